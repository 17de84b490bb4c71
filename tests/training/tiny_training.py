"""The sizes and texts that the tests of training share, in this process and in those that they start."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from modeling_longembed import LongEmbedConfig
from training import compression, contrastive, distillation, pretraining

WORDS = ("river stone cloud table green seven night paper music house train north glass bread winter garden").split()  # noqa: SIM905
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Script:
    """A script over the loop, and how it is given a small run.

    Args:
        main: its entry point.
        options: of a run in chunks, with what the script has of its own; {model} in it is the model's folder.
        size: of a batch of one process, an option that takes a number.
        sizes: its value when one process has the whole batch, and one that is refused.
    """

    main: Callable
    options: str
    size: str
    sizes: tuple[int, int]


SCRIPTS = {
    "compression": Script(
        compression.main,
        "--batch_tokens 70 --sequence_length 16:0.5 60:0.5 --student_hidden_size 16 --relation_heads 8",
        "--per_device_train_tokens",
        (240, 59),
    ),
    "contrastive": Script(
        contrastive.main,
        "--batch_tokens 150 --max_length 64 --symmetric",
        "--per_device_train_batch_size",
        (8, 49),
    ),
    "distillation": Script(
        distillation.main,
        "--batch_tokens 150 --max_length 64 --structural_teacher chunk-mean:{model}:16 --structural_mask "
        "--contextual_teacher truncate:{model}:24 --contextual_head_dims 12",
        "--per_device_train_batch_size",
        (8, 25),
    ),
    "pretraining": Script(
        pretraining.main,
        "--batch_tokens 70 --sequence_length 16:0.5 60:0.5 --next_sentence --mask_unit span --mask_rate 0.4-0.2",
        "--per_device_train_tokens",
        (240, 59),
    ),
}


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


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of our words and for each digit."""
    vocabulary = [*SPECIALS, *WORDS, *map(str, range(10))]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **names)


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


def random_documents(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 3 to 150 words."""
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 150)))} for _ in range(count)]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random vectors of unit length, float64."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_until_killed(script: str, argv: list[str], calls: int | None = None) -> None:
    """A training script in a process of its own, which kills itself, with SIGKILL, in the middle of a file operation.

    Args:
        script: one of `SCRIPTS`.
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
        SCRIPTS[script].main(argv)


def losses(output_dir: Path) -> list[tuple]:
    """Step and loss of every line of metrics.jsonl, in the order of the file: without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [tuple(line[name] for name in names if name in line) for line in lines]
