"""SIGTERM and Ctrl-C ask a run to stop where it can save; a second one stops it at once.

A run looks between steps and between the batches of an evaluation, so it says on receipt that it has heard.
"""

import os
import signal
from types import FrameType


class StopRequest:
    """Installed as the handler of SIGTERM and SIGINT while it is entered; `signal` is what arrived, or None."""

    def __init__(self, speaks: bool = True) -> None:
        """Nothing has been asked for yet.

        Args:
            speaks: whether to print a line when a signal arrives.
        """
        self.signal: signal.Signals | None = None
        self._speaks = speaks

    def __enter__(self) -> "StopRequest":
        """Take over both signals."""
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        if self._speaks:  # not by print: the signal may have come in the middle of one
            os.write(2, f"{self.signal.name}: the run saves and stops at the next chance; a second one stops it at once\n".encode())
