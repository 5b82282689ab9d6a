"""Prompts to steer on: typed ones, dialogues in the format of HH-RLHF, and their token ids."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from routesae_cache.tokens import Tokenizer

_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}
_FIELDS = ("prompt", "chosen", "rejected")
"""Of a record: the first that it has is read."""


class Turn(NamedTuple):
    """What one side of a dialogue says."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text that a model is to go on with."""

    source: str
    """Where it comes from, for people: `--prompt 1`, or a file and a line."""
    text: str
    """As it stands, without a chat template."""
    turns: tuple[Turn, ...]
    """The same as a dialogue, in which the assistant has the next turn."""


def make_prompt(text: str, source: str) -> Prompt:
    """A prompt from a text, which may be a dialogue of `Human:` and `Assistant:` turns.

    Of a dialogue, the prompt is everything up to what the assistant says last, "Assistant:"
    included. Any other text is one turn of the user.

    Raises:
        ValueError: naming the source, for what is no Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: expected Unicode text, found {error.object!r}") from None
    if not _DIALOGUE.match(text):
        return Prompt(source=source, text=text, turns=(Turn("user", text),))
    marks = list(_TURN.finditer(text))
    while marks[-1][1] == "Human":
        marks.pop()
    turns: list[Turn] = []
    for mark, following in itertools.pairwise(marks):
        turn = Turn(_ROLES[mark[1]], text[mark.end() : following.start()].strip())
        if turns and turns[-1].role == turn.role:  # chat templates want the roles to take turns
            turn = Turn(turn.role, f"{turns.pop().content}\n\n{turn.content}")
        turns.append(turn)
    return Prompt(source=source, text=text[: marks[-1].end()], turns=tuple(turns))


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file of JSON lines: HH-RLHF records, or objects with a "prompt".

    An HH-RLHF record has dialogues as "chosen" and "rejected"; they share their prompt, so the
    first is read.

    Args:
        limit: read so many and not the rest of the file.

    Raises:
        ValueError: with the line's number, for a line that is no such record; for a file without
            any.
        OSError: if the file cannot be read.
    """
    prompts: list[Prompt] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(prompts) == limit:
                break
            if line.strip():
                prompts.append(_prompt_of(line, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path}: expected a record on each line, found an empty file")
    return prompts


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, *, raw: bool) -> list[int]:
    """What a model is given: through the tokenizer's chat template where it has one and not `raw`.

    Otherwise BOS, where the tokenizer has one, and the text, in which the names of special tokens
    are plain text: as the rows of a store are.

    Raises:
        ValueError: if nothing comes of it.
    """
    if tokenizer.hf.chat_template is not None and not raw:
        messages = [turn._asdict() for turn in prompt.turns]
        encoded = tokenizer.hf.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        ids: list[int] = encoded["input_ids"]
    else:
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids += tokenizer.encode([prompt.text])[0].tolist()
    if not ids:
        raise ValueError(f"{prompt.source}: expected text to go on with, found none")
    return ids


def _prompt_of(line: bytes, source: str) -> Prompt:
    try:
        record: Any = json.loads(line.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON object, found {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(record).__name__}")
    field = next((field for field in _FIELDS if field in record), None)
    if field is None:
        names = " or ".join(f'"{name}"' for name in _FIELDS)
        raise ValueError(f"{source}: expected the field {names}, found {sorted(record)}")
    if not isinstance(record[field], str):
        raise ValueError(
            f'{source}: expected a text as "{field}", found {type(record[field]).__name__}'
        )
    if field != "prompt" and not _DIALOGUE.match(record[field]):
        raise ValueError(
            f'{source}: expected a dialogue of "Human:" and "Assistant:" turns as "{field}", '
            f"found {record[field][:40]!r}"
        )
    return make_prompt(record[field], source)
