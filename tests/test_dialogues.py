"""Prompts from files and from the command line, and the ids a model is given."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from routesae_cache.steering.dialogues import Turn, make_prompt, prompt_ids, read_prompts
from routesae_cache.tokens import Tokenizer, wrap_tokenizer

FIRST = "\n\nHuman: Who was first?\n\nAssistant: Ada."
RECORD = {"chosen": f"{FIRST}\n\nHuman: And then?\n\nAssistant: Bob.", "rejected": "…"}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Tokenizer:
    return wrap_tokenizer(tiny_tokenizer, "tiny")


@pytest.fixture(scope="module")
def chatty(tiny_tokenizer: Any) -> Tokenizer:
    hf = copy.deepcopy(tiny_tokenizer)
    hf.chat_template = TEMPLATE
    return wrap_tokenizer(hf, "chatty")


def file_of(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8")
    return path


def test_a_dialogue_up_to_what_the_assistant_says_last(tmp_path: Path) -> None:
    (prompt,) = read_prompts(file_of(tmp_path, RECORD))
    assert prompt.text == f"{FIRST}\n\nHuman: And then?\n\nAssistant:"
    assert prompt.turns == (
        Turn("user", "Who was first?"),
        Turn("assistant", "Ada."),
        Turn("user", "And then?"),
    )
    assert prompt.source == f"{tmp_path}/prompts.jsonl, line 1"


def test_all_kinds_of_records_and_empty_lines(tmp_path: Path) -> None:
    records = [
        {"rejected": FIRST},
        "",
        {"prompt": "Human: what is this?", "chosen": "Fine."},
        {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "chosen": " Hello."},
        {"chosen": "Human: Bye.\n\nAssistant: Bye.\n\nHuman: Still there?"},
    ]
    path = file_of(tmp_path, *records)
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == [
        "\n\nHuman: Who was first?\n\nAssistant:",
        "Human: what is this?",
        "\n\nHuman: Hi.\n\nAssistant:",
        "Human: Bye.\n\nAssistant:",
    ]
    contents = ["Who was first?", "Human: what is this?", "Hi.", "Bye."]
    assert [prompt.turns for prompt in prompts] == [(Turn("user", text),) for text in contents]
    assert [prompt.source[-1] for prompt in prompts] == ["1", "3", "4", "5"]
    assert read_prompts(path, limit=2) == prompts[:2]


def test_neighbouring_turns_of_one_side_are_one() -> None:
    text = (
        "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: A.\n\nAssistant: B.\n\nHuman: \n\nAssistant:"
    )
    turns = make_prompt(text, "here").turns
    assert turns == (Turn("user", "One.\n\nTwo."), Turn("assistant", "A.\n\nB."), Turn("user", ""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "cut off', "expected a JSON object, found Unterminated string"),
        ('["prompt"]', "expected a JSON object, found list"),
        ('{"text": "x"}', r"expected the field .*\"rejected\", found \['text'\]"),
        ('{"prompt": 3}', 'expected a text as "prompt", found int'),
        ('{"chosen": null}', 'expected a text as "chosen", found NoneType'),
        ('{"chosen": "Once upon"}', "turns as .chosen., found 'Once upon'"),
        (
            '{"chosen": "\\n\\nAssistant: I begin."}',
            "a dialogue of .Human:. and .Assistant:. turns",
        ),
        ('{"rejected": "\\n\\nHuman: alone"}', "a dialogue of .Human:. and .Assistant:. turns"),
        ('{"prompt": "\\ud800"}', "expected Unicode text"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, RECORD, line)
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 2: .*{message}"):
        read_prompts(path)
    assert len(read_prompts(path, limit=1)) == 1  # what is not asked for is not read


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\xff\xfe\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, found 'utf-8'"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="found an empty file"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.jsonl")
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')  # as Windows has it
    assert read_prompts(path)[0].text == "a"


def test_ids_are_those_of_a_row(tokenizer: Tokenizer) -> None:
    for raw in (True, False):  # there is no chat template
        ids = prompt_ids(make_prompt("The <|im_end|> router", "here"), tokenizer, raw=raw)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(["The <|im_end|> router"])[0]]
        assert tokenizer.hf.eos_token_id not in ids


def test_chat_templates(chatty: Tokenizer) -> None:
    prompt = make_prompt(RECORD["chosen"], "here")
    ids = prompt_ids(prompt, chatty, raw=False)
    said = "<user>Who was first?<|im_end|><assistant>Ada.<|im_end|><user>And then?<|im_end|>"
    assert chatty.hf.decode(ids) == f"{said}<assistant>"
    assert ids.count(chatty.hf.eos_token_id) == 3
    raw = prompt_ids(prompt, chatty, raw=True)
    assert chatty.hf.decode(raw) == f"<|bos|>{prompt.text}"


def test_nothing_to_go_on_with(tiny_tokenizer: Any) -> None:
    hf = copy.deepcopy(tiny_tokenizer)
    hf.bos_token = None
    with pytest.raises(ValueError, match="here: expected text to go on with, found none"):
        prompt_ids(make_prompt("", "here"), wrap_tokenizer(hf, "no bos"), raw=True)
