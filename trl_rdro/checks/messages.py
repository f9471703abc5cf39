"""
Lists of messages: what is wrong with one, and which lists of an Arrow column are surely right.

The two say the same. The first is the rule, in words for the user; the second passes over a million rows in seconds,
and hands the lists it is not sure of to the first.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow import is_blank, is_list, is_text, is_true, lengths, no_rows


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
DROP = "Drop such rows (`dataset.filter`)"
CONVERT = (
    'Convert them to the keys "role" and "content", with roles such as "user" and "assistant" '
    "(`trl.maybe_convert_to_chatml` does for a column `conversations`)."
)


def wrong_messages(messages: list[Any], is_prompt: bool, may_be_blank: bool) -> tuple[str, str] | None:
    """What is wrong with a prompt's or a completion's list of messages, and what to do; None if it is right."""
    if not messages:
        return "is a list without messages", f"{DROP}."
    for number, message in enumerate(messages):
        if wrong := _wrong_message(message):
            return f"has message {number + 1} of {len(messages)} {wrong[0]}", wrong[1]
    role = messages[-1]["role"]
    if not is_prompt and role != "assistant":
        return (
            f"ends with a message of the role {role!r}",
            'A completion ends with a message of the role "assistant"; the messages before it belong to the prompt.',
        )
    if (role == "user" if is_prompt else not may_be_blank) and ends_blank(messages):
        return f"ends with a message of the role {role!r} without text", f"{DROP}."
    return None


def _wrong_message(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return f"that is {type(message).__name__}, not a message", 'A message has the keys "role" and "content".'
    role, content = message.get("role"), message.get("content")
    if role is None:
        if message.get("from") is not None or message.get("value") is not None:
            return 'with the keys "from" and "value"', CONVERT
        return (
            f"without a role, only {', '.join(key for key, value in message.items() if value is not None) or 'nulls'}",
            'Give every message a "role" and a "content".',
        )
    if not isinstance(role, str) or role not in ROLES:
        return f"of the role {role!r}", f"Chat templates know the roles {', '.join(ROLES)}: rename it."
    if content is None:
        return None if message.get("tool_calls") else ("without content", f"{DROP}, or give the message a text.")
    if isinstance(content, list):
        if not content or not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
            return "whose content is a list but not of parts with a type", 'A part is {"type": "text", "text": ...}.'
        if any(part["type"] == "text" and not isinstance(part.get("text"), str) for part in content):
            return "whose content has a part of the type text without a text", f"{DROP}, or mend the part."
        return None
    if not isinstance(content, str):
        return f"whose content is {type(content).__name__}, not text", "Convert it to text."
    return None


def ends_blank(messages: list[Any]) -> bool:
    """Whether the last of right messages says nothing."""
    content = messages[-1].get("content")
    return isinstance(content, str) and not content.strip() and not messages[-1].get("tool_calls")


def surely_right(array: pa.Array, is_prompt: bool) -> np.ndarray:
    """For each list of a column, `(n,)`: whether `wrong_messages` certainly finds nothing."""
    fields = message_fields(array)
    if fields is None:
        return no_rows(array)
    role, content, valid = fields
    counts = lengths(array)
    good = is_true(pc.is_in(role, pa.array(ROLES, pa.string()))) & is_true(pc.is_valid(content)) & valid
    result = counts > 0
    result[np.repeat(np.arange(len(array)), counts)[~good]] = False
    last = np.cumsum(counts)[counts > 0] - 1
    ending = ~is_blank(content)
    if not is_prompt:
        ending &= is_true(pc.equal(role, pa.scalar("assistant", pa.string())))
    result[counts > 0] &= ending[last]
    return result


def message_fields(array: pa.Array) -> tuple[pa.Array, pa.Array, np.ndarray] | None:
    """The roles, the contents and whether there is a message at all, of all messages of a column of lists one after
    the other; None unless roles and contents are text."""
    if not is_list(array.type) or not pa.types.is_struct(array.type.value_type):
        return None
    places = [array.type.value_type.get_field_index(name) for name in ("role", "content")]
    if -1 in places:
        return None
    flat = array.flatten()
    role, content = map(flat.field, places)
    if not is_text(role.type) or not is_text(content.type):
        return None
    return role.cast(pa.string()), content, is_true(pc.is_valid(flat))
