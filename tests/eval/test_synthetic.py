"""Passkey and needle tasks: exact lengths, one answer, needles at all depths, the same seed the same bytes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.jsonl import read_text_columns
from eval.synthetic import write_synthetic_task
from eval.tasks.needles import MOST_DOCUMENTS, NEEDLES, Haystack, Needle
from eval.tasks.retrieval import local_task
from eval.tasks.texts import read_haystack

ESSAY = "".join(
    f"Sentence number {i} of the essay tells of the sea, of ships, and of day {i * 7 % 31}. " for i in range(300)
)


def rows(path, *fields):
    return dict(values for _, values in read_text_columns(path, *fields))


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.gz")}


@pytest.mark.parametrize(("kind", "haystack"), [("passkey", None), ("needle", ESSAY)])
def test_a_task_is_as_long_and_as_deep_as_it_says(minilm_tokenizer, tmp_path, kind, haystack):
    write_synthetic_task(
        tmp_path / "Task", kind, minilm_tokenizer, [96, 700], queries=10, documents=30, haystack=haystack
    )
    assert list(local_task(tmp_path / "Task").eval_splits) == ["test_96", "test_700"]
    for length in (96, 700):
        split = tmp_path / "Task" / f"test_{length}"
        documents = rows(split / "corpus.jsonl.gz", "doc_id", "text")
        queries = rows(split / "queries.jsonl.gz", "qid", "text")
        qrels = rows(split / "qrels.jsonl.gz", "qid", "doc_id")
        assert (len(documents), len(queries), len(qrels)) == (30, 10, 10)
        assert len(set(documents.values())) == 30
        for text in documents.values():
            assert length - 3 <= len(minilm_tokenizer(text)["input_ids"]) <= length
        needles = NEEDLES[kind](30, seed=length)
        depths = []
        for query, document in qrels.items():
            (needle,) = [needle for needle in needles if needle.question == queries[query]]
            holders = [name for name, text in documents.items() if needle.text.strip() in text]
            assert holders == [document]
        for i, needle in enumerate(needles):
            text = documents[f"d{i}"]
            depths.append(text.index(needle.text.strip()) / (len(text) - len(needle.text)))
        if length == 700:
            assert min(depths) < 0.1
            assert max(depths) > 0.9
            assert all(any(abs(depth - tenth / 10) < 0.1 for depth in depths) for tenth in range(11))


def test_the_seed_decides_every_byte(minilm_tokenizer, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_synthetic_task(
            tmp_path / name, "passkey", minilm_tokenizer, [64, 128], queries=5, documents=12, seed=seed
        )
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert not set(bytes_of(tmp_path / "a").values()) & set(bytes_of(tmp_path / "c").values())


@pytest.mark.parametrize("kind", NEEDLES)
def test_questions_and_answers_are_all_different(kind):
    needles = NEEDLES[kind](MOST_DOCUMENTS[kind], seed=1)
    assert len({needle.question for needle in needles}) == MOST_DOCUMENTS[kind]
    assert len({needle.text for needle in needles}) == MOST_DOCUMENTS[kind]


@pytest.fixture(scope="module")
def byte_pairs():
    """A byte-level BPE, where a word costs more tokens at the start of a text than after a space."""
    pieces = ["A ship sails. ", "Why, unbelievably? ", "The key is 42. "]
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(pieces * 50, vocab_size=400, min_frequency=1, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer)


@pytest.mark.parametrize("kind", ["minilm_tokenizer", "byte_pairs"])
@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    text=st.lists(
        st.sampled_from(["A ship sails. ", "Why, unbelievably? ", 'He said "no." ', "ünïcödé 東京! ", "x" * 40]),
        min_size=1,
    ),
    tokens=st.integers(12, 200),
    depth=st.floats(0, 1),
    start=st.integers(0, 10**6),
)
def test_any_text_gives_documents_of_any_length(request, kind, text, tokens, depth, start):
    tokenizer = request.getfixturevalue(kind)
    needle = Needle("The key is 42. ", "What is the key?")
    document = Haystack("".join(text), tokenizer).document(needle, tokens, depth, start)
    assert len(tokenizer(document)["input_ids"]) <= tokens
    assert document.count("The key is 42.") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "pass"}, "no kind of task 'pass'"),
        ({"kind": "needle"}, "needs a text to hide in"),
        ({"queries": 20, "documents": 10}, "give 1 <= queries <= documents"),
        ({"documents": 10**6}, "give 1 <= queries <= documents <= 676"),
        ({"lengths": [128, 128]}, "different positive numbers"),
        ({"lengths": []}, "different positive numbers"),
        ({"lengths": [128, 16]}, "16 tokens have no room for"),
    ],
)
def test_numbers_that_make_no_task_are_told_and_leave_nothing(minilm_tokenizer, tmp_path, arguments, words):
    settings = {"kind": "passkey", "lengths": [64], "queries": 2, "documents": 4} | arguments
    with pytest.raises(UserError, match=words):
        write_synthetic_task(tmp_path / "Task", tokenizer=minilm_tokenizer, **settings)
    assert not list(tmp_path.iterdir())


def test_a_haystack_is_read_from_text_json_lines_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text('{"text": "Two.", "doc_id": 1}\n{"text": "Three."}\n')
    assert read_haystack(str(tmp_path)) == "One.\n\nTwo.\n\nThree."
    with pytest.raises(UserError, match="holds no text"):
        read_haystack(str(tmp_path / "none.pdf"))
    (tmp_path / "b.jsonl").write_text('{"body": "Two."}\n')
    with pytest.raises(UserError, match=r"b.jsonl, row 1: the column text is missing"):
        read_haystack(str(tmp_path))
