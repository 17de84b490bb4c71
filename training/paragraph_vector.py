"""Paragraph Vectors of your own documents: a teacher that has read all of a document, whatever its length.

    python training/paragraph_vector.py --train_data documents.jsonl --eval_data held-out.jsonl --output_dir runs/pv

Trains gensim's Doc2Vec (Le and Mikolov 2014, arXiv:1405.4053) and writes `runs/pv/final`, which is a teacher of
training/distillation.py as `paragraph-vector:runs/pv/final`. Needs `pip install -e .[train,eval,paragraph-vector]`.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_folder, atomic_write, sha256_file
from common.text_vectors import PromptType
from training.data.sources import Columns, Source, read_sources

SETTINGS, VOCABULARY, WEIGHTS, DOCUMENTS = (
    "paragraph_vector.json",
    "vocabulary.json",
    "model.safetensors",
    "documents.json",
)
WORD = re.compile(r"\w+")
STRETCH = 10_000  # words: gensim passes over what an example has beyond them (MAX_DOCUMENT_LEN of its compiled code)


@dataclass
class ParagraphVectorArguments:
    """The documents and the model."""

    train_data: list[str] = field(
        metadata={
            "help": "path_or_id ...: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name[@config] on the Hub, "
            "with one document a row"
        }
    )
    output_dir: str = field(metadata={"help": "folder for final/ and report.json"})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out documents, in the same forms"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the documents"})
    id_column: str | None = field(
        default=None, metadata={"help": "the column that names them; file and row do if not given"}
    )
    architecture: Literal["dm", "dbow", "both"] = field(
        default="dbow", metadata={"help": "dm: distributed memory; dbow: bag of words; both: one behind the other"}
    )
    vector_size: int = field(default=100, metadata={"help": "of one architecture"})
    window: int = field(default=5, metadata={"help": "words on either side"})
    min_count: int = field(default=2, metadata={"help": "rarer words are left out"})
    negative: int = field(default=5, metadata={"help": "noise words for each word"})
    epochs: int = field(default=10, metadata={"help": "times through the documents, and of an inference"})
    learning_rate: float = field(default=0.025, metadata={"help": "at the start; it falls to 0.0001"})
    dbow_words: bool = field(default=True, metadata={"help": "dbow learns vectors of words as well (skip-gram)"})
    lowercase: bool = field(default=True, metadata={"help": "words are read in lower case"})
    workers: int = field(default=1, metadata={"help": "threads; with more than one no two runs are the same"})
    seed: int = field(default=42, metadata={"help": "of everything that is random"})

    def __post_init__(self) -> None:
        for name in ("vector_size", "window", "min_count", "negative", "epochs", "workers", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be from 0 to {2**32 - 1}")


class ParagraphVector:
    """Doc2Vec models whose vectors stand one behind the other; an encoder as `common.encoders.stream` takes it.

    The vector of a text is inferred: it starts at random and learns with all other weights fixed. Here the start and
    all draws come from a hash of the text, so that it is the same in every process and order. (gensim's own
    `infer_vector` starts from Python's salted `hash` and goes on in the random numbers of the texts before.)

    A document is read in stretches of 10,000 words, one after the other in every epoch, which train one vector: gensim
    itself would pass over all that comes after the first. No window of words reaches from a stretch into the next.

    Attributes:
        settings: arguments that shape a vector.
        dimension: of a vector.
    """

    prompts: dict[str, str | None] = {}
    batch_tokens = 65536  # of a window of texts between two writes to the cache

    def __init__(self, models: list[Any], settings: dict[str, Any], identity: str = "") -> None:
        self.models, self.settings, self.identity = models, settings, identity
        self.dimension = sum(model.vector_size for model in models)

    @classmethod
    def train(cls, sources: list[Source], arguments: ParagraphVectorArguments) -> "ParagraphVector":
        """Train on all documents.

        Raises:
            UserError: gensim is not installed, or no word is frequent enough.
        """
        _gensim()
        settings = {name: getattr(arguments, name) for name in SHAPING}
        corpus = _Corpus(sources, settings)
        names = ("dm", "dbow") if arguments.architecture == "both" else (arguments.architecture,)
        models = []
        for name in names:
            model = _new_model(settings, name, workers=arguments.workers)
            model.build_vocab(corpus)
            if not len(model.wv):
                raise UserError(
                    f"--min_count {arguments.min_count}: no word occurs so often; give less, or more documents"
                )
            print(f"{name}: {len(model.dv)} documents, {len(model.wv)} words", file=sys.stderr)
            with tqdm(total=model.epochs, desc=f"training {name}", unit="epoch") as bar:
                progress = _Progress(bar)
                model.train(corpus, total_examples=model.corpus_count, epochs=model.epochs, callbacks=[progress])
            models.append(model)
        return cls(models, settings)

    @classmethod
    def load(cls, folder: Path) -> "ParagraphVector":
        """Read what `save` wrote.

        Raises:
            UserError: it is no such folder, or damaged; gensim is not installed.
        """
        _gensim()
        try:
            settings = json.loads((folder / SETTINGS).read_text())
            vocabulary = json.loads((folder / VOCABULARY).read_text())
            weights = load_file(folder / WEIGHTS)
            names = settings.pop("architectures")
            models = [_restored(settings, name, vocabulary, weights) for name in names]
        except FileNotFoundError as error:
            missing = Path(error.filename or WEIGHTS).name
            raise UserError(
                f"{folder}: is no folder of training/paragraph_vector.py, {missing} is missing; give its final/"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder}: is damaged ({' '.join(str(error).split())}); train it again") from None
        hashes = f"{STRETCH}" + "".join(sha256_file(folder / name) for name in (SETTINGS, VOCABULARY, WEIGHTS))
        return cls(models, settings, f"paragraph-vector:{hashlib.sha256(hashes.encode()).hexdigest()[:40]}")

    def save(self, folder: Path, document_ids: list[str]) -> None:
        """Write a folder: settings and words as JSON, weights as safetensors, and the documents' own vectors by id.

        Args:
            folder: which is replaced.
            document_ids: of the training documents, in their order.
        """
        weights: dict[str, np.ndarray] = {}
        names = ["dbow" if model.sg else "dm" for model in self.models]
        for name, model in zip(names, self.models, strict=True):
            weights |= {f"{name}.words": model.wv.vectors, f"{name}.outputs": model.syn1neg}
            weights |= {f"{name}.documents": model.dv.vectors}
        words = self.models[0].wv
        vocabulary = [[word, int(words.get_vecattr(word, "count"))] for word in words.index_to_key]
        with atomic_folder(folder) as temporary:
            (temporary / SETTINGS).write_text(json.dumps(self.settings | {"architectures": names}, indent=2))
            (temporary / VOCABULARY).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
            (temporary / DOCUMENTS).write_text(json.dumps(document_ids, ensure_ascii=False), encoding="utf-8")
            save_file(weights, temporary / WEIGHTS)

    def __call__(self, texts: list[str], prompt_type: PromptType | None = None) -> list[np.ndarray]:
        """A matrix (1, d) for each text."""
        return [
            np.concatenate([_infer(model, split_words(text, self.settings)) for model in self.models])[None]
            for text in texts
        ]


# Arguments that a vector depends on.
SHAPING = (
    "vector_size",
    "window",
    "min_count",
    "negative",
    "epochs",
    "learning_rate",
    "dbow_words",
    "lowercase",
    "seed",
)
FINAL_LEARNING_RATE = 0.0001


def split_words(text: str, settings: dict[str, Any]) -> list[str]:
    """The words of a text: letters, digits and underscores."""
    return WORD.findall(text.lower() if settings["lowercase"] else text)


def half_retrieval(model: ParagraphVector, texts: Sequence[str]) -> dict[str, float]:
    """Whether vectors tell documents apart: every other word of a document must find the words between.

    Args:
        model: that makes vectors.
        texts: of documents that it was not trained on.

    Returns:
        The number of `documents`, and the share whose own other half is the nearest: `accuracy`, and by `chance`.
    """
    halves = []
    for start in (0, 1):
        parts = [" ".join(split_words(text, model.settings)[start::2]) for text in texts]
        rows = np.concatenate(model(parts))
        halves.append(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny))
    nearest = (halves[0] @ halves[1].T).argmax(axis=1)
    accuracy = float((nearest == np.arange(len(texts))).mean())
    return {"documents": len(texts), "accuracy": accuracy, "chance": 1 / len(texts)}


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the process's own if None."""
    (arguments,) = parse(ParagraphVectorArguments, argv=argv)
    _gensim()
    classes = () if arguments.id_column is None else (arguments.id_column,)
    columns = Columns((arguments.text_column,), None, "documents", classes)
    train = read_sources(arguments.train_data, columns)
    held_out = read_sources(arguments.eval_data, Columns((arguments.text_column,), None, "documents"))
    final = Path(arguments.output_dir) / "final"
    names = document_ids(train, arguments.id_column)  # before the training: they may be refused
    ParagraphVector.train(train, arguments).save(final, names)
    model = ParagraphVector.load(final)
    report: dict[str, Any] = {"arguments": asdict(arguments)}
    for source in held_out:
        texts = [text for (text,) in _rows(source)]
        report.setdefault("held_out", {})[source.name] = half_retrieval(model, texts)
        print(f"{source.name}: {json.dumps(report['held_out'][source.name])}")
    atomic_write(Path(arguments.output_dir) / "report.json", json.dumps(report, indent=2))
    print(f"written: {final}")


def document_ids(sources: list[Source], column: str | None) -> list[str]:
    """The names of all documents in their order.

    Raises:
        UserError: two documents of one name.
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


class _Corpus:
    """All documents as gensim's examples, again at each pass, from memory-mapped columns; a long one is several."""

    def __init__(self, sources: list[Source], settings: dict[str, Any]) -> None:
        self.sources, self.settings = sources, settings

    def __iter__(self) -> Iterator[Any]:
        texts = (text for source in self.sources for (text,) in _rows(source))
        for number, text in enumerate(texts):
            for words in _stretches(split_words(text, self.settings)):
                yield _gensim().TaggedDocument(words, [number])


def _stretches(words: list[str]) -> list[list[str]]:
    """Of a document without words the one that is empty: it has a vector too."""
    return [words[start : start + STRETCH] for start in range(0, max(1, len(words)), STRETCH)]


class _Progress:
    """One of gensim's callbacks, which asks for no base class."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_train_begin(self, model: Any) -> None:
        """Nothing."""

    def on_train_end(self, model: Any) -> None:
        """Nothing."""

    def on_epoch_begin(self, model: Any) -> None:
        """Nothing."""

    def on_epoch_end(self, model: Any) -> None:
        """An epoch more."""
        self.bar.update()


def _rows(source: Source) -> Iterator[list[str]]:
    for start in range(0, len(source.rows), 1000):
        (texts,) = source.texts(list(range(start, min(start + 1000, len(source.rows)))))
        yield from ([text] for text in texts)


def _new_model(settings: dict[str, Any], name: str, workers: int = 1) -> Any:
    return _gensim().Doc2Vec(
        dm=int(name == "dm"),
        vector_size=settings["vector_size"],
        window=settings["window"],
        min_count=settings["min_count"],
        negative=settings["negative"],
        hs=0,
        sample=0,
        epochs=settings["epochs"],
        alpha=settings["learning_rate"],
        min_alpha=FINAL_LEARNING_RATE,
        dbow_words=int(settings["dbow_words"]),
        seed=settings["seed"],
        workers=workers,
        hashfxn=_hash,
    )


def _restored(settings: dict[str, Any], name: str, vocabulary: list[list], weights: dict[str, np.ndarray]) -> Any:
    """A model that infers as the saved one does."""
    model = _new_model(settings, name)
    model.build_vocab_from_freq(dict(vocabulary), corpus_count=1)
    # gensim orders words of one count anew; what it keeps of a word beside its vectors goes by the count alone.
    model.wv.index_to_key = [word for word, _ in vocabulary]
    model.wv.key_to_index = {word: place for place, (word, _) in enumerate(vocabulary)}
    model.wv.vectors, model.syn1neg = weights[f"{name}.words"], weights[f"{name}.outputs"]
    return model


def _infer(model: Any, words: list[str]) -> np.ndarray:
    """The vector of a text, float32 `(d,)`; gensim's own inference but for where its random numbers come from."""
    from gensim.models import doc2vec

    digest = hashlib.sha256(" ".join(words).encode()).digest()
    seeds = np.frombuffer(digest, dtype=np.uint32)
    model.random.seed(seeds)
    start = np.random.default_rng(seeds).random(model.vector_size, dtype=np.float32)
    vector = ((start - 0.5) / model.vector_size).reshape(1, -1)
    work = np.zeros(model.layer1_size, dtype=np.float32)
    options = {
        "learn_words": False,
        "learn_hidden": False,
        "doctag_vectors": vector,
        "doctags_lockf": np.ones(1, dtype=np.float32),
    }
    for rate in np.linspace(model.alpha, model.min_alpha, model.epochs):
        for stretch in _stretches(words):
            if model.sg:
                doc2vec.train_document_dbow(model, stretch, [0], float(rate), work, **options)
            else:
                sums = np.zeros(model.layer1_size, dtype=np.float32)
                doc2vec.train_document_dm(model, stretch, [0], float(rate), work, sums, **options)
    return vector[0]


def _hash(text: str) -> int:
    """In place of Python's, which differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _gensim() -> Any:
    try:
        from gensim.models import doc2vec
    except ImportError:
        raise UserError("Paragraph Vector needs gensim: pip install -e .[paragraph-vector]") from None
    return doc2vec


if __name__ == "__main__":
    run(main, after_interrupt="the same command starts from the beginning; nothing of an unfinished training is kept")
