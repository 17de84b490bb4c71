"""Vectors of many texts: each is computed once, even if the run is stopped, and only a window of texts is in memory."""

import gc
import weakref

import numpy as np

from common.encoders.text_vectors import stream
from common.encoders.vector_cache import VectorCache


class Counting:
    """An encoder that counts what it is asked; a text's matrix is its length and its number of spaces."""

    def __init__(self, identity: str = "a"):
        self.identity, self.batch_tokens, self.asked = identity, 8, []
        self.prompts: dict[str, str | None] = {}
        self.computed_by: dict[str, str] = {}

    def __call__(self, texts, prompt_type):
        self.asked += texts
        return [np.array([[len(text), text.count(" ")]], dtype=np.float32) for text in texts]


def test_each_text_is_encoded_once_for_all_runs(tmp_path):
    texts = [*(f"text {i} " * (1 + i % 7) for i in range(40)), "twice", "twice"]
    for run, encoder in enumerate((Counting(), Counting(), Counting("another"))):
        found = {}
        for indices, matrices in stream(texts, encoder, None, VectorCache(tmp_path / "v.sqlite"), "texts"):
            found.update(zip(indices, matrices, strict=True))
        assert [tuple(found[i][0]) for i in range(len(texts))] == [(len(t), t.count(" ")) for t in texts]
        assert sorted(encoder.asked) == ([] if run == 1 else sorted(set(texts)))


def test_the_kind_of_text_is_part_of_the_key(tmp_path):
    cache, encoder = VectorCache(tmp_path / "v.sqlite"), Counting()
    for prompt_type in ("query", "document", "query"):
        list(stream(["text"], encoder, prompt_type, cache, "texts"))
    assert encoder.asked == ["text", "text"]


def test_only_a_window_of_texts_is_in_memory():
    """Texts come from a sequence that makes them when asked and tells how many live at a time."""
    living: weakref.WeakSet = weakref.WeakSet()

    class Text(str):
        __slots__ = ("__weakref__",)

    class Lazy:
        most = 0

        def __len__(self):
            return 200

        def __getitem__(self, i):
            if i >= len(self):
                raise IndexError(i)
            text = Text(f"{i} " * 20)
            living.add(text)
            gc.collect(0)
            Lazy.most = max(Lazy.most, len(living))
            return text

    encoder = Counting()
    encoder.__class__ = type(
        "Forgetting", (Counting,), {"__call__": lambda self, texts, kind: [np.zeros((1, 2))] * len(texts)}
    )
    for _ in stream(Lazy(), encoder, None, VectorCache(":memory:"), "texts"):
        pass
    assert Lazy.most < 20  # a window of 8 * 16 characters holds one or two
