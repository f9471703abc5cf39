"""What `trl-rdro iterate` adds to the training options."""

import importlib.util
from dataclasses import dataclass, field, fields
from typing import Any

from ..configs.validation import Range, validate_fields
from ..log import get_logger
from .margins import largest_norm, stability_margin
from .references import needs_distribution
from .stability import loss_strength


logger = get_logger(__name__)

METHODS = ("dpo", "kto")
# The ways to choose pairs, with the options of each
SELECTIONS: dict[str, tuple[str, ...]] = {
    "best_vs_worst": (),
    "random": (),
    "rejection": ("rejection_accepted", "rejection_beta"),
    "threshold": ("threshold_eta", "threshold_tau"),
}
DEFAULT_REFERENCE_MIX = 0.25
RANGES = {
    **dict.fromkeys(("rounds", "max_completion_length", "prompts_per_chunk", "monitor_prompts"), Range("[1, inf)")),
    **dict.fromkeys(("prompts_per_round", "keep_rounds"), Range("[1, inf)", "Leave it None for all.")),
    **dict.fromkeys(("samples_per_prompt", "monitor_samples"), Range("[2, inf)")),
    **dict.fromkeys(("reference_mix", "sampling_mix"), Range("[0, 1]")),
    "rejection_accepted": Range("[2, inf)", "They make pairs."),
    "rejection_beta": Range("[1e-6, 1e6]", "Large values accept everything."),
    "threshold_eta": Range("[0.5, 1)", "0.5 takes every pair of unequal rewards."),
    "threshold_tau": Range("[1e-6, 1e6]"),
    "temperature": Range("[1e-6, 1e6]"),
    "top_p": Range("[1e-6, 1]"),
    "top_k": Range("[0, inf)"),
    "entropy_floor": Range("[0, 1)"),
    "vllm_gpu_memory_utilization": Range("(0, 1]"),
    "judge_bound": Range("(0.5, 1)", "Leave it None for a judge that can be certain, as every reward function is."),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class IterateConfig:
    r"""
    The loop: what is sampled, who judges, how the reference moves, when to stop.

    Parameters:
        method (`str`, defaults to `"dpo"`): train on pairs (`"dpo"`) or on labelled completions (`"kto"`).
        rounds (`int`, defaults to `3`): raise it to continue a finished run.
        reference_mix (`float`, *optional*): a in [0, 1]: the reference of a round is pi_t^a pi_0^(1-a). If `None`,
            0.25. Must be `None` for losses of single log-ratios (ddro, rdro, apo_zero_unpaired, ...): their reference
            is the sampling distribution.
        sampling_mix (`float`, defaults to `0.25`): lam in [0, 1]: the share of completions drawn from pi_t; the others
            are drawn from pi_0.
        samples_per_prompt (`int`, defaults to `4`): completions for each prompt and round.
        prompts_per_round (`int`, *optional*): prompts of a round, the next ones in the next. If `None`, all.
        pair_selection (`str`, *optional*): `"best_vs_worst"`, `"random"` (disjoint random pairs), `"rejection"` (such
            pairs of what rejection sampling leaves, as in RSO) or `"threshold"` (all of clearly different rewards, as
            in RS-DPO). If `None`, `"random"` for losses of single log-ratios and `"best_vs_worst"` for others.
        rejection_accepted (`int`, defaults to `2`): completions that are left of the `samples_per_prompt` candidates.
        rejection_beta (`float`, defaults to `0.5`): a candidate is accepted with probability exp((r - r_max)/beta).
        threshold_eta (`float`, defaults to `0.8`): a pair is taken where sigma((r_i - r_j)/tau) >= eta.
        threshold_tau (`float`, defaults to `1.0`): tau there.
        reward_funcs (`list[str]`, *optional*): dotted paths of reward functions with TRL's signature.
        reward_weights (`list[float]`, *optional*): their weights. If `None`, 1 each.
        preference_func (`str`, *optional*): dotted path of `f(prompts, first, second, **columns) -> list[float]`, the
            probability that the first completion beats the second.
        labelled_file (`str`, *optional*): JSON lines of prompt, completion, score or of prompt, chosen, rejected.
        judge_bound (`float`, *optional*):
            p in (1/2, 1), if the judge's probabilities lie within [1 - p, p]. The logistic losses have a stability
            margin only then.
        max_completion_length (`int`, defaults to `256`): in tokens.
        temperature (`float`, defaults to `1.0`), top_p (`float`, defaults to `1.0`), top_k (`int`, defaults to `0`):
            of sampling. The completions of the stability report are always drawn from the policy itself.
        use_vllm (`bool`, defaults to `False`): sample with vLLM, in one process.
        vllm_gpu_memory_utilization (`float`, defaults to `0.8`): the share of the GPU's memory that vLLM may take.
            What is left is for CUDA itself and what the training before has not given back.
        prompts_per_chunk (`int`, defaults to `8`): prompts that are sampled at once, and lost at most when killed.
        monitor_prompts (`int`, defaults to `64`): prompts of the stability report, from the test split where there is
            one.
        monitor_samples (`int`, defaults to `4`): completions for each of them.
        entropy_floor (`float`, defaults to `0.1`): stop when the policy's entropy falls below this share of that of
            pi_0. 0 never stops.
        sample_only (`bool`, defaults to `False`): stop when the first round's completions are drawn, judged and
            written with their reference log-probabilities to `output_dir/data/train.jsonl`.
        keep_rounds (`int`, *optional*): keep the data and the models of so many last rounds, and of the best one. If
            `None`, all. Reports are always kept.
    """

    method: str = field(
        default="dpo",
        metadata={**_help("`dpo` (pairs) or `kto` (labelled completions)."), "choices": list(METHODS)},
    )
    rounds: int = field(default=3, metadata=_help("Rounds of sample, judge, train."))
    reference_mix: float | None = field(
        default=None,
        metadata=_help(
            f"a in [0, 1]: the reference of a round is pi_t^a pi_0^(1-a). If `None`, {DEFAULT_REFERENCE_MIX}; must be "
            "None for losses of single log-ratios."
        ),
    )
    sampling_mix: float = field(
        default=0.25, metadata=_help("lam in [0, 1]: the share of completions drawn from pi_t, not from pi_0.")
    )
    samples_per_prompt: int = field(default=4, metadata=_help("Completions for each prompt and round, at least 2."))
    prompts_per_round: int | None = field(
        default=None, metadata=_help("A round takes so many prompts, the next round the next ones. If `None`, all.")
    )
    pair_selection: str | None = field(
        default=None,
        metadata={
            **_help("`best_vs_worst`, `random`, `rejection` (RSO) or `threshold` (RS-DPO). If `None`, by the loss."),
            "choices": list(SELECTIONS),
        },
    )
    rejection_accepted: int = field(
        default=2, metadata=_help("For `pair_selection=rejection`: completions left of the candidates.")
    )
    rejection_beta: float = field(
        default=0.5, metadata=_help("For `pair_selection=rejection`: acceptance is exp((r - r_max)/beta).")
    )
    threshold_eta: float = field(
        default=0.8, metadata=_help("For `pair_selection=threshold`: pairs with sigma((r_i - r_j)/tau) >= eta.")
    )
    threshold_tau: float = field(default=1.0, metadata=_help("For `pair_selection=threshold`: tau."))
    reward_funcs: list[str] | None = field(
        default=None, metadata=_help("Dotted paths of reward functions with TRL's signature.")
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("The weights of `reward_funcs`. If `None`, 1 each.")
    )
    preference_func: str | None = field(
        default=None,
        metadata=_help(
            "Dotted path of f(prompts, first, second, **columns) -> list of probabilities that the first wins."
        ),
    )
    labelled_file: str | None = field(
        default=None,
        metadata=_help("JSON lines of (prompt, completion, score), or of (prompt, chosen, rejected)."),
    )
    judge_bound: float | None = field(
        default=None,
        metadata=_help(
            "p in (1/2, 1), if the judge's probabilities lie within [1 - p, p]: what the logistic losses need for a "
            "stability margin."
        ),
    )
    max_completion_length: int = field(default=256, metadata=_help("Longest completion, in tokens."))
    temperature: float = field(default=1.0, metadata=_help("Temperature of sampling."))
    top_p: float = field(default=1.0, metadata=_help("Nucleus of sampling; 1 is everything."))
    top_k: int = field(default=0, metadata=_help("Sample among so many tokens; 0 is all."))
    use_vllm: bool = field(default=False, metadata=_help("Sample with vLLM, in one process."))
    vllm_gpu_memory_utilization: float = field(
        default=0.8, metadata=_help("With `use_vllm`: the share of the GPU's memory that vLLM may take.")
    )
    prompts_per_chunk: int = field(
        default=8, metadata=_help("Prompts that are sampled at once, and lost at most when killed.")
    )
    monitor_prompts: int = field(default=64, metadata=_help("Prompts of the stability report."))
    monitor_samples: int = field(default=4, metadata=_help("Completions for each of them, at least 2."))
    entropy_floor: float = field(
        default=0.1, metadata=_help("Stop below this share of the entropy of pi_0. 0 never stops.")
    )
    sample_only: bool = field(
        default=False, metadata=_help("Stop at the first round's judged data, `output_dir/data/train.jsonl`.")
    )
    keep_rounds: int | None = field(
        default=None,
        metadata=_help("Keep data and models of so many last rounds, and of the best one. If `None`, all."),
    )

    def __post_init__(self):
        validate_fields(self, RANGES)
        self._validate_selection()
        self._validate_judge()
        if self.use_vllm and importlib.util.find_spec("vllm") is None:
            raise ValueError("`use_vllm=True` needs vLLM: `pip install vllm`, or set `use_vllm=False`.")

    def _validate_selection(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for selection, options in SELECTIONS.items():
            for name in options:
                value = getattr(self, name)
                if selection != self.pair_selection and value != defaults[name]:
                    raise ValueError(
                        f"`{name}={value}` has no effect with `pair_selection={self.pair_selection!r}`. Leave it at "
                        f"{defaults[name]} or use `pair_selection={selection!r}`."
                    )
        if self.pair_selection == "rejection" and self.rejection_accepted >= self.samples_per_prompt:
            raise ValueError(
                f"`rejection_accepted` must be less than `samples_per_prompt` ({self.samples_per_prompt}), got "
                f"{self.rejection_accepted}: no candidate would be rejected."
            )

    def _validate_judge(self) -> None:
        given = [name for name in ("reward_funcs", "preference_func", "labelled_file") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "Set one of `reward_funcs`, `preference_func` and `labelled_file`, which judge the completions; got "
                f"{' and '.join(given) or 'none'}."
            )
        if self.reward_weights is None:
            return
        if len(self.reward_weights) != len(self.reward_funcs or []):
            raise ValueError(
                f"`reward_weights` must have a weight for each of the {len(self.reward_funcs or [])} `reward_funcs`, "
                f"got {len(self.reward_weights)}: {self.reward_weights!r}. Leave it None for 1 each."
            )
        if not any(self.reward_weights):
            raise ValueError(
                f"`reward_weights` must not all be 0, got {self.reward_weights!r}: every completion would be worth "
                "the same."
            )

    # Together with the training options

    @property
    def a(self) -> float:
        return DEFAULT_REFERENCE_MIX if self.reference_mix is None else self.reference_mix

    def selection(self, args: Any) -> str:
        """Which pairs of a prompt's completions are trained on."""
        return self.pair_selection or ("random" if needs_distribution(args) else "best_vs_worst")

    def validate_with(self, args: Any) -> None:
        """Refuse training options that do not go with the loop, before anything is loaded."""
        if args.loss_type == "kto":
            raise ValueError(
                "`loss_type='kto'` is not offered in the loop: its KL term needs reference log-probabilities of "
                "completions under other prompts. Use `apo_zero_unpaired`, `rdro` or `ddro`."
            )
        if needs_distribution(args):
            self._validate_distribution(args)
        if getattr(args, "ld_alpha", None) is not None:
            raise ValueError(
                f"`ld_alpha={args.ld_alpha}` cannot be combined with the loop: its reference log-probabilities count "
                "all tokens. Set `ld_alpha=None`."
            )
        if args.eval_strategy != "no":
            raise ValueError(
                f"`eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}` has no data here: "
                "each round is evaluated by its report. Set `eval_strategy: no`."
            )
        if args.push_to_hub:
            raise ValueError(
                "`push_to_hub=True` would upload every round. Set it to False and upload `final` of the output "
                "directory."
            )
        if args.max_length is not None and args.max_length <= self.max_completion_length:
            raise ValueError(
                f"`max_length` must leave room for a prompt beside `max_completion_length="
                f"{self.max_completion_length}`, got {args.max_length}. Raise it or lower the other."
            )
        plugin = getattr(args, "deepspeed_plugin", None)
        if args.fsdp or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                f"Sampling needs the whole model on each GPU, which {'FSDP' if args.fsdp else 'ZeRO-3'} shards. Use "
                "DDP, ZeRO-1 or ZeRO-2, with QLoRA where memory is short."
            )
        if self.use_vllm and args.world_size > 1:
            raise ValueError(
                f"`use_vllm=True` samples in one process, got {args.world_size}. Start one, or sample without vLLM."
            )

    def _validate_distribution(self, args: Any) -> None:
        loss = args.loss_type if isinstance(args.loss_type, str) else " and ".join(args.loss_type)
        if self.reference_mix is not None:
            raise ValueError(
                f"`reference_mix={self.reference_mix}` cannot be combined with {loss}: the constant of the geometric "
                "mixture does not cancel in it, and its reference is the sampling distribution. Leave it None and set "
                "`sampling_mix`."
            )
        sampling = ("temperature", self.temperature, 1), ("top_p", self.top_p, 1), ("top_k", self.top_k, 0)
        changed = [f"{name}={value}" for name, value, default in sampling if value != default]
        if changed:
            raise ValueError(
                f"`{'`, `'.join(changed)}` cannot be combined with {loss}, whose reference must be the distribution "
                "that was sampled from. Leave temperature, top_p and top_k at 1, 1 and 0."
            )
        is_best_of_two = self.selection(args) == "best_vs_worst" and self.samples_per_prompt == 2
        if self.selection(args) != "random" and not is_best_of_two:
            logger.warning(
                f"The pairs of `pair_selection={self.pair_selection!r}` are no sample of what was drawn, and {loss} "
                "takes what was drawn from for their mixture: the round does not go to the distribution of preferred "
                "completions. Leave `pair_selection` at None for `random`."
            )

    def guaranteed_margin(self, args: Any) -> float | None:
        """The stability margin with the worst judge there can be, or None for losses without the constant b."""
        if needs_distribution(args):
            return None
        strength = loss_strength(args, self.max_completion_length, self.judge_bound)
        norm = largest_norm(self.samples_per_prompt)
        return None if strength is None else float(stability_margin(self.a, strength, self.sampling_mix, norm))
