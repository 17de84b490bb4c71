"""An environment that holds some distributions and what they require, and nothing else of this one.

`python -I -S` starts without site-packages, so without the editable install of this repository. The only folder added
is one of links to the files of the distributions named: what is not linked is not installed, metadata included.
"""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def with_requirements(names: list[str]) -> dict[str, metadata.Distribution]:
    """The distributions called `names` and those that they require, extras left out."""
    found: dict[str, metadata.Distribution] = {}
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a requirement for another platform
            continue
        needed = [line for line in found[name].requires or [] if "extra ==" not in line]
        queue += [re.match(r"[\w.-]+", line).group() for line in needed]
    return found


class CleanEnvironment:
    """Runs scripts that see the standard library and the given distributions alone.

    Args:
        folder: an empty folder for the links and for what the scripts cache.
        names: distributions; their requirements come along.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.packages = folder, folder / "site-packages"
        self.packages.mkdir(parents=True)
        for distribution in with_requirements(names).values():
            for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                link = self.packages / top
                if not link.exists():
                    link.symlink_to(distribution.locate_file(top))

    def run(self, script: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
        """Runs Python code offline; `arguments` become `sys.argv[1:]`, `environment` is added to a bare one."""
        lines = f"import sys; sys.path.append({str(self.packages)!r})\n{script}"
        kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
        home = {"HOME": str(self.folder), "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", lines, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=kept | home | environment,
            stdin=subprocess.DEVNULL,
        )
