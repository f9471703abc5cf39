"""
The end of a run by SIGTERM or Ctrl-C: all its processes, within seconds, one line, exit code 128 + signal.

A process that trains stops where it is. What it was writing is left incomplete and passed over later, as after a power
cut; nothing is waited for, since a process can be inside a collective operation that never returns. So it is a thread
that ends it: the main thread sees a signal only when it comes back to Python.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 20  # seconds after which a launcher kills what is left

_advice: list[Callable[[], str]] = [lambda: "training had not begun"]


def say_when_stopped(advice: Callable[[], str]) -> None:
    """How to go on, said by the main process of a run when it is stopped."""
    _advice[0] = advice


# In a process that trains


def end_on_signals() -> None:
    """Let SIGTERM and SIGINT end this process and those that it started. For entry points only."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for signum in SIGNALS:
        signal.signal(signum, _park)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    _end_with_launcher()


def _park(signum, frame) -> None:
    """Keep the main thread from whatever it would do, until the other ends the process."""
    time.sleep(60)


def _forget() -> None:
    """In a forked process: it would tell its parent of its own signals."""
    signal.set_wakeup_fd(-1)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


def _watch(reading: int) -> None:
    signum = os.read(reading, 1)[0]
    # Another handler may have taken the place of ours: `enable_jit_checkpoint` saves on SIGTERM
    while signum not in SIGNALS or signal.getsignal(signum) is not _park:
        signum = os.read(reading, 1)[0]
    if int(os.environ.get("RANK", 0)) == 0:
        _say(signum, _advice[0]())
    _leave(signum)


def _say(signum: int, advice: str = "") -> None:
    sentence = f"trl-rdro: stopped by {signal.Signals(signum).name}{advice and ': ' + advice}."
    with suppress(OSError):  # a closed terminal
        # Not `print`, whose lock the main thread may hold; a new line, because of the progress bar
        os.write(2, f"\n{sentence}\n".encode())


def _leave(signum: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    _signal_all(_children(recursive=True), signal.SIGTERM)
    os._exit(128 + signum)


def _end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the launcher dies, which `accelerate launch` does without a word to us."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if launched and sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


# In a command


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End at once, without a traceback."""

    def end(signum, frame):
        _say(signum)
        _leave(signum)

    with _handled_by(end):
        yield


@contextmanager
def passing_on_signals() -> Iterator[list[int]]:
    """Pass signals on to the processes that are launched meanwhile, and wait for their end.

    Yields:
        A list that holds the signal when one has come.
    """
    received: list[int] = []

    def pass_on(signum, frame):
        children = _children()
        if not children:
            _say(signum)
            _leave(signum)
        if received:  # `timeout` and others send it twice
            return
        received.append(signum)
        _signal_all(children, signum)
        last = threading.Timer(GRACE, lambda: _signal_all(_children(recursive=True), signal.SIGKILL))
        last.daemon = True
        last.start()

    with _handled_by(pass_on):
        yield received


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, former in previous.items():
            signal.signal(signum, former)


def _children(recursive: bool = False) -> list:
    import psutil  # slow to import, and rarely needed

    return psutil.Process().children(recursive=recursive)


def _signal_all(processes: list, signum: int) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
