"""What went wrong at the Hugging Face hub, in words that say what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the client's
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from routesae_cache.presets import DEFAULT_CORPUS, DEFAULT_MODEL, PRESET_NAMES, Kind

Problem = Literal["unreachable", "gated", "missing", "revision"]

# A refused connection is an HTTPError but no OSError, a wrapped one an OSError.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, HTTPError)

_TIMEOUT_S = 15.0
_REPO_TYPE = {"model": "model", "data set": "dataset"}
_PAGE = {"model": "https://huggingface.co/", "data set": "https://huggingface.co/datasets/"}
_DEFAULT = {"model": DEFAULT_MODEL, "data set": DEFAULT_CORPUS}


def problem_of(failure: BaseException) -> Problem | None:
    """Which of the hub's problems an exception, or what it was raised from, stands for."""
    cause: BaseException | None = failure
    while cause is not None:
        match cause:
            case GatedRepoError():
                return "gated"
            case RepositoryNotFoundError():
                return "missing"
            case RevisionNotFoundError():
                return "revision"
            case HfHubHTTPError():
                return "gated" if cause.response.status_code in (401, 403) else "unreachable"
            case LocalEntryNotFoundError() | ConnectionError() | TimeoutError() | HTTPError():
                return "unreachable"
        cause = cause.__cause__ or cause.__context__
    return None


def advice(problem: Problem, kind: Kind, name: str) -> str:
    """One message per problem: what was found and what to do."""
    instead = f"give a local path, or use the default preset {_DEFAULT[kind]!r}"
    match problem:
        case "unreachable":
            return (
                f"the Hugging Face hub could not be reached for the {kind} {name!r}; check the "
                f"network and that HF_HUB_OFFLINE is not set, {instead} "
                f"(presets: {', '.join(PRESET_NAMES[kind])})"
            )
        case "gated":
            return (
                f"the hub does not let you have the {kind} {name!r}: accept its licence at "
                f"{_PAGE[kind]}{name} and set HF_TOKEN to a token of that account (or run "
                f"`hf auth login`), {instead}"
            )
        case "missing":
            return (
                f"the hub has no {kind} {name!r} (if it is a private one, set HF_TOKEN), and "
                f"there is no such local path; presets: {', '.join(PRESET_NAMES[kind])}"
            )
        case "revision":
            return f"the {kind} {name!r} on the hub has no such revision; see {_PAGE[kind]}{name}"


@contextmanager
def hub_errors(error: type[ValueError], kind: Kind, name: str) -> Iterator[None]:
    """Turn the hub's failures inside the block into `error` with advice; others pass."""
    try:
        yield
    except HUB_FAILURES as failure:
        problem = problem_of(failure)
        if problem is None:
            raise
        raise error(advice(problem, kind, name)) from failure


def current_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    """The commit that a repository's revision is at, having checked that one may read it.

    One or two small requests; raises the hub's own exceptions.
    """
    api = HfApi()
    info: ModelInfo | DatasetInfo
    if kind == "model":
        info = api.model_info(name, revision=revision, timeout=_TIMEOUT_S)
    else:
        info = api.dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    if info.gated:
        api.auth_check(name, repo_type=_REPO_TYPE[kind])
    return info.sha
