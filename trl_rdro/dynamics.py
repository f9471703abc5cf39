"""The documented import path of `trl_rdro.iterate.dynamics`."""

from .iterate.dynamics import *  # noqa: F403
