"""Throughput: the exponent, the fresh process, the count of operations, what is refused, and what is not done twice."""

import json
from dataclasses import replace

import pytest

from common.errors import UserError
from eval import throughput
from eval.speed import interleaved
from eval.speed.flops import PEAKS, model_flops, peak_flops
from eval.speed.growth import as_markdown, draw
from eval.speed.lengths import parse_lengths
from eval.speed.measurement import Case, Workload
from eval.speed.process import case_label
from eval.throughput import Arguments, compare
from modeling_longembed import LongEmbedConfig
from tests.eval.speed.tiny_cases import TINY, tiny_case


def never(case, limit):
    raise AssertionError("a process was started")


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
    monkeypatch.setattr(interleaved, "run_case", never)
    with pytest.raises(UserError, match=sentence):
        compare(Arguments(str(tmp_path), lengths=["8"], **arguments), replace(TINY, **workload))


def test_a_document_longer_than_the_context_of_a_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved, "run_case", never)
    LongEmbedConfig(max_position_embeddings=100, attention_patterns={"type": "block", "size": 7}).save_pretrained(
        tmp_path / "model"
    )
    workload = Workload(model_name_or_path=str(tmp_path / "model"))
    case = Case(workload, None, "longembed_varlen", 100, context=1)
    assert case.config().attention_patterns[0] == {"type": "block", "size": 7}
    with pytest.raises(UserError, match=r"^full at 101 tokens: 101 tokens are more than the model's context of 100;"):
        compare(Arguments(str(tmp_path), attention_patterns=["full"], lengths=["100,101"]), workload)


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Processes that follow a law: block linear, full quadratic; a list of what was asked for."""
    asked = []

    def run_case(case, limit):
        asked.append((case_label(case), case.length))
        power = 2 if case.attention_pattern["type"] == "full" else 1
        seconds = 1e-3 * case.length**power * asked.count(asked[-1])  # every repeat takes as long again
        if seconds > limit:
            return {"outcome": "over limit"}
        return {"outcome": "measured", "seconds": seconds, "peak": 10**9 + 8 * case.length, "base": 10**9, "pid": 1}

    monkeypatch.setattr(interleaved, "run_case", run_case)
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
    monkeypatch.setattr(throughput, "describe_environment", lambda device: "other code")
    compare(arguments_of(tmp_path), TINY)
    assert len(stand_in) == 12


def test_a_run_that_is_interrupted_goes_on(tmp_path, stand_in, monkeypatch):
    run_case = interleaved.run_case

    def interrupted(case, limit):
        if len(stand_in) == 5:
            raise KeyboardInterrupt
        return run_case(case, limit)

    monkeypatch.setattr(interleaved, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(arguments_of(tmp_path), TINY)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    monkeypatch.setattr(interleaved, "run_case", run_case)
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


def test_utilisation_is_told_of_known_devices_alone(tmp_path, monkeypatch, stand_in):
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    for device in ("cpu", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"):
        with pytest.raises(UserError, match=f"^there is no peak for '{device}' in eval/speed/flops.py"):
            peak_flops(device, "bfloat16")
    monkeypatch.setattr(interleaved, "run_case", never)
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
