"""The package's logger: sentences a user should see once, from the main process only, without configuring anything."""

import logging

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter


class Logger(MultiProcessAdapter):
    """Accelerate's logger, which also speaks before there is a state that knows the processes: data are looked at by
    commands that never make one."""

    def log(self, level, msg, *args, **kwargs):
        if PartialState._shared_state:
            super().log(level, msg, *args, **kwargs)
        else:
            self.logger.log(level, msg, *args, **kwargs)


def get_logger(name: str) -> Logger:
    """A logger below `trl_rdro`, shown from INFO on. Configure `logging.getLogger("trl_rdro")` to change that."""
    root = logging.getLogger("trl_rdro")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[trl_rdro] %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    return Logger(logging.getLogger(name), {})
