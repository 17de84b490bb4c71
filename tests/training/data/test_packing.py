"""Packing: every token stays, in its order, and chunks keep to their budget."""

from itertools import chain, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.data.packing import pack


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_packing_keeps_every_token_in_order_and_within_the_budget(lengths, budget):
    documents = [[number] * length for number, length in enumerate(lengths)]
    chunks = pack(documents, budget)
    assert torch.cat([chunk.input_ids[0] for chunk in chunks]).tolist() == list(chain(*documents))
    unpacked = [document for c in chunks for document in c.input_ids[0].split(c.cu_seq_lens_q.diff().tolist())]
    assert [document.tolist() for document in unpacked] == documents
    for chunk in chunks:
        documents_in_it = chunk.cu_seq_lens_q.diff()
        assert chunk.max_length_q == documents_in_it.max()
        assert chunk.input_ids.shape[1] <= budget or len(documents_in_it) == 1
    for one, two in pairwise(chunks):  # greedy: the next document did not fit
        assert one.input_ids.shape[1] + two.cu_seq_lens_q[1] > budget
