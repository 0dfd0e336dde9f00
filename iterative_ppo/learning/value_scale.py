"""How outputs of a head become values in the outcome's units, and the loss that fits them."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    loss_name: str
    low: float
    high: float
    bins: int = 1

    def value(self, outputs: torch.Tensor) -> torch.Tensor:
        """(..., bins) outputs to (...) values."""
        if self.loss_name == "hl_gauss":
            edges = self._edges(outputs)
            centres = (edges[1:] + edges[:-1]) / 2
            return (outputs.softmax(dim=-1) * centres).sum(dim=-1)  # autocast would make a matrix product bfloat16
        raw = outputs[..., 0]
        return self.low + (self.high - self.low) * (raw if self.loss_name == "mse" else torch.sigmoid(raw))

    def loss(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(...) elementwise loss of (..., bins) outputs against (...) targets in the outcome's units.

        A target may lie outside the range, as bootstrapped ones do: the gradient of bce and mse is linear in it, so
        what is learnt is its mean.
        """
        if self.loss_name == "hl_gauss":
            return -(self._histogram(target) * outputs.log_softmax(dim=-1)).sum(dim=-1)
        raw, unit = outputs[..., 0], (target - self.low) / (self.high - self.low)
        if self.loss_name == "mse":
            return (raw - unit) ** 2
        return F.binary_cross_entropy_with_logits(raw, unit, reduction="none")

    def _edges(self, like: torch.Tensor) -> torch.Tensor:
        """(bins + 1,) edges; the range proper is all but MARGIN bins at either end."""
        margin = MARGIN * (self.high - self.low) / max(1, self.bins - 2 * MARGIN)
        return torch.linspace(self.low - margin, self.high + margin, self.bins + 1, device=like.device)

    def _histogram(self, target: torch.Tensor) -> torch.Tensor:
        """(..., bins) mass of a normal distribution around each target."""
        edges = self._edges(target)
        width = edges[1] - edges[0]
        held = target.clamp(edges[0] + width, edges[-1] - width)[..., None]
        below = torch.special.ndtr((edges - held) / (SPREAD * width))
        mass = below.diff(dim=-1)
        return mass / mass.sum(dim=-1, keepdim=True)
