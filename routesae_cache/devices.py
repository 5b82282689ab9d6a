"""Which device to compute on, and how much of the machine."""

from __future__ import annotations

import os

import torch

_FEWEST_THREADS, _MOST_THREADS = 2, 16  # beyond, they would wait for each other's Python


def resolve_device(name: str) -> str:
    """`auto` is CUDA where there is one; ValueError for a device that cannot be used here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
    return name


_taken: int | None = None


def cores() -> int:
    """Cores that this process and those it starts may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_cores(count: int) -> None:
    """Leave all cores but so many to other processes on this machine."""
    global _taken
    _taken = count


def own_cores() -> int:
    """Cores that this process may use by itself."""
    return cores() if _taken is None else _taken


def batch_threads(cores: float) -> int:
    """Threads to read a store's batches with, and as many to decode them, on so many cores."""
    return int(min(max(_FEWEST_THREADS, cores), _MOST_THREADS))
