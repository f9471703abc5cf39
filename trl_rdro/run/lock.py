"""One run per output directory: a lock that goes with the process that holds it, however that ends."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import UserError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The underscore keeps it out of what the Trainer uploads
LOCK = "_lock"

# The locks of this process: a loop holds its directory and its trainer another below it, or the same once more
_held: set[Path] = set()


class Unusable(UserError):
    """Another process runs in this directory, or it cannot be written to."""


@contextmanager
def only_run_in(directory: str | Path) -> Iterator[None]:
    """Hold the lock of `directory` in the main process. On all ranks at once.

    Raises:
        `Unusable`: on every rank, if another process holds it, or if the directory cannot be made.
    """
    path, state = Path(directory).resolve() / LOCK, PartialState()
    file, refusal = None, None
    if state.is_main_process and path not in _held:
        file, refusal = _acquire(path)
    if state.num_processes > 1:
        (refusal,) = broadcast_object_list([refusal])
    if refusal is not None:
        raise Unusable(refusal)
    if file is None:
        yield
        return
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError), file:
            file.truncate(0)


def _acquire(path: Path) -> tuple[IO[str] | None, str | None]:
    """The open file that holds the lock, or the sentence that says who holds it."""
    if fcntl is None:
        return None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  (open as long as the lock is held)
    except OSError as error:
        return None, f"`output_dir={str(path.parent)!r}` cannot be written to ({error.strerror}). Give another."
    try:
        # Not `flock`: a worker process of the data loader would inherit that, and keep it when this process is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read()
        file.close()
        return None, _refusal(path.parent, holder)
    except OSError:  # a file system without locks
        file.close()
        return None, None
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file, None


def _refusal(directory: Path, holder: str) -> str:
    with suppress(ValueError, TypeError, KeyError):
        entry = json.loads(holder)
        holder = f"process {entry['pid']} on {entry['host']}"
    return (
        f"Another run is writing to `output_dir={str(directory)!r}` ({holder or 'just started'}). Wait for its end, "
        "stop it, or give another `output_dir`."
    )
