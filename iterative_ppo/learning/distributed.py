"""Several processes, started by `accelerate launch`: each does its share, and all of them know the whole.

Every process runs the same loop on the same batches; where nothing was launched there is one process, and no cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def size() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 is the one that writes."""
    return distributed.get_rank() if size() > 1 else 0


def wait() -> None:
    """Go on when all processes have come here."""
    if size() > 1:
        distributed.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """Every size-th item from this process's own on: neighbours in length go to different processes."""
    return items[rank() :: size()]


def gathered(mine: dict[int, T]) -> dict[int, T]:
    """What all processes know together, for keys that one of them knows."""
    if size() == 1:
        return mine
    parts: list[Any] = [None] * size()
    distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if size() == 1:
        return value
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return max(values)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in place."""
    if size() > 1:
        distributed.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Each parameter's gradient becomes the sum over the processes; one that a process did not meet counts as 0.

    Gradients of sharded parameters are sums already.
    """
    if size() == 1:
        return
    pending = []
    for parameter in [p for p in parameters if not isinstance(p, DTensor)]:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pending.append(distributed.all_reduce(parameter.grad, async_op=True))
    for one in pending:
        one.wait()
