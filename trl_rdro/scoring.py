"""The documented import path of `trl_rdro.tools.scoring`."""

from .tools.scoring import *  # noqa: F403
