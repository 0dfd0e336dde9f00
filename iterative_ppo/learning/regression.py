"""SingleTurnFitReward: the network of Q regressed on targets of the turn table's rows (Observation 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.batching import (
    Batch,
    EncodedTable,
    response_positions,
    step_count,
    trained_turns,
    training_batches,
)
from iterative_ppo.learning.checkpoint import Checkpoint, below_prefix, with_prefix
from iterative_ppo.learning.optimization import set_by
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.learning.sequences import Chosen
from iterative_ppo.learning.training import Progress, train


@dataclass(frozen=True)
class Regression:
    """How one regression runs: passes over the data, step size, batch of conversations."""

    epochs: float
    learning_rate: float
    batch_size: int
    running_weight: float


@dataclass(frozen=True)
class Targets:
    """What the heads of Q should say, by table row: all (N, H) float32, finite where `usable`.

    Attributes:
        q: at the response's end and between. v: at the prompt's end. weight: of each row and head.
        usable: (N,) rows that have a target.
        expectile: of v's targets, that V learns; None is their mean, as .5 is.
    """

    q: np.ndarray
    v: np.ndarray
    weight: np.ndarray
    usable: np.ndarray
    expectile: float | None = None

    @classmethod
    def of(
        cls,
        q: np.ndarray,
        heads: int,
        v: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        expectile: float | None = None,
    ) -> Targets:
        """Targets of (N,) or (N, K) values, K columns repeated for each member; rows with NaN are left out."""
        spread = _columns(q, heads)
        ones = np.ones(spread.shape, np.float32) if weight is None else weight.astype(np.float32)
        usable = np.isfinite(spread).all(axis=1)
        return cls(spread, spread if v is None else _columns(v, heads), ones, usable, expectile)


def _columns(values: np.ndarray, heads: int) -> np.ndarray:
    columns = (values if values.ndim == 2 else values[:, None]).astype(np.float32)
    return columns if columns.shape[1] == heads else np.tile(columns, (1, heads // columns.shape[1]))


@dataclass(frozen=True)
class TargetNetwork:
    """A network that goes `polyak` of the way to the fitted one after each update."""

    q: QModel
    polyak: float


@dataclass
class Followed:
    """A Q under training and the target network that follows it: a checkpoint holds both."""

    fitted: QModel
    target: QModel

    @property
    def model(self) -> PreTrainedModel:
        return self.fitted.model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        self.fitted.model = model

    def training_state(self) -> dict[str, torch.Tensor]:
        fitted = with_prefix("fitted", self.fitted.training_state())
        return fitted | with_prefix("target", self.target.training_state())

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        self.fitted.load_training_state(below_prefix("fitted", state))
        self.target.load_training_state(below_prefix("target", state))


def regress(
    q: QModel,
    encoded: EncodedTable,
    targets: np.ndarray | Targets,
    how: Regression,
    seed: int,
    progress: Progress | None = None,
    target: TargetNetwork | None = None,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Fit `q` in place to one target a row, at the prompt's end, the response's end, and (weighted) between.

    Args:
        targets: (N,) in the outcome's units, or (N, K) with a column for each outcome; rows with NaN are left out. Or
            Targets, with a column for each head.
        target: a network that follows with each update.
        checkpoint: where a killed fit goes on from, and what makes a finished one again.

    Returns the mean loss of the last tenth of the steps. Raises TrainingError where nothing is left to fit, or the
    loss is not finite.
    """
    wanted = targets if isinstance(targets, Targets) else Targets.of(targets, q.settings.heads)
    trained = trained_turns(encoded.sequences, wanted.usable)
    usable = Chosen(encoded.sequences, np.flatnonzero(trained))
    steps = step_count(len(usable), how.batch_size, how.epochs)
    if not steps:
        raise TrainingError("no turn has both a logged suggestion and a target: nothing to fit Q to")
    usual = trained.sum() / step_count(len(usable), how.batch_size, 1.0)

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return _regression_loss(q, batch, wanted, how.running_weight, usual), {}

    batches = training_batches(usable, how.batch_size, how.epochs, q.pad, np.random.default_rng(seed))
    with set_by("q.learning_rate, or q.value_learning_rate where it is that"):
        curve = train(
            _trained(q, target),
            batches,
            steps,
            objective,
            how.learning_rate,
            progress,
            checkpoint,
            None if target is None else lambda _: target.q.follow(q, target.polyak),
        )
    return float(np.mean([update["loss"] for update in curve[-max(1, steps // 10) :]]))


def take_up_fit(q: QModel, target: TargetNetwork | None, checkpoint: Checkpoint) -> None:
    """Give networks the weights that a finished fit kept; where a later one made up for them, none."""
    if found := checkpoint.load():
        _trained(q, target).load_training_state(below_prefix("weights", found[0]))


def _trained(q: QModel, target: TargetNetwork | None) -> QModel | Followed:
    return q if target is None else Followed(q, target.q)


def _regression_loss(q: QModel, batch: Batch, targets: Targets, running_weight: float, usual: float) -> torch.Tensor:
    """The batch's loss, a mean over heads, over the usual number of turns in a batch.

    Neighbours in length share a batch, so a mean over each batch's own turns would weigh a turn by how short its
    conversation is going to be: V(s) would hear less of the conversations that go on.
    """
    spans = np.flatnonzero(batch.trains & targets.usable[batch.row])
    span, sequence, position = response_positions(batch, spans)
    last = position == batch.end[span] - 1
    between = np.maximum(batch.end[span] - batch.start[span] - 1, 1)
    weight = np.where(last, 1.0, running_weight / between)
    sequence = np.concatenate([sequence, batch.sequence[spans]])
    position = np.concatenate([position, batch.start[spans] - 1])
    weight = np.concatenate([weight, np.ones(len(spans))])
    rows = np.concatenate([batch.row[span], batch.row[spans]])
    weights = weight[:, None] * targets.weight[rows]
    target = np.concatenate([targets.q[batch.row[span]], targets.v[batch.row[spans]]])
    at_end = np.concatenate([last, np.zeros(len(spans), bool)])
    outputs = q.outputs_at(batch.tokens, sequence, position, at_end)
    aim, weight_of = (torch.from_numpy(values).to(outputs.device) for values in (target, weights.astype(np.float32)))
    if targets.expectile is not None:  # the gradient of bce and mse is linear in aim - value, so each finds it
        above = aim[len(span) :] > q.settings.scale.value(outputs[len(span) :].detach())
        weight_of[len(span) :] *= 2 * torch.where(above, targets.expectile, 1 - targets.expectile)
    weighted = weight_of * q.settings.scale.loss(outputs, aim)
    return weighted.sum() / ((2.0 + running_weight) * usual * q.settings.heads)
