"""Several processes, started by `accelerate launch`: each does its share, and all of them know the whole.

Every process runs the same loop on the same batches; where nothing was launched there is one process, and no cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

T = TypeVar("T")
R = TypeVar("R")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What a launcher tells a process of the others, in its environment."""


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


def by_shares(items: Sequence[T], of: Callable[[Sequence[T]], list[R]], together: int = 1) -> list[R]:
    """What a function gives for items, one each: every process asks it for some neighbours, and all know all.

    Args:
        together: so many neighbours, from the first on, stay in one share.
    """
    if size() == 1:
        return of(items)
    units = -(-len(items) // together)
    begin, end = (together * (units * k // size()) for k in (rank(), rank() + 1))
    found = gathered(dict(enumerate(of(items[begin:end]) if begin < end else [], begin)))
    return [found[k] for k in range(len(items))]


def filled(values: np.ndarray) -> np.ndarray:
    """What all processes know together, in arrays that are NaN where another one knows."""
    for other in gathered({rank(): values}).values():
        np.copyto(values, other, where=~np.isnan(other))
    return values


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


@contextmanager
def unseen() -> Iterator[None]:
    """For a block, accelerate takes each process for the only one, while `size` and `rank` go on telling how it is.

    So a trainer of somebody else's runs its loop on the whole batch in every process, and what it asks of us is shared.
    """
    if size() == 1:
        yield
        return
    from accelerate.state import AcceleratorState, PartialState

    states: list[Any] = [PartialState._shared_state, AcceleratorState._shared_state]
    kept, told = [dict(state) for state in states], {name: os.environ.pop(name, None) for name in LAUNCHED}
    try:
        for state in states:
            state.clear()
        yield
    finally:
        os.environ.update({name: value for name, value in told.items() if value is not None})
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
