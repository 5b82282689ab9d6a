"""One question over real HTTP: what is sent, what is made of what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from routesae_cache.interpretation.chat import (
    Chat,
    ChatConfig,
    ChatError,
    Reply,
    RequestFailedError,
    find_key,
)
from routesae_cache.interpretation.excerpts import Context
from routesae_cache.interpretation.prices import PRICES, Usage, cost_usd
from routesae_cache.interpretation.prompts import Question, ask_for_explanation, ask_for_matches
from tests.chat_server import (
    FAULTS,
    KEY,
    QUICK,
    Answer,
    ChatServer,
    Request,
    chat_server,
    completion,
    error,
    explanation,
)

CONTEXT = Context("rhine", "the <ACTIVATED>Rhine</ACTIVATED> at Bonn", 9.5, 3, 7, 0, 12)
QUESTION = ask_for_explanation(5, [CONTEXT])
pytestmark = pytest.mark.usefixtures("chat_environment")


def ask(server: ChatServer, *questions: Question, **options: Any) -> list[Reply]:
    """Put questions one after the other, the same one by default."""
    config = ChatConfig(**{"base_url": server.url, "max_retries": 1, "timeout_s": 5.0} | options)

    async def run() -> list[Reply]:
        async with Chat(config) as chat:
            return [await chat.ask(question) for question in questions or (QUESTION,)]

    return asyncio.run(run())


def first(answer: Answer, then: Callable[[Request], Answer] = explanation) -> Any:
    return lambda request, number: answer if number == 1 else then(request)


def test_what_is_sent_and_read(server: ChatServer) -> None:
    (reply,) = ask(server, model="gpt-4.1-mini")
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (request.body["model"], request.body["temperature"]) == ("gpt-4.1-mini", 0.1)
    wanted = request.body["response_format"]["json_schema"]
    assert wanted["strict"]
    assert wanted["schema"]["required"] == ["explanation", "category", "score"]
    assert wanted["schema"]["additionalProperties"] is False
    assert reply.usage == Usage(100, 10, 0)
    assert QUESTION.parse(reply.text, "json") == ("word-level", 4, "Names of rivers.")


def test_retry_after_is_honoured(server: ChatServer) -> None:
    server.respond = first(Answer(429, "{}", {"Retry-After": "0.7"}))
    (reply,) = ask(server)
    assert reply.finish == "stop"
    before, after = (request.at for request in server.requests)
    assert after - before >= 0.7  # without the header it is 0.5 at most


@pytest.mark.parametrize("fault", ["500", "slow", "cut off", "no JSON", "another schema"])
def test_one_fault_costs_one_more_request(fault: str, server: ChatServer) -> None:
    server.misbehave(fault, 1)
    (reply,) = ask(server, timeout_s=0.4 if fault == "slow" else 5.0)
    assert QUESTION.parse(reply.text, reply.reply_format)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "500: broken"),
        ("429", "429: slow down"),
        ("slow", r"timed out \(ReadTimeout\); --timeout is 0.3 s"),
        ("cut off", "the connection failed"),
        ("no JSON", "no chat completion: '<html>Welcome to the hotel</html>'"),
        ("another schema", "no chat completion"),
    ],
)
def test_lasting_faults_fail_the_request(fault: str, words: str, server: ChatServer) -> None:
    server.respond = lambda request, _: FAULTS[fault](request)
    retries = 0 if fault in ("slow", "cut off") else 1
    with pytest.raises(RequestFailedError, match=words):
        ask(server, timeout_s=0.3 if fault == "slow" else 5.0, max_retries=retries)


def test_nobody_there() -> None:
    with chat_server() as server:
        gone = server
    with pytest.raises(RequestFailedError, match="connection failed"):
        ask(gone, max_retries=0)


@pytest.mark.parametrize("fault", ["filtered prompt", "filtered reply", "refusal"])
def test_refusals_are_replies(fault: str, server: ChatServer) -> None:
    server.misbehave(fault, 1)
    (reply,) = ask(server)
    assert reply.finish == "refused"
    assert reply.text == ("I cannot help with that." if fault == "refusal" else "")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401, f"Incorrect API key provided: {KEY}."), r"key of OPENAI_API_KEY \(401: .*\*\*"),
        (error(403, "not from here"), "403: not from here"),
        (error(404, "no such model", code="model_not_found"), "no model 'gpt-4o'"),
        (error(429, "pay first", code="insufficient_quota"), "nothing left to pay"),
    ],
)
def test_no_use_in_asking(answer: Answer, words: str, server: ChatServer) -> None:
    server.respond = first(answer)
    with pytest.raises(ChatError, match=words) as raised:
        ask(server, max_retries=0)
    assert len(server.requests) == 1
    assert KEY not in str(raised.value)
    assert raised.value.__suppress_context__  # the library's errors hold the request, key and all


REFUSED_SCHEMA = [
    error(400, "Unknown parameter", param="response_format"),
    error(422, "response_format: json_schema is not among the types"),
    error(400, "bad request"),
]


@pytest.mark.parametrize("answer", REFUSED_SCHEMA)
def test_without_schemas_the_text_format_is_asked_for(
    answer: Answer, server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.respond = lambda request, _: answer if request.structured else explanation(request)
    detection = ask_for_matches(5, "rivers", [CONTEXT, CONTEXT])
    with caplog.at_level("INFO", "routesae_cache"):
        replies = ask(server, QUESTION, detection)
    assert [reply.reply_format for reply in replies] == ["text", "text"]
    assert QUESTION.parse(replies[0].text, "text") == ("word-level", 4, "Names of rivers.")
    assert detection.parse(replies[1].text, "text") == ((1, 2),)
    assert [request.structured for request in server.requests] == [True, False, False]
    assert "SCORE: a digit" in server.requests[1].body["messages"][0]["content"]
    assert caplog.text.count("takes no response_format") == 1


def test_other_options_that_a_server_does_not_take(server: ChatServer) -> None:
    def respond(request: Request, _: int) -> Answer:
        for name in ("temperature", "max_completion_tokens"):
            if name in request.body:
                return error(400, f"'{name}' is not supported with this model", param=name)
        return explanation(request)

    server.respond = respond
    replies = ask(server, QUESTION, QUESTION)
    assert [reply.reply_format for reply in replies] == ["json", "json"]
    assert len(server.requests) == 4


def test_a_request_that_is_bad_anyway_changes_nothing(server: ChatServer) -> None:
    too_long = error(400, "too long", code="context_length_exceeded")
    long = ask_for_explanation(6, [CONTEXT] * 50)
    server.respond = lambda request, _: (
        too_long if len(request.user) > 1000 else explanation(request)
    )

    async def run() -> Reply:
        async with Chat(ChatConfig(base_url=server.url)) as chat:
            with pytest.raises(RequestFailedError, match="400: too long"):
                await chat.ask(long)
            return await chat.ask(QUESTION)

    assert asyncio.run(run()).reply_format == "json"


def test_a_key_that_comes_back_is_taken_out(server: ChatServer) -> None:
    server.respond = first(completion(f'{{"explanation": "{KEY}"}}'))
    (reply,) = ask(server)
    assert reply.text == '{"explanation": "***"}'


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ({"prompt_tokens": "many"}, None),
        (
            {
                "prompt_tokens": 50,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 32},
            },
            Usage(50, 4, 32),
        ),
    ],
)
def test_usage_is_the_servers(usage: Any, expected: Usage | None, server: ChatServer) -> None:
    record = json.loads(completion("x").body) | {"usage": usage}
    server.respond = first(Answer(body=json.dumps(record)))
    assert ask(server)[0].usage == expected


def test_cost() -> None:
    assert cost_usd("gpt-4o", Usage(1_000_000, 0)) == pytest.approx(2.5)
    assert cost_usd("gpt-4o", Usage(1_000_000, 100_000, 400_000)) == pytest.approx(1.5 + 0.5 + 1)
    assert cost_usd("llama-at-home", Usage(1, 1)) is None
    assert all(0 < p.cached < p.prompt < p.completion for p in PRICES.values())


def test_azure(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = server.url.removesuffix("/v1")
    azure = {"base_url": endpoint, "api_version": "2024-10-21", "model": "my-deployment"}
    with pytest.raises(ChatError, match="AZURE_OPENAI_API_KEY is not set"):
        ask(server, **azure)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key-0123456789")
    ask(server, **azure)
    (request,) = server.requests
    path = "/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21"
    assert request.path == path
    assert request.headers["api-key"] == "azure-key-0123456789"
    assert KEY not in str(request.headers)
    with pytest.raises(ChatError, match="--base-url https://NAME"):
        ask(server, **azure | {"base_url": None})


def test_keys(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert find_key(ChatConfig()) == KEY
    for bad in ("two words", "a\nb-012345678", "schlüssel-0123456"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ChatError, match="OPENAI_API_KEY is no key") as raised:
            find_key(ChatConfig())
        assert bad not in str(raised.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ChatError, match="OPENAI_API_KEY is not set"):
        find_key(ChatConfig())
    ask(server)  # a local server
    assert server.requests[0].headers["authorization"] == "Bearer none"
    server.respond = lambda *_: Answer(401, "who are you?", QUICK)
    with pytest.raises(ChatError, match=r"wants a key \(401: who are you\?\); set OPENAI_API_KEY"):
        ask(server)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "localhost:8000"}, "--base-url: expected http://"),
        ({"timeout_s": 0.0}, "--timeout: expected seconds above 0"),
        ({"model": ""}, "--model"),
    ],
)
def test_config_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatConfig(**options)
