"""Command lines that mean nothing good, for whatever options the commands have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from cli.app import app
from tests.faults.damage import no_hang

NUMBERS = (
    *("0", "-1", "nan", "inf", "-inf", "1e309", "1e-320", "0.5", "1" * 30, "-" + "9" * 30),
    *(
        "1_000",
        "٣",
        "0x10",
        "１",
        "9" * 5000,
        "9" * 400,
        str(2**31),
        str(2**63),
        str(2**64),
        "1,2",
        "1e3",
    ),
)
TEXTS = (
    *(
        "",
        " ",
        "-",
        "--",
        ",",
        "=",
        ":",
        "topk:",
        "topk:k",
        "topk:k=",
        "nothing",
        "22-7",
        "0-9" * 9,
    ),
    *(
        "topk:k=nan",
        "topk:k=-1",
        "route+",
        "+",
        "topk:k=1,k=2",
        "topk:colour=blue",
        "7+",
        "0-" + "9" * 20,
    ),
    *("\x1b[2J\x07", "a\nb", "[/red]", "[bold", "\udcff", "\u2028\u202e", "x" * 100_000, "🙂"),
    *("../../outside", "a/b/c", "~nobody/x", "zip://x::y", "https://h/x", "file:///etc/passwd"),
)
EXAMPLES = int(os.environ.get("ROUTESAE_FUZZ", "0"))
"""By hand: so many and at random; without it always the same few."""


class Reached(BaseException):
    """The first expensive second would begin here: everything was accepted."""


@dataclass(frozen=True)
class Place:
    """A folder to work in, and what commands take as their arguments there."""

    folder: Path
    every: Mapping[str, str]
    """Good values of what commands require, by the name of the parameter."""
    own: Mapping[str, Mapping[str, str]]
    """Those of single commands, and of options without which they refuse everything."""
    paths: tuple[str, ...]
    """Where there is nothing of use."""

    def listing(self) -> frozenset[Path]:
        """What there is."""
        return frozenset(self.folder.rglob("*"))

    def files(self) -> dict[Path, tuple[int, int]]:
        """What tells whether a file was written to."""
        found = {path: path.lstat() for path in self.listing() if not path.is_dir()}
        return {path: (about.st_mtime_ns, about.st_size) for path, about in found.items()}

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Remove what the block makes."""
        before = self.listing()
        try:
            yield
        finally:
            for path in sorted(self.listing() - before):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)  # with its folder, perhaps


def make_paths(folder: Path) -> tuple[str, ...]:
    """Files, folders and what is neither."""
    bad = folder / "bad"
    bad.mkdir()
    (bad / "folder").mkdir()
    contents = {
        "empty": b"",
        "latin.toml": b'out = "\xe9"',
        "bad.toml": b"[train\n= 3",
        "zero": bytes(100),
        "deep.toml": b"x = " + b"[" * 5000,
        "deep.json": b"[" * 100_000,
        "list.json": b"[1]",
        "word.json": b'{"kind": "contexts"}',
        "x.gguf": b"GGUF nothing",
        "x.jsonl": b'{"text": 3}\n',
        "x.zip": b"PK\3\4",
        "x.pt": b"\x80\x02cos\nsystem\n.",
    }
    for name, content in contents.items():
        (bad / name).write_bytes(content)
    os.mkfifo(bad / "fifo")
    (bad / "unreadable").write_bytes(b"x")
    (bad / "unreadable").chmod(0)
    (bad / "loop").symlink_to(bad / "loop")
    (bad / "dangling").symlink_to(folder / "nowhere")
    found = [str(path.relative_to(folder)) for path in sorted(bad.iterdir())]
    return (
        *found,
        "bad/empty/below",
        "nowhere/at/all",
        "",
        ".",
        "..",
        "/proc/self",
        "bad/" + "n" * 300,
    )


def commands() -> dict[str, Any]:
    """Every command there is, by its words."""

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(f"{words} {name}".strip(), inner)
        else:
            yield words, command

    return dict(walk("", typer.main.get_command(app)))


COMMANDS = commands()


def options(command: Any) -> list[Any]:
    """A command's parameters, all but --help."""
    return [parameter for parameter in command.params if parameter.name != "help"]


def line(
    words: str,
    command: Any,
    place: Place,
    bad: Mapping[str, str],
    flags: frozenset[str] = frozenset(),
) -> list[str]:
    """A command line as it should be, but for the parameters in `bad`."""
    given = {**place.own.get(words, {}), **bad}
    arguments = words.split()
    values: list[str] = []
    for parameter in options(command):
        name = parameter.name
        if getattr(parameter, "is_flag", False):
            arguments += [parameter.opts[0]] if name in flags else []
        elif name in given or parameter.required:
            value = given.get(name, place.every.get(name, "nothing"))
            if parameter.param_type_name == "argument":
                values.append(value)
            else:
                arguments.append(f"{parameter.opts[0]}={value}")
    return [*arguments, "--", *values]


def invoke(arguments: list[str]) -> Result:
    with no_hang(60):
        return CliRunner().invoke(app, arguments)


def fault(place: Place, arguments: list[str]) -> str | None:
    """What is wrong with the answer to a command line; None where it is right or accepted."""
    told = " ".join(argument[:80] for argument in arguments)
    with place.as_it_was():
        before, files = place.listing(), place.files()
        try:
            result = invoke(arguments)
        except Reached:
            return None
        created = sorted(map(str, place.listing() - before))
        now = place.files()
        spoilt = sorted(str(path) for path, about in files.items() if now.get(path) != about)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{told}: {result.exception!r:.300}"
    if result.exit_code == 2:
        if not result.stderr.strip():
            return f"{told}: no message"
        if "Traceback" in result.output:
            return f"{told}: a traceback"
        if created:
            return f"{told}: created {created[:5]} ({result.stderr.strip()[:200]})"
        if spoilt:
            return f"{told}: changed {spoilt[:5]} ({result.stderr.strip()[:200]})"
    elif result.exit_code not in (0, 1):
        return f"{told}: exit code {result.exit_code}"
    return None


def stop_before_work(patch: pytest.MonkeyPatch) -> None:
    """Let `Reached` come in place of everything that takes long or reaches the network."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    for name in (
        "routesae_cache.harvest.load_model",
        "routesae_cache.workers.load_model",
        "routesae_cache.workers.harvest_share",
        "routesae_cache.ray_harvest.harvest_on_ray",
        "routesae_cache.train_plan.Run",
        "routesae_cache.origin.origin_lm",
        "routesae_cache.origin.origin_tokenizer",
        "routesae_cache.evaluate.evaluate_saes",
        "routesae_cache.contexts.contexts.origin_tokenizer",
        "routesae_cache.interpretation.interpret._ask_all",
        "routesae_cache.report.build._read",
        "cli.pipeline._Stages.run",
    ):
        patch.setattr(name, reached)

    def quick(*_: Any, **__: Any) -> float:
        return 1.0

    patch.setattr("routesae_cache.harvest_plan.forward_seconds", quick)
    patch.setattr("cli.pipeline._show_forecast", quick)
