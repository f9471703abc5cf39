"""trl_rdro: density-ratio and distributionally robust preference losses for TRL.

Names are imported on first use, so that `import trl_rdro` and `trl_rdro.losses` do not pay for TRL's trainers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .compat.versions import require_supported_versions


if TYPE_CHECKING:
    from .configs.dpo_config import DPOConfig
    from .configs.kto_config import KTOConfig
    from .trainers.dpo_trainer import DPOTrainer
    from .trainers.kto_trainer import KTOTrainer

__version__ = "0.2.0"

_MODULES = {
    "DPOConfig": ".configs.dpo_config",
    "DPOTrainer": ".trainers.dpo_trainer",
    "KTOConfig": ".configs.kto_config",
    "KTOTrainer": ".trainers.kto_trainer",
}

__all__ = ["DPOConfig", "DPOTrainer", "KTOConfig", "KTOTrainer", "__version__"]

require_supported_versions()


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULES))
