"""Train Paragraph Vectors on your own documents: a teacher that reads documents of any length to their end.

    python training/paragraph_vector.py --train_data documents.jsonl --eval_data held-out.jsonl --output_dir runs/pv

Trains gensim's Doc2Vec (Le and Mikolov 2014, arXiv:1405.4053) and writes `runs/pv/final`, which is a teacher of
training/distillation.py as `paragraph-vector:runs/pv/final`. Needs `pip install -e '.[train,eval,paragraph-vector]'`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from training.data.sources import Columns, Source, read_sources
from training.teachers.paragraph_vector import SETTING_NAMES, ParagraphVector, gensim_doc2vec, split_words, texts_of


@dataclass
class ParagraphVectorArguments:
    """The documents and the model."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on the Hub, "
            "with one document per row"
        }
    )
    output_dir: str = field(metadata={"help": "folder for final/ and report.json", "output": "folder"})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out documents, given in the same way"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the documents"})
    id_column: str | None = field(
        default=None, metadata={"help": "the column with the names of documents; default: file and row number"}
    )
    architecture: Literal["dm", "dbow", "both"] = field(
        default="dbow", metadata={"help": "dm: distributed memory; dbow: bag of words; both: concatenated"}
    )
    vector_size: int = field(
        default=100, metadata={"help": "dimensions of the vectors of one architecture", "within": "[1, inf)"}
    )
    window: int = field(
        default=5,
        metadata={
            "help": "context words on either side",
            "within": "[1, inf)",
            "applies": [{"architecture": ("dm", "both")}, {"dbow_words": True}],
        },
    )
    min_count: int = field(
        default=2, metadata={"help": "occurrences that a word needs to be used", "within": "[1, inf)"}
    )
    negative: int = field(
        default=5, metadata={"help": "noise words per word (negative sampling)", "within": "[1, inf)"}
    )
    epochs: int = field(
        default=10,
        metadata={
            "help": "passes through the documents, and through a text whose vector is inferred",
            "within": "[1, inf)",
        },
    )
    learning_rate: float = field(
        default=0.025, metadata={"help": "initial learning rate; it decreases to 0.0001", "within": "(0, inf)"}
    )
    dbow_words: bool = field(
        default=True,
        metadata={"help": "let dbow train word vectors too (skip-gram)", "applies": {"architecture": ("dbow", "both")}},
    )
    lowercase: bool = field(default=True, metadata={"help": "convert words to lower case"})
    workers: int = field(
        default=1, metadata={"help": "threads; with more than one, runs are not reproducible", "within": "[1, inf)"}
    )
    seed: int = field(default=42, metadata={"help": "random seed", "within": "[0, 4294967295]"})


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command-line options `argv`; None: those of the process."""
    (arguments,) = parse(ParagraphVectorArguments, argv=argv)
    gensim_doc2vec()
    classes = () if arguments.id_column is None else (arguments.id_column,)
    columns = Columns((arguments.text_column,), None, "documents", classes)
    train = read_sources(arguments.train_data, columns)
    held_out = read_sources(arguments.eval_data, Columns((arguments.text_column,), None, "documents"))
    final = Path(arguments.output_dir) / "final"
    names = document_ids(train, arguments.id_column)  # before the training, because they may be refused
    settings = {name: getattr(arguments, name) for name in SETTING_NAMES}
    architectures = ("dm", "dbow") if arguments.architecture == "both" else (arguments.architecture,)
    ParagraphVector.train(train, architectures, settings, arguments.workers).save(final, names)
    model = ParagraphVector.load(final)
    report: dict[str, Any] = {"arguments": asdict(arguments)}
    for source in held_out:
        texts = list(texts_of(source))
        report.setdefault("held_out", {})[source.name] = half_retrieval(model, texts)
        print(f"{source.name}: {json.dumps(report['held_out'][source.name])}")
    atomic_write(Path(arguments.output_dir) / "report.json", json.dumps(report, indent=2))
    print(f"written: {final}")


def half_retrieval(model: ParagraphVector, texts: Sequence[str]) -> dict[str, float]:
    """Measure whether vectors distinguish documents: the even words of a document have to find its odd words.

    Args:
        model: the model.
        texts: documents that it was not trained on.

    Returns:
        The number of `documents`, the fraction whose other half is the nearest (`accuracy`), and that by `chance`.
    """
    halves = []
    for start in (0, 1):
        parts = [" ".join(split_words(text, model.settings)[start::2]) for text in texts]
        rows = np.concatenate(model(parts))
        halves.append(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny))
    nearest = (halves[0] @ halves[1].T).argmax(axis=1)
    accuracy = float((nearest == np.arange(len(texts))).mean())
    return {"documents": len(texts), "accuracy": accuracy, "chance": 1 / len(texts)}


def document_ids(sources: list[Source], column: str | None) -> list[str]:
    """Return the names of all documents in order.

    Raises:
        UserError: two documents have the same name.
    """
    ids: list[str] = []
    for source in sources:
        count = range(len(source.rows))
        own = [f"{source.name}:{row + 1}" for row in count] if column is None else source.rows[column]
        ids += [str(name) for name in own]
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise UserError(f"--id_column {column}: two documents are called {name}; give each a name of its own")
        seen.add(name)
    return ids


if __name__ == "__main__":
    run(main, after_interrupt="the same command starts from the beginning; nothing of an unfinished training is kept")
