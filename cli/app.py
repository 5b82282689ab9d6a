"""The `routesae` command. Each command lives in a file of its own, heavy imports inside it."""

from __future__ import annotations

import typer

from cli.console import handled
from cli.contexts import contexts
from cli.evaluate import evaluate
from cli.export import export
from cli.harvest import harvest
from cli.import_reference import import_reference
from cli.interpret import interpret
from cli.pipeline import pipeline
from cli.plan import plan
from cli.report import report
from cli.steer import steer
from cli.store import copy, info, recode, verify
from cli.sweep import sweep
from cli.train import train

app = typer.Typer(
    name="routesae",
    help="Run a language model once, keep its residuals on disk, train sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
store = typer.Typer(
    help="Look at, check, convert and copy activation stores.", no_args_is_help=True
)

app.command("harvest")(handled(harvest))
app.command("train")(handled(train))
app.command("sweep")(handled(sweep))
app.command("evaluate")(handled(evaluate))
app.command("contexts")(handled(contexts))
app.command("interpret")(handled(interpret))
app.command("steer")(handled(steer))
app.command("report")(handled(report))
app.command("pipeline")(handled(pipeline))
app.command("plan")(handled(plan))
app.command("export")(handled(export))
app.command("import-reference")(handled(import_reference))
store.command("info")(handled(info))
store.command("verify")(handled(verify))
store.command("recode")(handled(recode))
store.command("copy")(handled(copy))
app.add_typer(store, name="store")


def main() -> None:
    """Entry point of the `routesae` script."""
    app()


if __name__ == "__main__":
    main()
