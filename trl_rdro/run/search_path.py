"""
Where a launched process searches for modules: not in the working directory, where a file `json.py` or `torch.py` would
stand in for the library. Judges are found there all the same, after everything else (`iterate.functions`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import patch_environment


VARIABLE = "PYTHONSAFEPATH"  # Python's own


@contextmanager
def without_working_directory() -> Iterator[None]:
    """Let the processes that are started in the body leave the working directory out, which `python -m` searches first
    and the launcher of DeepSpeed puts into PYTHONPATH. Not where this package is found there itself."""
    from ..compat.engines import path_of_deepspeed_unchanged

    if Path(__file__).parents[2] == Path.cwd():
        yield
        return
    with patch_environment(**{VARIABLE: "1"}), path_of_deepspeed_unchanged():
        yield


def restore_search_path() -> None:
    """In a launched process: what it starts itself, such as a judge's programs, is to search as usual."""
    os.environ.pop(VARIABLE, None)
