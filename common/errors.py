"""User errors, which scripts print as one sentence instead of a traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Faults of the machine, or of the place that a user names. That a file is missing may be a mistake of ours.
_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.EINVAL),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


class UserError(Exception):
    """An error in the user's input: a file, an argument, or a model that cannot do what was asked.

    The message is one sentence: what is wrong, where (file, row, field), and what to do about it.
    """


def one_line(error: object, most: int = 600) -> str:
    """Return a message, such as that of an exception, without line breaks, to be part of a sentence.

    Args:
        error: the exception.
        most: characters; what is longer is cut off, such as a value that the message repeats.
    """
    words = " ".join(str(error).split())
    return words if len(words) <= most else f"{words[:most]}..."


def machine_fault(error: BaseException | None) -> str | None:
    """Return a sentence for an exception that a full disk or an unusable place on it has caused; None for any other.

    Args:
        error: the exception. Its causes are looked at too, because libraries wrap such an error in one of their own.
    """
    while error is not None:
        # safetensors writes in Rust, and has the number of the error in its message alone.
        told = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        # A copy names two files, and the second is the one that is written.
        name = getattr(error, "filename2", None) or getattr(error, "filename", None)
        place = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
        if number in _FULL:
            return f"{place}the disk is full ({os.strerror(number)}); make room, and start the same command again"
        if number in _PLACE:
            return f"{place or 'a file '}cannot be used ({os.strerror(number)}); give a place that can be written to"
        # torch's writer raises its own error while it handles that of the file.
        error = error.__cause__ or (error.__context__ if "inline_container" in str(error) else None)
    return None


# What libraries raise for a file that is damaged. Those of the second kind have no words for a reader.
_REFUSED = (OSError, ValueError, ImportError, RuntimeError)
_STUMBLED = (LookupError, TypeError, AttributeError, AssertionError, RecursionError)


@contextmanager
def reading(what: str, path: str | Path | None = None) -> Iterator[None]:
    """Turn what a library raises in the block, where it reads files that the user names, into a `UserError`.

    Args:
        what: the beginning of the sentence: the option and its value, or the file.
        path: the file or the folder of the files, if they are on this machine.

    Raises:
        UserError: the library raised an error; its own is the cause.
    """
    try:
        yield
    except Exception as error:
        # The libraries in Rust raise a class of their own, or `Exception` itself.
        known = isinstance(error, (*_REFUSED, *_STUMBLED)) or type(error).__name__ in ("SafetensorError", "Exception")
        if isinstance(error, UserError) or not known:
            raise
        if pointers := _lfs_pointers(path):
            reason = f"{pointers[0]} is a git-lfs pointer instead of the file; fetch it with git lfs pull"
        elif isinstance(error, _STUMBLED):
            told = f"{type(error).__name__}: {one_line(error)}"
            reason = f"one of its files is damaged or has another format ({told}); copy or download it again"
        else:
            reason = one_line(error)
        raise UserError(f"{what}: {reason}") from error


def _lfs_pointers(path: str | Path | None) -> list[Path]:
    """Return the files at a path that hold a pointer of git-lfs in place of what belongs there."""
    files = [] if path is None else [Path(path), *Path(path).glob("*"), *Path(path).glob("*/*")]
    found = []
    for file in files:
        if file.is_file() and file.stat().st_size < 1000:
            with open(file, "rb") as opened:
                if opened.read(40).startswith(b"version https://git-lfs"):
                    found.append(file)
    return found


def run(main: Callable[[], None], after_interrupt: str = "the same command goes on where it stopped") -> NoReturn:
    """Run the `main` function of a script, and exit with a code that says how it ended.

    Args:
        main: the script's entry point, without arguments.
        after_interrupt: how to continue after Ctrl-C; printed when that happens.

    Raises:
        SystemExit: always; 0 after success, 2 after a `UserError` or a `machine_fault` (printed as `error: <sentence>`
            on stderr), 130 after Ctrl-C. Any other exception is a bug of ours and passes through with its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {one_line(error, most=1500)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted: {after_interrupt}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        print(f"error: {one_line(fault)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)
