"""A tiny model, and documents of random words."""

import random

import pytest

from retrieval.documents.document import Document

WORDS = "river stone cloud table green seven night paper music house train north glass bread winter garden".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def tiny_model(tiny_longembed):
    """A random encoder of ours with a context of 256 tokens, and with a prompt for queries."""
    from modeling_longembed import LongEmbedModel

    return LongEmbedModel.from_pretrained(tiny_longembed).eval()


@pytest.fixture
def in_float32(monkeypatch):
    """Encode in float32 also where the processor is fast in bfloat16, which rounds differently in each batch."""
    monkeypatch.setattr("modeling_longembed.encoding_longembed.is_fast_in_bfloat16", lambda device: False)


def make_documents(count: int, most: int = 50, seed: int = 0) -> list[Document]:
    """Make documents `d0`, `d1` and so on of at most so many random words, with their number as metadata."""
    draw = random.Random(seed)
    return [
        Document(f"d{number}", " ".join(draw.choices(WORDS, k=draw.randint(1, most))), {"number": number})
        for number in range(count)
    ]
