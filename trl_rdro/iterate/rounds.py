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
      data/train.jsonl  with `sample_only` that of the first round, for `trl-rdro dpo` and `kto`
      final/            the last round's model, or the best one's if the run stopped itself

Each is written beside its place and renamed when it is complete, and what is there is not made again: a run that was
killed is continued by the same command.
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..log import get_logger
from ..run.files import Row, read_json, read_rows, write_json, write_rows
from ..run.lock import only_run_in
from ..tools.loading import load_processing_class
from .config import IterateConfig
from .finish import prune, result_of, write_result
from .judges import Judge
from .judging import judge_round
from .policies import Policies
from .prompts import Prompt, short_enough, tokenize
from .report import Figures, entropy, in_one_line, judge_policy, round_report
from .sampling import Generation, Sampler, flip_coins
from .settings import check_settings, require_last_model
from .training import train_round


logger = get_logger(__name__)


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
        processing_class = load_processing_class(
            model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code
        )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        room = (args.max_length, config.max_completion_length)
        self.prompts = short_enough(tokenize(tokenizer, rows), *room)
        self.monitor = short_enough(tokenize(tokenizer, monitor_rows[: config.monitor_prompts]), *room)
        self.policies = Policies(args, model_args)
        self.sampler = Sampler(self.policies, tokenizer, config)
        self.settings = check_settings(self.root / "settings.json", config, args, model_args, judge, self.prompts)
        require_last_model(self.root, self._folder(config.rounds - 1), config)

    def run(self) -> Figures:
        """Run the rounds that are not complete. Returns what is written to `output_dir/report.json`.

        Raises:
            `UserError`: on every rank, if another process runs in the output directory.
        """
        with only_run_in(self.root):
            return self._run()

    def sample(self) -> Path:
        """The first phases of the first round: completions of the model itself, judged, with their reference columns.
        Returns the file of rows to train on.

        Raises:
            `UserError`: as `run`.
        """
        with only_run_in(self.root):
            if self.state.is_main_process:
                write_json(self.root / "settings.json", self.settings)
            self._sample(0)
            self._judge(0)
            self.policies.close()
            target = self.root / "data" / "train.jsonl"
            if self.state.is_main_process:
                write_rows(target, read_rows(self._folder(0) / "train.jsonl"))
            self.state.wait_for_everyone()
        return target

    def _run(self) -> Figures:
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
            if self.state.is_main_process:
                prune(self._folders(len(reports)), reports, self.config.keep_rounds)
        self.policies.close()
        result = result_of(base, reports, self.config)
        if self.state.is_main_process:
            write_result(self.root, result, self._folder(result["final_round"]) / "model")
        self.state.wait_for_everyone()
        return result

    # Places

    def _folder(self, number: int) -> Path:
        return self.root / f"round_{number:03d}"

    def _folders(self, rounds: int) -> list[Path]:
        return [self._folder(number) for number in range(rounds)]

    def _policy(self, number: int) -> Path | None:
        """Where pi_t of this round is saved; None for pi_0."""
        return self._folder(number - 1) / "model" if number else None

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
        """Judge and choose the pairs, in one process."""
        folder = self._folder(number)
        if self.state.is_main_process and not (folder / "train.jsonl").exists():
            judge_round(self.judge, self.config, self.args, folder, self._round_prompts(number), number)
        self.state.wait_for_everyone()

    def _report(self, number: int, base: Figures) -> None:
        folder = self._folder(number)
        coins = [[True] * self.config.monitor_samples for _ in self.monitor]
        place, policy, path = (self.args.seed, number, "monitor"), folder / "model", folder / "monitor.jsonl"
        self.sampler.sample(path, self.monitor, coins, policy, self._own(), place, score_base=False)
        completions = [row["completion_ids"] for row in read_rows(self.root / "base.jsonl")]
        self.sampler.score(folder / "probe.json", self.monitor, completions, policy)
        if self.state.is_main_process:
            folders, rows = self._folders(number + 1), self._monitor_rows
            report = round_report(self.root, folders, self.config, self.args, self.judge, rows, base)
            write_json(folder / "report.json", report)
            logger.info(f"Round {number + 1} of {self.config.rounds}: {in_one_line(report)}")
            for sentence in report["warnings"]:
                logger.warning(sentence)
        self.state.wait_for_everyone()
