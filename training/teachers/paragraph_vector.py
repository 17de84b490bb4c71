"""Paragraph Vectors (Le and Mikolov 2014, arXiv:1405.4053): gensim's Doc2Vec as a reproducible text encoder."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_folder, sha256_file
from common.text_vectors import PromptType
from training.data.sources import Source

SETTINGS, VOCABULARY, WEIGHTS, DOCUMENTS = (
    "paragraph_vector.json",
    "vocabulary.json",
    "model.safetensors",
    "documents.json",
)
WORD = re.compile(r"\w+")
STRETCH = 10_000  # words: gensim passes over what an example has beyond them (MAX_DOCUMENT_LEN of its compiled code)
# What a vector depends on beside the documents and the architecture.
SETTING_NAMES = (
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


class ParagraphVector:
    """Doc2Vec models whose vectors stand one behind the other; an encoder as `common.text_vectors.stream` takes it.

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
    def train(
        cls, sources: list[Source], architectures: Sequence[str], settings: dict[str, Any], workers: int = 1
    ) -> "ParagraphVector":
        """Train on all documents.

        Args:
            sources: the documents, one text a row.
            architectures: `dm`, `dbow`, or both, whose vectors are concatenated.
            settings: a value for each name of `SETTING_NAMES`.
            workers: threads; with more than one no two runs are the same.

        Raises:
            UserError: gensim is not installed, or no word is frequent enough.
        """
        gensim_doc2vec()
        corpus = _Corpus(sources, settings)
        models = []
        for name in architectures:
            model = _new_model(settings, name, workers=workers)
            model.build_vocab(corpus)
            if not len(model.wv):
                raise UserError(
                    f"--min_count {settings['min_count']}: no word occurs so often; give less, or more documents"
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
        gensim_doc2vec()
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


def split_words(text: str, settings: dict[str, Any]) -> list[str]:
    """The words of a text: letters, digits and underscores."""
    return WORD.findall(text.lower() if settings["lowercase"] else text)


class _Corpus:
    """All documents as gensim's examples, again at each pass, from memory-mapped columns; a long one is several."""

    def __init__(self, sources: list[Source], settings: dict[str, Any]) -> None:
        self.sources, self.settings = sources, settings

    def __iter__(self) -> Iterator[Any]:
        texts = (text for source in self.sources for text in texts_of(source))
        for number, text in enumerate(texts):
            for words in _stretches(split_words(text, self.settings)):
                yield gensim_doc2vec().TaggedDocument(words, [number])


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


def texts_of(source: Source) -> Iterator[str]:
    """Yield the texts of a source in their order, read 1,000 at a time."""
    for start in range(0, len(source.rows), 1000):
        (texts,) = source.texts(list(range(start, min(start + 1000, len(source.rows)))))
        yield from texts


def _new_model(settings: dict[str, Any], name: str, workers: int = 1) -> Any:
    return gensim_doc2vec().Doc2Vec(
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


def gensim_doc2vec() -> Any:
    try:
        from gensim.models import doc2vec
    except ImportError:
        raise UserError("Paragraph Vector needs gensim: pip install -e .[paragraph-vector]") from None
    return doc2vec
