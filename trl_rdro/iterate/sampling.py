"""
Completions drawn from pi_t and from pi_0, and their log-probabilities under both.

Prompts are cut into chunks by their index. All that is random in a chunk is seeded by its place alone, the chunks go
to the processes in turn, and each is written when it is done. So the data are the same for any number of processes,
and a killed run loses a chunk at most.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig

from ..compat import trl as trl_compat
from ..run.files import read_json, write_json, write_rows
from .config import IterateConfig
from .policies import Policies
from .prompts import Ids, Prompt


@dataclass
class Generation:
    """How completions are drawn; by default from the policy itself."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def seed_of(*place: Any) -> int:
    return random.Random("/".join(map(str, place))).getrandbits(63)


def flip_coins(place: Sequence[Any], prompts: int, samples: int, share: float) -> list[list[bool]]:
    """For each completion whether it comes from pi_t."""
    coins = random.Random(seed_of(*place, "coins"))
    return [[coins.random() < share for _ in range(samples)] for _ in range(prompts)]


class Sampler:
    """Draws and scores, in all processes together."""

    def __init__(self, policies: Policies, tokenizer: Any, config: IterateConfig):
        self.policies, self.tokenizer, self.config = policies, tokenizer, config
        self.state = PartialState()

    def sample(
        self,
        path: Path,
        prompts: list[Prompt],
        coins: list[list[bool]],
        policy: Path | None,
        generation: Generation,
        place: Sequence[Any],
        score_base: bool = True,
    ) -> None:
        """
        Write completions of each prompt to `path`, unless they are there.

        Args:
            coins: for each completion whether `policy` draws it; else pi_0 does.
            policy: where pi_t is saved, or None while it is pi_0.
            place: what seeds the draws, besides the chunk.
            score_base: whether to compute the log-probabilities under pi_0 as well.
        """
        folder = path.with_name(path.name + ".chunks")
        if path.exists():
            self._drop(folder)
            return
        models = {"base": None, "policy": policy}
        drawn_by = {name for row in coins for name in (("policy" if coin else "base") for coin in row)}
        for name in sorted(drawn_by):
            draw = partial(self._draw_chunk, prompts, coins, name == "policy", generation, (*place, name))
            self._pass(folder, f"draw-{name}", len(prompts), models[name], draw)
        scored_by = ["policy", "base"] if policy is not None and score_base else ["policy"]
        completions = self._merge_draws(folder, drawn_by, len(prompts))
        for name in scored_by:
            self._pass(folder, f"score-{name}", len(prompts), models[name], partial(self._score, prompts, completions))
        if self.state.is_main_process:
            logps = {name: self._read(folder, f"score-{name}", len(prompts)) for name in scored_by}
            write_rows(
                path,
                (
                    {
                        "prompt": prompt.row["prompt"],
                        "completions": self.tokenizer.batch_decode(completions[i], skip_special_tokens=True),
                        "from_policy": coins[i],
                        "policy_logps": logps["policy"][i],
                        "base_logps": logps.get("base", logps["policy"])[i] if score_base else None,
                        "completion_ids": completions[i],
                    }
                    for i, prompt in enumerate(prompts)
                ),
            )
        self._drop(folder)

    def score(self, path: Path, prompts: list[Prompt], completions: list[list[Ids]], policy: Path) -> None:
        """Write the log-probabilities of given completions under `policy` to `path`, unless they are there."""
        folder = path.with_name(path.name + ".chunks")
        if path.exists():
            self._drop(folder)
            return
        self._pass(folder, "score", len(prompts), policy, partial(self._score, prompts, completions))
        if self.state.is_main_process:
            write_json(path, self._read(folder, "score", len(prompts)))
        self._drop(folder)

    # Chunks

    def _drop(self, folder: Path) -> None:
        if self.state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        self.state.wait_for_everyone()

    def _chunks(self, prompts: int) -> list[range]:
        size = self.config.prompts_per_chunk
        return [range(start, min(start + size, prompts)) for start in range(0, prompts, size)]

    def _pass(
        self, folder: Path, name: str, prompts: int, policy: Path | None, compute: Callable[[Any, int, range], list]
    ) -> None:
        """Compute the chunks of this process that are not written yet, all with one model."""
        mine = list(enumerate(self._chunks(prompts)))[self.state.process_index :: self.state.num_processes]
        todo = [(i, rows) for i, rows in mine if not _chunk_file(folder, name, i).exists()]
        if todo and name.startswith("draw") and self.config.use_vllm:
            from .vllm_sampling import vllm_engine

            self.policies.close()
            memory = self.config.vllm_gpu_memory_utilization
            with vllm_engine(self.policies.model_args, policy, memory) as engine:
                for i, rows in todo:
                    write_json(_chunk_file(folder, name, i), compute(engine, i, rows))
        elif todo:
            with self.policies.use(policy) as model:
                for i, rows in todo:
                    write_json(_chunk_file(folder, name, i), compute(model, i, rows))
        self.state.wait_for_everyone()

    def _read(self, folder: Path, name: str, prompts: int) -> list:
        return [row for i in range(len(self._chunks(prompts))) for row in read_json(_chunk_file(folder, name, i))]

    def _merge_draws(self, folder: Path, drawn_by: set[str], prompts: int) -> list[list[Ids]]:
        draws = [self._read(folder, f"draw-{name}", prompts) for name in sorted(drawn_by)]
        return [[next(filter(None, slot)) for slot in zip(*rows, strict=True)] for rows in zip(*draws, strict=True)]

    # One chunk

    def _draw_chunk(
        self,
        prompts: list[Prompt],
        coins: list[list[bool]],
        wanted: bool,
        generation: Generation,
        place: Sequence[Any],
        model: Any,
        chunk: int,
        rows: range,
    ) -> list[list[Ids | None]]:
        """The chunk's completions whose coin is `wanted`; None for the others."""
        slots = [(i, k) for i in rows for k, coin in enumerate(coins[i]) if coin == wanted]
        result: list[list[Ids | None]] = [[None] * len(coins[i]) for i in rows]
        if slots:
            ids = [prompts[i].ids for i, _ in slots]
            end_tokens = {*self.policies.end_tokens, self.tokenizer.eos_token_id}
            seed = seed_of(*place, chunk)
            if self.config.use_vllm:
                completions = model.draw(ids, generation, end_tokens, seed)
            else:
                completions = draw(model, ids, generation, end_tokens, self._pad_token, seed)
            for (i, k), completion in zip(slots, completions, strict=True):
                result[i - rows.start][k] = completion
        return result

    def _score(
        self, prompts: list[Prompt], completions: list[list[Ids]], model: Any, chunk: int, rows: range
    ) -> list[list[float]]:
        pairs = [(prompts[i].ids, completion) for i in rows for completion in completions[i]]
        logps = iter(completion_logps(model, pairs, self._pad_token))
        return [[next(logps) for _ in completions[i]] for i in rows]

    @property
    def _pad_token(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _chunk_file(folder: Path, name: str, index: int) -> Path:
    return folder / f"{name}-{index:05d}.json"


def draw(
    model: Any, prompts: list[Ids], generation: Generation, end_tokens: set[int], pad_token: int, seed: int
) -> list[Ids]:
    """A completion of each prompt, up to and with its end token."""
    width = max(map(len, prompts))
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=generation.max_completion_length,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        eos_token_id=sorted(end_tokens),
        pad_token_id=pad_token,
    )
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=torch.tensor([[pad_token] * (width - len(ids)) + ids for ids in prompts], device=model.device),
        attention_mask=torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device
        ),
        generation_config=settings,
    )
    return [until_end(ids, end_tokens) for ids in output[:, width:].tolist()]


def until_end(ids: Ids, end_tokens: set[int]) -> Ids:
    ends = [i for i, token in enumerate(ids) if token in end_tokens]
    return ids[: ends[0] + 1] if ends else ids


def completion_logps(model: Any, pairs: list[tuple[Ids, Ids]], pad_token: int) -> list[float]:
    """The log-probability of each completion after its prompt, as the trainer computes it."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    rows: dict[str, list[Ids]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, completion in pairs:
        rest = width - len(prompt) - len(completion)
        rows["input_ids"].append([*prompt, *completion, *([pad_token] * rest)])
        rows["attention_mask"].append([1] * (width - rest) + [0] * rest)
        rows["completion_mask"].append([0] * len(prompt) + [1] * len(completion) + [0] * rest)
    inputs = {key: torch.tensor(values, device=model.device) for key, values in rows.items()}
    outputs = trl_compat.policy_forward(trl_compat.NO_TRAINER, model, inputs)
    logps = trl_compat.completion_logps(trl_compat.NO_TRAINER, outputs.log_probs, inputs["completion_mask"])
    return logps.cpu().double().tolist()
