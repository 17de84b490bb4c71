"""Sequences: consecutive and whole, each once an epoch, between the special tokens of the tokenizer."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.training.data.documents.numbered_documents import READ, READ_PAIRS, SPECIAL, numbered_documents
from training.data.documents.sequences import Sequences, SpecialTokens

many = st.lists(st.integers(1, 70), min_size=2, max_size=12)


@given(lengths=many, length=st.integers(6, 40), pairs=st.booleans())
def test_sequences_are_consecutive_and_whole(lengths, length, pairs):
    read = READ_PAIRS if pairs else READ
    sequences, size = Sequences(numbered_documents(lengths), length, read), length - read.special_tokens
    of_document = [
        [s for s in map(sequences.segment, range(len(sequences))) if s.document == d] for d in range(len(lengths))
    ]
    for total, segments in zip(lengths, of_document, strict=True):
        assert all(one.stop == two.start for one, two in pairwise(segments))
        assert all(s.stop - s.start == size for s in segments[:-1])
        read_of_it = segments[-1].stop if segments else 0
        assert read_of_it == (total if not pairs or total % size != 1 else total - 1)
    assert sequences.total == sum(s.stop - s.start + read.special_tokens for s in chain(*of_document))


@given(lengths=many, length=st.integers(6, 20), seed=st.integers(0, 3))
def test_epoch_tokens_holds_every_sequence_once(lengths, length, seed):
    sequences = Sequences(numbered_documents(lengths), length, READ)
    cuts = sorted(np.random.default_rng(seed).integers(0, 3 * sequences.total, 7).tolist())
    found = list(chain(*(sequences.between(a, b, seed) for a, b in pairwise([0, *cuts, 3 * sequences.total]))))
    assert Counter(found) == Counter((number, sequence) for number in range(3) for sequence in range(len(sequences)))


def test_special_tokens_are_those_of_the_tokenizer(word_tokenizer):
    assert SpecialTokens.of(word_tokenizer) == SPECIAL
    assert [SPECIAL.count(segments) for segments in (1, 2)] == [2, 3]
