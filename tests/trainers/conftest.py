"""What the trainers say."""

import logging

import pytest


@pytest.fixture
def messages(caplog):
    """The sentences logged by the package so far."""
    caplog.set_level(logging.INFO, logger="trl_rdro")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_rdro")]
