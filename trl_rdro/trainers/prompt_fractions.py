"""The share of preferred completions of each prompt: counted where that can be done, and missed where it matters."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from ..checks.arrow import lengths
from ..checks.datasets import evaluation_sets
from ..checks.rules import as_array
from ..configs.density_ratio_config import require_cap_above_start
from ..log import get_logger
from ..losses.types import of_family


logger = get_logger(__name__)

COLUMN = "preferred_fraction"
ENOUGH = 4  # labelled completions of a prompt, for its share to be counted
CHANCE = 4.0  # standard deviations that chance does not reach
VISIBLE = 0.05  # standard deviation between the prompts' shares that is worth a word
BATCH = 10_000


def has_shares(dataset: Any) -> bool:
    """Whether a data set brings the column `preferred_fraction`."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    return COLUMN in (dataset.column_names or next(iter(dataset), {}))


def require_countable(dataset: Any) -> None:
    """Raises `ValueError` for a stream."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "`count_fraction_by_prompt=True` cannot count on a streaming `train_dataset`. Load the data set without "
            f"streaming, or give the shares in a column `{COLUMN}`."
        )


def refuse_beside_pairs(example: Mapping[str, Any]) -> None:
    """Refuse the column in a row that is a pair, whose share is 1/2."""
    if COLUMN in example and example.keys() & {"chosen", "chosen_ids"}:
        raise ValueError(
            f"`train_dataset` has a column `{COLUMN}` beside pairs, of whose completions one half is preferred for "
            "every prompt. Remove the column."
        )


def require_shares_alone(args: Any, example: Mapping[str, Any]) -> None:
    """Refuse what the column contradicts: another source of the same share, and pairs."""
    refuse_beside_pairs(example)
    defaults = {"rdro_alpha": None, "ddro_t": None, COLUMN: None, "count_fraction_by_prompt": False}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` and the column `{COLUMN}` of `train_dataset` both say what the "
                "share of preferred completions is. Leave one of them out."
            )


def warn_of_unread_shares(example: Mapping[str, Any], loss_type: str) -> None:
    """Say that one of TRL's losses does not read the column."""
    if COLUMN in example:
        logger.warning(
            f"The column `{COLUMN}` of `train_dataset` has no effect: `loss_type` is {loss_type}, and only "
            f"{' and '.join(of_family('density_ratio'))} read it."
        )


def warn_of_shares_in_evaluation_alone(eval_dataset: Any) -> None:
    """Say that the column is not read where the training set lacks it."""
    for name, dataset in evaluation_sets(eval_dataset).items():
        if has_shares(dataset):
            logger.warning(
                f"The column `{COLUMN}` of `{name}` has no effect: "
                "`train_dataset` has none, so that one share is used for all prompts. Give both the column."
            )


def preferred_share(dataset: Dataset | IterableDataset) -> float:
    """The share of a set's completions, by their weights if they have some, whose label is True. 0 of none, and where
    all weights are 0."""
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)
        labels = dataset["label"][:]
        weights = dataset["weight"][:] if "weight" in dataset.column_names else [1.0] * len(labels)
    else:
        labels, weights = [], []
        for row in dataset:
            labels.append(row["label"])
            weights.append(row.get("weight", 1.0))
    preferred, total = sum(weight for weight, label in zip(weights, labels, strict=True) if label), sum(weights)
    return preferred / total if total else 0.0


def with_shares(dataset: Any, args: Any, loss_type: str, fraction: float | None) -> Any:
    """A prepared data set with the column: its own, or counted (see `count_by_prompt`); a stream to be evaluated has
    none then. For ddro `ddro_cap` has to be above each share, or training would start beyond the cap there."""
    if isinstance(dataset, IterableDataset) and args.count_fraction_by_prompt:
        return dataset
    if COLUMN not in (dataset.column_names or {COLUMN}):
        assert fraction is not None  # counted on the training set
        dataset = count_by_prompt(dataset, fraction)
    if loss_type == "ddro" and isinstance(dataset, Dataset):
        require_cap_above_start(max(dataset.with_format(None)[COLUMN][:]), args.ddro_cap)
    elif loss_type == "ddro":
        dataset = dataset.map(_require_cap_above_start, fn_kwargs={"cap": args.ddro_cap})
    return dataset


def _require_cap_above_start(row: dict[str, Any], cap: float) -> dict[str, Any]:
    require_cap_above_start(row[COLUMN], cap)
    return row


class Labels(NamedTuple):
    """The labels of a prepared data set by prompt; all arrays `(n,)`."""

    prompt: np.ndarray  # a number for each prompt
    label: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> "Labels":
        numbers: dict[bytes, int] = {}
        prompts = []
        for table in dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(BATCH):
            ids = as_array(table["prompt_ids"])
            for tokens in np.split(ids.flatten().to_numpy(), np.cumsum(lengths(ids))[:-1]):
                digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
                prompts.append(numbers.setdefault(digest, len(numbers)))
        rows = dataset.with_format(None)
        weights = rows["weight"][:] if "weight" in rows.column_names else np.ones(len(prompts))
        return cls(np.array(prompts), np.array(rows["label"][:], dtype=float), np.array(weights, dtype=float))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of `(n,)` values over the completions of each prompt, `(prompts,)`."""
        return np.bincount(self.prompt, values)


def count_by_prompt(dataset: Dataset, fraction: float) -> Dataset:
    """The data set with the column `preferred_fraction`.

    For a completion of a prompt with `ENOUGH` or more it is the share of preferred ones among the prompt's OTHERS,
    with one more that is preferred to the degree `fraction`, the share of the whole set, which others have as theirs.
    Its own label is left out since the weights 1 / share would not be right on average otherwise. Of 20 outcomes with
    shares .15, .4 and .65 the KL to p+ that rdro leaves is .0655 with one share for all, .0347 with k/K at K = 4 and
    .0014 with these; at K = 8 .0044 and .0035.
    """
    labels = Labels.of(dataset)
    counts = labels.sums((labels.weight > 0).astype(float))[labels.prompt]
    others = labels.sums(labels.weight)[labels.prompt] - labels.weight
    preferred = labels.sums(labels.weight * labels.label)[labels.prompt] - labels.weight * labels.label
    shares = np.where(counts >= ENOUGH, (preferred.clip(min=0) + fraction) / (others + 1), fraction)
    of_prompts = labels.sums((labels.weight > 0).astype(float))
    counted, few = int((of_prompts >= ENOUGH).sum()), int(((of_prompts > 1) & (of_prompts < ENOUGH)).sum())
    advice = f" For the {few} with 2 or 3 make pairs of a preferred and another one, which need no such share."
    logger.info(
        f"Preferred fraction counted for {counted} of {len(of_prompts)} prompts, those with {ENOUGH} completions or "
        f"more; the others have that of the whole set, {fraction:.4f}.{advice if few else ''}"
    )
    return dataset.add_column(COLUMN, shares.tolist())


def warn_of_unequal_shares(dataset: Dataset) -> None:
    """Say that the prompts' shares differ by more than chance allows while one share is used for all.

    By the statistic of a chi-squared test for prompts with several completions: (k - K pi)^2 / (K pi (1 - pi)) has
    the mean 1 and the variance 2 + (1 / (pi (1 - pi)) - 6) / K if all have the same share. Silent where no prompt has
    several.
    """
    labels = Labels.of(dataset)
    K, k = labels.sums(np.ones_like(labels.label)), labels.sums(labels.label)
    K, k = K[K > 1], k[K > 1]
    pi = k.sum() / K.sum() if len(K) > 1 else 0
    if not 0 < pi < 1:
        return
    spread = pi * (1 - pi)
    excess = ((k - K * pi) ** 2 / (K * spread) - 1).sum()
    variance = (2 + (1 / spread - 6) / K).sum()
    between = math.sqrt(max(0.0, spread * excess / (K - 1).sum()))
    if excess > CHANCE * math.sqrt(variance) and between > VISIBLE:
        logger.warning(
            "The share of preferred completions differs between prompts by more than chance: by a standard deviation "
            f"of {between:.2f} around {pi:.2f}, over the {len(K)} prompts with several completions. With one share "
            "for all the policy does not go to p+, and on prompts with few preferred answers it takes mass from all "
            f"of them. Set `count_fraction_by_prompt: true` (for prompts with {ENOUGH} completions or more), give the "
            f"shares in a column `{COLUMN}`, or make pairs of preferred and other completions."
        )
