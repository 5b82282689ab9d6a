"""Killing a command again and again, and looking at what it left."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.jobs import Content, Job
from tests.faults.processes import Command, SignalAtFile, finished, running
from tests.faults.tally import Tally

Folders = Callable[[], Path]
"""Makes an empty folder."""
TIMES = int(os.environ.get("FAULT_TIMES", "1"))
"""How often there are as many kills as a test asks for, to find what is rare."""
Kill = Callable[[Path, Job], bool]
"""Runs a job's command in a folder and kills it; False where it ended well before that."""


def at_random_instants(seconds: float, seed: int) -> Kill:
    """Spread evenly over what the command takes."""
    rng = random.Random(seed)

    def kill(folder: Path, job: Job) -> bool:
        with running(folder, *job.arguments) as command:
            time.sleep(rng.uniform(0, seconds))
            command.kill()
            return was_killed(command)

    return kill


def at_random_files(most: int, seed: int) -> Kill:
    """Just before it makes, opens, renames or removes a file, which one is drawn."""
    rng = random.Random(seed)

    def kill(folder: Path, job: Job) -> bool:
        dies = SignalAtFile(re.escape(f"{folder.resolve()}/"), rng.randint(1, most))
        with running(folder, *job.arguments, first=dies) as command:
            return was_killed(command)

    return kill


def was_killed(command: Command) -> bool:
    code = command.code()
    assert code in (0, -9), command.output()
    return code == -9


def try_kills(
    what: str, job: Job, expected: Content, kill: Kill, kills: int, folders: Folders, tally: Tally
) -> None:
    """Kill and restart until it ends well, again and again until there were so many kills."""
    kills *= TIMES
    killed = survived = 0
    lost, wrong = list[str](), list[str]()
    while killed < kills:
        folder = folders()
        job.prepare(folder)
        here, before = 0, job.kept(folder)
        while kill(folder, job):
            here += 1
            kept = job.kept(folder)
            lost += differing(kept, expected) + [f"no {name}" for name in before.keys() - kept]
            before = kept
            if killed + here == kills:
                finished(folder, *job.arguments)
                break
        result = job.result(folder)
        found = differing(result, expected) + [f"no {name}" for name in expected.keys() - result]
        killed += here
        survived += 0 if found else here
        wrong += found
    tally.add(what, tried=killed, survived=survived, lost=len(lost))
    assert (wrong, lost) == ([], [])


def differing(kept: Content, expected: Content) -> list[str]:
    """What there is and is not what it is to be."""
    return [name for name, content in kept.items() if expected.get(name) != content]
