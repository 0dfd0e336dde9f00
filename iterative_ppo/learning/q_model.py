"""SingleTurnFitReward: a transformer with a scalar head, regressed on returns or on one-step targets (Observation 2).

One network serves V and Q: the value read at the last token of a prompt is V(s), at the end of a response Q(s, a), and
at the tokens between a running value, E[Q | the response so far], which PPO uses as its token-level critic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from iterative_ppo.config import Config
from iterative_ppo.errors import ModelError, StoreError, TrainingError
from iterative_ppo.files import read_settings, write_json
from iterative_ppo.learning.batching import (
    Batch,
    EncodedTable,
    inference_batches,
    response_positions,
    step_count,
    training_batches,
)
from iterative_ppo.learning.language_model import INFERENCE_TOKENS, LanguagePolicy
from iterative_ppo.mdp.rendering import Encoded

SETTINGS = "q.json"
FORMAT = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class QSettings:
    """How logits become values: low + (high - low) * sigmoid(logit) under bce, the logit itself under mse."""

    loss: str
    low: float
    high: float
    gamma: float
    format: int = FORMAT

    @classmethod
    def of(cls, config: Config) -> QSettings:
        return cls(config.q.loss, config.data.outcome_low, config.data.outcome_high, config.gamma)


@dataclass(frozen=True)
class Values:
    """Per table row: V(s_i) where the row has a state to act in, Q(s_i, a_i) where it has a logged action, else NaN."""

    v: np.ndarray
    q: np.ndarray


class QModel:
    """Q^pi and V^pi, frozen once fitted."""

    def __init__(self, model: PreTrainedModel, settings: QSettings, pad: int) -> None:
        self.model, self.settings, self.pad = model, settings, pad
        model.eval()

    @classmethod
    def from_policy(cls, policy: LanguagePolicy, settings: QSettings, seed: int) -> QModel:
        """A new Q on the policy's own backbone, with a fresh scalar head."""
        config = copy.deepcopy(policy.model.config)
        config.num_labels = 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = value_class(config)(config)
        model.base_model.load_state_dict(policy.model.base_model.state_dict())
        return cls(model.to(policy.model.device), settings, policy.pad)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> QModel:
        """Load a saved Q. Raises StoreError or ModelError with the reason."""
        values = read_settings(path / SETTINGS, FORMAT)
        try:
            pad = values.pop("pad")
            settings = QSettings(**values)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path / SETTINGS}: not a Q's settings ({error})") from None
        try:
            config = AutoConfig.from_pretrained(str(path))
            model: Any = value_class(config).from_pretrained(str(path), dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path}: not a saved Q-model ({' '.join(str(error).split())[:200]})") from None
        return cls(model.to(device), settings, pad)

    def save(self, path: Path) -> None:
        """Save weights (safetensors) and settings into a directory that `load` reads."""
        self.model.save_pretrained(path)
        write_json(path / SETTINGS, {**asdict(self.settings), "pad": self.pad})

    def copy(self) -> QModel:
        return QModel(copy.deepcopy(self.model), self.settings, self.pad)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) raw head outputs."""
        output: torch.Tensor = self.model(input_ids=tokens.to(self.model.device)).logits[..., 0]
        return output.float()

    def to_value(self, logits: torch.Tensor) -> torch.Tensor:
        """Head outputs to values in the outcome's units."""
        if self.settings.loss == "mse":
            return logits
        return self.settings.low + (self.settings.high - self.settings.low) * torch.sigmoid(logits)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(N,) elementwise loss against targets in the outcome's units."""
        if self.settings.loss == "mse":
            return (logits - target) ** 2
        unit = (target - self.settings.low) / (self.settings.high - self.settings.low)
        return F.binary_cross_entropy_with_logits(logits, unit.clamp(0.0, 1.0), reduction="none")

    @torch.inference_mode()
    def evaluate(self, encoded: EncodedTable) -> Values:
        """V and Q of all rows of a table, one pass a sequence."""
        v, q = np.full(encoded.rows, np.nan), np.full(encoded.rows, np.nan)
        for batch in inference_batches(encoded.sequences, INFERENCE_TOKENS, self.pad):
            values = self.to_value(self.logits(batch.tokens)).cpu().numpy()
            v[batch.row] = values[batch.sequence, batch.start - 1]
            logged = batch.trains
            q[batch.row[logged]] = values[batch.sequence[logged], batch.end[logged] - 1]
        return Values(v, q)

    @torch.inference_mode()
    def running_values(self, sequences: list[Encoded]) -> list[np.ndarray]:
        """For each single-turn sequence: values at the last prompt token and at every response token, (1 + length,)."""
        table = EncodedTable(sequences, len(sequences))
        result: list[np.ndarray] = [np.empty(0)] * len(sequences)
        for batch in inference_batches(table.sequences, INFERENCE_TOKENS, self.pad):
            values = self.to_value(self.logits(batch.tokens)).cpu().numpy()
            for k, start, end, row in zip(batch.sequence, batch.start, batch.end, batch.row, strict=True):
                result[row] = values[k, start - 1 : end]
        return result


def value_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """A head a token on every causal LM: transformers has one for half of the families (none for Gemma 3, OPT)."""
    kind = type(config)
    known: Any = AutoModelForTokenClassification._model_mapping
    causal_lms: Any = AutoModelForCausalLM._model_mapping
    if kind in known:
        head: type[PreTrainedModel] = known[kind]
        return head
    if kind not in causal_lms:
        raise ModelError(f"{config.model_type}: not a causal language model, so it can carry no Q")
    causal = causal_lms[kind]
    family = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    parts = {"config_class": kind, "__module__": causal.__module__}
    return type(f"{causal.__name__}WithValue", (GenericForTokenClassification, family), parts)


@dataclass(frozen=True)
class Regression:
    """How one regression runs: passes over the data, step size, batch of conversations."""

    epochs: float
    learning_rate: float
    batch_size: int
    running_weight: float


def regress(
    q: QModel,
    encoded: EncodedTable,
    targets: np.ndarray,
    how: Regression,
    seed: int,
    progress: Progress | None = None,
) -> float:
    """Fit `q` in place to one target a row, at the prompt's end, the response's end, and (weighted) between.

    Args:
        targets: (rows,) in the outcome's units; rows with NaN are left out.

    Returns the mean loss of the last tenth of the steps. Raises TrainingError where nothing is left to fit, or the
    loss is not finite.
    """
    usable = [s for s in encoded.sequences if any(x.trains and np.isfinite(targets[x.row]) for x in s.spans)]
    steps = step_count(len(usable), how.batch_size, how.epochs)
    if not steps:
        raise TrainingError("no turn has both a logged suggestion and a target: nothing to fit Q to")
    optimizer, schedule = optimizer_for(q.model, how.learning_rate, steps)
    losses = []
    rng = np.random.default_rng(seed)
    turns = sum(x.trains and bool(np.isfinite(targets[x.row])) for s in usable for x in s.spans)
    usual = turns / step_count(len(usable), how.batch_size, 1.0)
    for step, batch in enumerate(training_batches(usable, how.batch_size, how.epochs, q.pad, rng)):
        loss = _regression_loss(q, batch, targets, how.running_weight, usual)
        take_step(q.model, loss, optimizer, schedule)
        losses.append(loss.item())
        if progress:
            progress(step + 1, steps)
    if not np.isfinite(losses[-1]):
        raise TrainingError(f"the loss of Q is {losses[-1]}; lower q.learning_rate")
    return float(np.mean(losses[-max(1, steps // 10) :]))


def _regression_loss(q: QModel, batch: Batch, targets: np.ndarray, running_weight: float, usual: float) -> torch.Tensor:
    """The batch's loss over the usual number of turns in a batch.

    Neighbours in length share a batch, so a mean over each batch's own turns would weigh a turn by how short its
    conversation is going to be: V(s) would hear less of the conversations that go on.
    """
    spans = np.flatnonzero(batch.trains & np.isfinite(targets[batch.row]))
    span, sequence, position = response_positions(batch, spans)
    last = position == batch.end[span] - 1
    between = np.maximum(batch.end[span] - batch.start[span] - 1, 1)
    weight = np.where(last, 1.0, running_weight / between)
    sequence = np.concatenate([sequence, batch.sequence[spans]])
    position = np.concatenate([position, batch.start[spans] - 1])
    weight = np.concatenate([weight, np.ones(len(spans))])
    target = np.concatenate([targets[batch.row[span]], targets[batch.row[spans]]])
    logits = q.logits(batch.tokens)
    device = logits.device
    chosen = logits[torch.from_numpy(sequence).to(device), torch.from_numpy(position).to(device)]
    w = torch.from_numpy(weight).float().to(device)
    return (w * q.loss(chosen, torch.from_numpy(target).float().to(device))).sum() / ((2.0 + running_weight) * usual)


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


def take_step(
    model: torch.nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One update with the gradient clipped at norm 1. Returns the norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return float(norm)


def one_step_targets(reward: np.ndarray, last: np.ndarray, v: np.ndarray, gamma: float) -> np.ndarray:
    """(N,) y_i = r_i + gamma V(s_{i+1}), V(terminal) = 0: Q^pi of any logged action, whoever chose it.

    Args:
        reward: (N,) r_i. last: (N,) last rows of conversations. v: (N,) V(s_i), NaN in terminal rows.
    """
    following = np.append(v[1:], np.nan)
    return reward + gamma * np.where(last, 0.0, np.nan_to_num(following))


@dataclass(frozen=True)
class Round:
    """One round's encoded conversations with its rewards, for fitting Q."""

    encoded: EncodedTable
    reward: np.ndarray
    last: np.ndarray
    returns: np.ndarray
    fit: np.ndarray

    @property
    def fit_returns(self) -> np.ndarray:
        """(N,) returns of the fit part, NaN in the evidence part: what a regression may see."""
        return np.where(self.fit, self.returns, np.nan)


def fit_q(
    policy: LanguagePolicy,
    current: Round,
    replay: Iterable[Round],
    config: Config,
    start: QModel | None = None,
    progress: Progress | None = None,
) -> QModel:
    """Line 5 of Algorithm 1: Q^pi from conversations of pi (and, one-step, from earlier rounds' turns too).

    Args:
        start: the previous round's Q, for a warm start; None starts from the policy's backbone.
    """
    q = start.copy() if start is not None else QModel.from_policy(policy, QSettings.of(config), config.seed)
    c = config.q
    if c.target == "monte_carlo":
        how = Regression(c.epochs, c.learning_rate, c.batch_size, c.running_weight)
        regress(q, current.encoded, current.fit_returns, how, config.seed, progress)
        return q
    v = q.copy()
    how = Regression(c.value_epochs, c.value_learning_rate, c.value_batch_size, c.running_weight)
    regress(v, current.encoded, current.fit_returns, how, config.seed, progress)
    rounds = [current, *replay]
    targets = [
        np.where(r.fit, one_step_targets(r.reward, r.last, v.evaluate(r.encoded).v, config.gamma), np.nan)
        for r in rounds
    ]
    encoded, y = joined([r.encoded for r in rounds]), np.concatenate(targets)
    how = Regression(c.epochs, c.learning_rate, c.batch_size, c.running_weight)
    regress(q, encoded, y, how, config.seed + 1, progress)
    return q


def joined(tables: list[EncodedTable]) -> EncodedTable:
    """Several encoded tables as one, rows renumbered."""
    sequences, offset = [], 0
    for table in tables:
        for sequence in table.sequences:
            spans = tuple(replace(span, row=span.row + offset) for span in sequence.spans)
            sequences.append(Encoded(sequence.tokens, spans))
        offset += table.rows
    return EncodedTable(sequences, offset, sum(t.truncated_turns for t in tables), sum(t.unshared for t in tables))
