"""Evaluation: MTEB tasks on long documents, baselines, synthetic tasks of any length, speed, tables and plots."""

import os
import tempfile
from pathlib import Path

# mteb makes a folder for its cache when it is imported, and no script here uses that cache: results are kept where the
# user says. A home that cannot be written to, as in many containers, must not stop them.
try:
    Path(os.environ.get("MTEB_CACHE") or Path.home() / ".cache" / "mteb").mkdir(parents=True, exist_ok=True)
except (OSError, RuntimeError):  # the latter if nobody knows where the home is
    os.environ["MTEB_CACHE"] = str(Path(tempfile.gettempdir(), "mteb"))
