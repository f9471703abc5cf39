"""The loss types of each trainer, TRL's and ours."""

import re

import trl

from ..losses.types import LOSS_TYPES
from .density_ratio_config import DENSITY_RATIO_LOSSES


DPO_LOSS_TYPE_HELP = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
# TRL does not validate `DPOConfig.loss_type`, and names the possible ones in its help text only
TRL_DPO_LOSSES = tuple(re.findall(r"`'(\w+)'`", DPO_LOSS_TYPE_HELP))
TRL_KTO_LOSSES = tuple(trl.KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
LOSSES_OF = {"dpo": (*TRL_DPO_LOSSES, *LOSS_TYPES), "kto": (*TRL_KTO_LOSSES, *DENSITY_RATIO_LOSSES)}
