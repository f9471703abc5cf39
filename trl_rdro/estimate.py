"""The documented import path of `trl_rdro.tools.memory`."""

from .tools.memory import *  # noqa: F403
