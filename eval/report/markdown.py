"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table.

    Args:
        headings: one for each column.
        rows: cells, one for each column.
        left: number of columns, counted from the first, that are aligned to the left; the others hold numbers and are
            aligned to the right.

    Returns:
        The lines of the table, each with its line break.
    """
    alignments = ["---" if column < left else "---:" for column in range(len(headings))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, alignments, *rows))
