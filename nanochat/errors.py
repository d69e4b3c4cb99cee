"""Bad input ends a run with one clear line and exit status 2.

Anything a user can get wrong (a flag, a path, a file's contents) raises `BadInput` with a message that says what is wrong
and how to mend it. Scripts hand their `main` to `run`, the only place that turns it into an exit status; a bug still
shows its traceback.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class BadInput(Exception):
    """The user's input cannot be used; the message is one line that says why and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text of fifty flags."""

    def error(self, message: str) -> NoReturn:
        """Print `message` with a pointer to --help and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def status(error: Exception) -> int:
    """The exit status of a process that ends with `error`: 2 for bad input, 1 for what else Python shows a traceback of."""
    return 2 if isinstance(error, BadInput) else 1


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 when it returns, 2 with one line on stderr when it raises `BadInput`."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(status(error))
    sys.exit(0)
