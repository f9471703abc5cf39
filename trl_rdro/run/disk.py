"""A full disk, said in one sentence whatever library met it."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DiskFull(OSError):
    """Something could not be written because there is no room."""


def is_full(error: BaseException) -> bool:
    """Whether an exception says that the disk, a quota or a limit on file sizes is exhausted."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # Libraries in other languages give the system's sentence or, as torch's archive writer does, none
    text = str(error)
    says_so = any(words in text for words in ("No space left", "quota exceeded", "File too large"))
    return says_so or (isinstance(error, RuntimeError) and "PytorchStreamWriter failed writing" in text)


@contextmanager
def full_disk_said(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """
    Raises:
        `DiskFull`: for an exception in the body that means a full disk.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(f"No room on the disk for {what}. {advice()}") from error
