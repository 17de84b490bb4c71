"""`common.errors.run`: messages and exit codes of scripts, checked from outside the process."""

import subprocess
import sys

import pytest

from common.errors import UserError, reading


@pytest.mark.parametrize(
    ("body", "code", "stdout", "stderr"),
    [
        ("print('done')", 0, "done\n", ""),
        ("raise UserError('no such file x')", 2, "", "error: no such file x\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted: the same command goes on where it stopped\n"),
    ],
)
def test_exit_code_and_one_line(body, code, stdout, stderr):
    script = f"from common.errors import UserError, run\ndef main():\n    {body}\nrun(main)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (code, stdout, stderr)


def test_a_script_says_how_to_go_on():
    script = "from common.errors import run\ndef main():\n    raise KeyboardInterrupt\nrun(main, 'add --again')"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (130, "interrupted: add --again\n")


def test_our_own_mistakes_keep_their_traceback():
    script = "from common.errors import run\ndef main():\n    {}['absent']\nrun(main)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "KeyError: 'absent'" in process.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise OSError(28, 'No space left on device', '/x/y')", "/x/y: the disk is full"),
        ("raise RuntimeError('wrapped') from OSError(28, 'No space left on device')", "the disk is full"),
        ("open('/proc/version/below')", "/proc/version/below: cannot be used (Not a directory)"),
        ("open('/')", "/: cannot be used (Is a directory)"),
        ("import pathlib; pathlib.Path('/proc/version').mkdir()", "/proc/version: cannot be used (File exists)"),
    ],
)
def test_a_full_disk_and_an_unusable_place_are_one_sentence(body, words):
    script = f"from common.errors import run\ndef main():\n    {body}\nrun(main)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {words}")
    assert process.stderr.count("\n") == 1


def test_what_a_library_raises_over_a_damaged_file_is_a_sentence_and_our_own_mistakes_are_not(tmp_path):
    damaged = r"x: one of its files is damaged .*\(KeyError: 'type'\)"
    for error, words in ((ValueError("a\nb"), "x: a b"), (KeyError("type"), damaged)):
        with pytest.raises(UserError, match=words) as refused, reading("x"):
            raise error
        assert refused.value.__cause__ is error
    with pytest.raises(ZeroDivisionError), reading("x"):
        raise ZeroDivisionError
    (tmp_path / "weights").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="weights is a git-lfs pointer"), reading("x", tmp_path):
        raise ValueError
