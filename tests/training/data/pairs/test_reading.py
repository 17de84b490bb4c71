"""Reading and making pairs: the columns, what is left out, and the shares of the sources."""

import inspect
import json.decoder
import statistics
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.arguments import parse
from common.errors import UserError
from tests.training.tiny_training import WORDS, losses, random_documents, random_pairs, write_jsonl
from training.data.pairs.batches import PairBatches, PairTokenizer
from training.data.pairs.reading import PairArguments, read_pairs
from training.data.sources import PAIRS

MADE = ["crops", "inverse_cloze", "neighbours", "segments"]


@pytest.fixture
def read(tmp_path, word_tokenizer):
    """Sources of rows, one file each, and the lines that were logged about them."""

    def read(*files: list[dict], max_length: int = 40, **options) -> tuple[list, list[str]]:
        paths = [str(write_jsonl(tmp_path / f"{number}.jsonl", rows)) for number, rows in enumerate(files)]
        logged: list[str] = []
        tokenize = PairTokenizer(word_tokenizer, max_length, max_length, {"query": "river stone "})
        return read_pairs(paths, PairArguments(**options), PAIRS, tokenize, logged.append)[0], logged

    return read


def texts(source) -> list[list[str]]:
    return source.texts(list(range(len(source.rows))))


def batches(sources, tokenizer, batch_size=4, **options) -> PairBatches:
    tokenize = PairTokenizer(tokenizer, 40, 40, {})
    options = {"batch_tokens": 100, "seed": 3, "keep_texts": True} | options
    return PairBatches(sources, tokenize, batch_size=batch_size, **options)


def sentences(count: int) -> list[dict]:
    """Return documents of 12 to 60 words, in sentences of 4."""
    rows = []
    for number, row in enumerate(random_documents(count)):
        words = (row["text"].split() * 12)[: 12 + 4 * number % 50]
        parts = [" ".join(words[start : start + 4]) for start in range(0, len(words), 4)]
        rows.append({"text": f"{number}. " + ". ".join(parts)})
    return rows


def test_columns_by_other_names(read):
    rows = [{"title": row["anchor"], "body": row["positive"], "negative_0": "x"} for row in random_pairs(5)]
    (source,), logged = read(rows, anchor_column="title", positive_column="body")
    assert texts(source) == [[row[name] for row in rows] for name in ("title", "body", "negative_0")]
    assert logged == []
    with pytest.raises(UserError, match="the column abstract is missing; it has title, body, negative_0"):
        read(rows, anchor_column="abstract", positive_column="body")


NLI = [
    ("p", "yes 1", "entailment"),
    ("p", "no 1", "Contradiction"),
    ("p", "maybe", "neutral"),
    ("p", "yes 2", 0),
    ("p", "yes 3", "0"),
    ("p", "no 2", 2),
    ("q", "yes", "entailment"),
    ("r", "no", "contradiction"),
    ("s", "unlabelled", "-"),
]


def test_triplets_of_labelled_premises(read):
    rows = [dict(zip(("premise", "hypothesis", "label"), row, strict=True)) for row in NLI]
    (source,), logged = read(rows, pairs="nli")
    found = list(zip(*texts(source), strict=True))
    assert found == [("p", "yes 1", "no 1"), ("p", "yes 2", "no 2"), ("p", "yes 3", "no 1")]
    assert [line.partition(": ")[2] for line in logged] == [
        "2 of 3 premises lack an entailment or a contradiction: left out"
    ]
    with pytest.raises(UserError, match="row 2: label is perhaps"):
        read([rows[0], rows[1] | {"label": "perhaps"}], pairs="nli")
    with pytest.raises(UserError, match="no premise has both"):
        read(rows[6:], pairs="nli")


@pytest.mark.promise("C4")
@pytest.mark.parametrize("pairs", MADE)
def test_pairs_of_documents_know_their_document_and_are_made_anew(read, word_tokenizer, pairs):
    rows = sentences(12)
    (source,), logged = read(rows, pairs=pairs, pair_window=10, segment_step=4, segment_gap=-6)
    assert logged == []
    made = batches([source], word_tokenizer)
    again = batches([source], word_tokenizer)
    epochs: list[dict] = [{}, {}]
    for index in range(6):
        batch = made[index]
        assert len(set(batch.rows)) == 4
        anchor_id, positive_id = batch.text_ids.view(2, 4)
        assert anchor_id.equal(positive_id)
        for row, anchor, positive in zip(batch.rows, *batch.texts, strict=True):
            text = rows[row - 1]["text"]
            assert set(anchor.split()) | set(positive.split()) <= {*text.split(), *text.replace(".", " ").split(), "."}
            epochs[index // 3][row] = anchor, positive
        assert again[index].texts == batch.texts
    assert set(epochs[0]) == set(epochs[1]) == set(range(1, 13))
    assert sum(epochs[0][row] != epochs[1][row] for row in epochs[0]) > 8
    shares = [batches([source], word_tokenizer, 2, rank=rank, world_size=2) for rank in range(2)]
    for column in range(2):
        assert [text for share in shares for text in share[5].texts[column]] == made[5].texts[column]
    assert shares[1].describe() == made.describe()
    rows[3]["text"] += " more"
    other, _ = read(rows, pairs=pairs, pair_window=9, segment_step=4, segment_gap=-5)
    assert batches(other, word_tokenizer).describe() != made.describe()


@pytest.mark.parametrize("pairs", MADE)
def test_the_heaviest_batch_of_made_pairs_is_a_bound(read, word_tokenizer, pairs):
    options = {"pair_window": 14, "segment_step": 4, "segment_gap": -10, "crop_ratio": [0.5, 1.0]}
    (source,), _ = read(sentences(12), pairs=pairs, **options)
    made = batches([source], word_tokenizer, batch_tokens=60)
    heaviest = made.heaviest()
    for index in range(60):
        assert max(made[index].longest) <= max(heaviest.longest)
        assert made[index].largest_chunk().input_ids.numel() <= heaviest.largest_chunk().input_ids.numel()
    assert max(heaviest.longest) <= 14 + 2 + 2 * (pairs != "crops")  # not the documents, which are longer


def test_twins_are_read_as_documents(read, word_tokenizer):
    rows = random_documents(8)
    (source,), _ = read(rows, pairs="twins")
    assert texts(source) == [[row["text"] for row in rows]] * 2
    made = PairBatches(
        [source], PairTokenizer(word_tokenizer, 40, 8, {"query": "x "}), batch_size=4, batch_tokens=1000, seed=0
    )
    first, second = made[0].chunks[0].cu_seq_lens_q.diff().view(2, 4)
    assert first.equal(second)
    assert first.max() > 8


def test_short_documents_are_counted_and_left_out(read, word_tokenizer):
    rows = [{"text": text} for text in ("one", "river stone", "!", "night paper music", "x " * 99)]
    (source,), logged = read(rows, pairs="crops")
    assert texts(source) == [["river stone", "night paper music", "x " * 99]]
    expected = "2 of 5 documents are too short for a pair, which needs 2 tokens: left out"
    assert [line.partition(": ")[2] for line in logged] == [expected]
    assert source.numbers([0, 1, 2]) == (2, 4, 5)  # as the user counts them
    # Half of 40 - 2 - 2: special tokens and the prompt.
    assert source.longest_texts(1, word_tokenizer) == [["x " * 17 + "x"]] * 2
    with pytest.raises(UserError, match="no document is long enough"):
        read(rows[:1], pairs="neighbours")


def test_rows_that_repeat_another_one_are_counted_and_left_out(read, word_tokenizer):
    rows = random_pairs(6)
    (source,), logged = read([rows[0]] * 1000 + rows + [rows[3]])
    assert texts(source) == [[row[name] for row in rows] for name in ("anchor", "positive")]
    assert [line.partition(": ")[2] for line in logged] == ["1001 of 1007 rows repeat another row: left out"]
    assert source.numbers([0, 1, 5]) == (1, 1002, 1006)
    epoch = batches([source], word_tokenizer, 3)
    assert {*epoch[0].rows, *epoch[1].rows} == {1, *range(1002, 1007)}


def test_pairs_of_a_text_and_itself_are_counted(read):
    _, logged = read([*random_pairs(3), {"anchor": "a", "positive": "a"}])
    assert [line.partition(": ")[2] for line in logged] == [
        "in 1 of 4 rows anchor and positive are the same text: from these a model learns nothing"
    ]


def test_a_batch_holds_no_text_twice(read, word_tokenizer):
    rows = [{"anchor": f"a {n}", "positive": f"b {n % 16}"} for n in range(48)]
    (source,), _ = read(rows)
    made = batches([source], word_tokenizer, 8)
    for index in range(12):
        assert len(made[index].text_ids.unique()) == 16


@settings(max_examples=20)  # an example reads files
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True), st.floats(1, 20))
def test_sources_are_mixed_by_temperature(word_tokenizer, tmp_path_factory, sizes, temperature):
    folder = tmp_path_factory.mktemp("mixed")
    names = [
        f"{write_jsonl(folder / f'{size}.jsonl', random_pairs(size, size))}:{1 + n}" for n, size in enumerate(sizes)
    ]
    tokenize = PairTokenizer(word_tokenizer, 40, 40, {})
    sources, _ = read_pairs(names, PairArguments(mixing_temperature=temperature), PAIRS, tokenize, lambda line: None)
    rows = np.array([len(source.rows) for source in sources])
    weights = np.array([source.weight for source in sources])
    given_weights = 1 + np.arange(len(sizes))
    shares = given_weights * rows ** (1 / temperature)
    np.testing.assert_allclose(weights * rows / (weights * rows).sum(), shares / shares.sum())
    np.testing.assert_allclose((weights * rows).sum(), (given_weights * rows).sum())  # an epoch stays as long


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"crop_ratio": [0.5]}, "--crop_ratio"),
        ({"crop_ratio": [0.5, 0.4]}, "--crop_ratio"),
        ({"pairs": "segments", "segment_step": 289}, "--segment_step 289"),
        ({"pairs": "segments", "segment_gap": -288}, "--segment_gap -288"),
    ],
)
def test_options_that_contradict_each_other(options, complaint):
    with pytest.raises(UserError, match=complaint):
        PairArguments(**options)


@pytest.mark.parametrize(
    "options",
    [
        "--pairs crops --crop_ratio 0.0 0.4",
        "--pairs crops --crop_ratio 0.4 1.1",
        "--pairs crops --word_deletion 1.0",
        "--pairs inverse_cloze --sentence_removal -0.1",
        "--pairs segments --pair_window 1",
        "--pairs segments --segment_step 0",
        "--mixing_temperature 0",
        "--streaming --shuffle_buffer 0",
        "--eval_split 1",
        "--eval_split 0.1 --eval_split_seed -1",
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=r"must be (at least|more than)"):
        parse(PairArguments, argv=options.split())


def in_known_words(words: list[str]) -> str:
    """Replace each word by one of the tokenizer's, always the same one; a sentence ends after every ninth."""
    known = [WORDS[zlib.crc32(word.encode()) % len(WORDS)] for word in words]
    return " ".join(f"{word}." if place % 9 == 8 else word for place, word in enumerate(known))


@pytest.mark.parametrize("pairs", [*MADE, "twins"])
def test_training_on_real_documents(train_script, tmp_path, pairs):
    """On functions of Python's library the loss falls, and a run that is stopped and resumed gives the same losses."""
    members = [member for module in (json.decoder, statistics) for member in vars(module).values()]
    sources = [inspect.getsource(member).split() for member in members if inspect.isfunction(member)]
    rows = [{"text": in_known_words(words)} for words in sources]
    data = write_jsonl(tmp_path / "documents.jsonl", rows)
    windows = {"twins": "", "segments": "--pair_window 24 --segment_step 8"}.get(pairs, "--pair_window 24")
    options = f"--train_data {data} --pairs {pairs} {windows} --learning_rate 3e-3 --max_steps 30 "
    options += "--logging_steps 10 --save_steps 10 --save_total_limit 9 --temperature 0.1 "
    whole = losses(train_script("contrastive", options))
    assert whole[-1][1] < whole[0][1]
    first = tmp_path / "out" / "checkpoints"
    other = tmp_path / "again"
    train_script("contrastive", options + f"--output_dir {other} --resume_from_checkpoint {first / 'step-20'}")
    assert losses(other) == whole[-1:]
