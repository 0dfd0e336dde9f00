"""How outputs of a head become values in the outcome's units, and the loss that fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

SPREAD = 0.75
"""Standard deviation of hl_gauss's targets in bins, the paper's."""
MARGIN = 3
"""Bins beyond either end of the range, so that the histogram of a target at an end is not cut."""


@dataclass(frozen=True)
class ValueScale:
    """One output a head, under bce low + (high - low) sigmoid, under mse the same without; `bins` under hl_gauss.

    hl_gauss (Farebrother et al. 2024, arXiv 2403.03950): the value is the mean of a histogram over the range, fitted by
    cross-entropy to a normal distribution around the target.

    Attributes:
        low, high: (H,) ends of each head's range.
    """

    loss_name: str
    low: Sequence[float]
    high: Sequence[float]
    bins: int = 1

    def value(self, outputs: torch.Tensor) -> torch.Tensor:
        """(..., H, bins) outputs to (..., H) values."""
        if self.loss_name == "hl_gauss":
            edges = self._edges(outputs)
            centres = (edges[:, 1:] + edges[:, :-1]) / 2
            return (outputs.softmax(dim=-1) * centres).sum(dim=-1)  # autocast would make a matrix product bfloat16
        raw, (low, span) = outputs[..., 0], self._ends(outputs)
        return low + span * (raw if self.loss_name == "mse" else torch.sigmoid(raw))

    def loss(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(..., H) elementwise loss of (..., H, bins) outputs against (..., H) targets in the outcomes' units.

        A target may lie outside the range, as bootstrapped ones do: the gradient of bce and mse is linear in it, so
        what is learnt is its mean.
        """
        if self.loss_name == "hl_gauss":
            return -(self._histogram(target) * outputs.log_softmax(dim=-1)).sum(dim=-1)
        low, span = self._ends(target)
        raw, unit = outputs[..., 0], (target - low) / span
        if self.loss_name == "mse":
            return (raw - unit) ** 2
        return F.binary_cross_entropy_with_logits(raw, unit, reduction="none")

    @cached_property
    def span(self) -> np.ndarray:
        """(H,) high - low."""
        return np.subtract(self.high, self.low)

    def _ends(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(H,) low and span."""
        return like.new_tensor(self.low), like.new_tensor(self.span)

    def _edges(self, like: torch.Tensor) -> torch.Tensor:
        """(H, bins + 1) edges; the range proper is all but MARGIN bins at either end."""
        margin = MARGIN * self.span / max(1, self.bins - 2 * MARGIN)
        ends = zip(self.low - margin, self.high + margin, strict=True)
        return torch.stack([torch.linspace(low, high, self.bins + 1, device=like.device) for low, high in ends])

    def _histogram(self, target: torch.Tensor) -> torch.Tensor:
        """(..., H, bins) mass of a normal distribution around each target."""
        edges = self._edges(target)
        width = edges[:, 1:2] - edges[:, :1]
        held = target[..., None].clamp(edges[:, :1] + width, edges[:, -1:] - width)
        below = torch.special.ndtr((edges - held) / (SPREAD * width))
        mass = below.diff(dim=-1)
        return mass / mass.sum(dim=-1, keepdim=True)
