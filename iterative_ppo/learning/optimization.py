"""Optimizer, schedule and one update: shared by every training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from iterative_ppo.errors import Diverged, TrainingError
from iterative_ppo.learning import distributed, runtime, sharding
from iterative_ppo.learning.batching import Batch

Objective = Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def optimizer_for(
    model: torch.nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a short warm-up and a linear fall to a tenth."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * max(0.1, 1.0 - 0.9 * step / max(1, steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextmanager
def set_by(rate: str) -> Iterator[None]:
    """For a block, an error of updates that diverge names the setting that their rate is from."""
    try:
        yield
    except Diverged as error:
        raise TrainingError(f"{error}; lower {rate}") from None


def take_step(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One update with the gradient clipped at norm 1. Returns the norm before clipping; raises Diverged, as descend."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return _update(optimizer, schedule)


def descend(
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, float]:
    """One update on a batch, in pieces: a share for each process, and no more tokens at once than the runtime allows.

    Args:
        objective: from a piece of the batch to its loss and figures. Both are contributions that add up over the
            pieces to the batch's: sums over what a count of the whole batch divides, never means over the piece. A
            piece may hold a sequence without spans.

    Returns the sums of the figures, of the loss, and the gradient's norm before it was clipped at 1; the same in every
    process, and up to rounding the same however many there are. Raises Diverged, with nothing changed, where the
    gradient is not a number.
    """
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, torch.Tensor] = {}
    for piece in pieces(batch, runtime.current().micro_batch_tokens):
        loss, figures = objective(piece)
        loss.backward()
        for name, value in {"loss": loss, **figures}.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.detach().double().cpu()
    distributed.sum_gradients(_parameters(optimizer))
    norm = _update(optimizer, schedule)
    values = distributed.summed(torch.stack(list(totals.values())).to(_parameters(optimizer)[0].device))
    return dict(zip(totals, values.tolist(), strict=True)) | {"gradient_norm": norm}


def _update(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> float:
    """The model may hold other gradients, such as those of an adapter that was trained before: they do not count."""
    norm = float(sharding.full(torch.nn.utils.clip_grad_norm_(_parameters(optimizer), 1.0)))
    if not math.isfinite(norm):
        raise Diverged(f"training diverged: its gradient is {norm} at a learning rate of {schedule.get_last_lr()[0]:g}")
    optimizer.step()
    schedule.step()
    return norm


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def pieces(batch: Batch, tokens: int | None) -> list[Batch]:
    """This process's share of a batch, at most about `tokens` padded tokens at once (None: all at once).

    Every process gets one at least, a sequence without spans where its share is empty; for a sharded model, whose
    processes meet in each forward pass, all get as many.
    """
    lengths = np.zeros(len(batch.tokens), dtype=np.int64)
    np.maximum.at(lengths, batch.sequence, batch.end)
    mine = np.array(distributed.share(np.argsort(-lengths, kind="stable").tolist()), dtype=np.int64)
    found: list[Batch] = []
    begin = 0
    while begin < len(mine):
        width = max(1, int(lengths[mine[begin]]))
        size = len(mine) if tokens is None else max(1, tokens // width)
        found.append(_part(batch, mine[begin : begin + size], width))
        begin += size
    least = distributed.largest(len(found)) if sharding.wanted() else 1
    return found + [_without_spans(batch)] * (least - len(found))


def _part(batch: Batch, sequences: np.ndarray, width: int) -> Batch:
    if len(sequences) == len(batch.tokens):
        return batch
    place = np.full(len(batch.tokens), -1)
    place[sequences] = np.arange(len(sequences))
    kept = place[batch.sequence] >= 0
    return Batch(
        batch.tokens[torch.from_numpy(sequences.copy()), :width],
        place[batch.sequence[kept]],
        batch.start[kept],
        batch.end[kept],
        batch.row[kept],
        batch.trains[kept],
    )


def _without_spans(batch: Batch) -> Batch:
    none = np.zeros(0, dtype=np.int64)
    return Batch(batch.tokens[:1, :1], none, none, none, none, none.astype(bool))
