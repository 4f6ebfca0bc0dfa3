"""Ctrl-C as a request to stop at a good moment."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from . import processes

NOTICE = "stopping after this step; Ctrl-C again stops at once"


class Interrupt:
    """While entered, the first Ctrl-C only sets `asked`, and the second raises KeyboardInterrupt.

    notice: shows a sentence, or returns False where it cannot; then stderr has it.
    """

    def __init__(self, notice: Callable[[str], bool]) -> None:
        self.asked = False
        self._notice = notice
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
        if processes.first() and not self._notice(NOTICE):
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{NOTICE}\n".encode())
