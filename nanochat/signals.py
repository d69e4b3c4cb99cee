"""SIGTERM and Ctrl-C ask a run to stop at the next step boundary, where it can save; a second Ctrl-C stops it at once."""

import signal
from types import FrameType


class StopRequest:
    """Installed as the handler of SIGTERM and SIGINT while it is entered; `signal` is what arrived, or None."""

    def __init__(self) -> None:
        """Nothing has been asked for yet."""
        self.signal: signal.Signals | None = None

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
