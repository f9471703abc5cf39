"""What is said of a name that cannot be loaded."""

import pytest
from huggingface_hub.errors import GatedRepoError

from trl_rdro.errors import UserError
from trl_rdro.tools.loading import loading


def raise_wrapped(inner: Exception) -> None:
    try:
        raise inner
    except Exception as error:
        raise OSError("you are trying to access a repo") from error


def test_a_gated_repository_is_not_said_to_be_missing():
    gated = GatedRepoError.__new__(GatedRepoError)  # its constructor wants an answer of the hub
    words = "cannot load the model a/b: it is gated on the hub; accept its terms .*`hf auth login`$"
    with pytest.raises(UserError, match=words), loading("the model", "a/b", OSError):
        raise_wrapped(gated)
    words = r"cannot load the model a/b \(not a local directory, and not found on the hub\)"
    with pytest.raises(UserError, match=words), loading("the model", "a/b", OSError):
        raise_wrapped(KeyError("x"))
    with pytest.raises(KeyError), loading("the model", "a/b", OSError):  # what was not named keeps its traceback
        raise KeyError("x")
