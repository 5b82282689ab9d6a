"""Replies on disk: a JSON line for each, written as it arrives, so that none is paid for twice."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from routesae_cache.interpretation.chat import Reply
from routesae_cache.interpretation.prices import Usage
from routesae_cache.interpretation.prompts import PROMPT_VERSION, Answer, Question, Unparsed
from routesae_cache.json_files import json_line, parse_json

logger = logging.getLogger(__name__)

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link may lead elsewhere
TRIES = 2  # a reply that does not parse is asked for once more

Status = Literal["parsed", "unparsed", "refused", "failed", "left"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a question."""

    status: Status
    """`failed`: no reply after all retries; `left`: not asked. A rerun asks these again."""
    answer: Answer | None = None
    """Of a parsed reply."""
    trouble: str = ""
    """Why there is none, for people."""


class ReplyLog:
    """The replies kept beside a contexts file, to one model; a context manager.

    Inside it, the file is locked and can be added to. Replies of other models stay in the file.
    """

    def __init__(self, path: Path, model: str) -> None:
        """Read what is there.

        Raises:
            ValueError: for a file with something else in it. A last line that was cut off while
                it was written is passed over.
        """
        self.path, self._model = path, model
        self._replies: dict[str, list[Reply]] = {}
        self._handle = -1
        if path.exists():
            self._load()

    def __enter__(self) -> Self:
        self._handle = os.open(self.path, _FLAGS, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise ValueError(
                f"{self.path}: another process is asking; wait for it or end it"
            ) from None
        self._replies.clear()
        self._mend_end()
        self._load()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
        self._handle = -1

    def to(self, question: Question) -> Sequence[Reply]:
        """Replies to this very question, oldest first."""
        return self._replies.get(question.key(self._model), ())

    def settled(self, question: Question) -> Outcome | None:
        """What the replies amount to; None while it takes another request."""
        replies = self.to(question)
        trouble = ""
        for reply in replies:
            if reply.finish == "refused":
                return Outcome(status="refused", trouble=reply.text or "by a content filter")
            try:
                return Outcome(status="parsed", answer=_answer(question, reply))
            except Unparsed as error:
                trouble = f"{error}: {reply.text!r}"
        return Outcome(status="unparsed", trouble=trouble) if len(replies) >= TRIES else None

    def add(self, question: Question, reply: Reply) -> None:
        """Write a reply down."""
        key = question.key(self._model)
        record = {
            "latent": question.latent,
            "kind": question.kind,
            "key": key,
            "model": self._model,
            "prompt_version": PROMPT_VERSION,
            "format": reply.reply_format,
            "finish": reply.finish,
            "text": reply.text,
            "usage": reply.usage and reply.usage._asdict(),
        }
        line = json_line(record)
        while line:
            line = line[os.write(self._handle, line) :]
        self._replies.setdefault(key, []).append(reply)

    def _load(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = parse_json(line)
                    if record["model"] == self._model:
                        self._replies.setdefault(record["key"], []).append(_reply(record))
                except (ValueError, LookupError, TypeError) as error:
                    if not line.endswith(b"\n"):
                        return  # cut off while it was written
                    raise ValueError(
                        f"{self.path}, line {number}: expected a reply of `routesae interpret`, "
                        f"found something else ({type(error).__name__}: {error}); remove the "
                        "line, or move the file away to ask for everything again"
                    ) from None

    def _mend_end(self) -> None:
        """Drop a last line without its end, unless only the line feed is missing."""
        content = self.path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        if not rest:
            return
        try:
            parse_json(rest)
            os.write(self._handle, b"\n")
        except ValueError:
            logger.info("%s: the last reply was cut off while it was written", self.path)
            os.ftruncate(self._handle, len(whole) + 1 if whole else 0)


def _answer(question: Question, reply: Reply) -> Answer:
    if reply.finish == "length":
        raise Unparsed("cut off for its length")
    return question.parse(reply.text, reply.reply_format)


def _reply(record: Mapping[str, Any]) -> Reply:
    text, usage = record["text"], record["usage"]
    if not isinstance(text, str):
        raise TypeError("no text")
    return Reply(
        text=text,
        finish=record["finish"],
        reply_format=record["format"],
        usage=None if usage is None else Usage(**usage),
    )
