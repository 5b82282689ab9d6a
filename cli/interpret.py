"""`routesae interpret`: contexts of latents -> explanations and scores by a chat model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.console import bar, count, err, out, styled
from cli.options import Seed
from cli.stopping import stop_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from routesae_cache.interpretation.interpret import (
        InterpretConfig,
        InterpretPlan,
        InterpretProgress,
    )
    from routesae_cache.interpretation.replies import Status
    from routesae_cache.interpretation.results import Interpretation, LatentResult

_SHOWN_LATENTS = 10
_SHOWN_TROUBLE, _SHOWN_CHARACTERS = 5, 200
_TROUBLE: dict[Status, str] = {
    "unparsed": "Not in the format asked for, twice",
    "refused": "Refused by the model or a content filter",
    "failed": "No reply; the same command asks again",
}


class ScoreKind(StrEnum):
    """Scores that need no trust in the model's own grading."""

    detection = "detection"


def interpret(
    contexts: Annotated[
        Path, typer.Argument(help="A file of `routesae contexts`.", metavar="CONTEXTS.json")
    ],
    model: Annotated[str, typer.Option(help="Chat model; of Azure, the deployment.")] = "gpt-4o",
    base_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible server, such as http://localhost:8000/v1; it gets the key "
            "of OPENAI_API_KEY, if that is set. With --api-version, the Azure endpoint."
        ),
    ] = None,
    api_version: Annotated[
        str | None, typer.Option(help="Of Azure, whose key is in AZURE_OPENAI_API_KEY.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Latents to draw.")] = 100,
    seed: Seed = 42,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds for one attempt at a request.")] = 120,
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="USD; nothing is asked that might pass it. Replies of earlier runs count."
        ),
    ] = None,
    score: Annotated[
        ScoreKind | None,
        typer.Option(
            help="detection: explain from half of the contexts, and have the model tell the other "
            "half from contexts of other latents."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show requests, cost and a prompt; send nothing.")
    ] = False,
) -> list[Path]:
    """Have a chat model explain and score latents, from their contexts.

    The key comes from the environment: OPENAI_API_KEY. Replies are kept as they arrive, and the
    same command asks only for what is missing.
    """
    with err.status("Reading the contexts"):
        from routesae_cache.interpretation.chat import ChatConfig, find_key
        from routesae_cache.interpretation.interpret import (
            InterpretConfig,
            plan,
            replies_path,
            result_path,
        )
        from routesae_cache.interpretation.interpret import interpret as run_interpretation
        from routesae_cache.whole_files import named_full_disk

        config = InterpretConfig(
            chat=ChatConfig(
                model=model, base_url=base_url, api_version=api_version, timeout_s=timeout
            ),
            sample=sample,
            seed=seed,
            concurrency=concurrency,
            max_cost=max_cost,
            score=score.value if score else None,
        )
        if not dry_run:
            find_key(config.chat)  # before there is a bar
    if dry_run:
        _show_plan(plan(contexts, config), config)
        return []
    with (
        stop_signals() as stopped,
        named_full_disk(contexts, lambda: None),
        bar("Asking") as update,
    ):
        result = run_interpretation(contexts, config, _progress(update), stopped)
        update(completed=1, total=1, note="")
    _show(result, max_cost)
    out.print(f"Explanations: {result_path(contexts)}", soft_wrap=True)
    out.print(f"Every reply: {replies_path(contexts)}", soft_wrap=True)
    if result.interrupted:
        raise stopped.error()
    if result.with_status("failed") or "failed" in result.undetected():
        raise typer.Exit(1)
    return [result_path(contexts)]


def _progress(update: Callable[..., None]) -> Callable[[InterpretProgress], None]:
    def show(state: InterpretProgress) -> None:
        parts = [f"{state.done} of {state.total}"]
        if state.spent_usd is not None:
            parts.append(f"${state.spent_usd:.2f}")
        if state.trouble:
            parts.append(f"{state.trouble} without an answer")
        if state.stopping:
            parts = ["stopping; Ctrl-C again: at once"]
        # a bar without an end only moves to and fro
        update(completed=state.done, total=max(1, state.total), note=", ".join(parts))

    return show


def _show_plan(planned: InterpretPlan, config: InterpretConfig) -> None:
    out.print(
        f"{planned.latents:,} of {planned.interpretable:,} interpretable latents: "
        f"{planned.requests:,} requests to send, {planned.answered:,} questions answered already"
    )
    out.print(
        f"Estimate: {count(planned.prompt_tokens)} tokens of prompts and "
        f"{count(planned.completion_tokens)} of replies, "
        f"{_dollars(planned.cost_usd, config.chat.model)}"
    )
    out.rule("one prompt, whole", style="dim")
    for message in planned.example.messages("json"):
        out.print(f"{message['role']}:", style="bold")
        out.print(*map(_plain, message["content"].split("\n")), sep="\n", soft_wrap=True)
    out.rule(style="dim")
    out.print("Nothing was sent.")


def _show(result: Interpretation, max_cost: float | None) -> None:
    out.print(_score_table(result))
    if any(result.explained()):
        out.print(_latent_table(result))
    for status, what in _TROUBLE.items():
        _show_trouble(what, result.with_status(status))
    if left := len(result.with_status("left")) + result.undetected().get("left", 0):
        limited = max_cost is not None and not result.interrupted
        why = f"; going on might pass --max-cost {max_cost:g}" if limited else ""
        err.print(styled("yellow", "Left:", f" {_many(left, 'latent')}{why}"), soft_wrap=True)
    if result.tested:
        out.print(_detection_line(result))
    usage = result.usage
    cost = _dollars(result.cost_usd, result.model)
    if not result.usage_complete:
        cost = "cost unknown: the server does not always say what it used"
    out.print(
        f"{usage.prompt_tokens:,} tokens of prompts and {usage.completion_tokens:,} of replies, "
        f"{cost}",
        soft_wrap=True,
    )


def _score_table(result: Interpretation) -> Table:
    from routesae_cache.interpretation.results import LEVELS

    table = Table(title=f"Interpretation by {result.model}", title_justify="left")
    table.add_column(result.name, overflow="fold")
    for name in ("latents", "score (1-5)", "standard error"):
        table.add_column(name, justify="right", no_wrap=True)
    categories = result.categories()
    rows = {"all": result.score()} | {str(level): result.score(level) for level in LEVELS}
    for name, average in rows.items():
        table.add_row(name, f"{average.count}", _number(average.mean), _number(average.se))
    table.add_row("undiscernible", f"{categories['undiscernible']}", "", "")
    return table


def _latent_table(result: Interpretation) -> Table:
    explained = list(result.explained())
    shown = explained[:_SHOWN_LATENTS]
    title = f"The first {len(shown)} of {_many(len(explained), 'explained latent')}"
    table = Table(title=title, title_justify="left")
    for name in ("latent", "score", *(["detection"] if result.tested else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("category", no_wrap=True)
    table.add_column("explanation", overflow="fold")
    for latent, answer in shown:
        found = latent.detection
        detection = [_number(found.balanced_accuracy if found else None)] if result.tested else []
        row = (f"{latent.latent}", f"{answer.score}", *detection, answer.category)
        table.add_row(*row, _plain(answer.text))
    return table


def _show_trouble(what: str, results: Sequence[LatentResult]) -> None:
    if not results:
        return
    err.print(styled("yellow", f"{what}:", f" {_many(len(results), 'latent')}"))
    for result in results[:_SHOWN_TROUBLE]:
        told = f"  latent {result.latent}: {result.explanation.trouble}"
        err.print(_plain(told[:_SHOWN_CHARACTERS]), soft_wrap=True)
    if len(results) > _SHOWN_TROUBLE:
        err.print("  …")


def _detection_line(result: Interpretation) -> str:
    average, missing = result.detection(), result.undetected()
    line = (
        f"Detection: balanced accuracy {_number(average.mean)} "
        f"(standard error {_number(average.se)}) over {_many(average.count, 'latent')}"
    )
    if missing:
        why = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in missing.items())
        line += f"; not scored: {why}"
    return line


def _dollars(cost: float | None, model: str) -> str:
    from routesae_cache.interpretation.prices import PRICES_FROM

    if cost is None:
        return f"cost unknown: no price for {model} in the table of {PRICES_FROM}"
    return f"${cost:.4f} by the prices of {PRICES_FROM}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _plain(text: str) -> Text:
    """Text by others: no markup, nothing that a terminal acts on."""
    return Text("".join(c if c.isprintable() else " " for c in text))
