"""Throughput: the exponent, the fresh process, the count of operations, what is refused, and what is not done twice."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from eval import throughput
from eval.speed.flops import PEAKS, model_flops, peak_flops
from eval.speed.growth import as_markdown, draw, growth_exponent
from eval.speed.measurement import Case, Workload
from eval.throughput import Arguments, compare, parse_lengths, run_process
from modeling_longembed import LongEmbedConfig, LongEmbedModel

TINY = Workload(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64, device="cpu", threads=1
)


def tiny_case(length, kernel="longembed_varlen", pattern=None, **fields):
    return Case(replace(TINY, **fields), pattern, kernel, length, context=length)


def never(case, limit):
    raise AssertionError("a process was started")


# Growth ---------------------------------------------------------------------------------------------------------------


@given(
    exponent=st.floats(-1, 3),
    factor=st.floats(1e-6, 1e6),
    lengths=st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True),
)
def test_the_exponent_of_a_power_law_is_recovered(exponent, factor, lengths):
    values = [factor * length**exponent for length in lengths]
    assert growth_exponent(lengths, values) == pytest.approx(exponent, abs=1e-6)


def test_the_exponent_is_the_slope_of_least_squares():
    lengths, values = [1, 2, 4, 8], [1.0, 5.0, 3.0, 20.0]
    x, y = np.log(lengths), np.log(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert growth_exponent(lengths, values) == pytest.approx(slope)
    assert np.isnan(growth_exponent([4096], [1.0]))
    assert np.isnan(growth_exponent([4096, 8192], [0.0, 1.0]))


# The command line -----------------------------------------------------------------------------------------------------


def test_lengths_of_the_command_line():
    assert parse_lengths(["4096,8192", "128"]) == [128, 4096, 8192]
    for words in (["4k"], ["0"], ["-1"], [""], []):
        with pytest.raises(UserError, match=r"^--lengths: '.*' is no number of tokens; write such as 4096,8192$"):
            parse_lengths(words)


@pytest.mark.parametrize(
    ("arguments", "workload", "sentence"),
    [
        ({"attention_patterns": ["blok"]}, {}, r"^blok at 8 tokens: attention_patterns: there is no pattern 'blok'"),
        ({"attention_patterns": ["block:size=x"]}, {}, r"^block:size=x at 8 .* give a whole number of at least 1"),
        ({"attn_implementation": ["fast"]}, {}, r"^own patterns \(fast\) at 8 tokens: attn_implementation='fast' is"),
        ({}, {"hidden_size": 34}, r"^own patterns at 8 tokens: hidden_size=34 is not num_attention_heads=4"),
        ({}, {"model_name_or_path": "no/such/folder"}, r"^own patterns at 8 tokens: "),
        ({"repeats": 0}, {}, "must be positive"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(tmp_path, monkeypatch, arguments, workload, sentence):
    monkeypatch.setattr(throughput, "run_process", never)
    with pytest.raises(UserError, match=sentence):
        compare(Arguments(str(tmp_path), lengths=["8"], **arguments), replace(TINY, **workload))


def test_a_document_longer_than_the_context_of_a_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "run_process", never)
    LongEmbedConfig(max_position_embeddings=100, attention_patterns={"type": "block", "size": 7}).save_pretrained(
        tmp_path / "model"
    )
    workload = Workload(model_name_or_path=str(tmp_path / "model"))
    case = Case(workload, None, "longembed_varlen", 100, context=1)
    assert case.config().attention_patterns[0] == {"type": "block", "size": 7}
    with pytest.raises(UserError, match=r"^full at 101 tokens: 101 tokens are more than the model's context of 100;"):
        compare(Arguments(str(tmp_path), attention_patterns=["full"], lengths=["100,101"]), workload)


# The fresh process ----------------------------------------------------------------------------------------------------


def test_the_process_is_fresh_and_its_memory_its_own():
    ballast = np.ones(900 << 20, dtype=np.uint8)  # a process inherits the ru_maxrss of the one that starts it
    length, heads = 3000, 4
    large = run_process(tiny_case(length, kernel="eager"), limit=200)
    small = run_process(tiny_case(64, kernel="eager"), limit=200)
    assert ballast.all()
    assert len({os.getpid(), large["pid"], small["pid"]}) == 3
    scores = 4 * heads * length**2  # bytes of the weights of one layer, which eager attention holds at least once
    assert scores < large["peak"] - large["base"] < 8 * scores
    assert 0 <= small["peak"] - small["base"] < scores / 10
    assert small["peak"] < 900 << 20


def test_a_training_step_is_counted_with_gradients_and_moments():
    fields = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 2048}
    kept, recomputed = (
        run_process(tiny_case(512, mode="training", gradient_checkpointing=flag, **fields), limit=200)
        for flag in (False, True)
    )
    parameters = 4 * LongEmbedModel(tiny_case(512, **fields).config()).num_parameters()  # bytes
    for result in (kept, recomputed):
        assert result["base"] > 3 * parameters  # weights and both moments
        assert result["peak"] - result["base"] > parameters  # gradients
    assert recomputed["peak"] - recomputed["base"] < kept["peak"] - kept["base"]


def test_a_process_that_takes_too_long_is_stopped_and_said_so():
    assert run_process(tiny_case(64), limit=0.01) == {"outcome": "over limit"}


def test_a_process_that_fails_is_told_in_a_sentence_and_one_that_is_killed_was_out_of_memory(tmp_path, monkeypatch):
    """Stand-ins for Python: no process that we start fails by itself."""
    for name, script in (("fails", "echo 'ValueError: no' >&2; exit 1"), ("killed", "kill -9 $$")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "fails"))
    with pytest.raises(UserError, match=r"^own patterns at 64 tokens could not be measured: ValueError: no$"):
        run_process(tiny_case(64), limit=200)
    monkeypatch.setattr("sys.executable", str(tmp_path / "killed"))
    assert run_process(tiny_case(64), limit=200) == {"outcome": "out of memory"}


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Processes that follow a law: block linear, full quadratic; a list of what was asked for."""
    asked = []

    def run_process(case, limit):
        asked.append((throughput.label(case), case.length))
        power = 2 if case.attention_pattern["type"] == "full" else 1
        seconds = 1e-3 * case.length**power * asked.count(asked[-1])  # every repeat takes as long again
        if seconds > limit:
            return {"outcome": "over limit"}
        return {"outcome": "measured", "seconds": seconds, "peak": 10**9 + 8 * case.length, "base": 10**9, "pid": 1}

    monkeypatch.setattr(throughput, "run_process", run_process)
    return asked


def arguments_of(folder, **fields):
    fields = {"attention_patterns": ["full", "block:size=4"], "lengths": ["16,32,64"], "repeats": 2} | fields
    return Arguments(str(folder), **fields)


def test_repeats_are_interleaved_and_tables_tell_the_growth(tmp_path, stand_in):
    curves = compare(arguments_of(tmp_path), TINY)
    round_of_all = [(name, length) for length in (16, 32, 64) for name in ("full", "block:size=4")]
    assert stand_in == 2 * round_of_all
    assert curves[0].exponents("seconds") == (pytest.approx(2), pytest.approx(2))
    assert curves[1].exponents("seconds") == (pytest.approx(1), pytest.approx(1))
    assert curves[1].exponents("memory") == (pytest.approx(1), pytest.approx(1))
    speed, memory = as_markdown(curves, [16, 32, 64]).split("\n\n")[1::2]
    assert speed.splitlines()[0] == "| pattern | 16 | 32 | 64 | exponent | of the last two |"
    assert speed.splitlines()[3] == "| block:size=4 | 667 ± 33% | 667 ± 33% | 667 ± 33% | 1.00 | 1.00 |"
    assert memory.splitlines()[2] == "| full | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    draw(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_not_measured_again(tmp_path, stand_in, monkeypatch):
    compare(arguments_of(tmp_path), TINY)
    stand_in.clear()
    compare(arguments_of(tmp_path), TINY)
    assert stand_in == []
    compare(arguments_of(tmp_path, repeats=3, lengths=["16"]), TINY)  # of another context: all three anew
    assert len(stand_in) == 6
    stand_in.clear()
    compare(arguments_of(tmp_path, repeats=3), TINY)
    assert len(stand_in) == 6
    stand_in.clear()
    compare(arguments_of(tmp_path), replace(TINY, mode="training"))
    assert len(stand_in) == 12
    stand_in.clear()
    monkeypatch.setattr(throughput, "where", lambda device: "other code")
    compare(arguments_of(tmp_path), TINY)
    assert len(stand_in) == 12


def test_a_run_that_is_interrupted_goes_on(tmp_path, stand_in, monkeypatch):
    run_process = throughput.run_process

    def interrupted(case, limit):
        if len(stand_in) == 5:
            raise KeyboardInterrupt
        return run_process(case, limit)

    monkeypatch.setattr(throughput, "run_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(arguments_of(tmp_path), TINY)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    monkeypatch.setattr(throughput, "run_process", run_process)
    compare(arguments_of(tmp_path), TINY)
    assert len(stand_in) == 12


def test_what_is_over_the_limit_is_said_and_longer_documents_are_left_out(tmp_path, stand_in):
    curves = compare(arguments_of(tmp_path, max_seconds=0.6), TINY)
    assert stand_in.count(("full", 32)) == 1
    assert ("full", 64) not in stand_in
    rows = as_markdown(curves, [16, 32, 64]).splitlines()
    assert rows[4].split(" | ")[2:4] == ["over limit", "over limit"]
    assert curves[0].lengths == [16]
    assert curves[1].lengths == [16, 32, 64]
    stand_in.clear()
    curves = compare(arguments_of(tmp_path, max_seconds=60), TINY)  # more time: what was stopped is tried again
    assert {name for name, _ in stand_in} == {"full"}
    assert curves[0].lengths == [16, 32, 64]


def test_the_script(tmp_path, monkeypatch, capsys):
    words = "--attention_patterns block:size=16 --lengths 128 --repeats 1 --num_hidden_layers 1 --hidden_size 32"
    words += f" --num_attention_heads 4 --intermediate_size 64 --device cpu --output_dir {tmp_path}"
    monkeypatch.setattr("sys.argv", ["throughput.py", *words.split()])
    throughput.main()
    printed = capsys.readouterr().out
    assert "repeat 1, block:size=16, 128 tokens: " in printed
    assert "tokens/s" in printed
    assert (tmp_path / "table.md").read_text().count("| block:size=16 |") == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# Floating-point operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("pattern", "kernel", "pairs"),
    [
        ("full", "eager", lambda length: length**2),
        ({"type": "block", "size": 16}, "longembed_varlen", lambda length: 16 * length),
    ],
)
def test_operations_are_those_that_torch_counts(pattern, kernel, pairs, gated):
    """These kernels compute no pair that the pattern does not ask for."""
    config = LongEmbedConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        sublayer_pattern="ssff",
        attention_patterns=pattern,
        feed_forward_gated=gated,
        hidden_dropout_prob=0.0,
    )
    model = LongEmbedModel._from_config(config, attn_implementation=kernel)
    # The fused kernel of the CPU is not in torch's table, the products of the plain one are.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.ones(1, 64, dtype=torch.long))
    assert model_flops(config, 64) == counter.get_total_flops()
    assert model_flops(config, 64, "training") == 3 * model_flops(config, 64)
    more = model_flops(config, 128) - 2 * model_flops(config, 64)
    assert more == 2 * 2 * 2 * 32 * (pairs(128) - 2 * pairs(64))  # multiply and add, QK and PV, layers, width


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_counted_by_the_predicate(causal):
    length, window, heads = 50, 3, 4
    pairs = sum(abs(i - j) <= window and (j <= i or not causal) for i in range(length) for j in range(length))
    fields = {"hidden_size": 32, "num_attention_heads": heads, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LongEmbedConfig(**fields, attention_patterns={"type": "sliding", "window": window}, is_causal=causal)
    products = length * (4 * 32**2 + 2 * 32 * 48) + 2 * 32 * pairs
    assert model_flops(config, length) == 2 * products


def test_utilisation_is_told_of_known_devices_alone(tmp_path, monkeypatch, stand_in):
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    for device in ("cpu", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"):
        with pytest.raises(UserError, match=f"^there is no peak for '{device}' in eval/speed/flops.py"):
            peak_flops(device, "bfloat16")
    monkeypatch.setattr(throughput, "run_process", never)
    monkeypatch.setattr("sys.argv", ["throughput.py", "--flops", "--device", "cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"^there is no peak for 'cpu'"):
        throughput.main()
    assert all(peaks["half"] > peaks["float32"] for peaks in PEAKS.values())


def test_utilisation_is_operations_by_time_by_peak(tmp_path, stand_in):
    curves = compare(arguments_of(tmp_path, flops=True, repeats=1), TINY)
    measured = json.loads((tmp_path / "results.json").read_text())[0]
    config = tiny_case(16, pattern={"type": "full"}).config()
    expected = model_flops(config, 16) / measured["seconds"] / 2e9
    assert curves[0].utilisation(16, 2e9) == pytest.approx(expected)
    assert f"| full | {expected:.1%} |" in as_markdown(curves, [16, 32, 64], 2e9)
