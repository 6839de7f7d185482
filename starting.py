"""The first thing that a program does: from here on a Ctrl-C or SIGTERM is one line, also in slow imports.

    from starting import starting

    if __name__ == "__main__":
        starting()

It imports next to nothing. Python itself works for 12 ms before it reads a program's first line, in which a
Ctrl-C is its own affair; before this was a file of its own, it were 50. The rest is in config.command_line.
"""

import os
import signal
from collections.abc import Callable

TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
INTERRUPTED = "interrupted; what was finished is kept, the same command continues"
TERMINATED = "terminated; what was finished is kept, the same command continues"


def starting():
    """What a program calls before its other imports."""
    if not os.environ.get("DEBUG"):
        # Of a connection that is lost torch would print what its functions are called, thirty lines.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # After a process was killed, Python's resource tracker would print a warning below the last line.
        filters = os.environ.get("PYTHONWARNINGS", "")
        if TRACKER not in filters:
            os.environ["PYTHONWARNINGS"] = f"{filters},{TRACKER}".lstrip(",")
        on_signal(signal.SIGINT, signal.default_int_handler, end_at_once)
        on_signal(signal.SIGTERM, signal.SIG_DFL, end_at_once)


def on_signal(number: int, before, handler: Callable):
    """In the main thread: installs `handler` where `before` was; a signal that is ignored stays so."""
    if signal.getsignal(number) == before:
        signal.signal(number, handler)


def end_at_once(number: int, frame):
    line, code = (INTERRUPTED, 130) if number == signal.SIGINT else (TERMINATED, 143)
    os.write(2, f"\n{line}\n".encode())
    os._exit(code)


class signals_held:
    """Delays signals to the end of the block. Python code that C calls back, as soundfile does for files in
    memory, loses the exception of a signal handler, and the file then looks damaged."""

    def __enter__(self):
        self.came: list[int] = []
        self.before = {}
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and callable(handler := signal.getsignal(number)):
                try:
                    signal.signal(number, lambda number, frame: self.came.append(number))
                except ValueError:  # not the main thread: it receives no signals
                    return
                self.before[number] = handler

    def __exit__(self, *problem):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        for number in self.came:
            signal.raise_signal(number)
