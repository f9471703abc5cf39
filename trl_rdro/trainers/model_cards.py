"""Model cards that name the method, its paper and this package."""

from pathlib import Path

import trl_rdro

from ..losses.types import LOSS_TYPES
from .hosts import Host


class ModelCards(Host):
    """Mixin of the trainers, before TRL's class."""

    def _describe_in_model_card(self) -> None:
        """Let TRL's cards name the method and the paper of our loss in use, the first of several."""
        if self._ours:
            self._paper = LOSS_TYPES[self._ours[0]].paper
            self._name = self._ours[0].upper()
            self._tag_names = [*self._tag_names, *self._ours, "trl-rdro"]

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir, "README.md")
            text = card.read_text(encoding="utf-8")
            versions = f"\n- trl_rdro: {trl_rdro.__version__}\n- TRL: "
            card.write_text(text.replace("\n- TRL: ", versions, 1), encoding="utf-8")
