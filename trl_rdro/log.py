"""The package's logger: sentences a user should see once, from the main process only, without configuring anything."""

import logging

from accelerate.logging import MultiProcessAdapter
from accelerate.logging import get_logger as get_accelerate_logger


def get_logger(name: str) -> MultiProcessAdapter:
    """A logger below `trl_rdro`, shown from INFO on. Configure `logging.getLogger("trl_rdro")` to change that."""
    root = logging.getLogger("trl_rdro")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[trl_rdro] %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    return get_accelerate_logger(name)
