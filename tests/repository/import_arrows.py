"""Count the import arrows of a package: which of its files import which, inside folders and between them.

    python -m tests.repository.import_arrows [PACKAGE ...]

An arrow is a pair of files of which one imports the other, at any depth of its code. A package is given by its path, so
that another checkout can be counted: `git worktree add /tmp/before COMMIT`, then `/tmp/before/training`.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full name of what a file imports absolutely: a module, or a name in a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_arrows(package: Path) -> set[tuple[str, str]]:
    """Return the arrows inside a package.

    Args:
        package: its folder, such as `training`.

    Returns:
        Pairs of importing and imported file, by their paths without `.py` relative to the package: `engine/loop`.
    """
    files = {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in package.rglob("*.py")
    }
    arrows = set()
    for name, path in files.items():
        for imported in imported_modules(path):
            target = imported if imported in files else imported.rpartition(".")[0]
            if target in files and target != name:
                arrows.add((name, target))
    return {tuple(name.split(".", 1)[1].replace(".", "/") for name in arrow) for arrow in arrows}


def folder_of(file: str) -> str:
    """Return the folder of a file that `import_arrows` names; the top of the package is `.`."""
    return file.rpartition("/")[0] or "."


def report(package: Path) -> str:
    """Return the counts of a package in a few lines."""
    arrows = import_arrows(package)
    pairs = Counter((folder_of(importing), folder_of(imported)) for importing, imported in arrows)
    inside = sum(count for (importing, imported), count in pairs.items() if importing == imported)
    between = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    lines = [
        f"{package}: {len(arrows)} arrows, {inside} inside a folder and {len(arrows) - inside} between folders, which "
        f"{len(between)} arrows join"
    ]
    lines += [f"  {count:4} {importing} -> {imported}" for (importing, imported), count in sorted(pairs.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    for argument in sys.argv[1:] or [str(ROOT / "training"), str(ROOT / "eval")]:
        print(report(Path(argument)))
