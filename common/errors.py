"""User errors, which scripts print as one sentence instead of a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """An error in the user's input: a file, an argument, or a model that cannot do what was asked.

    The message is one sentence: what is wrong, where (file, row, field), and what to do about it.
    """


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, to be part of a sentence."""
    return " ".join(str(error).split())


def run(main: Callable[[], None], after_interrupt: str = "the same command goes on where it stopped") -> NoReturn:
    """Run the `main` function of a script, and exit with a code that says how it ended.

    Args:
        main: the script's entry point, without arguments.
        after_interrupt: how to continue after Ctrl-C; printed when that happens.

    Raises:
        SystemExit: always; 0 after success, 2 after a `UserError` (printed as `error: <sentence>` on stderr), 130 after
            Ctrl-C. Any other exception is a bug of ours and passes through with its traceback.
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
