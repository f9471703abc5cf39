"""The one table of our loss types: what everything outside a loss must know of it.

Configs, help texts, trainers, guard rails, plots, model cards, the loop, the command line and the tests read it. Which
function computes a loss, and from which options, is in `trl_rdro.trainers.objectives`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from . import papers


@dataclass(frozen=True)
class LossType:
    """
    A loss type.

    Parameters:
        family (`str`):
            `"density_ratio"`: of single completions, so that `KTOTrainer` takes it too. `"pair"`: of a pair.
            `"robust"`: over the losses of pairs that `inner_loss_type` chooses.
        summary (`str`):
            What it is for, in a few words.
        paper (`dict`):
            Title, arXiv id and citation, as model cards take them.
        temperature (`str`, *optional*):
            The option that says how sharply the pairs of an optimiser step are weighed against one another. Such a
            loss couples the pairs of the whole step.
        columns (`tuple[str, ...]`):
            Of the data set, which the loss cannot do without.
        optional_columns (`tuple[str, ...]`):
            Of the data set, which it reads where they are.
        state (`str`, *optional*):
            The column of whose labels the loss learns a number each beside the policy, once per optimiser step. The
            data set need not have it, unless it is one of `columns`; then its labels are those of the training set.
        of_differences (`bool`):
            Whether the loss of a pair sees the reference only through the difference of its two log-ratios. For a
            robust loss this is a matter of its inner loss.
    """

    family: str
    summary: str
    paper: dict[str, str]
    temperature: str | None = None
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    state: str | None = None
    of_differences: bool = True


LOSS_TYPES = {
    "ddro": LossType("density_ratio", "direct density ratio", papers.DDRO, of_differences=False),
    "rdro": LossType("density_ratio", "relative density ratio", papers.RDRO, of_differences=False),
    "kldpo": LossType("robust", "worst case in a KL ball", papers.ROBUST, temperature="kldpo_tau"),
    "wdpo": LossType("robust", "worst case in a Wasserstein ball", papers.ROBUST),
    "drdpo": LossType("robust", "follows the pairs that go best", papers.DRDPO, temperature="drdpo_beta"),
    "grdpo": LossType("robust", "worst group of people", papers.GRDPO, columns=("group",), state="group"),
    "cdpo": LossType("pair", "told the share of flipped labels", papers.DPO),
    "holder": LossType("pair", "lets go of contradicted pairs", papers.HOLDER),
    "ropo": LossType("pair", "bounds the pull of contradicted pairs", papers.ROPO),
    "repo": LossType("pair", "learns how reliable labels are", papers.REPO, state="annotator"),
    "chipo": LossType("pair", "chi-squared tie to the reference", papers.CHIPO, of_differences=False),
    "dpop": LossType("pair", "keeps the chosen completion likely", papers.DPOP, of_differences=False),
    "minor": LossType("pair", "pushes no further than the reference", papers.MINOR, of_differences=False),
    "adadpo": LossType("pair", "a temperature for each pair", papers.ADADPO),
    "gdpo": LossType("pair", "soft labels scale the margin", papers.GDPO, columns=("preference_probability",)),
    "dpopro": LossType("pair", "worst soft label near the given", papers.DPOPRO, columns=("preference_probability",)),
    "mrpo": LossType(
        "pair",
        "a second reference model",
        papers.MRPO,
        optional_columns=("second_ref_chosen_logps", "second_ref_rejected_logps"),
    ),
}


def of_family(family: str) -> tuple[str, ...]:
    """The names of a family's loss types."""
    return tuple(name for name, loss in LOSS_TYPES.items() if loss.family == family)


def in_use(loss_types: Iterable[str], inner: str | None) -> tuple[str, ...]:
    """Our losses among `loss_types`, and `inner` where one of them is a robust loss and `inner` is ours."""
    ours = [name for name in loss_types if name in LOSS_TYPES]
    inside = any(LOSS_TYPES[name].family == "robust" for name in ours) and inner in LOSS_TYPES
    return tuple(dict.fromkeys([*ours, inner] if inside and inner is not None else ours))


def column_names(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that these of our losses read, if the data have them, and the weight that every loss reads."""
    losses = [LOSS_TYPES[name] for name in names]
    read = ["weight"]
    for loss in losses:
        read += [*loss.columns, *loss.optional_columns, *([loss.state] if loss.state else [])]
    return tuple(dict.fromkeys(read))


def sees_differences_only(name: str, inner: str | None) -> bool:
    """Whether our loss `name`, with `inner` inside if it is a robust one, leaves no trace of a constant that both
    log-ratios of a pair share. The inner losses that are TRL's (sigmoid, ipo, hinge) do not."""
    loss = LOSS_TYPES[name]
    if loss.family == "robust":
        return inner not in LOSS_TYPES or LOSS_TYPES[inner].of_differences
    return loss.of_differences
