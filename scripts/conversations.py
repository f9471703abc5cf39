"""Prompts and completions as messages, for the data preparation scripts."""

import re
import sys
from typing import Any


# HelpSteer2 keeps a conversation in one text: what the user says first, then turns that each begin with such a line
TURN = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)[ \t]*(?:\n|$)")


def as_messages(role: str, text: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A text as a conversation of one message; a conversation stays one."""
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def as_prompt(text: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt as messages, a text with turns in it split into them. A last turn that is empty, which only says whose
    turn it is, is left out.

    Turns after which it is not the assistant's, so that no completion can follow, end the script.
    """
    if not isinstance(text, str) or not TURN.search(text):
        return as_messages("user", text)
    first, *rest = TURN.split(text)
    turns = list(zip(["user", *(name.lower() for name in rest[::2])], [first, *rest[1::2]], strict=True))
    if not first.strip():  # the text begins with a marker
        turns = turns[1:]
    if turns and turns[-1][0] == "assistant" and not turns[-1][1].strip():
        turns = turns[:-1]
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        sys.exit(f"a prompt must take turns from user to user, got {' '.join(roles) or 'none'} in {text[:200]!r}")
    return [{"role": role, "content": content} for role, content in turns]
