"""
Settings every test needs before torch is imported, two that only make the suite quicker, and the saved models.

One thread per process: with tiny models a second thread costs more than it brings, and the tests already run in
several processes. No hub: a test that reached for the network would hang or fail in CI, so it fails at once here.
"""

import gc
import os


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "1"  # switches off TRL's usage telemetry

import pytest  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402

from .tiny import save_tiny  # noqa: E402


torch.set_num_threads(1)

# `Trainer.train` collects garbage on the way out, which walks every object the imports above created (a third of a
# second per run). Those objects live as long as the process: take them out of the collector's sight.
trl.DPOTrainer  # noqa: B018  (TRL imports lazily)
gc.collect()
gc.freeze()


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> str:
    """A saved tiny Qwen2 and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """A saved tiny Llama with tied embeddings, and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", tie=True)


@pytest.fixture(scope="session")
def model(qwen2) -> str:
    """Where the kind does not matter."""
    return qwen2


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every figure that is drawn."""
    from trl_rdro.tools import plotting

    drawn = []

    class Recording(plotting.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(plotting, "Figure", Recording)
    return drawn
