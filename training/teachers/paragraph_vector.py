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

from common.encoders.text_vectors import PromptType
from common.errors import UserError
from common.files import atomic_folder, sha256_file
from common.provenance import computed_by
from training.data.sources import Source

SETTINGS, VOCABULARY, WEIGHTS, DOCUMENTS = (
    "paragraph_vector.json",
    "vocabulary.json",
    "model.safetensors",
    "documents.json",
)
WORD = re.compile(r"\w+")
SPAN_WORDS = 10_000  # gensim ignores further words of an example (MAX_DOCUMENT_LEN of its compiled code)
# The settings that a vector depends on, besides the documents and the architecture.
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
    """Doc2Vec models whose vectors are concatenated; an encoder for `common.encoders.text_vectors.stream`.

    The vector of a text is inferred: it starts at random and is trained with all other weights fixed. Here the start
    and all random numbers come from a hash of the text, so the vector is the same in every process and every order.
    (gensim's own `infer_vector` starts from Python's salted `hash` and continues the random numbers of earlier texts.)

    A document is read in spans of 10,000 words, one after the other in every epoch, which train one vector: gensim
    would ignore everything after the first span. No window of words crosses the border between two spans.

    Args:
        models: gensim's models, one for each architecture.
        settings: a value for each name of `SETTING_NAMES`.
        identity: the files that the vectors depend on besides the texts; known for a saved model only.

    Attributes:
        settings: the settings that a vector depends on.
        dimension: width of a vector.
    """

    prompts: dict[str, str | None] = {}
    batch_tokens = 65536  # number of tokens of the texts between two writes to the cache

    def __init__(self, models: list[Any], settings: dict[str, Any], identity: str = "") -> None:
        self.models, self.settings, self.identity = models, settings, identity
        self.dimension = sum(model.vector_size for model in models)
        self.computed_by = computed_by(__name__, libraries=("gensim", "numpy"), device="cpu")

    @classmethod
    def train(
        cls, sources: list[Source], architectures: Sequence[str], settings: dict[str, Any], workers: int = 1
    ) -> "ParagraphVector":
        """Train on all documents.

        Args:
            sources: the documents, one text per row.
            architectures: `dm`, `dbow`, or both, whose vectors are concatenated.
            settings: a value for each name of `SETTING_NAMES`.
            workers: number of threads; with more than one, runs are not reproducible.

        Returns:
            The trained models.

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
        """Load models from a folder that `save` wrote.

        Args:
            folder: the folder.

        Returns:
            The models; they infer vectors, but cannot be trained further.

        Raises:
            UserError: the folder is another one or damaged, or gensim is not installed.
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
        hashes = f"{SPAN_WORDS}" + "".join(sha256_file(folder / name) for name in (SETTINGS, VOCABULARY, WEIGHTS))
        return cls(models, settings, f"paragraph-vector:{hashlib.sha256(hashes.encode()).hexdigest()[:40]}")

    def save(self, folder: Path, document_ids: list[str]) -> None:
        """Write settings, words and document ids as JSON, and weights and document vectors as safetensors.

        Args:
            folder: the folder; it is replaced.
            document_ids: ids of the training documents, in their order.
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
        """Return a matrix `(1, dimension)` for each text; `prompt_type` has no effect."""
        return [
            np.concatenate([_infer(model, split_words(text, self.settings)) for model in self.models])[None]
            for text in texts
        ]


def split_words(text: str, settings: dict[str, Any]) -> list[str]:
    """Return the words of a text, which consist of letters, digits and underscores."""
    return WORD.findall(text.lower() if settings["lowercase"] else text)


class _Corpus:
    """All documents as gensim's examples, one for each span, read from memory-mapped columns at each pass."""

    def __init__(self, sources: list[Source], settings: dict[str, Any]) -> None:
        self.sources, self.settings = sources, settings

    def __iter__(self) -> Iterator[Any]:
        texts = (text for source in self.sources for text in texts_of(source))
        for number, text in enumerate(texts):
            for words in _spans(split_words(text, self.settings)):
                yield gensim_doc2vec().TaggedDocument(words, [number])


def _spans(words: list[str]) -> list[list[str]]:
    """Divide a document into spans; one without words is a single empty span, because it has a vector, too."""
    return [words[start : start + SPAN_WORDS] for start in range(0, max(1, len(words)), SPAN_WORDS)]


class _Progress:
    """A progress bar as a callback of gensim, which needs no base class."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_train_begin(self, model: Any) -> None:
        """Do nothing; gensim calls it."""

    def on_train_end(self, model: Any) -> None:
        """Do nothing; gensim calls it."""

    def on_epoch_begin(self, model: Any) -> None:
        """Do nothing; gensim calls it."""

    def on_epoch_end(self, model: Any) -> None:
        """Count an epoch."""
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
    """Rebuild a saved model for inference."""
    model = _new_model(settings, name)
    model.build_vocab_from_freq(dict(vocabulary), corpus_count=1)
    # gensim sorts words of equal count in another order. Apart from vectors, what it stores of a word depends on its
    # count only, so restoring the saved order is safe.
    model.wv.index_to_key = [word for word, _ in vocabulary]
    model.wv.key_to_index = {word: index for index, (word, _) in enumerate(vocabulary)}
    model.wv.vectors, model.syn1neg = weights[f"{name}.words"], weights[f"{name}.outputs"]
    return model


def _infer(model: Any, words: list[str]) -> np.ndarray:
    """Infer the vector of a text, float32 `(d,)`: gensim's inference, with random numbers from a hash of the text."""
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
        for span in _spans(words):
            if model.sg:
                doc2vec.train_document_dbow(model, span, [0], float(rate), work, **options)
            else:
                sums = np.zeros(model.layer1_size, dtype=np.float32)
                doc2vec.train_document_dm(model, span, [0], float(rate), work, sums, **options)
    return vector[0]


def _hash(text: str) -> int:
    """Hash a word; Python's own hash differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def gensim_doc2vec() -> Any:
    """Import gensim's Doc2Vec module.

    Returns:
        The module.

    Raises:
        UserError: gensim is not installed.
    """
    try:
        from gensim.models import doc2vec
    except ImportError:
        raise UserError("Paragraph Vector needs gensim: pip install -e '.[paragraph-vector]'") from None
    return doc2vec
