"""Running commands as a user does."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from cli.app import app


def routesae(*arguments: object) -> Result:
    """The result of a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one message with these words in it, no traceback."""
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    for word in words:
        assert word in message
    assert "Traceback" not in result.output
