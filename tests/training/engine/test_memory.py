"""The limit of memory, and the answer to memory that runs out."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from training.engine.memory import CPU_SHARE, GIB, Memory, MemoryArguments, available_gib, machine_memory


def memory(
    batch_tokens: int = 100,
    *,
    limit: float | None = 2.0,
    tuning: str | None = "full",
    checkpointing=False,
    resumed=False,
):
    """The memory of a training that has nothing but what the answer depends on."""
    training = SimpleNamespace(
        batches=SimpleNamespace(batch_tokens=batch_tokens), tuning=tuning, length_option="sequence_length"
    )
    options = SimpleNamespace(gradient_checkpointing=checkpointing, change_settings=["max_steps"])
    checkpoint = SimpleNamespace() if resumed else None
    loop = SimpleNamespace(arguments=options, device=torch.device("cpu"), checkpoint=checkpoint)
    return Memory(training, loop, MemoryArguments(memory_limit_gib=limit))


def chunk(tokens: int, longest: int):
    return SimpleNamespace(input_ids=torch.zeros(1, tokens), max_length_q=longest)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    expected = CPU_SHARE * machine_memory() / GIB
    assert memory(limit=None).limit_gib == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_gib(torch.device("cpu")) == expected / 4


def test_the_answer_names_the_sizes_the_peak_and_what_is_left_to_change():
    found = memory()
    found.note(chunk(90, 30))
    assert found.answer(3.5) == (
        "out of memory: a peak of 3.50 GiB where 2.00 GiB are available, with 90 tokens at once and texts of up to 30 "
        "tokens; use --gradient_checkpointing or --batch_tokens 45 or --tuning lora"
    )
    found = memory(tuning="lora", checkpointing=True)
    found.note(chunk(90, 60))
    ending = "texts of up to 60 tokens; use --sequence_length 45 with --batch_tokens 45"
    assert found.answer().startswith("out of memory: memory did not suffice where 2.00 GiB are available, with 90 ")
    assert found.answer().endswith(ending)
    found = memory(40, tuning=None, checkpointing=True)
    found.note(chunk(90, 90))
    assert found.answer().endswith("; use --sequence_length 45")


def test_a_resumed_run_is_told_what_it_may_change():
    found = memory(resumed=True)
    found.note(chunk(90, 60))
    changes = (
        "--sequence_length 45 with --batch_tokens 45 with --change_settings max_steps sequence_length batch_tokens"
    )
    assert found.answer().endswith(f"; use --gradient_checkpointing or {changes}")


def test_before_the_data_is_known_the_budget_stands_for_it():
    assert "with 100 tokens at once" in memory().answer()


def test_memory_that_runs_out_inside_is_answered_and_other_errors_are_not():
    with pytest.raises(UserError, match=r"^out of memory"), memory().answering():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), memory().answering():
        raise RuntimeError("shapes")
    with memory().answering():
        pass
