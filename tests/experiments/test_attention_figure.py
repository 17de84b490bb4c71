"""The picture and the page of the patterns: every registered pattern is there, and masks look like their predicates."""

import re
from pathlib import Path

import pytest
import torch

from experiments import attention_figure
from experiments.attention_figure import PATTERNS as PICTURED
from experiments.attention_figure import TOKENS, seen
from modeling_longembed.pattern_registry_longembed import PATTERNS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "attention-patterns.md"


def test_every_registered_pattern_is_pictured_and_has_its_row():
    assert {text.partition(":")[0] for text in PICTURED} == set(PATTERNS)
    assert set(re.findall(r"^\| `(\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == set(PATTERNS)


@pytest.mark.parametrize(
    ("text", "sees"),
    [
        ("full", lambda i, j: 1.0),
        ("sliding:window=4", lambda i, j: float(abs(i - j) <= 4)),
        ("sliding:window=4,global_tokens=1", lambda i, j: float(abs(i - j) <= 4 or 0 in (i, j))),
        ("block:size=8", lambda i, j: float(i // 8 == j // 8)),
        ("shifted:size=8", lambda i, j: (i // 8 == j // 8) / 2 + ((i + 4) // 8 == (j + 4) // 8) / 2),
        ("memory:size=8,memory=4", lambda i, j: float(i // 8 == j // 8 or i // 8 * 8 - 4 <= j < i // 8 * 8)),
    ],
)
def test_the_picture_of_a_mask_is_its_definition(text, sees):
    assert text in PICTURED
    expected = torch.tensor([[sees(i, j) for j in range(TOKENS)] for i in range(TOKENS)], dtype=torch.double)
    assert torch.equal(seen(text), expected)


def test_a_query_reads_as_much_as_its_pattern_says():
    landmarks = seen("landmark:size=5,top_k=1") * 2  # two heads: their own block of 4 words, and one other each
    assert torch.equal(landmarks.sum(1), torch.full((TOKENS,), 2.0 * (4 + 4), dtype=torch.double))
    focused = seen("focused:size=8,top_k=3") * 2
    assert torch.equal(focused.sum(1), torch.full((TOKENS,), 2.0 * (8 + 3), dtype=torch.double))


def test_the_script_writes_the_picture(tmp_path, monkeypatch, capsys):
    path = tmp_path / "patterns.png"
    monkeypatch.setattr("sys.argv", ["attention_figure.py", "--output", str(path)])
    attention_figure.main()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{path}\n"
