"""A critic that learns on from what Q knows: a copy of Q whose running value follows the returns of PPO's episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from iterative_ppo.learning.batching import Batch, response_positions
from iterative_ppo.learning.checkpoint import (
    below_prefix,
    load_optimizer,
    optimizer_tensors,
    resume_schedule,
    with_prefix,
)
from iterative_ppo.learning.optimization import descend, optimizer_for
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.mdp.rendering import Encoded


class LearnedCritic:
    """V of a prompt and the tokens so far, over `scale`, regressed on returns by squared error."""

    def __init__(self, q: QModel, learning_rate: float, steps: int, scale: float) -> None:
        self.q, self.scale = q.copy().with_settings(pessimism=0.0), scale  # the mean is what learns, so it is read too
        self.optimizer, self.schedule = optimizer_for(self.q.model, learning_rate, steps)

    def running_values(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """(1 + length,) a sequence, as QModel's, over the scale."""
        return [value / self.scale for value in self.q.running_values(sequences)]

    def learn(self, batch: Batch, returns: list[np.ndarray], usual: float) -> float:
        """One update on a minibatch; the loss, over the usual number of tokens."""
        wanted = np.concatenate(returns)
        begin = np.cumsum([0, *map(len, returns)])

        def objective(piece: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            spans = np.arange(len(piece.row))
            span, sequence, position = response_positions(piece, spans)
            at = begin[piece.row[span]] + position - piece.start[span]
            values = self._values(piece, sequence, position - 1) / self.scale
            return ((values - torch.from_numpy(wanted[at]).to(values)) ** 2).sum() / usual, {}

        return descend(batch, objective, self.optimizer, self.schedule)["loss"]

    def _values(self, batch: Batch, sequence: np.ndarray, position: np.ndarray) -> torch.Tensor:
        """(N,) values at some positions: outcomes weighted, the mean over members."""
        outputs = self.q.outputs_at(batch.tokens, sequence, position, np.zeros(len(position), dtype=bool))
        settings = self.q.settings
        weights = outputs.new_tensor(list(settings.outcomes.values()))
        values = settings.scale.value(outputs).unflatten(1, (-1, len(weights)))  # N is 0 in a process without a share
        by_member = (values * weights).sum(dim=-1)  # no matrix product, which autocast would make bfloat16
        return by_member[:, : settings.members].mean(dim=1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        weights = with_prefix("critic", dict(self.q.model.named_parameters()))
        return weights | optimizer_tensors(self.optimizer, "critic-optimizer")

    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take up what `tensors` gave after so many updates."""
        kept = below_prefix("critic", tensors)
        with torch.no_grad():
            for name, parameter in self.q.model.named_parameters():
                parameter.copy_(kept[name])
        load_optimizer(self.optimizer, tensors, "critic-optimizer")
        resume_schedule(self.schedule, updates)
