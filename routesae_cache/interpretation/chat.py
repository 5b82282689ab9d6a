"""A chat model behind the OpenAI API: a question, its reply, and what that cost.

Retries, back-off and `Retry-After` are the library's. The key comes from the environment; it is
taken out of everything that a server sends back.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Self

import openai

from routesae_cache.interpretation.prices import Usage
from routesae_cache.interpretation.prompts import FORMS, Question, ReplyFormat

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length", "refused"]

MOST_REPLY_TOKENS = 1000
_TEMPERATURE = 0.1  # RouteSAE's
_NO_KEY = "none"  # for servers that want none; the library insists on one
_CONNECT_S = 10.0
_SHORTEST_SECRET = 8  # shorter ones are placeholders, and words that replies may well contain
_SHOWN = 300  # characters of what a server says
_FILTERED = {"content_filter", "content_policy_violation", "invalid_prompt"}


class ChatError(ValueError):
    """The model cannot be asked at all: no or a wrong key, no such model, nothing left to pay."""


class RequestFailedError(Exception):
    """One request got no reply, after all retries."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back, as it came."""

    text: str
    """Empty for a refusal without words."""
    finish: Finish
    """`length`: cut off; `refused`: by the model or a content filter."""
    reply_format: ReplyFormat
    """What was asked for."""
    usage: Usage | None
    """None where the server does not say."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Which model, and where."""

    model: str = "gpt-4o"
    """Of Azure, the deployment's name."""
    base_url: str | None = None
    """None: OpenAI's, or as the library's environment variables say."""
    api_version: str | None = None
    """Given: Azure."""
    timeout_s: float = 120.0
    """For one attempt."""
    max_retries: int = 5

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"--base-url: expected http://… or https://…, found {_hidden(self.base_url)!r}"
            )
        if self.base_url is not None and _hidden(self.base_url) != self.base_url:
            raise ValueError(
                "--base-url: expected an address without user and password, which files and logs "
                f"would keep; found {_hidden(self.base_url)!r}"
            )
        if not self.timeout_s > 0:
            raise ValueError(f"--timeout: expected seconds above 0, found {self.timeout_s}")
        if not self.model:
            raise ValueError("--model: expected the name of a model, found none")


def find_key(config: ChatConfig) -> str:
    """The key that the environment has for this service; ChatError where it has none.

    Servers given by their address get a placeholder instead, except Azure.
    """
    variable = _key_variable(config)
    key = os.environ.get(variable, "").strip()
    if not key and config.base_url is not None and config.api_version is None:
        return _NO_KEY
    if not key:
        raise ChatError(
            f"{variable} is not set; export it with the key of your account"
            + ("" if config.api_version else " (a local server at --base-url needs none)")
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ChatError(
            f"{variable} is no key: expected ASCII letters, digits and signs, found a space, a "
            "line break or something else inside it"
        )
    return key


class Chat:
    """Asks one model; an async context manager."""

    def __init__(self, config: ChatConfig) -> None:
        """ChatError for a missing key or address."""
        self._config = config
        self._key = find_key(config)
        self._client = _client(config, self._key)
        self._unsupported: frozenset[str] = frozenset()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, question: Question, reply_format: ReplyFormat = "json") -> Reply:
        """The model's reply; in the text format where the server takes no JSON schema.

        Raises:
            ChatError: where no question can be asked at all.
            RequestFailedError: where this one got no reply, after all retries.
        """
        try:
            return await self._ask(question, reply_format, self._unsupported)
        except _NoCompletionError as error:
            logger.info("%s; asking once more", error)
        return await self._ask(question, reply_format, self._unsupported)

    async def _ask(self, question: Question, wanted: ReplyFormat, without: frozenset[str]) -> Reply:
        reply_format: ReplyFormat = "text" if "response_format" in without else wanted
        options = _options(question, reply_format, without)
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._config.model,
                messages=question.messages(reply_format),  # type: ignore[arg-type]
                **options,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if error.code in _FILTERED:
                return Reply(
                    text="", finish="refused", reply_format=reply_format, usage=Usage(0, 0)
                )
            refused = _refused_option(error, options)
            if refused is None:
                raise RequestFailedError(self._told(error)) from None
            reply = await self._ask(question, wanted, without | {refused})
            self._do_without(refused)
            return reply
        except openai.APIStatusError as error:
            self._raise_status(error)
        except openai.APITimeoutError as error:
            what = type(error.__cause__).__name__
            limit = f"--timeout is {self._config.timeout_s:g} s"
            raise RequestFailedError(f"timed out ({what}); {limit}") from None
        except openai.APIConnectionError as error:
            cause = str(error.__cause__ or error)
            raise RequestFailedError(f"the connection failed: {self._clean(cause)}") from None
        return self._read(response.text, reply_format)

    def _do_without(self, option: str) -> None:
        if option not in self._unsupported:
            self._unsupported |= {option}
            logger.info("The server takes no %s; going on without it", option)

    def _raise_status(self, error: openai.APIStatusError) -> NoReturn:
        told = self._told(error)
        if error.status_code in (401, 403):
            if self._key == _NO_KEY:
                raise ChatError(
                    f"the server wants a key ({told}); set {_key_variable(self._config)}"
                ) from None
            raise ChatError(
                f"the server refuses the key of {_key_variable(self._config)} ({told}); set "
                "the right one"
            ) from None
        if error.status_code == 404:
            raise ChatError(
                f"the server has no model {self._config.model!r} ({told}); check --model, "
                "--base-url and --api-version"
            ) from None
        if error.code == "insufficient_quota":
            raise ChatError(f"the account has nothing left to pay with ({told})") from None
        raise RequestFailedError(told) from None

    def _told(self, error: openai.APIStatusError) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        text = message if isinstance(message, str) else error.response.text
        return f"{error.status_code}: {self._clean(text)}"

    def _clean(self, text: str) -> str:
        """For a message: without the key, short, printable."""
        return printable(self._without_key(text))[:_SHOWN]

    def _without_key(self, text: str) -> str:
        return text if len(self._key) < _SHORTEST_SECRET else text.replace(self._key, "***")

    def _read(self, body: str, reply_format: ReplyFormat) -> Reply:
        try:
            record = json.loads(body)
            choice = record["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
            if not isinstance(content or "", str) or not isinstance(refusal or "", str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _NoCompletionError(
                f"what the server sent is no chat completion: {self._clean(body)!r}"
            ) from None
        finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
        if refusal or choice.get("finish_reason") == "content_filter":
            finish = "refused"
        return Reply(
            text=self._without_key(refusal or content or ""),
            finish=finish,
            reply_format=reply_format,
            usage=_usage(record.get("usage")),
        )


class _NoCompletionError(RequestFailedError):
    """A body that the API does not have, such as a proxy's page."""


def printable(text: str) -> str:
    """On one line, without control characters: safe to show on a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _hidden(address: str) -> str:
    """An address with stars for what is before an @, which may be a password."""
    return re.sub(r"^([^/]*//)?[^/]*@", r"\1***@", address)


def _key_variable(config: ChatConfig) -> str:
    return "AZURE_OPENAI_API_KEY" if config.api_version else "OPENAI_API_KEY"


def _client(config: ChatConfig, key: str) -> openai.AsyncOpenAI:
    # a server that is not there should not take as long as a slow reply
    timeout = openai.Timeout(config.timeout_s, connect=min(config.timeout_s, _CONNECT_S))
    if config.api_version is None:
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=config.base_url,
            timeout=timeout,
            max_retries=config.max_retries,
        )
    endpoint = config.base_url or os.environ.get("AZURE_OPENAI_ENDPOINT")
    if not endpoint:
        raise ChatError("Azure: give --base-url https://NAME.openai.azure.com beside --api-version")
    return openai.AsyncAzureOpenAI(
        api_key=key,
        azure_endpoint=endpoint,
        api_version=config.api_version,
        timeout=timeout,
        max_retries=config.max_retries,
    )


def _options(
    question: Question, reply_format: ReplyFormat, without: frozenset[str]
) -> dict[str, Any]:
    """What is sent beside model and messages: parameters that a server may not take."""
    options: dict[str, Any] = {
        "temperature": _TEMPERATURE,
        "max_completion_tokens": MOST_REPLY_TOKENS,
    }
    if reply_format == "json":
        schema = {"name": question.kind, "strict": True, "schema": FORMS[question.kind].schema}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {name: value for name, value in options.items() if name not in without}


def _refused_option(error: openai.APIStatusError, options: Mapping[str, Any]) -> str | None:
    """What to leave out of a refused request: what the server names, otherwise the schema."""
    told = f"{error.param} {error.response.text}"
    named = [name for name in options if name in told]
    return named[0] if named else "response_format" if "response_format" in options else None


def _usage(record: Any) -> Usage | None:
    if not isinstance(record, dict):
        return None
    details = record.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    prompt, completion = record.get("prompt_tokens"), record.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None
    return Usage(prompt, completion, cached if type(cached) is int else 0)
