"""Processes that train the same SAEs, each on its part of every batch.

This module alone knows `torch.distributed`. A `World` is what the others see of it: with one
process its methods give back what they are given. Weights are never sent after the start: every
process makes the same update from the same summed gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from routesae_cache import selection
from routesae_cache.devices import cores, own_cores, take_cores

_ENVIRONMENT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_HERE = "127.0.0.1"
_SMALL = 1 << 16  # elements; smaller gradients travel together, in one buffer
T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the training has ended or refused; what it was is that one's to say."""


class World:
    """All processes of a training, as one of them sees them; here it is the only one.

    Every process makes the same calls in the same order. Batches have the same size in all of
    them, so that a mean over all is the mean of their means.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """Set the gradients of the loss over the whole batch; returns that loss."""
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def mean(self, value: Tensor) -> Tensor:
        """Of each element, over the processes."""
        return value

    def least(self, value: Tensor) -> Tensor:
        """Of each element, over the processes; no element is NaN."""
        return value

    def union(self, mask: Tensor) -> Tensor:
        """True where it is in any process."""
        return mask

    def batch_top(self, value_MF: Tensor, count: int) -> Tensor:
        """Positions in this process's values of the `count` largest a process over all of them."""
        return selection.batch_top(value_MF, count)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag

    def first(self, function: Callable[[], T]) -> T:
        """What the leading process finds; no other calls the function."""
        return function()

    def match_(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors the leading process's values."""

    def wait(self) -> None:
        """Until every process is here."""

    @contextmanager
    def together(self) -> Generator[None]:
        """A block in which what a user can mend may be found in any process, and ends them all.

        Raises:
            PeerError: where it is another process that raises the error itself.
        """
        yield


ALONE = World()


class _Group(World):
    """Processes joined by `torch.distributed`; tensors on a CPU go through gloo."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        (loss / self.size).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        large = [each for each in gradients if each.numel() >= _SMALL and each.ndim == 2]
        small = [each for each in gradients if each.numel() < _SMALL or each.ndim != 2]
        flat = torch.cat([loss.detach().view(1) / self.size, *(each.view(-1) for each in small)])
        self._reduce(flat, dist.ReduceOp.SUM)
        mean_loss, *sums = torch.split(flat, [1, *(each.numel() for each in small)])
        for each, total in zip(small, sums, strict=True):
            each.copy_(total.view_as(each))
        if large:
            self._sum_rows(large)
        return mean_loss[0]

    def _sum_rows(self, gradients: Sequence[Tensor]) -> None:
        """Sum matrices; of one with rows that are 0 in every process, only the others are sent."""
        used = [torch.linalg.vector_norm(g, float("inf"), dim=1) != 0 for g in gradients]
        everywhere = torch.split(self.union(torch.cat(used)), [len(g) for g in gradients])
        for gradient_FD, used_F in zip(gradients, everywhere, strict=True):
            row_U = used_F.nonzero().view(-1)
            if len(row_U) == len(gradient_FD):
                self._reduce(gradient_FD, dist.ReduceOp.SUM)
            elif len(row_U):
                gradient_UD = gradient_FD[row_U]
                self._reduce(gradient_UD, dist.ReduceOp.SUM)
                gradient_FD.index_copy_(0, row_U, gradient_UD)

    def mean(self, value: Tensor) -> Tensor:
        total = value.clone()
        self._reduce(total, dist.ReduceOp.SUM)
        return total / self.size

    def least(self, value: Tensor) -> Tensor:
        least = value.clone()
        self._reduce(least, dist.ReduceOp.MIN)
        return least

    def union(self, mask: Tensor) -> Tensor:
        union = mask.to(torch.uint8)
        self._reduce(union, dist.ReduceOp.MAX)
        return union.bool()

    def batch_top(self, value_MF: Tensor, count: int) -> Tensor:
        flat = value_MF.view(-1)
        own_P = flat[super().batch_top(value_MF, count)].float()
        # every process has `count` values from here on, so the last one chosen is no smaller
        floor = self.least(torch.where(own_P.isnan(), float("inf"), own_P).min())
        candidate_P = torch.nonzero(~(flat < floor)).view(-1)
        parts = self._gather(flat[candidate_P].float())
        begin = sum(map(len, parts[: self.rank]))
        best = torch.cat(parts).topk(count * self.size, sorted=False).indices - begin
        mine = best[(best >= 0) & (best < len(candidate_P))]
        return candidate_P[mine.sort().values]

    def any(self, flag: bool) -> bool:
        return bool(self.union(torch.tensor(flag)))

    def first(self, function: Callable[[], T]) -> T:
        found: list[T | None] = [None]
        with self.together():
            if self.leads:
                found = [function()]
        with self._peers():
            dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]  # type: ignore[return-value]

    def match_(self, tensors: Iterable[Tensor]) -> None:
        with self._peers():
            for each in tensors:
                dist.broadcast(each.view(torch.uint8) if each.dtype == torch.bool else each, 0)

    def wait(self) -> None:
        self.any(False)

    @contextmanager
    def together(self) -> Generator[None]:
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as found:
            error = found
        failed = torch.cat(self._gather(torch.tensor([int(error is not None)])))
        if not failed.any():
            return
        first = int(failed.argmax())
        if error is not None and first == self.rank:
            raise error
        raise PeerError(f"process {first} of 0 to {self.size - 1} gave the training up") from error

    def _gather(self, value_P: Tensor) -> list[Tensor]:
        """Every process's values, however many, in the order of ranks."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._peers():
            dist.all_gather(lengths, torch.tensor([len(value_P)]))
            longest = int(torch.cat(lengths).max())
            padded = value_P.new_zeros(longest)
            padded[: len(value_P)] = value_P
            parts = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(parts, padded)
        return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    def _reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with self._peers():
            dist.all_reduce(value, operation)

    @contextmanager
    def _peers(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise when a process is gone
            raise PeerError(
                f"another of the {self.size} processes has ended; --resume goes on with the runs "
                f"from their last checkpoints ({str(error).splitlines()[0]})"
            ) from error


def meeting_point() -> dist.TCPStore:  # type: ignore[name-defined]
    """Where processes on this machine find each other, open until it is let go of."""
    return dist.TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process, of some on this machine that meet at a port."""
    values = (*map(str, (rank, size, rank, size)), _HERE, str(port))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # nobody is to open the meeting point again
    return dict(zip(_ENVIRONMENT, values, strict=True)) | agent


def launched() -> bool:
    """Whether this is one of several processes, by the environment that torchrun sets."""
    return all(name in os.environ for name in _ENVIRONMENT)


@contextmanager
def join(device: str) -> Generator[tuple[World, str]]:
    """The world that this process is in, and the device it is to use.

    Args:
        device: `cpu`, or `cuda` for the GPU whose number is this process's on its machine.

    Raises:
        ValueError: where there is no such GPU.
    """
    if not launched():
        yield ALONE, device
        return
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    check_devices(processes, device)
    take_cores(max(1, cores() // processes))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_cores())
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    yield _Group(), device
    dist.destroy_process_group()  # not after an error: it might wait for processes that wait for it


def check_devices(processes: int, device: str) -> None:
    """ValueError where so many processes on this machine cannot have a device each."""
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {device}: several processes take a GPU each, from the first on; give cuda, "
            "and CUDA_VISIBLE_DEVICES for other ones"
        )
    if device == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise ValueError(f"{processes} processes: expected at most {gpus}, a GPU here for each")
