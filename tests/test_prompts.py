"""Prompts that nothing can break out of, and replies that are read to the letter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routesae_cache.interpretation.excerpts import Context
from routesae_cache.interpretation.prompts import (
    CATEGORIES,
    FORMS,
    Explanation,
    Matches,
    Unparsed,
    ask_for_explanation,
    ask_for_matches,
)

CONTEXTS = [Context(f"w{i}", f"text {i}", 2.0, i, 0, 0, 3) for i in range(4)]
EXPLAIN = ask_for_explanation(1, CONTEXTS)
DETECT = ask_for_matches(1, "rivers", CONTEXTS)
GOOD = {"explanation": "Names of rivers.", "category": "disambiguation", "score": 4}


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_a_text_never_leaves_its_line(texts: list[str]) -> None:
    contexts = [Context(text, text, 1.25, 0, 0, 0, 0) for text in texts]
    for question in (ask_for_explanation(1, contexts), ask_for_matches(1, texts[0], contexts)):
        lines = [json.loads(line) for line in question.data.splitlines()]
        assert [line["context"] for line in lines if "context" in line] == texts
        assert len(lines) == len(texts) + (question.kind == "detection")


def test_good_replies() -> None:
    expected = Explanation("disambiguation", 4, "Names of rivers.")
    assert EXPLAIN.parse(json.dumps(GOOD), "json") == expected
    assert EXPLAIN.parse(json.dumps(GOOD | {"explanation": " Names\nof  rivers. "}), "json") == (
        expected
    )
    text = "EXPLANATION: Names of rivers.\nCATEGORY: disambiguation\nSCORE: 4"
    assert EXPLAIN.parse(f"\n{text}\n", "text") == expected
    assert DETECT.parse('{"matches": [4, 1]}', "json") == Matches((1, 4))
    assert DETECT.parse('{"matches": []}', "json") == Matches(())
    assert DETECT.parse("MATCHES: 4, 1", "text") == Matches((1, 4))
    assert DETECT.parse("MATCHES: none", "text") == Matches(())


@pytest.mark.parametrize(
    "changes",
    [
        {"score": 0},
        {"score": 6},
        {"score": 4.0},
        {"score": "4"},
        {"score": True},
        {"score": None},
        {"category": "low-level"},
        {"category": None},
        {"category": ["word-level"]},
        {"explanation": "  "},
        {"explanation": 5},
        {"confidence": 1},
    ],
)
def test_json_explanations_that_are_not_taken(changes: dict[str, Any]) -> None:
    with pytest.raises(Unparsed):
        EXPLAIN.parse(json.dumps(GOOD | changes), "json")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "null",
        "[]",
        '{"score": 4}',
        f"```json\n{json.dumps(GOOD)}\n```",
        f"Sure! {json.dumps(GOOD)}",
        json.dumps(GOOD)[:-1],
    ],
)
def test_json_that_is_not_the_object(reply: str) -> None:
    with pytest.raises(Unparsed):
        EXPLAIN.parse(reply, "json")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        json.dumps(GOOD),
        "EXPLANATION: a\nCATEGORY: word-level\nSCORE: 6",
        "EXPLANATION: a\nCATEGORY: word-level\nSCORE: 45",
        "EXPLANATION: a\nCATEGORY: low-level\nSCORE: 4",
        "EXPLANATION:\nCATEGORY: word-level\nSCORE: 4",
        "EXPLANATION: a\nb\nCATEGORY: word-level\nSCORE: 4",
        "SCORE: 4\nCATEGORY: word-level\nEXPLANATION: a",
        "EXPLANATION: a\nCATEGORY: word-level\nSCORE: 4\nHope that helps!",
        "EXPLANATION: a\nCATEGORY: word-level\nSCORE: \u0664",
    ],
)
def test_text_that_is_not_the_lines(reply: str) -> None:
    with pytest.raises(Unparsed):
        EXPLAIN.parse(reply, "text")


@pytest.mark.parametrize(
    ("reply", "reply_format"),
    [
        ('{"matches": [0]}', "json"),
        ('{"matches": [5]}', "json"),
        ('{"matches": [1, 1]}', "json"),
        ('{"matches": [true]}', "json"),
        ('{"matches": "1"}', "json"),
        ('{"matches": [1.0]}', "json"),
        ("MATCHES: 5", "text"),
        ("MATCHES: 1, 1", "text"),
        ("MATCHES: 1 and 2", "text"),
        ("MATCHES:", "text"),
        ("1, 2", "text"),
    ],
)
def test_matches_that_are_not_taken(reply: str, reply_format: Any) -> None:
    with pytest.raises(Unparsed):
        DETECT.parse(reply, reply_format)


def test_questions_are_told_apart() -> None:
    keys = {
        EXPLAIN.key("a"),
        EXPLAIN.key("b"),
        DETECT.key("a"),
        ask_for_explanation(2, CONTEXTS).key("a"),
        ask_for_explanation(1, CONTEXTS[1:]).key("a"),
        ask_for_matches(1, "lakes", CONTEXTS).key("a"),
    }
    assert len(keys) == 6
    assert ask_for_explanation(1, CONTEXTS).key("a") == EXPLAIN.key("a")


def test_prompts_say_what_can_be_answered() -> None:
    form = FORMS["explanation"]
    assert form.schema["properties"]["category"]["enum"] == list(CATEGORIES)
    for category in CATEGORIES:
        assert f"- {category}:" in form.task
        assert category in form.text_request
    assert all(f"- {score}: " in form.task for score in range(1, 6))
