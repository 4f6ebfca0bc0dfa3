"""Ctrl-C as a request to stop at a good moment."""

import contextlib
import os
import signal
import threading
from typing import Any

from . import processes


class Interrupt:
    """While entered, the first Ctrl-C only sets `asked`, and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> None:
        self.asked = False
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not processes.first():
            return
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
