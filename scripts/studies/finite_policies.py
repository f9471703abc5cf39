"""
Policies over a finite number of completions, small enough to be trained a thousand times, and two sets of pairs.

A policy tilts its reference by the features f of a completion, pi(y|x) ~ pi_ref(y|x) exp(theta . f(y)), so that

    z(y) = theta . f(y) - log sum_y' pi_ref(y'|x) exp(theta . f(y'))

is exact, without a language model. What is done with z are the package's losses (`trainers.objectives`), their weights
over an optimiser step and what they learn on the way; only the loop around them is not the trainers', which would take
hours.

- `language`: the 36 completions of language.py, each a feature of its own; one is preferred to another with a
  probability that follows a Bradley-Terry model.
- `ratings`: the texts of the quickstart's pairs, rated by people; their features are how often each word occurs.

Labels can be flipped for training and validation, and never are for the test.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from language import OUTCOMES, TOKENS, cyclic_language

from trl_rdro import DPOConfig
from trl_rdro.losses import kldpo_log_weights, kldpo_loss
from trl_rdro.losses.types import LOSS_TYPES
from trl_rdro.quickstart import load_quickstart
from trl_rdro.trainers import objectives


BATCH = 32
MIN_COUNT = 3  # of a word that is a feature
ONE_ANNOTATOR = torch.zeros(BATCH, dtype=torch.int64)


@dataclass
class Task:
    """
    Attributes:
        features: `(m, d)` of the completions, sparse and coalesced.
        prompts: `(m,)` the prompt of each, a number.
        log_reference: `(m,)` their log-probability under the reference.
        lengths: `(m,)` tokens of each.
        test_pairs, test_shares: `(k, 2)` better and worse completion, and `(k,)` how much each pair counts.
        draw: of a generator and a number of pairs, that many `(n, 2)`, preferred first.
    """

    features: torch.Tensor
    prompts: torch.Tensor
    log_reference: torch.Tensor
    lengths: torch.Tensor
    test_pairs: torch.Tensor
    test_shares: torch.Tensor
    draw: Any

    def flipped(self, n: int, share: float, seed: int) -> torch.Tensor:
        """`n` pairs, a share of which, by the toss of a coin each, is the wrong way round."""
        rng = np.random.default_rng(seed)
        pairs, wrong = self.draw(rng, n), torch.tensor(rng.random(n) < share)
        return torch.where(wrong[:, None], pairs.flip(1), pairs)

    def logratios(self, theta: torch.Tensor) -> torch.Tensor:
        """z of all completions, `(m,)`, in nats."""
        rows, columns = self.features.indices()
        terms = self.features.values() * theta[columns]
        scores = torch.zeros(len(self.prompts)).index_add(0, rows, terms)  # ten times as fast as a sparse product
        tilted = self.log_reference + scores
        largest = tilted.max().detach()
        totals = torch.zeros(int(self.prompts.max()) + 1).index_add(0, self.prompts, (tilted - largest).exp())
        return scores - (largest + totals.log())[self.prompts]

    def accuracy(self, theta: torch.Tensor, pairs: torch.Tensor | None = None) -> float:
        """How often the first of a pair has the larger log-ratio (a tie: half); of the test pairs by default."""
        shares = self.test_shares if pairs is None else torch.ones(len(pairs))
        first, second = self.logratios(theta)[self.test_pairs if pairs is None else pairs].T
        right = (first > second).float() + 0.5 * (first == second).float()
        return float((shares * right).sum() / shares.sum())


@cache
def language() -> Task:
    of_pairs = cyclic_language(cycle=0.0)
    base, better = torch.tensor(of_pairs.base, dtype=torch.float32), torch.tensor(of_pairs.preference > 0.5).nonzero()
    return Task(
        features=torch.eye(OUTCOMES).to_sparse().coalesce(),
        prompts=torch.zeros(OUTCOMES, dtype=torch.int64),
        log_reference=base.log(),
        lengths=torch.full((OUTCOMES,), float(TOKENS)),
        test_pairs=better,
        test_shares=base[better].prod(dim=1),
        draw=lambda rng, n: torch.tensor(np.stack(of_pairs.pairs(n, rng), axis=1)),
    )


@cache
def ratings() -> Task:
    rows = {split: load_quickstart(split).to_list() for split in ("train", "test")}
    texts = [(row["prompt"], row[side]) for split in rows.values() for row in split for side in ("chosen", "rejected")]
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for _, text in texts]
    of_training = Counter(word for text in words[: 2 * len(rows["train"])] for word in text)
    place = {word: i for i, word in enumerate(word for word, count in of_training.items() if count >= MIN_COUNT)}
    features = torch.zeros(len(texts), len(place))
    for row, text in enumerate(words):
        for word in text:
            if word in place:
                features[row, place[word]] += 1
    names = sorted({prompt for prompt, _ in texts})
    prompts = torch.tensor([names.index(prompt) for prompt, _ in texts])
    pairs = torch.arange(len(texts)).view(-1, 2)
    pool, test = pairs[: len(rows["train"])], pairs[len(rows["train"]) :]
    return Task(
        features=features.to_sparse().coalesce(),
        prompts=prompts,
        log_reference=-prompts.bincount()[prompts].float().log(),
        lengths=torch.tensor([float(len(text)) for text in words]).clamp(min=1),
        test_pairs=test,
        test_shares=torch.ones(len(test)),
        draw=lambda rng, n: pool[torch.tensor(rng.permutation(len(pool))[:n])],
    )


TASKS = {"language": language, "ratings": ratings}


@cache
def config(loss_type: str, beta: float, options: tuple[tuple[str, Any], ...]) -> DPOConfig:
    return DPOConfig("unused", use_cpu=True, bf16=False, loss_type=loss_type, beta=beta, **dict(options))


def train(
    task: Task, pairs: torch.Tensor, loss_type: str, steps: int, rate: float, beta: float, seed: int, **options: Any
) -> torch.Tensor:
    """theta after training from 0: Adam, a rate that falls to 0, batches of pairs in a new random order each epoch."""
    args, eta = config(loss_type, beta, tuple(options.items())), torch.tensor([0.0])
    if loss_type == "repo":
        eta = torch.tensor([objectives.number_of_a_new_label("repo", args)])
    theta = torch.zeros(task.features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(pairs))
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(epochs)])
    for batch in order[: steps * BATCH].view(steps, BATCH):
        chosen, rejected = task.logratios(theta)[pairs[batch]].T
        of_step = objectives.Pairs(chosen, rejected, task.lengths[pairs[batch]].T, {"repo": eta.expand(BATCH)})
        optimizer.zero_grad()
        losses(loss_type, of_step, args).mean().backward()
        if loss_type == "repo":
            posteriors = objectives.state_statistics("repo", of_step, args)
            eta = objectives.updated_numbers("repo", eta, posteriors, ONE_ANNOTATOR, torch.ones(BATCH), args)
        optimizer.step()
        schedule.step()
    return theta.detach()


def losses(loss_type: str, pairs: objectives.Pairs, args: DPOConfig) -> torch.Tensor:
    """The losses of a step's pairs, whose mean is that of the step, as `DPOTrainer` takes it."""
    family = LOSS_TYPES[loss_type].family if loss_type in LOSS_TYPES else "pair"
    if family == "density_ratio":
        logratios, preferred = torch.cat(pairs[:2]), torch.arange(2 * BATCH) < BATCH
        values, _ = objectives.density_ratio_loss(loss_type, logratios, preferred, 0.5, args)
        return values.view(2, -1).sum(dim=0)
    inner = objectives.pair_loss(
        args.inner_loss_type if family == "robust" else loss_type, *pairs[:3], args, pairs.columns
    )
    if family == "pair":
        return inner
    temperature = objectives.temperature(loss_type, args)
    return kldpo_loss(inner, temperature, kldpo_log_weights(inner, temperature))
