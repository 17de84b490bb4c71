"""Make passkey and needle tasks of any context length, as LongEmbed (Zhu et al. 2024) does, with our own texts.

    python eval/synthetic.py --output_dir my_tasks --tokenizer runs/my/final --lengths 256 1024 4096 --haystack essays/

- passkey: each document states the pass key of one person among filler sentences, and a query asks for a person's pass
  key. The needle differs from its haystack, so a model only has to read far enough.
- needle: each document is ordinary text with one invented fact between two of its sentences, and a query asks for the
  fact. The haystack competes with the needle, which makes this task harder.

For each length there are more documents than queries, and all documents of a length are candidates, so that a model
that cannot see the needles scores 1 / documents in nDCG@1. The depths of the needles are spread evenly over the
documents. The result is a task folder that eval/mteb_long.py reads:
`<task>/test_<length>/{corpus,queries,qrels}.jsonl.gz`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from common.arguments import parse
from common.errors import UserError, reading, run
from common.files import atomic_folder
from eval.tasks.needles import FILLER, MOST_DOCUMENTS, NEEDLES, Haystack
from eval.tasks.task_files import write_task_files
from eval.tasks.texts import read_haystack


def write_synthetic_task(
    folder: Path,
    kind: str,
    tokenizer: Any,
    lengths: Sequence[int],
    queries: int = 50,
    documents: int = 100,
    seed: int = 0,
    haystack: str | None = None,
) -> None:
    """Write one task, whole or not at all.

    Args:
        folder: of the task, such as `my_tasks/Passkey`; it is replaced if it exists.
        kind: `passkey` or `needle`.
        tokenizer: counts the tokens; a fast tokenizer of transformers.
        lengths: tokens of a document with special tokens; one split for each.
        queries: number of queries of each length.
        documents: number of documents of each length.
        seed: random seed.
        haystack: the text around the needles; None: filler sentences (passkey only).

    Raises:
        UserError: the numbers are not possible, or the kind needs a haystack.
    """
    if kind not in NEEDLES:
        raise UserError(f"there is no kind of task {kind!r}; choose from {', '.join(NEEDLES)}")
    if kind == "needle" and not (haystack or "").strip():
        raise UserError("the needle task needs a text to hide in; give --haystack, or --tasks passkey")
    if not 1 <= queries <= documents <= MOST_DOCUMENTS[kind]:
        raise UserError(
            f"{queries} queries and {documents} documents make no {kind} task: give 1 <= queries <= documents <= "
            f"{MOST_DOCUMENTS[kind]}"
        )
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise UserError(f"--lengths {' '.join(map(str, lengths))}: give different positive numbers of tokens")
    source = Haystack(haystack or FILLER * 50, tokenizer)
    with (
        atomic_folder(folder) as temporary,
        tqdm(total=len(lengths) * documents, desc=f"{kind} documents", unit="doc") as progress,
    ):
        for length in lengths:
            needles = NEEDLES[kind](documents, seed=seed + length)
            generator = random.Random(f"{kind}-{seed}-{length}")
            depths = [i / max(1, documents - 1) for i in range(documents)]
            generator.shuffle(depths)
            corpus = {}
            for i, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
                corpus[f"d{i}"] = source.document(needle, length, depth, generator.randrange(len(source.starts)))
                progress.update()
            asked = generator.sample(range(documents), queries)
            write_task_files(
                temporary / f"test_{length}",
                corpus,
                {f"q{i}": needles[i].question for i in asked},
                ((f"q{i}", f"d{i}") for i in asked),
            )


@dataclass
class Arguments:
    """Options of the script."""

    output_dir: str = field(
        metadata={"help": "folder in which the task folders Passkey/ and Needle/ are made", "output": "folder"}
    )
    tokenizer: str = field(metadata={"help": "folder or Hub id of the tokenizer that counts the tokens"})
    tasks: list[str] = field(default_factory=lambda: list(NEEDLES), metadata={"help": "passkey, needle"})
    lengths: list[int] = field(
        default_factory=lambda: [2**n for n in range(8, 16)],
        metadata={"help": "tokens of a document; LongEmbed has 256 to 32768"},
    )
    queries: int = field(default=50, metadata={"help": "queries of each length"})
    documents: int = field(default=100, metadata={"help": "documents of each length"})
    seed: int = field(default=0, metadata={"help": "random seed"})
    haystack: str | None = field(
        default=None,
        metadata={"help": "text for the needle task: a .txt file, a .jsonl file with text fields, or a folder"},
    )


def main() -> None:
    """Run the script.

    Raises:
        UserError: the tokenizer does not load.
    """
    (arguments,) = parse(Arguments)
    with reading(f"--tokenizer {arguments.tokenizer}: there is no tokenizer", arguments.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        tokenizer("a text")  # its settings may be damaged too
    haystack = read_haystack(arguments.haystack) if arguments.haystack else None
    for kind in arguments.tasks:
        folder = Path(arguments.output_dir, kind.capitalize())
        write_synthetic_task(
            folder,
            kind,
            tokenizer,
            arguments.lengths,
            arguments.queries,
            arguments.documents,
            arguments.seed,
            haystack if kind == "needle" else None,
        )
        print(folder)


if __name__ == "__main__":
    run(main)
