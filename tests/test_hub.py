"""The hub's failures and their messages, with its own exception classes."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from routesae_cache import hub
from routesae_cache.hub import Problem, advice, current_commit, hub_errors, problem_of
from routesae_cache.presets import CORPORA, MODELS, Kind


def answer(status: int) -> Any:
    return SimpleNamespace(headers={}, status_code=status, request=None)


FAILURES: list[tuple[BaseException, Problem]] = [
    (errors.HTTPError("no route to host"), "unreachable"),
    (errors.OfflineModeIsEnabled("offline"), "unreachable"),
    (errors.LocalEntryNotFoundError("not downloaded"), "unreachable"),
    (TimeoutError("slow"), "unreachable"),
    (errors.HfHubHTTPError("server error", response=answer(503)), "unreachable"),
    (errors.GatedRepoError("licence", response=answer(403)), "gated"),
    (errors.HfHubHTTPError("forbidden", response=answer(403)), "gated"),
    (errors.HfHubHTTPError("bad token", response=answer(401)), "gated"),
    (errors.RepositoryNotFoundError("no such", response=answer(404)), "missing"),
    (errors.RevisionNotFoundError("no such", response=answer(404)), "revision"),
]


@pytest.mark.parametrize(("failure", "problem"), FAILURES)
def test_problem_of_a_failure_and_of_what_wraps_it(failure: Exception, problem: Problem) -> None:
    assert problem_of(failure) == problem
    with pytest.raises(OSError, match="could not load") as wrapper:
        raise OSError("could not load") from failure
    assert problem_of(wrapper.value) == problem


@pytest.mark.parametrize("failure", [OSError("disk full"), FileNotFoundError("config.json")])
def test_other_failures_pass(failure: OSError) -> None:
    assert problem_of(failure) is None
    with pytest.raises(type(failure), match=str(failure)), hub_errors(ValueError, "model", "a/b"):
        raise failure


@pytest.mark.parametrize(("kind", "presets"), [("model", MODELS), ("data set", CORPORA)])
def test_each_problem_has_its_own_advice(kind: Kind, presets: dict[str, Any]) -> None:
    unreachable = advice("unreachable", kind, "a/b")
    assert "could not be reached" in unreachable
    assert "local path" in unreachable
    gated = advice("gated", kind, "a/b")
    assert "licence" in gated
    assert "HF_TOKEN" in gated
    assert ("/datasets/a/b" if kind == "data set" else "huggingface.co/a/b") in gated
    missing = advice("missing", kind, "a/b")
    assert f"no {kind} 'a/b'" in missing
    assert all(name in missing and name in unreachable for name in presets)
    assert "no such revision" in advice("revision", kind, "a/b")


def test_failures_become_the_error_asked_for() -> None:
    class OurError(ValueError):
        pass

    with pytest.raises(OurError, match="licence"), hub_errors(OurError, "model", "a/b"):
        raise errors.GatedRepoError("licence", response=answer(403))


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_a_gated_repository_is_found_out_before_anything_is_loaded(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Api:
        def model_info(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(gated="manual" if name == "gated/it" else False, sha="c0ffee")

        dataset_info = model_info

        def auth_check(self, name: str, *, repo_type: str) -> None:
            asked.append(repo_type)
            raise errors.GatedRepoError("licence", response=answer(403))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert current_commit(kind, "open/it", None) == "c0ffee"
    with pytest.raises(errors.GatedRepoError):
        current_commit(kind, "gated/it", None)
    assert asked == ["model" if kind == "model" else "dataset"]


def test_no_network_is_no_surprise() -> None:
    with pytest.raises(hub.HUB_FAILURES) as error:
        current_commit("model", "a/b", None)
    assert problem_of(error.value) == "unreachable"
