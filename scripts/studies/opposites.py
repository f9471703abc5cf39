"""Texts of the quickstart with one word in the place of its opposite: pairs that differ in that word only."""

import re

import ratings
from wordings import in_case_of


# Each occurs in the data, and stands for the other in most of its uses
OPPOSITES = """
    good bad, great terrible, best worst, better worse, love hate, loved hated, loves hates, happy sad, nice nasty,
    easy difficult, excellent poor, amazing awful, awesome lousy, wonderful horrible, perfect useless, beautiful ugly,
    fun boring, cool lame, sweet bitter, funny dull, smart stupid, strong weak, fresh stale, right wrong, always never,
    glad sorry, interesting tedious, success failure, brilliant mediocre, enjoyable annoying, works fails, well badly,
    cute gross, fantastic dreadful, pleasure pain, warm cold, alive dead
"""
NEGATIVE = dict(pair.split() for pair in OPPOSITES.split(","))
POSITIVE = {negative: positive for positive, negative in NEGATIVE.items()}


def near_identical(pairs: list[ratings.Pair]) -> list[ratings.Pair]:
    """One pair of each text that has such a word, at the first it has: a text that people rated positive is preferred
    to itself with the opposite word, and one that they rated negative is the worse of the two."""
    found = []
    for pair in pairs:
        for side, opposites in (("chosen", NEGATIVE), ("rejected", POSITIVE)):
            other = _replaced(pair[side], opposites)
            if other is not None:
                texts = {side: pair[side], "rejected" if side == "chosen" else "chosen": other}
                found.append({"split": pair["split"], "prompt": pair["prompt"], **texts})
    return found


def _replaced(text: str, opposites: dict[str, str]) -> str | None:
    for match in re.finditer(r"[A-Za-z']+", text):
        other = opposites.get(match[0].lower())
        if other is not None:
            return text[: match.start()] + in_case_of(match[0], other) + text[match.end() :]
    return None
