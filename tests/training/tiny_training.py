"""The sizes and texts that the tests of training share, in this process and in those that they start."""

import json
import multiprocessing
import os
import random
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from modeling_longembed import LongEmbedConfig
from training import contrastive

WORDS = ("river stone cloud table green seven night paper music house train north glass bread winter garden").split()  # noqa: SIM905
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_config(**changes) -> LongEmbedConfig:
    """Two layers of width 32, restarting positions in blocks of 16, no dropout."""
    options = {
        "vocab_size": len(SPECIALS) + len(WORDS) + 10,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "attention_patterns": {"type": "block", "size": 16},
        "hidden_dropout_prob": 0.0,
    }
    return LongEmbedConfig(**(options | changes))


def random_pairs(count: int, seed: int = 0, negatives: int = 0) -> list[dict[str, str]]:
    """Pairs of texts of 3 to 40 words; a positive repeats its anchor's words somewhere."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        anchor = [*draw.choices(WORDS, k=draw.randint(3, 6)), str(draw.randint(0, 9))]
        noise = draw.choices(WORDS, k=draw.randint(1, 34))
        row = {"anchor": " ".join(anchor), "positive": " ".join(noise + anchor)}
        for number in range(negatives):
            row[f"negative_{number}"] = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_until_killed(argv: list[str], calls: int | None = None) -> None:
    """The training script in a process of its own, which kills itself, with SIGKILL, in the middle of a file operation.

    Args:
        argv: of the script.
        calls: before which fsync or rename, counted from the start of the run, the kill comes; never if None.
    """
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a shell has started
    left = [calls]

    def killing(call):
        def counted(*args, **kwargs):
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    os.fsync, os.replace = killing(os.fsync), killing(os.replace)
    with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink):
        contrastive.main(argv)


def losses(output_dir: Path) -> list[tuple]:
    """Step and loss of every line of metrics.jsonl, in the order of the file: without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [tuple(line[name] for name in names if name in line) for line in lines]
