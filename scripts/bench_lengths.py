"""Lengths of preference pairs in tokens, real and made up, for `scripts/bench.py`: (prompt, chosen, rejected)."""

import json
import math
import random
from pathlib import Path


# Of the 300 pairs in data/dpo_en_demo.json of llamafactory==0.9.5's source package (Apache-2.0), in Qwen 2.5's tokens
# with its chat template
DEMO = Path(__file__).with_name("demo_pair_lengths.json")
# Log-normal, with a correlation of 1/2 between the completions of a pair: median, sigma, least, most
MADE_UP = {
    "UltraFeedback-like": ((110, 1.0, 20, 3000), (270, 0.75, 5, 2000)),
    "multi-turn": ((900, 0.6, 100, 6000), (220, 0.75, 5, 1500)),
    "RAG": ((2500, 0.45, 300, 8000), (150, 0.8, 5, 1000)),
}
CORPORA = ("demo pairs", *MADE_UP)


def pair_lengths(corpus: str, count: int, max_length: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """`count` pairs of a corpus, without those whose prompt leaves no room, which TRL drops; completions are cut to
    what room there is, as TRL does."""
    rng = random.Random(seed)
    found: list[tuple[int, int, int]] = []
    real = json.loads(DEMO.read_text())
    while len(found) < count:
        pair = rng.choice(real) if corpus == "demo pairs" else _made_up(rng, *MADE_UP[corpus])
        if pair[0] < max_length:
            room = max_length - pair[0]
            found.append((pair[0], min(pair[1], room), min(pair[2], room)))
    return found


def grouped(corpus: str, count: int, max_length: int, batch: int) -> list[tuple[int, int, int]]:
    """`count` pairs in the order of `train_sampling_strategy: group_by_length`: batches, in random order, of fifty
    batches sorted by the length of their longest row."""
    pool = pair_lengths(corpus, max(50 * batch, count), max_length)
    pool.sort(key=lambda pair: -(pair[0] + max(pair[1:])))
    batches = [pool[start : start + batch] for start in range(0, len(pool) - batch + 1, batch)]
    random.Random(0).shuffle(batches)
    return [pair for part in batches for pair in part][:count]


def _made_up(rng: random.Random, prompt: tuple, completion: tuple) -> tuple[int, int, int]:
    def draw(median: float, sigma: float, least: int, most: int, normal: float) -> int:
        return round(min(most, max(least, median * math.exp(sigma * normal))))

    common = rng.gauss(0, 1)
    sides = (draw(*completion, math.sqrt(0.5) * (common + rng.gauss(0, 1))) for _ in range(2))
    return draw(*prompt, rng.gauss(0, 1)), *sides
