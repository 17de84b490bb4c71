"""Texts from the user's files: .txt, .jsonl, .jsonl.gz, or folders of such files."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.jsonl import read_text_columns


def read_texts(path: str, argument: str) -> list[str]:
    """Read the texts of a file, or of all such files of a folder.

    A .txt file is one text; of a .jsonl or .jsonl.gz file the `text` fields are read.

    Args:
        path: the file or folder.
        argument: the option that the path was given with, for error messages.

    Raises:
        UserError: a file cannot be read, or there is no text.
    """
    root = Path(path)
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    texts = [text for file in files for text in _texts(file)]
    if not texts:
        raise UserError(
            f"{argument} {path} holds no text; give a .txt or .jsonl file with text fields, or a folder of such"
        )
    return texts


def read_haystack(path: str) -> str:
    """Read the text that needles are hidden in: all texts of a file or a folder, separated by blank lines.

    Raises:
        UserError: a file cannot be read, or there is no text.
    """
    return "\n\n".join(read_texts(path, "--haystack"))


def _texts(file: Path) -> Iterator[str]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (text for _, (text,) in read_text_columns(file, "text"))
    elif file.suffix == ".txt":
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
