"""
The loop: each round samples, judges, trains, saves and reports, in a directory of its own.

    output_dir/
      settings.json     what the run was begun with; another run is refused here
      base.jsonl        completions of pi_0 on the prompts of the report
      base.json         their entropy and reward
      round_000/
        samples.jsonl   completions with their log-probabilities under pi_t and pi_0
        judged.jsonl    what the judge said of them
        train.jsonl     the rows trained on, with their reference columns
        model/          the adapter, or the model
        monitor.jsonl   completions of the new policy on the prompts of the report
        probe.json      log-probabilities of the completions in base.jsonl under the new policy
        report.json
      report.json, iterate.png
      final/            the last round's model, or the best one's if the run stopped itself

Each is written beside its place and renamed when it is complete, and what is there is not made again: a run that was
killed is continued by the same command.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import AutoTokenizer

from ..log import get_logger
from .config import IterateConfig
from .files import Row, partial, read_json, read_rows, write_json, write_rows
from .judges import Judge, MissingLabels
from .pairs import Judged, judge_prompts, select_pairs
from .policies import Policies
from .references import geometric, linear, needs_distribution
from .report import (
    Figures,
    best_round,
    distance_figures,
    draw_report,
    entropy,
    judge_policy,
    preference_figures,
    warnings_of,
)
from .sampling import Generation, Prompt, Sampler, flip_coins, tokenize
from .training import train_round


logger = get_logger(__name__)

# May differ from the run that is continued
FREE_SETTINGS = {"rounds", "keep_rounds"}
TRAINING_SETTINGS = (
    *("loss_type", "beta", "learning_rate", "seed", "max_steps", "num_train_epochs", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
# Too large to be kept for ever; the rest of a round is a few kilobytes
BULKY = ("samples.jsonl", "judged.jsonl", "train.jsonl", "monitor.jsonl", "model")


class Loop:
    """
    Rounds of sample, judge, train.

    Args:
        config: the loop.
        args: a `DPOConfig` or `KTOConfig` of this package, according to `config.method`.
        model_args: TRL's `ModelConfig`.
        judge: of `make_judge(config)`.
        rows: rows with a `prompt`, text or messages; other columns go to the judge.
        monitor_rows: rows for the stability report.
    """

    def __init__(
        self,
        config: IterateConfig,
        args: Any,
        model_args: Any,
        judge: Judge,
        rows: list[Row],
        monitor_rows: list[Row],
    ):
        self.config, self.args, self.model_args, self.judge = config, args, model_args, judge
        self.root, self.state = Path(args.output_dir), PartialState()
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
        self.prompts = self._short_enough(tokenize(tokenizer, rows))
        self.monitor = self._short_enough(tokenize(tokenizer, monitor_rows[: config.monitor_prompts]))
        self.policies = Policies(args, model_args)
        self.sampler = Sampler(self.policies, tokenizer, config)
        self.settings = self._check_settings()

    def run(self) -> Figures:
        """Run the rounds that are not complete. Returns what is written to `output_dir/report.json`."""
        margin = self.config.guaranteed_margin(self.args)
        if margin is not None:
            meaning = "stable" if margin > 0 else "stability depends on the judge; see the margin of each round"
            logger.info(f"Stability margin with the worst possible judge: {margin:.2f} ({meaning}).")
        if self.state.is_main_process:
            write_json(self.root / "settings.json", self.settings)
        base = self._base()
        reports: list[Figures] = []
        while len(reports) < self.config.rounds and not (reports and reports[-1]["below_floor"]):
            number = len(reports)
            folder = self._folder(number)
            if not (folder / "report.json").exists():
                self._sample(number)
                self._judge(number)
                self.policies.close()  # the trainer loads its own
                rows = read_rows(folder / "train.jsonl")
                train_round(self.config, self.args, self.model_args, rows, self._policy(number), folder, number)
                self._report(number, base)
            reports.append(read_json(folder / "report.json"))
            self._prune(reports)
        self.policies.close()
        return self._finish(base, reports)

    # Places

    def _folder(self, number: int) -> Path:
        return self.root / f"round_{number:03d}"

    def _policy(self, number: int) -> Path | None:
        """Where pi_t of this round is saved; None for pi_0."""
        return self._folder(number - 1) / "model" if number else None

    def _short_enough(self, prompts: list[Prompt]) -> list[Prompt]:
        if self.args.max_length is None:
            return prompts
        room = self.args.max_length - self.config.max_completion_length
        kept = [prompt for prompt in prompts if len(prompt.ids) <= room]
        if not kept:
            raise ValueError(
                f"No prompt fits: `max_length={self.args.max_length}` leaves {room} tokens for it beside "
                f"`max_completion_length={self.config.max_completion_length}`. Raise `max_length`."
            )
        if len(kept) < len(prompts):
            logger.warning(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {room} tokens.")
        return kept

    def _check_settings(self) -> Row:
        """Refuse to mix two runs in one directory. Returns what this one is begun with."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in FREE_SETTINGS}
        settings |= {name: getattr(self.args, name) for name in TRAINING_SETTINGS}
        settings |= {"model": self.model_args.model_name_or_path, "prompts": _fingerprint(self.prompts)}
        path = self.root / "settings.json"
        begun = read_json(path) if path.exists() else settings
        if changed := sorted(key for key in settings if settings[key] != begun.get(key)):
            before = ", ".join(f"{key}={begun.get(key)!r}" for key in changed)
            raise ValueError(f"{self.root} was begun with {before}. Set that again, or give another `output_dir`.")
        return settings

    # Phases

    def _base(self) -> Figures:
        """pi_0 on the prompts of the report."""
        path, samples = self.root / "base.jsonl", self.config.monitor_samples
        coins = [[False] * samples for _ in self.monitor]
        self.sampler.sample(path, self.monitor, coins, None, self._own(), (self.args.seed, "base"))
        figures_path = self.root / "base.json"
        if self.state.is_main_process and not figures_path.exists():
            base = read_rows(path)
            reward = judge_policy(self.judge, self._monitor_rows, base, base)["reward"]
            write_json(figures_path, {"entropy": entropy(base), "reward": reward})
        self.state.wait_for_everyone()
        return read_json(figures_path)

    def _own(self) -> Generation:
        """The policy's own distribution."""
        return Generation(self.config.max_completion_length)

    @property
    def _monitor_rows(self) -> list[Row]:
        return [prompt.row for prompt in self.monitor]

    def _round_prompts(self, number: int) -> list[Prompt]:
        size = self.config.prompts_per_round
        if size is None:
            return self.prompts
        return [self.prompts[i % len(self.prompts)] for i in range(number * size, (number + 1) * size)]

    def _sample(self, number: int) -> None:
        config, prompts, place = self.config, self._round_prompts(number), (self.args.seed, number)
        share = config.sampling_mix if number else 0.0  # pi_t is pi_0
        coins = flip_coins(place, len(prompts), config.samples_per_prompt, share)
        generation = Generation(config.max_completion_length, config.temperature, config.top_p, config.top_k)
        path = self._folder(number) / "samples.jsonl"
        self.sampler.sample(path, prompts, coins, self._policy(number), generation, place)
        logger.info(f"Round {number + 1} of {config.rounds}: {len(prompts)} prompts sampled.")

    def _judge(self, number: int) -> None:
        """Judge, choose the pairs and write them with their reference, in one process."""
        folder = self._folder(number)
        if self.state.is_main_process and not (folder / "train.jsonl").exists():
            samples, prompts = read_rows(folder / "samples.jsonl"), self._round_prompts(number)
            judged = self._judged(folder, samples, prompts)
            rows = []
            for i, (sample, prompt, verdict) in enumerate(zip(samples, prompts, judged, strict=True)):
                seed = f"{self.args.seed}/{number}/{i}/pairs"
                pairs = select_pairs(verdict, self.config, self.judge.gives_rewards, seed)
                rows += [row for pair in pairs for row in self._rows_of_pair(prompt, sample, pair)]
            if not rows:
                raise ValueError(
                    f"Round {number + 1}: the judge tells no two completions of a prompt apart, so there is nothing "
                    "to train on. Look at judged.jsonl; raise `samples_per_prompt`, or lower `reward_gap`."
                )
            write_rows(folder / "train.jsonl", rows)
        self.state.wait_for_everyone()

    def _judged(self, folder: Path, samples: list[Row], prompts: list[Prompt]) -> list[Judged]:
        path = folder / "judged.jsonl"
        if not path.exists():
            groups, size = [row["completions"] for row in samples], self.config.prompts_per_chunk
            rows, judged = [prompt.row for prompt in prompts], []
            try:
                for start in range(0, len(groups), size):
                    chunk = slice(start, start + size)
                    judged += judge_prompts(self.judge, rows[chunk], groups[chunk])
            except MissingLabels:
                self._ask_for_labels(folder, rows, groups)
            write_rows(path, map(asdict, judged))
        return [Judged(**row) for row in read_rows(path)]

    def _ask_for_labels(self, folder: Path, rows: list[Row], groups: list[list[str]]) -> None:
        missing = []
        for row, group in zip(rows, groups, strict=True):
            try:
                judge_prompts(self.judge, [row], [group])
            except MissingLabels as error:
                missing += error.rows
        write_rows(folder / "to_label.jsonl", missing)
        raise ValueError(
            f"`labelled_file` has no label for {len(missing)} of the completions of this round. They are in "
            f"{folder / 'to_label.jsonl'}: label them, add them to the file, and start the same command again."
        )

    def _rows_of_pair(self, prompt: Prompt, sample: Row, pair: tuple[int, int]) -> list[Row]:
        references = [self._reference(sample["policy_logps"][k], sample["base_logps"][k]) for k in pair]
        ids = [sample["completion_ids"][k] for k in pair]
        if self.config.method == "kto":
            return [
                {"prompt_ids": prompt.ids, "completion_ids": ids[k], "label": k == 0, "ref_logps": references[k]}
                for k in range(2)
            ]
        return [
            {
                "prompt_ids": prompt.ids,
                "chosen_ids": ids[0],
                "rejected_ids": ids[1],
                "ref_chosen_logps": references[0],
                "ref_rejected_logps": references[1],
            }
        ]

    def _reference(self, policy_logp: float, base_logp: float) -> float:
        if needs_distribution(self.args):
            return linear(policy_logp, base_logp, self.config.sampling_mix)
        return geometric(policy_logp, base_logp, self.config.a)

    def _report(self, number: int, base: Figures) -> None:
        folder = self._folder(number)
        coins = [[True] * self.config.monitor_samples for _ in self.monitor]
        place, policy, path = (self.args.seed, number, "monitor"), folder / "model", folder / "monitor.jsonl"
        self.sampler.sample(path, self.monitor, coins, policy, self._own(), place, score_base=False)
        completions = [row["completion_ids"] for row in read_rows(self.root / "base.jsonl")]
        self.sampler.score(folder / "probe.json", self.monitor, completions, policy)
        if self.state.is_main_process:
            self._write_report(number, base)
        self.state.wait_for_everyone()

    def _write_report(self, number: int, base: Figures) -> None:
        folder, config = self._folder(number), self.config
        monitor, judged = read_rows(folder / "monitor.jsonl"), read_rows(folder / "judged.jsonl")
        base_samples = read_rows(self.root / "base.jsonl")
        lengths = [len(ids) for row in read_rows(folder / "samples.jsonl") for ids in row["completion_ids"]]
        probes = [read_json(self._folder(i) / "probe.json") for i in range(number + 1)]
        history = [np.asarray(logps) for logps in ([row["policy_logps"] for row in base_samples], *probes)]
        report = {
            "round": number,
            **judge_policy(self.judge, self._monitor_rows, monitor, base_samples),
            "entropy": entropy(monitor),
            **distance_figures(history),
            **preference_figures([row["preferences"] for row in judged], config, self.args, float(np.mean(lengths))),
            "tokens_per_completion": float(np.mean(lengths)),
            "training_rows": len(read_rows(folder / "train.jsonl")),
        }
        floor = config.entropy_floor * base["entropy"]["mean"]
        report["below_floor"] = report["entropy"]["mean"] < floor
        report["warnings"] = warnings_of(report, base["entropy"]["mean"], config)
        write_json(folder / "report.json", report)
        logger.info(f"Round {number + 1} of {config.rounds}: {_summary(report)}")
        for sentence in report["warnings"]:
            logger.warning(sentence)

    # The end of a round, and of the run

    def _prune(self, reports: list[Figures]) -> None:
        """Drop what is bulky in rounds that are neither among the last `keep_rounds` nor the best one."""
        if self.config.keep_rounds is None or not self.state.is_main_process:
            return
        kept = {best_round(reports), *range(len(reports) - self.config.keep_rounds, len(reports))}
        for number in set(range(len(reports))) - kept:
            for name in BULKY:
                path = self._folder(number) / name
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)

    def _finish(self, base: Figures, reports: list[Figures]) -> Figures:
        best, has_stopped = best_round(reports), reports[-1]["below_floor"]
        result = {
            "base": base,
            "rounds": reports,
            "best_round": best,
            "final_round": best if has_stopped else reports[-1]["round"],
            "stopped": has_stopped,
            "entropy_floor": self.config.entropy_floor,
        }
        if self.state.is_main_process:
            self._copy_final(self._folder(result["final_round"]) / "model")
            write_json(self.root / "report.json", result)
            if not draw_report(result, self.root / "iterate.png"):
                logger.info("No figure: matplotlib is not installed (`pip install 'trl-rdro[plot]'`).")
        self.state.wait_for_everyone()
        return result

    def _copy_final(self, model: Path) -> None:
        final = self.root / "final"
        shutil.rmtree(partial(final), ignore_errors=True)
        shutil.copytree(model, partial(final))
        shutil.rmtree(final, ignore_errors=True)
        partial(final).rename(final)


def _fingerprint(prompts: list[Prompt]) -> str:
    """Short, and different for other prompts."""
    digest = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    return f"{len(prompts)} prompts, {digest[:12]}"


def _summary(report: Figures) -> str:
    """One line of a report."""
    parts = []
    for name in ("reward", "reward_change", "win_rate", "entropy"):
        if (figure := report[name]) is not None:
            parts.append(f"{name.replace('_', ' ')} {figure['mean']:.3f} ± {figure['standard_error']:.3f}")
    parts.append(f"distance to the previous round {report['distance_to_previous']:.2f} nats")
    if report["margin"] is not None:
        parts.append(f"margin {report['margin']:.2f}")
    return ", ".join(parts) + "."
