"""Whatever a user types: exit code 2 and a message, or it means something; never a traceback."""

from __future__ import annotations

import contextlib

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.faults.bad_commands import (
    COMMANDS,
    EXAMPLES,
    NUMBERS,
    TEXTS,
    Place,
    Reached,
    fault,
    invoke,
    line,
    options,
)
from tests.faults.tally import Tally


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_of_every_command(words: str, place: Place, tally: Tally) -> None:
    """Each takes its turn with some of the values, the next one with the next ones."""
    command = COMMANDS[words]
    values = [*NUMBERS, *TEXTS, *place.paths]
    each = min(EXAMPLES, len(values)) or 3
    wrong: list[str] = []
    tried = 0
    for number, parameter in enumerate(options(command)):
        if getattr(parameter, "is_flag", False):
            continue
        for turn in range(each):
            value = values[(number * 7 + turn * 17) % len(values)]
            told = fault(place, line(words, command, place, {parameter.name: value}))
            wrong += [told] if told else []
            tried += 1
    assert not wrong, "\n".join(wrong)
    tally.add("a bad value of an option", tried=tried, survived=tried)


@pytest.mark.parametrize("words", COMMANDS)
def test_options_together(words: str, place: Place, tally: Tally) -> None:
    command = COMMANDS[words]
    names = [p.name for p in options(command) if not getattr(p, "is_flag", False)]
    flags = [p.name for p in options(command) if getattr(p, "is_flag", False)]
    values = st.sampled_from([*NUMBERS, *TEXTS, *place.paths]) | st.text(
        st.characters(exclude_characters="\0"), max_size=8
    )
    tried = 0

    @hypothesis.settings(
        max_examples=EXAMPLES or 10,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        bad=st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=4),
        given_flags=st.frozensets(st.sampled_from(flags or ["none"])),
    )
    def check(bad: dict[str, str], given_flags: frozenset[str]) -> None:
        nonlocal tried
        tried += 1
        told = fault(place, line(words, command, place, bad, given_flags))
        assert told is None, told

    check()
    tally.add("bad values of several options", tried=tried, survived=tried)


@pytest.mark.parametrize("words", COMMANDS)
def test_without_a_bad_value_it_is_accepted(words: str, place: Place) -> None:
    """So that what is refused elsewhere is the bad value."""
    arguments = line(words, COMMANDS[words], place, {})
    with contextlib.suppress(Reached), place.as_it_was():
        result = invoke(arguments)
        assert result.exit_code == 0, result.output
