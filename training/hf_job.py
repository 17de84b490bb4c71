# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.9.1",
#     "transformers>=5.10.1",
#     "safetensors>=0.6.2",
#     "accelerate>=1.12.0",
#     "peft>=0.18.0",
#     "datasets>=4.5.0",
#     "tensorboard>=2.20.0",
#     "pyyaml>=6.0.2",
#     "tqdm>=4.67.0",
# ]
#
# [tool.hf-jobs]
# flavor = "a10g-small"
# timeout = "4h"
# secrets = ["HF_TOKEN"]
# ///
"""Train on the Hub's machines: a job that fetches this repository and runs one of its training scripts.

hf jobs uv run training/hf_job.py --repository URL --revision v0.1.0 training/contrastive.py \\
    --config training/recipes/contrastive/default.yaml --model_name_or_path you/model --train_data you/pairs \\
    --output_dir run --push_to_hub --hub_model_id you/your-model-2

`hf jobs uv run --dry-run ...` shows the job and starts none; `python training/hf_job.py --dry_run ...` shows what it
would run. Data and models come from the Hub, and the result goes there: the machine is gone afterwards. With
`--volume hf://buckets/you/runs:/runs`, `--output_dir /runs/mine` and `--resume_from_checkpoint last` the same command
goes on where a job was stopped. The card of the machine, its time limit and the token are those in the header above,
unless options of `hf jobs uv run` say otherwise.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = "longembed"


def commands(repository: str, revision: str, script: Sequence[str]) -> list[list[str]]:
    """Return what the job runs, one after the other.

    Args:
        repository: what `git clone` takes.
        revision: a tag or a branch.
        script: a training script of the repository, and its options.
    """
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", revision, repository, FOLDER]
    return [clone, [sys.executable, "-m", "accelerate.commands.launch", *script]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run, or show, the commands of a job.

    Args:
        argv: command-line options; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repository", required=True, help="where the job clones this repository from")
    parser.add_argument("--revision", default="main", help="tag or branch")
    parser.add_argument("--dry_run", action="store_true", help="show what would run")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="training/....py and its options")
    options = parser.parse_args(argv)
    if not options.script or not options.script[0].startswith("training/"):
        parser.error("name a script of training/ and its options, after those of the job")
    clone, train = commands(options.repository, options.revision, options.script)
    if options.dry_run:
        print(shlex.join(clone), f"cd {FOLDER}", shlex.join(train), sep="\n")
        return
    subprocess.run(clone, check=True)
    # Scripts import the other folders of the checkout.
    environment = os.environ | {"PYTHONPATH": str(Path(FOLDER).resolve())}
    raise SystemExit(subprocess.run(train, cwd=FOLDER, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
