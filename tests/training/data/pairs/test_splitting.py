"""Held-out rows: no text in common with the training, the same for the same seed, and the same after a resume."""

import datasets
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from common.errors import UserError
from tests.training.tiny_training import losses, random_documents, write_jsonl
from training.data.pairs.batches import PairTokenizer
from training.data.pairs.reading import PairArguments, read_pairs
from training.data.pairs.splitting import SplitArguments, hold_out
from training.data.sources import PAIRS, Source

NAMES = ("anchor", "positive", "negative")


def source(rows, name="pairs") -> Source:
    columns = dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))
    return Source(name, datasets.Dataset.from_dict(columns), NAMES)


def rows_of(sources) -> list[tuple]:
    return [row for source in sources for row in zip(*source.texts(list(range(len(source.rows)))), strict=True)]


def split(sources, share=0.2, seed=0):
    logged: list[str] = []
    parts = hold_out(sources, SplitArguments(eval_split=share, eval_split_seed=seed), logged.append)
    train = [source.select(rows) for source, (rows, _) in zip(sources, parts, strict=True)]
    held_out = [source.select(rows) for source, (_, rows) in zip(sources, parts, strict=True)]
    return rows_of(train), [row[:2] for row in rows_of(held_out)], logged


texts = st.integers(0, 300).map(str)


@settings(max_examples=12)
@given(st.lists(st.tuples(texts, texts, texts), min_size=8, max_size=40, unique=True), st.integers(0, 9), st.randoms())
def test_no_text_is_on_both_sides(rows, seed, random):
    sources = [source(rows[::2], "a"), source(rows[1::2], "b")]
    try:
        train, held_out, logged = split(sources, seed=seed)
    except UserError:  # the rows share too many texts
        reject()
    on_train = {text for row in train for text in row}
    on_held_out = {text for row in held_out for text in row}
    assert not on_train & on_held_out
    assert 0 < len(held_out) <= max(1, round(0.2 * len(rows)))
    pairs = [row[:2] for row in rows]
    assert all(held_out.count(pair) <= pairs.count(pair) for pair in held_out)
    assert set(train) <= set(rows)
    # All others have a held-out text as their negative, and are counted.
    left_out = [row for row in rows if row not in train and row[:2] not in held_out]
    assert all(row[2] in on_held_out for row in left_out)
    counts = [[int(word) for word in line.split() if word.isdigit()] for line in logged]
    assert [sum(column) for column in zip(*counts, strict=True)] == [len(held_out), len(rows), len(left_out)]
    # What is held out does not depend on the order of the rows, or on the source that they are in.
    shuffled = random.sample(rows, len(rows))
    again = split([source(shuffled)], seed=seed)
    assert (sorted(again[0]), sorted(again[1])) == (sorted(train), sorted(held_out))


def test_the_share_and_the_seed():
    rows = [(f"a{n}", f"p{n}", f"n{n}") for n in range(200)]
    found = [split([source(rows)], 0.05, seed) for seed in (0, 0, 1)]
    assert [len(held_out) for _, held_out, _ in found] == [10] * 3
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize(
    ("rows", "share"), [([("same", f"p{n}", "n") for n in range(9)], 0.2), ([("a", "p", "n"), ("b", "q", "p")], 0.5)]
)
def test_what_cannot_be_divided_is_refused(rows, share):
    with pytest.raises(UserError, match=rf"--eval_split {share}"):
        for seed in range(9):
            split([source(rows)], share, seed)


def test_held_out_documents_become_the_same_pairs_in_every_run(tmp_path, word_tokenizer):
    path = str(write_jsonl(tmp_path / "documents.jsonl", random_documents(20)))
    arguments = PairArguments(pairs="neighbours", eval_split=0.3)
    tokenize = PairTokenizer(word_tokenizer, 40, 40, {})
    (train,), (held_out,) = read_pairs([path], arguments, PAIRS, tokenize, lambda line: None)
    _, (again,) = read_pairs([path], arguments, PAIRS, tokenize, lambda line: None)
    assert (len(train.rows), len(held_out.rows)) == (14, 6)
    assert rows_of([held_out]) == rows_of([again])
    trained = rows_of([train])
    documents = [row["text"] for row in random_documents(20)]
    for pair in rows_of([held_out]):
        (document,) = [text for text in documents if all(span in text for span in pair)]
        assert (document,) not in trained


def test_a_resumed_run_holds_the_same_rows_out(train_contrastive, tmp_path):
    options = "--eval_split 0.2 --eval_steps 2 --save_steps 2 --dropout 0.1 --rehearse never "
    whole = losses(train_contrastive(options))
    checkpoint = tmp_path / "out" / "checkpoints" / "step-2"
    again = losses(train_contrastive(options + f"--resume_from_checkpoint {checkpoint}", output="again"))
    assert again == whole[3:]  # after the two steps and their evaluation
    assert len(again[-1]) == 2  # an evaluation: its step and its loss
    with pytest.raises(UserError, match=r"sources|eval_split"):
        train_contrastive(f"--eval_split 0.3 --resume_from_checkpoint {checkpoint}", output="other")
    for refused in ("--eval_split_seed 3", "--eval_split 0.2 --streaming", "--eval_split 1", "--objective simcse"):
        with pytest.raises(UserError, match="eval_split"):
            train_contrastive(f"{refused} {'--eval_split 0.2' * ('simcse' in refused)}", output="refused")
