"""The loop of every supervised pass: batches, updates, a curve, and a checkpoint to go on from after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import torch
from transformers import PreTrainedModel

from iterative_ppo.learning.batching import Batch
from iterative_ppo.learning.checkpoint import (
    Checkpoint,
    below_prefix,
    load_optimizer,
    optimizer_tensors,
    resume_schedule,
    with_prefix,
)
from iterative_ppo.learning.optimization import Objective, descend, optimizer_for
from iterative_ppo.learning.sharding import in_shards

Progress = Callable[[int, int], None]
Curve = list[dict[str, float]]


class Trainee(Protocol):
    """What can be trained: a policy or a Q."""

    model: PreTrainedModel

    def training_state(self) -> dict[str, torch.Tensor]: ...

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None: ...


@in_shards
def train(
    trainee: Trainee,
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    steps: int,
    objective: Objective,
    learning_rate: float,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    after_step: Callable[[Curve], None] | None = None,
) -> Curve:
    """Fit in place, one update a batch; figures of each update.

    Args:
        batches: the same ones in the same order after a kill, for those that were learnt from are passed over. Or a
            function that gives those after so many, where they cost something.
        after_step: called with the curve after each update, whose figures it may add to.
    """
    optimizer, schedule = optimizer_for(trainee.model, learning_rate, steps)
    curve: Curve = []
    if checkpoint and (found := checkpoint.load()):
        tensors, values = found
        with checkpoint.understood():
            trainee.load_training_state(below_prefix("weights", tensors))
            load_optimizer(optimizer, tensors)
            curve = [dict(entry) for entry in values["curve"]]
            resume_schedule(schedule, len(curve))
    for batch in batches(len(curve)) if callable(batches) else islice(batches, len(curve), None):
        curve.append(descend(batch, objective, optimizer, schedule))
        if after_step:
            after_step(curve)
        if checkpoint and (len(curve) % checkpoint.every == 0 or len(curve) == steps):
            weights = with_prefix("weights", trainee.training_state())
            going = optimizer_tensors(optimizer) if len(curve) < steps else {}
            checkpoint.save(weights | going, {"curve": curve})
        if progress:
            progress(len(curve), steps)
    return curve
