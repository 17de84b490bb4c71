"""Pass-key retrieval at one length and depth, by embedding models and by causal language models.

Embedding models find documents, as in LongEmbed (Zhu et al. 2024). Causal language models complete the prompt of
landmark attention (Mohtashami & Jaggi 2023).
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from common.encoders.encoder import Encoder
from common.errors import UserError
from eval.models.language_models import LanguageModel
from eval.models.mteb_models import EvaluatedModel
from eval.tasks.needles import FILLER, Haystack, Needle, passkey_needles

# The prompt of landmark attention, word for word: its wording decides what a model answers.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "\nWhat is the pass key? The pass key is"
KEYS = range(1, 50_001)
REPEATS = 50  # of the filler, so that few passages are longer than the haystack


def passkey_documents(source: Haystack, needles: Sequence[Needle], length: int, depth: float, seed: int) -> list[str]:
    """Return one document for each needle.

    Args:
        source: the text around the needles.
        needles: the pass keys.
        length: maximum tokens of a document.
        depth: of the needle, 0 to 1; the same text surrounds it at every depth.
        seed: random seed.
    """
    generator = random.Random(f"passkey-{seed}-{length}")
    return [source.document(needle, length, depth, generator.randrange(len(source.starts))) for needle in needles]


def accuracy(scores: np.ndarray) -> float:
    """Compute the share of questions whose own document is nearest.

    Args:
        scores: `(n, n)`, questions by documents; the right pairs are on the diagonal.

    Returns:
        0 to 1; a question for which k documents are equally near (up to rounding) counts 1 / k.
    """
    right, rounding = np.diagonal(scores)[:, None], 1e-6 * max(1.0, float(np.abs(scores).max()))
    tied = (np.abs(scores - right) <= rounding).sum(1)
    return float(np.mean(np.where((scores > right + rounding).any(1), 0.0, 1.0 / tied)))


def similarities(encoder: Encoder, kind: str, questions: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
    """Compare questions with documents as eval/models/mteb_models.py does.

    Args:
        encoder: of the vectors.
        kind: of the model: `model`, `truncate`, `chunk-mean` or `chunk-max`.
        questions: n matrices `(k, d)` of k vectors each.
        documents: m matrices `(k, d)`.

    Returns:
        Scores `(n, m)`.
    """
    vectors = torch.from_numpy(np.stack([rows.sum(0) for rows in questions]))
    if kind == "chunk-max":
        vectors = torch.nn.functional.normalize(vectors)
        chunks = [torch.nn.functional.normalize(torch.from_numpy(rows)) for rows in documents]
        return np.stack([(vectors @ rows.T).amax(1).numpy() for rows in chunks], axis=1)
    others = torch.from_numpy(np.stack([rows.sum(0) for rows in documents]))
    if kind == "chunk-mean":
        vectors, others = torch.nn.functional.normalize(vectors), torch.nn.functional.normalize(others)
    return encoder.model.similarity(vectors, others).numpy()


class EmbeddingTest:
    """An embedding model has to find the document with the key.

    Args:
        spec: the model.
        encoder: what makes its vectors.
        haystack: the text around the keys; None: filler sentences.
    """

    def __init__(self, spec: EvaluatedModel, encoder: Encoder, haystack: str | None):
        self.kind, self.encoder, self.identity = spec.kind, encoder, f"{spec.kind}:{encoder.identity}"
        self.computed_by = encoder.computed_by
        self.source = Haystack(haystack or FILLER * REPEATS, encoder.model.tokenizer)
        self.room = len(encoder.prompt_ids("document"))

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """Return all lengths: what is beyond the model's context is cut off, which is part of the result."""
        return list(lengths)

    def measure(self, length: int, depth: float, trials: int, seed: int) -> float:
        """Return the accuracy, 0 to 1, at one length and depth.

        Args:
            length: in tokens.
            depth: of the pass keys, 0 to 1.
            trials: number of pass keys.
            seed: random seed.
        """
        needles = passkey_needles(trials, seed=seed + length)
        documents = passkey_documents(self.source, needles, length - self.room, depth, seed)
        found = self.encoder(documents, "document")
        asked = self.encoder([needle.question for needle in needles], "query")
        return accuracy(similarities(self.encoder, self.kind, asked, found))


def passkey_prompt(source: Haystack, key: int, tokens: int, depth: float) -> str:
    """Return the prompt of landmark attention.

    Args:
        source: the text around the key.
        key: the pass key.
        tokens: maximum length of the prompt.
        depth: place of the key, 0 to 1.
    """
    needle = Needle(f"The pass key is {key}. Remember it. {key} is the pass key. ", QUESTION)
    return source.document(needle, tokens, depth, start=0, before=TASK, after=QUESTION)


def is_greedy(model: LanguageModel, ids: Sequence[int], count: int) -> bool:
    """Return whether greedy decoding after all but the last `count` of `ids` gives exactly those.

    It does if each of them is the likeliest token after all before it, so that one forward pass is enough.

    Args:
        model: a causal language model.
        ids: token ids of the prompt and of the answer.
        count: tokens of the answer.
    """
    chosen = torch.zeros(1, len(ids) - 1, dtype=torch.bool)
    chosen[:, -count:] = True
    return model.logits(torch.tensor([ids[:-1]]), chosen).argmax(-1).tolist() == list(ids[-count:])


class GenerationTest:
    """A causal language model has to generate the key.

    Args:
        model: the model.
        haystack: the text around the keys; None: the sentences of landmark attention.

    Raises:
        UserError: the model is a masked language model.
    """

    def __init__(self, model: LanguageModel, haystack: str | None):
        if not model.is_causal:
            raise UserError(f"generate:{model.folder.name} is a masked language model; give one that predicts the next")
        self.model, self.identity = model, f"generate:{model.folder.revision}:{model.precision}"
        self.computed_by = model.computed_by
        self.source = Haystack(haystack or GARBAGE * REPEATS, model.tokenizer)

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """Return the lengths within the model's context."""
        return [length for length in lengths if length <= self.model.context]

    def measure(self, length: int, depth: float, trials: int, seed: int) -> float:
        """Return the accuracy, 0 to 1, at one length and depth.

        Args:
            length: in tokens.
            depth: of the pass keys, 0 to 1.
            trials: number of pass keys.
            seed: random seed.
        """
        generator = random.Random(f"generate-{seed}-{length}-{depth}")
        keys = [generator.choice(KEYS) for _ in range(trials)]
        given = 0
        for key in keys:
            answer = self.model.tokenize(f" {key}")
            prompt = self.model.tokenize(passkey_prompt(self.source, key, length - len(answer), depth))
            given += is_greedy(self.model, [*self.model.lead, *prompt, *answer], len(answer))
        return given / trials
