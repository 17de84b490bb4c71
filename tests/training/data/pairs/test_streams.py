"""Streams: complete, shuffled, the same for any number of processes, and continued from any position."""

import gzip
import json
import os
from collections import Counter
from itertools import chain

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from tests.training.tiny_training import losses, random_documents, random_pairs, write_jsonl
from training.data.pairs import streams
from training.data.pairs.batches import PairTokenizer
from training.data.pairs.reading import PairArguments, stream_pairs
from training.data.pairs.streams import Reader, Shard, StreamedBatches, open_streams
from training.data.sources import PAIRS


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(streams, "SHARD_BYTES", 700)


@given(
    st.lists(st.sampled_from(["", " ", '{"n": 1}', '{"n": "ü\\u2028"}', '{"n": "' + "x" * 40 + '"}']), max_size=30),
    st.booleans(),
    st.integers(1, 90),
)
def test_the_lines_of_the_shards_are_those_of_the_file(tmp_path_factory, lines, ends, size):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * ends)
    shards = [Shard(str(path), start, start + size) for start in range(0, path.stat().st_size, size)]
    rows = [row for shard in shards for _, row in shard.rows()]
    assert rows == [json.loads(line) for line in lines if line.strip()]


@pytest.fixture
def forms(tmp_path, small_shards, monkeypatch):
    """40 pairs, in every form: paths, and the number of shards."""
    rows = random_pairs(40)
    lines = write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=9)
    (tmp_path / "folder").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "folder" / f"{number}.jsonl", rows[number::4])
    on_hub = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: on_hub)
    names = [str(tmp_path / name) for name in ("pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet", "folder")]
    return rows, [*names, "org/name"]


def test_every_pass_holds_every_row_once_in_an_order_of_its_own(forms):
    rows, names = forms
    for name in names:
        (stream,) = open_streams([name], PAIRS)
        reader = Reader(stream, 3)
        passes = [[tuple(next(reader).values()) for _ in rows] for _ in range(3)]
        expected = sorted((row["anchor"], row["positive"]) for row in rows)
        assert [sorted(found) for found in passes] == [expected] * 3, name
        if stream.shards.num_shards > 2:
            assert passes[0] != passes[1] or passes[1] != passes[2], name
    assert open_streams([names[0]], PAIRS)[0].shards.num_shards > 5


def test_a_position_is_where_it_was(forms):
    for name in forms[1]:
        (stream,) = open_streams([name], PAIRS)
        reader = Reader(stream, 3)
        positions, rows = [], []
        for _ in range(95):
            positions.append(reader.position())
            rows.append(next(reader))
        for place in (0, 1, 39, 40, 41, 94):
            again = Reader(stream, 3)
            again.go_to(json.loads(json.dumps(positions[place])))
            assert [next(again) for _ in rows[place:]] == rows[place:], (name, place)


def streamed(names, tokenizer, batch_size=4, arguments=None, **options) -> StreamedBatches:
    tokenize = PairTokenizer(tokenizer, 40, 40, {})
    found = stream_pairs(names, arguments or PairArguments(streaming=True), PAIRS, tokenize)
    given_options = {"length": 100, "buffer": 18, "batch_tokens": 100, "seed": 3, "keep_texts": True}
    return StreamedBatches(found, tokenize, batch_size=batch_size, **(given_options | options))


def test_batches_are_those_of_their_index(forms, word_tokenizer):
    _, (lines, *others) = forms
    names = [lines, f"{others[1]}:2"]
    whole = streamed(names, word_tokenizer)
    batches = [whole[index] for index in range(60)]
    for start in (0, 1, 4, 5, 17, 59):
        anew = streamed(names, word_tokenizer)
        if start:
            anew.go_to(json.loads(json.dumps(batches[start - 1].bookmark)))
        for index in (start, min(59, start + 3), start):  # back again, too
            assert anew[index].texts == batches[index].texts
            assert anew[index].bookmark == batches[index].bookmark
    assert streamed(names, word_tokenizer)[33].texts == batches[33].texts  # without a bookmark


def test_processes_share_the_batch_that_one_would_have(forms, word_tokenizer):
    whole = streamed(forms[1][:1], word_tokenizer)
    shares = [streamed(forms[1][:1], word_tokenizer, 2, rank=rank, world_size=2) for rank in range(2)]
    for index in range(12):
        ids = [share[index].text_ids.view(2, -1) for share in shares]
        assert torch.cat(ids, dim=1).equal(whole[index].text_ids.view(2, -1))
    assert shares[1].describe() == whole.describe()


def test_rows_are_shuffled_within_blocks_and_none_is_lost(forms, word_tokenizer):
    rows, names = forms
    whole = streamed(names[1:2], word_tokenizer)  # one shard: blocks of 20 rows, in the order of the file
    texts = [list(zip(*whole[index].texts, strict=True)) for index in range(20)]
    expected = [(row["anchor"], row["positive"]) for row in rows]
    for block in range(4):
        found = list(chain(*texts[5 * block : 5 * block + 5]))
        assert Counter(found) == Counter(expected[20 * (block % 2) :][:20])
        assert found != expected[20 * (block % 2) :][:20]
    assert texts[:10] != texts[10:]


def test_weights_are_shares_of_the_batches(forms, word_tokenizer):
    _, (lines, compressed, *_) = forms
    whole = streamed([lines, f"{compressed}:3"], word_tokenizer)
    share = sum(whole.stream_of(index) for index in range(4000)) / 4000
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)


def test_a_resumed_run_reads_a_shard_and_a_block(forms, word_tokenizer, monkeypatch):
    whole = streamed(forms[1][:1], word_tokenizer)
    bookmark = [whole[index].bookmark for index in range(99)][-1]
    read, original = [], Shard.rows

    def counted(shard):
        for row in original(shard):
            read.append(row)
            yield row

    monkeypatch.setattr(Shard, "rows", counted)
    anew = streamed(forms[1][:1], word_tokenizer)
    read.clear()
    anew.go_to(bookmark)
    anew[99]
    assert 20 <= len(read) <= 20 + 15  # 700 bytes of the smallest rows


@pytest.mark.parametrize("pairs", ["crops", "twins"])
def test_pairs_are_made_of_streamed_documents(tmp_path, word_tokenizer, pairs):
    documents = [{"text": "short"}, *random_documents(20), {"text": "x"}]
    data = write_jsonl(tmp_path / "documents.jsonl", documents)
    arguments = PairArguments(streaming=True, pairs=pairs, pair_window=20)
    whole = streamed([str(data)], word_tokenizer, arguments=arguments, buffer=20, batch_tokens=70)
    first = [whole[index] for index in range(10)]
    for batch in first:
        anchor_id, positive_id = batch.text_ids.view(2, 4)
        assert anchor_id.equal(positive_id)
        assert (batch.texts[0] == batch.texts[1]) == (pairs == "twins")
    texts = set(chain(*(batch.texts[0] for batch in first)))
    assert ("short" in texts) == (pairs == "twins")
    # The two documents of one token are skipped in each pass, and their share of the rows is logged.
    # (A block of 20 rows, 5 batches: the first has read 20 to 22 rows, both together at least 40 and one of the two.)
    shares = [batch.too_short_share for batch in first]
    if pairs == "twins":
        assert set(shares) == {None}
    else:
        assert set(shares) <= {0, 1 / 21, 2 / 22, 3 / 23, 4 / 24}
        assert max(shares) > 0
        assert first[0].measures()["too_short_share"] == shares[0]
    heaviest = whole.heaviest()
    assert max(heaviest.longest) >= max(max(batch.longest) for batch in first)
    assert heaviest.largest_chunk().input_ids.numel() == 70


def test_documents_without_pairs_end_the_search(tmp_path, word_tokenizer):
    data = write_jsonl(tmp_path / "documents.jsonl", [{"text": "short"}] * 5)
    arguments = PairArguments(streaming=True, pairs="crops")
    with pytest.raises(UserError, match="no document is long enough"):
        streamed([str(data)], word_tokenizer, arguments=arguments)[0].to("cpu")


def test_a_streamed_run_is_stopped_and_resumed(train_script, pairs_file, tmp_path, small_shards, monkeypatch):
    """At two steps, read by this process and by two workers."""
    options = "--streaming --shuffle_buffer 20 --max_steps 12 --save_steps 4 --save_total_limit 9 --logging_steps 1 "
    options += f"--gradient_accumulation_steps 2 --train_data {pairs_file} {pairs_file}:2 --dropout 0.1 "
    train_script("contrastive", options + f"--output_dir {tmp_path / 'whole'}")
    whole = losses(tmp_path / "whole")
    reached, original = [], StreamedBatches.go_to

    def recorded(self, bookmark):
        reached.append(bookmark["index"])
        original(self, bookmark)

    monkeypatch.setattr(StreamedBatches, "go_to", recorded)
    for step, workers in ((4, 2), (8, 0)):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{step}"
        again = tmp_path / checkpoint.name
        options += f"--dataloader_num_workers {workers} "
        train_script("contrastive", options + f"--output_dir {again} --resume_from_checkpoint {checkpoint}")
        found = losses(again)
        assert found == whole[step:]
        assert 2 * step in reached  # it did not read everything before the checkpoint again


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", json.dumps(random_pairs(1)[0]).encode() + b'\n{"anchor": "a", "pos', "row 2: is not JSON"),
        ("a.jsonl", json.dumps(random_pairs(1)[0]).encode() + b'\n{"anchor": " "}', "row 2: anchor is empty"),
        (
            "a.jsonl.gz",
            gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in random_pairs(99)))[:-9],
            "ended",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_middle_is_one_sentence(train_script, tmp_path, name, content, complaint, workers):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        train_script(
            "contrastive",
            f"--streaming --train_data {tmp_path / name} --shuffle_buffer 300 --rehearse never "
            f"--dataloader_num_workers {workers}",
        )
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_the_shard_of_a_mistake_is_named(tmp_path, small_shards):
    rows = random_pairs(40)
    rows[-1]["anchor"] = 7
    (stream,) = open_streams([str(write_jsonl(tmp_path / "a.jsonl", rows))], PAIRS)
    reader = Reader(stream, 0)
    with pytest.raises(UserError, match=r"a.jsonl from byte \d+, row \d+: anchor is int instead of text"):
        for _ in rows:
            next(reader)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_another_file_of_the_same_size_and_time_is_other_data(tmp_path, small_shards, suffix):
    path, rows = tmp_path / f"a.{suffix}", random_pairs(40)

    def content(changed: int | None) -> tuple[int, str]:
        own = [row | {"positive": row["positive"][::-1]} if n == changed else row for n, row in enumerate(rows)]
        if suffix == "parquet":
            plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), path, **plain)
        else:
            lines = write_jsonl(path, own).read_bytes()
            path.write_bytes(gzip.compress(lines, 0, mtime=0) if suffix.endswith("gz") else lines)
        os.utime(path, ns=(10**18, 10**18))
        return path.stat().st_size, open_streams([str(path)], PAIRS)[0].content

    size, first = content(None)
    others = [content(row) for row in (0, 20, 39)]
    assert {own for own, _ in others} == {size}
    assert len({first, *(name for _, name in others)}) == 4
    assert content(None) == (size, first)


def test_a_first_row_that_cannot_be_read_is_no_later_one(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError("the network is down")
        yield

    shards = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: shards)
    with pytest.raises(UserError, match=r"^org/name: the next row cannot be read: the network is down$"):
        open_streams(["org/name"], PAIRS)


def test_what_a_stream_cannot_do(train_script, pairs_file):
    for options, complaint in [
        ("--max_steps 0", "give --max_steps"),
        ("--pairs nli", "--streaming: --pairs nli"),
        ("--mixing_temperature 2", "--mixing_temperature: applies only without --streaming"),
        ("--shuffle_buffer 0", "shuffle-buffer: 0: must be at least 1"),
        ("--train_data nowhere.jsonl", "no such file"),
    ]:
        with pytest.raises(UserError, match=complaint):
            train_script("contrastive", f"--streaming {options}")
