"""Options of the form `name:parameter=value` on the command line."""

import pytest

from common.errors import UserError
from common.patterns import parse_pattern


def test_patterns_of_the_command_line_are_entries_of_the_config():
    assert parse_pattern("full") == {"type": "full"}
    assert parse_pattern("sliding:window=128,global_tokens=1") == {"type": "sliding", "window": 128, "global_tokens": 1}
    assert parse_pattern("shifted:size=8,wrap=true") == {"type": "shifted", "size": 8, "wrap": True}
    for text in ("", "block:", "block=256", "block:size", "block:size=256,", "block size=3"):
        with pytest.raises(UserError, match=r"^--attention_patterns: '.*' is no choice; write a name, or name:"):
            parse_pattern(text)


def test_a_position_extension_is_written_in_the_same_way():
    written = "yarn:factor=2.5,rope_theta=1e6"
    expected = {"method": "yarn", "factor": 2.5, "rope_theta": 1e6}
    assert parse_pattern(written, option="position_extension", key="method") == expected
    with pytest.raises(UserError, match=r"^--position_extension: 'yarn:' is no choice"):
        parse_pattern("yarn:", option="position_extension", key="method")
