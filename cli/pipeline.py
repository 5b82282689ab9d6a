"""`routesae pipeline`: an experiment's file -> every stage whose result is not there yet.

A stage is a command of this program, with the options that the file has for it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.exceptions import TyperException

from cli.console import duration, err, out, size, styled
from cli.options import EndpointUrl
from cli.stopping import raise_stop

if TYPE_CHECKING:
    from routesae_cache.experiment import Experiment, Stage
    from routesae_cache.pipeline import Pipeline
    from stores.place import Place

COMMANDS: dict[Stage, str] = {
    "harvest": "harvest",
    "train": "sweep",
    "evaluate": "evaluate",
    "contexts": "contexts",
    "interpret": "interpret",
    "report": "report",
}
_OURS = ("out", "json", "store", "resume", "replace", "dry_run")
"""Options that the pipeline gives itself."""


class StageKind(StrEnum):
    """The stages, in order."""

    harvest = "harvest"
    train = "train"
    evaluate = "evaluate"
    contexts = "contexts"
    interpret = "interpret"
    report = "report"


def pipeline(
    file: Annotated[
        Path, typer.Argument(help="TOML: what every stage is to do.", metavar="EXPERIMENT.toml")
    ],
    first: Annotated[
        StageKind | None, typer.Option("--from", help="Run this stage and all after it again.")
    ] = None,
    only: Annotated[
        StageKind | None, typer.Option(help="Run this stage alone, whatever is there.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is done and what is to do, and stop.")
    ] = False,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Run every stage of an experiment, from harvest to report, that is not done yet."""
    if first is not None and only is not None:
        raise ValueError(f"--from {first.value} and --only {only.value} exclude each other")
    with err.status("Reading the experiment"):
        from routesae_cache.experiment import STAGES, read_experiment
        from routesae_cache.pipeline import Pipeline
        from routesae_cache.sole_use import sole_use

        experiment = read_experiment(file)
        stages = _Stages(Pipeline(experiment))
        forced: Sequence[Stage] = ()
        if first is not None:
            forced = STAGES[STAGES.index(first.value) :]
        elif only is not None:
            forced = (only.value,)
        stages.check_options()
    chosen = STAGES if only is None else forced
    if dry_run:
        _show_plan(stages, chosen, forced)
        return
    with sole_use(experiment.out, ["pipeline"]):
        stages = _Stages(Pipeline(experiment))  # another one may have come to its end just now
        for stage in chosen:
            stages.run(stage, forced=stage in forced)
    out.print(f"\nEverything of {file} is done; look at {experiment.report}", soft_wrap=True)


class _Stages:
    """The experiment's stages as commands."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.experiment: Experiment = pipeline.experiment

    def check_options(self) -> None:
        """ValueError for an option or value, of any stage, that its command does not take."""
        for stage in COMMANDS:
            if stage == "train":
                continue
            for option in self.experiment.options[stage]:
                if option in _OURS:
                    raise ValueError(
                        f"{self.experiment.path}, [{stage}]: {option} is the pipeline's to give"
                    )
            self.parsed(stage, self.arguments(stage, [Path("-")]))

    def arguments(self, stage: Stage, read: Sequence[Path]) -> list[str]:
        """A command's arguments. `read`: runs, or for `interpret` the file with contexts."""
        experiment = self.experiment
        paths: list[Path | Place | str]
        match stage:
            case "harvest":
                paths = ["--out", experiment.store]
            case "train":
                target = ["--out", experiment.saes, "--resume", "--replace"]
                return list(map(str, [experiment.store, experiment.sweep_file, *target]))
            case "evaluate":
                paths = [experiment.store, *read, "--json", experiment.evaluation]
            case "contexts":
                paths = [experiment.store, *read, "--out", experiment.contexts]
            case "interpret":
                paths = list(read)
            case "report":
                paths = [experiment.out, "--store", experiment.store, "--out", experiment.report]
        return [*map(str, paths), *self._given(stage)]

    def parsed(self, stage: Stage, arguments: list[str]) -> dict[str, Any]:
        """Typed values of a command's parameters."""
        command = _command(stage)
        try:
            return dict(command.make_context(command.name, list(arguments)).params)
        except TyperException as error:
            raise ValueError(
                f"{self.experiment.path}, [{stage}]: {error.format_message()}"
            ) from error

    def why_not(self, stage: Stage) -> str | None:
        """Why a stage is left out although it is not done; None where it is not."""
        if stage != "interpret":
            return None
        from routesae_cache.interpretation.chat import ChatConfig, ChatError, find_key

        if not self.experiment.interprets:
            return "the file has no [interpret]"
        options = self.parsed(stage, self.arguments(stage, [Path("-")]))
        names = ("base_url", "api_version")
        try:
            find_key(ChatConfig(**{name: options[name] for name in names}))
        except ChatError as error:
            return str(error)
        return None

    def run(self, stage: Stage, *, forced: bool) -> None:
        """Run a stage unless its result is there; its command's failure ends the pipeline."""
        if left_out := self.why_not(stage):
            _headline(stage, f"left out: {left_out}")
            return
        reason = "asked for" if forced else self.pipeline.why(stage)
        if reason is None:
            _headline(stage, "done already")
            return
        _headline(stage, reason)
        start = time.perf_counter()
        written = [path for call in self.calls(stage) for path in self._call(stage, call)]
        self.pipeline.finish(stage, self._outputs(stage, written), time.perf_counter() - start)

    def calls(self, stage: Stage) -> Iterator[list[str]]:
        """The arguments of each call of a stage's command."""
        if stage == "interpret":
            from routesae_cache.json_files import read_json

            for file in self.pipeline.made_by("contexts"):
                if read_json(file)["total_latents"]:
                    yield self.arguments(stage, [file])
                else:
                    out.print(f"{file} has no interpretable latent: nothing to ask")
        elif stage in ("evaluate", "contexts"):
            runs = self.pipeline.finished_runs()
            if not runs:
                raise ValueError(f"no SAE of {self.experiment.saes} has been trained to its end")
            yield self.arguments(stage, runs)
        else:
            yield self.arguments(stage, [])

    def _call(self, stage: Stage, arguments: list[str]) -> list[Path]:
        """Run a command; returns what it says that it wrote."""
        out.print(styled("dim", _shell(stage, arguments)), soft_wrap=True)
        outcome = _command(stage).main(list(arguments), standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
        raise_stop(code)
        if stage == "train" and code == 1 and self.pipeline.finished_runs():
            told = " the stages after this leave out the SAEs that failed"
            err.print(styled("yellow", "Warning:", told))
        elif code:
            again = f"`routesae pipeline {self.experiment.path}` goes on here"
            err.print(f"The stage {stage} did not end well; what came before is kept, {again}.")
            raise typer.Exit(code)
        return outcome if isinstance(outcome, list) else []

    def _given(self, stage: Stage) -> Iterator[str]:
        """The options that the file has for a stage, as words, and the harvest's model.

        That is given where the store is not to say which it is: a local one has to be found, and
        whose code is run is the file's to say.
        """
        known = {parameter.name: parameter for parameter in _command(stage).params}
        options = dict(self.experiment.options[stage])
        harvested = self.experiment.options["harvest"]
        model, trusted = harvested.get("model"), harvested.get("trust_remote_code") is True
        loads_it = stage in ("contexts", "report") or bool(options.get("spliced"))
        if loads_it and "model" not in options and isinstance(model, str):
            if trusted:
                same = ("model", "revision", "trust_remote_code")
                options = {name: harvested[name] for name in same if name in harvested} | options
            elif Path(model).expanduser().exists():
                options["model"] = model
        if options.get("spliced"):
            options.setdefault("skip_refused", True)
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            parameter = known.get(name)
            if value is True:
                yield flag
            elif value is False:
                continue
            elif not isinstance(value, list):
                yield from (flag, str(value))
            elif parameter is not None and parameter.multiple:
                for each in value:
                    yield from (flag, str(each))
            else:
                yield from (flag, ",".join(map(str, value)))

    def _outputs(self, stage: Stage, written: list[Path]) -> Sequence[Path | Place]:
        """What a stage has made. `written`: what its commands said, where nobody knows before."""
        experiment = self.experiment
        match stage:
            case "harvest":
                return [experiment.store]
            case "train":
                return self.pipeline.runs()
            case "evaluate":
                return [experiment.evaluation]
            case "contexts" | "interpret":
                return written
            case "report":
                return [experiment.report]


def _command(stage: Stage) -> Any:
    from cli.app import app

    group: Any = typer.main.get_command(app)
    return group.commands[COMMANDS[stage]]


def _shell(stage: Stage, arguments: Sequence[str]) -> str:
    return shlex.join(["routesae", COMMANDS[stage], *arguments])


def _headline(stage: Stage, what: str) -> None:
    out.print()
    out.print(styled("bold", stage, f": {what}"), soft_wrap=True)


def _show_plan(stages: _Stages, chosen: Sequence[Stage], forced: Sequence[Stage]) -> None:
    table = Table(title=str(stages.experiment.path), title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("why", overflow="fold")
    after: Stage | None = None
    for stage in chosen:
        record = stages.pipeline.records.get(stage)
        if left_out := stages.why_not(stage):
            table.add_row(stage, "left out", left_out)
            continue
        if stage in forced:
            why: str | None = "asked for"
        elif after is not None:
            why = f"follows {after}"
        else:
            why = stages.pipeline.why(stage)
        if why is None:
            assert record is not None
            table.add_row(stage, styled("green", "done"), f"in {duration(record.seconds)}")
        else:
            table.add_row(stage, styled("yellow", "to do"), why)
            after = after or stage
    out.print(table)
    _show_forecast(stages)


def _show_forecast(stages: _Stages) -> None:
    from cli.options import build_codec, chosen_model
    from routesae_cache.forecast import forecast

    with err.status("Estimating"):
        harvest = stages.parsed("harvest", stages.arguments("harvest", []))
        sweep = stages.experiment.sweep
        named = ("tokens", "eval_tokens", "layers", "context", "device")
        model = (harvest[name] for name in ("model", "revision", "trust_remote_code"))
        expected = forecast(
            model=chosen_model(*model),
            **{name: harvest[name] for name in named},
            dtype=str(harvest["dtype"]),
            codec=build_codec(harvest["codec"], harvest["step"], harvest["keyframe_every"]),
            saes=sweep.specs,
            epochs=sweep.train.get("epochs", 1),
        )
    out.print(
        f"From nothing, on this machine: a store of about {size(expected.store_bytes)}, "
        f"about {duration(expected.harvest_seconds)} to harvest it, about "
        f"{duration(expected.train_seconds)} to train {expected.saes} SAEs in one pass."
    )
