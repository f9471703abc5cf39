"""
A reward function that needs neither a hub nor a GPU, for trying the loop.

    pip install 'trl-rdro[iterate]'
    trl-rdro iterate --config recipes/iterate.yaml --reward_funcs trl_rdro.iterate.rewards.positivity ...

A reward function has TRL's signature: `prompts` and `completions` are lists of equal length, of texts or
conversations, and the other columns of the data come as keyword arguments.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

from ..errors import UserError


if find_spec("vaderSentiment") is None:  # said where a judge is looked for, before a model is loaded
    raise UserError(
        "The reward function `trl_rdro.iterate.rewards.positivity` needs vaderSentiment: pip install "
        "'trl-rdro[iterate]', or give one of your own."
    )


@cache
def _analyser():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positivity(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """How positive each completion is by VADER's lexicon, from -1 to 1."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [_analyser().polarity_scores(text)["compound"] for text in texts]
