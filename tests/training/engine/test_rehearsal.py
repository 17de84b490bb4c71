"""The heaviest batch comes first and leaves no trace, the largest budget is found, an answer tells what to change."""

import json
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from common import memory
from common.errors import UserError
from common.memory import is_out_of_memory, machine_memory
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import losses, random_pairs, write_jsonl
from training.data.packing import cut_to_fill, pack
from training.data.pairs.batches import PairBatches, PairTokenizer
from training.data.sources import read_sources
from training.engine.rehearsal import Probe, largest_that_fits, run_probe


@pytest.mark.parametrize("options", ["", "--batch_tokens 100 --gradient_accumulation_steps 2", "--tuning lora"])
def test_a_rehearsal_changes_no_bit(train_contrastive, options):
    with_it, without = (
        train_contrastive(f"{options} --rehearse first"),
        train_contrastive(f"{options} --rehearse never", "never"),
    )
    assert losses(with_it) == losses(without)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (with_it, without)]
    torch.testing.assert_close(*weights, atol=0, rtol=0)


def test_a_rehearsal_of_pretraining_changes_no_bit_and_ends_in_an_answer(train_script, out_of_memory_above, tmp_path):
    with_it = train_script("pretraining", "--batch_tokens 64 --logging_steps 1 --max_steps 2")
    without = f"--batch_tokens 64 --logging_steps 1 --max_steps 2 --rehearse never --output_dir {tmp_path}/never"
    train_script("pretraining", without)
    assert losses(with_it) == losses(tmp_path / "never")
    out_of_memory_above(63)
    with pytest.raises(UserError, match=r"with 64 tokens at once .*; use --gradient_checkpointing"):
        train_script("pretraining", f"--batch_tokens 64 --output_dir {tmp_path}/failed")
    assert not (tmp_path / "failed" / "final").exists()
    assert not (tmp_path / "failed" / "metrics.jsonl").exists()


@pytest.mark.parametrize("batch_tokens", [16, 100, 10_000])
def test_no_batch_is_heavier_than_the_heaviest(pairs_file, tmp_path, word_tokenizer, batch_tokens):
    other = write_jsonl(tmp_path / "other.jsonl", random_pairs(30, seed=7, negatives=1))
    tokenize = PairTokenizer(
        word_tokenizer, max_length=30, query_max_length=12, prompts={"query": "", "document": "river"}
    )
    batches = PairBatches(
        read_sources([str(pairs_file), str(other)]), tokenize, batch_size=5, batch_tokens=batch_tokens, seed=0
    )
    heaviest = batches.heaviest()
    seen = [batches[index] for index in range(60)]
    assert heaviest.largest_chunk().input_ids.numel() >= max(x.largest_chunk().input_ids.numel() for x in seen)
    assert heaviest.largest_chunk().max_length_q == max(max(batch.longest) for batch in seen)
    assert (heaviest.pairs, heaviest.text_ids.shape) == (seen[0].pairs, seen[0].text_ids.shape)
    if batch_tokens == 100:  # what the longest texts alone would not do
        assert heaviest.largest_chunk().input_ids.numel() == batch_tokens


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_chunks_are_full(lengths, batch_tokens):
    columns = [[list(range(length)) for length in column] for column in lengths]
    cut = cut_to_fill(columns, batch_tokens)
    for whole, kept in zip(columns, cut, strict=True):
        assert kept == [document[: len(part)] for document, part in zip(whole, kept, strict=True)]
    sizes = [chunk.input_ids.numel() for chunk in pack([ids for column in cut for ids in column], batch_tokens)]
    for size, then in pairwise(sizes):
        assert size >= batch_tokens or then > batch_tokens  # only a text too long for any chunk leaves one unfilled
    longest = max(max(column) for column in lengths)
    assert max(sizes) >= min(longest, batch_tokens)
    assert longest <= batch_tokens or max(sizes) == longest


def test_memory_that_does_not_suffice_shows_before_the_first_step(train_contrastive, out_of_memory_above, tmp_path):
    seen = out_of_memory_above(99)
    with pytest.raises(UserError) as caught:
        train_contrastive("--batch_tokens 100")
    assert seen[-1] == max(seen) == 100
    text = str(caught.value)
    assert "\n" not in text
    assert "with 100 tokens at once and texts of up to" in text
    for remedy in ("--gradient_checkpointing or", "--batch_tokens 50 or", "--tuning lora"):
        assert remedy in text
    assert "--max_length" not in text
    assert not (tmp_path / "out").exists()


def test_what_the_run_uses_already_is_no_remedy(train_contrastive, out_of_memory_above):
    out_of_memory_above(30)
    with pytest.raises(UserError) as caught:
        train_contrastive("--batch_tokens 36 --gradient_checkpointing --tuning lora")
    text = str(caught.value)
    remedies = text.split("; use ")[1]
    longest = int(text.split("texts of up to ")[1].split(" ")[0])
    # A chunk is one text: a smaller budget alone would not make it smaller.
    assert remedies.startswith(f"--max_length {longest // 2}")
    assert " or " not in remedies


def test_memory_that_runs_out_later_is_answered_too(train_contrastive, out_of_memory_above, tmp_path):
    out_of_memory_above(60)
    with pytest.raises(UserError, match=r"out of memory: .*; use --gradient_checkpointing"):
        train_contrastive("--rehearse never")
    assert not (tmp_path / "out" / "final").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_other_errors_stay_errors(train_contrastive, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LongEmbedModel, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_contrastive()


def test_on_the_cpu_the_peak_is_compared_with_the_limit(train_contrastive, tmp_path):
    with pytest.raises(UserError, match=r"out of memory: a peak of \d+\.\d\d GiB where 0\.05 GiB are available"):
        train_contrastive("--memory_limit_gib 0.05")
    assert not (tmp_path / "out").exists()
    train_contrastive("--memory_limit_gib 100 --max_steps 1")


def test_torch_says_so_on_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("no"))


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ())
    machine = machine_memory()
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (str(2**62), machine)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "absent")))
        assert machine_memory() == expected


@given(st.integers(1, 100_000), st.integers(64, 40_000), st.integers(1, 60_000))
def test_the_largest_budget_that_fits_is_found(limit, start, filled):
    """Against a machine with a known limit and data that fill `filled` tokens at most."""
    tried = []

    def probe(tokens):
        tried.append(tokens)
        return Probe(min(tokens, filled) <= limit, min(tokens, filled), answer=f"{tokens} tokens do not fit")

    if limit < min(64, filled):
        with pytest.raises(UserError, match="tokens do not fit"):
            largest_that_fits(probe, start)
    else:
        best = largest_that_fits(probe, start)
        assert probe(best).fits
        assert filled < best or filled <= limit or limit - best <= max(64, best // 8)
    assert len(tried) < 30
    assert len(set(tried)) >= len(tried) - 1


def test_a_text_that_does_not_fit_by_itself_ends_the_search():
    with pytest.raises(UserError, match="500"):
        largest_that_fits(lambda tokens: Probe(False, max(tokens, 500), answer=f"{max(tokens, 500)}"), 4000)


def run_python(code):
    return run_probe([sys.executable, "-c", code])


def test_what_a_process_says_is_heard():
    found = Probe(True, 5, 1.5)
    assert run_python(f"print('first'); print({json.dumps(found._asdict())!r})") == found
    assert not run_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").fits
    with pytest.raises(UserError, match=r"^no such file$"):
        run_python("import sys; print('error: no such file', file=sys.stderr); sys.exit(2)")
