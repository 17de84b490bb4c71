"""Pairs for next-sentence prediction: half true, never from the same document otherwise, framed as BERT's tokenizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForNextSentencePrediction

from training.data.documents.next_sentence import IS_NEXT, NOT_NEXT, NextSentenceHead, Segment, draw_pair
from training.data.documents.sequences import SpecialTokens

lengths = st.lists(st.integers(1, 60), min_size=2, max_size=6)


@pytest.mark.promise("M2")
@given(lengths=lengths, data=st.data())
def test_true_pairs_go_on_and_the_others_are_of_another_document(lengths, data):
    document = data.draw(st.sampled_from([n for n, length in enumerate(lengths) if length > 1] or [None]))
    if document is None:
        return
    start = data.draw(st.integers(0, lengths[document] - 2))
    sequence = Segment(document, start, data.draw(st.integers(start + 2, lengths[document])))
    for seed in range(8):
        first, second, label = draw_pair(sequence, np.array(lengths), np.random.default_rng(seed))
        assert (first.document, first.start) == (document, start)
        assert first.stop - first.start > 0
        assert second.stop - second.start > 0
        assert 0 <= second.start < second.stop <= lengths[second.document]
        # Together they keep to the budget of the sequence.
        assert first.stop - first.start + second.stop - second.start <= sequence.stop - sequence.start
        if label == IS_NEXT:
            assert second == Segment(document, first.stop, sequence.stop)
        else:
            assert second.document != document
            full = sequence.stop - first.stop
            assert second.stop - second.start == min(full, lengths[second.document])


@pytest.mark.promise("M2")
def test_half_are_true_and_all_other_documents_serve():
    generator, lengths = np.random.default_rng(0), np.array([50, 60, 70, 80])
    pairs = [draw_pair(Segment(2, 10, 60), lengths, generator) for _ in range(40_000)]
    labels = np.array([label for *_, label in pairs])
    assert (labels == IS_NEXT).mean() == pytest.approx(0.5, abs=0.01)
    others = np.bincount([second.document for _, second, label in pairs if label == NOT_NEXT])
    assert others[2] == 0
    assert others[[0, 1, 3]] / others.sum() == pytest.approx([1 / 3] * 3, abs=0.02)
    # Lengths do not tell the answer.
    length_of_b = np.array([second.stop - second.start for _, second, _ in pairs])
    assert length_of_b[labels == IS_NEXT].mean() == pytest.approx(length_of_b[labels == NOT_NEXT].mean(), rel=0.02)


@pytest.mark.promise("M2")
def test_segments_stand_as_berts_tokenizer_puts_them(word_tokenizer):
    published = type(word_tokenizer.backend_tokenizer).from_str(word_tokenizer.backend_tokenizer.to_str())
    published.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    texts = "river stone cloud", "night paper"
    expected = published.encode(*texts)
    a, b = (np.array(word_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    ids, starts, types = SpecialTokens.of(word_tokenizer).frame((a, np.ones(3, bool)), (b, np.ones(2, bool)))
    assert ids.tolist() == expected.ids
    assert types.tolist() == expected.type_ids
    assert starts.all()


@pytest.mark.promise("M2")
def test_the_head_and_the_labels_are_those_of_transformers():
    """The pooler and classifier of BertForNextSentencePrediction under our names give its loss with our labels."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    published = BertForNextSentencePrediction(BertConfig(**sizes, intermediate_size=16)).eval()
    head = NextSentenceHead(16, 0.02)
    head.dense.load_state_dict(published.bert.pooler.dense.state_dict())
    head.classifier.load_state_dict(published.cls.seq_relationship.state_dict())
    input_ids, labels = torch.randint(0, 40, (4, 7)), torch.tensor([IS_NEXT, NOT_NEXT, IS_NEXT, IS_NEXT])
    expected = published(input_ids, labels=labels)
    scores = head(published.bert(input_ids).last_hidden_state[:, 0])
    torch.testing.assert_close(scores, expected.logits)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(scores, labels), expected.loss)
    # transformers documents that 0 says "B follows A".
    assert "- 0 indicates sequence B is a continuation of sequence A" in BertForNextSentencePrediction.forward.__doc__
