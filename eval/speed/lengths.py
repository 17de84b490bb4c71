"""The option `--lengths` of several scripts."""

from collections.abc import Iterable

from common.errors import UserError


def parse_lengths(words: Iterable[str]) -> list[int]:
    """Parse lengths in tokens from words such as `4096,8192`.

    Returns:
        The different lengths, ascending.

    Raises:
        UserError: one of them is no positive whole number, or there is none.
    """
    texts = [text for word in words for text in word.split(",") if text]
    wrong = [text for text in texts if not text.isdecimal() or int(text) < 1]
    if wrong or not texts:
        raise UserError(f"--lengths: {wrong[0] if wrong else ''!r} is no number of tokens; write such as 4096,8192")
    return sorted({int(text) for text in texts})
