"""The training of one round: our trainers on rows that are tokenised already and bring their reference."""

import copy
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed
from trl import get_peft_config, get_quantization_config

from ..configs.density_ratio_config import DENSITY_RATIO_LOSSES
from ..errors import user_error
from ..trainers.dpo_trainer import DPOTrainer
from ..trainers.kto_trainer import KTOTrainer
from .config import IterateConfig
from .files import Row, partial
from .policies import load_adapter


class _Tokenised:
    """Mixin: trains on the very tokens that were sampled, which a text does not always give back."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


class TokenisedDPOTrainer(_Tokenised, DPOTrainer):
    pass


class TokenisedKTOTrainer(_Tokenised, KTOTrainer):
    pass


TRAINERS = {"dpo": TokenisedDPOTrainer, "kto": TokenisedKTOTrainer}


def train_round(
    config: IterateConfig,
    args: Any,
    model_args: Any,
    rows: list[Row],
    previous: Path | None,
    folder: Path,
    number: int,
) -> None:
    """Train on `rows` from the policy saved at `previous` (None: from pi_0) and save the result to `folder/model`."""
    model_dir, state = folder / "model", PartialState()
    if not model_dir.exists():
        set_seed(args.seed + number)  # a new adapter is random
        trainer = _build(config, _round_args(config, args, folder, number), model_args, rows, previous)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_state()
        trainer.save_model(str(partial(model_dir)))
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.copy(folder / "trainer" / "trainer_state.json", partial(model_dir))  # the curves
            partial(model_dir).rename(model_dir)
        trainer.accelerator.free_memory()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / "trainer", ignore_errors=True)


def _round_args(config: IterateConfig, args: Any, folder: Path, number: int) -> Any:
    args = copy.copy(args)
    args.output_dir = str(folder / "trainer")
    args.seed += number
    args.precompute_ref_log_probs = True  # "precomputed" in the columns of the data
    if config.method == "kto" and args.loss_type in DENSITY_RATIO_LOSSES:
        args.preferred_fraction = 0.5  # each pair gives one of each
    return args


def _build(config: IterateConfig, args: Any, model_args: Any, rows: list[Row], previous: Path | None) -> Any:
    is_adapter = model_args.use_peft
    with user_error(ValueError, OSError, ImportError, NotImplementedError):
        trainer = TRAINERS[config.method](
            model=model_args.model_name_or_path if previous is None or is_adapter else str(previous),
            args=args,
            train_dataset=Dataset.from_list(rows),
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    if previous is not None and is_adapter:
        load_adapter(trainer.model, previous)
    return trainer
