"""A directory that is made once, also by several processes that want it at the same time."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(directory)` if it is not there. Interrupted, that leaves no half of it behind."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.", suffix=".tmp"))
        try:
            make(temporary)
            os.rename(temporary, target)
        except OSError:
            if not target.exists():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target
