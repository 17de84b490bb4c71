"""Mistakes of a user, told in one sentence instead of a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in what the user gave us: a file, an argument, a model that cannot do what was asked.

    The message is one sentence: what is wrong, where (file, row, field), and what to do about it.
    """


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, to be part of a sentence."""
    return " ".join(str(error).split())


def run(main: Callable[[], None], after_interrupt: str = "the same command goes on where it stopped") -> NoReturn:
    """Run a script's `main` and leave with the exit code that its end deserves.

    Args:
        main: the script's entry point, without arguments.
        after_interrupt: what Ctrl-C is answered with: how to go on.

    Raises:
        SystemExit: always; 0 after success, 2 after a `UserError` (printed as `error: <sentence>` on stderr), 130 after
            Ctrl-C. Every other exception passes through with its traceback: it is our mistake, not the user's.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted: {after_interrupt}", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)
