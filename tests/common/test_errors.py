"""`common.errors.run`: messages and exit codes of scripts, checked from outside the process."""

import subprocess
import sys

import pytest


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
