"""How good a Q is on conversations it has not seen: R2, AUC of the outcome, calibration, ranking within a state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """1 - SS_res / SS_tot; NaN where the truth does not vary."""
    if np.ptp(truth) == 0:
        return float("nan")
    return float(1.0 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def auc(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of `score` for a bool `positive`; NaN where there is one class only."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else float("nan")


@dataclass(frozen=True)
class Calibration:
    """Equal-mass bins of a prediction beside what came true, the expected calibration error, and what chance gives."""

    predicted: list[float]
    observed: list[float]
    count: list[int]
    error: float
    chance_95: float


def calibration(
    predicted: np.ndarray, observed: np.ndarray, group: np.ndarray, bins: int = 10, draws: int = 200, seed: int = 0
) -> Calibration:
    """Expected calibration error over equal-mass bins, and its 95th percentile were the prediction perfect.

    Args:
        predicted: (N,) in [0, 1]. observed: (N,). group: (N,) conversation ids: under the null each conversation
            draws one uniform number, so that its turns succeed or fail together.
    """
    edges = np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, predicted, side="right")
    count = np.bincount(place, minlength=bins)
    used = count > 0

    def means(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values, minlength=bins)[used] / count[used]

    def error(values: np.ndarray) -> float:
        return float((np.abs(means(values) - means(predicted)) * count[used]).sum() / len(predicted))

    rng = np.random.default_rng(seed)
    _, unit = np.unique(group, return_inverse=True)
    null = [error((rng.random(unit.max() + 1)[unit] < predicted).astype(float)) for _ in range(draws)]
    return Calibration(
        means(predicted).tolist(),
        means(observed).tolist(),
        count[used].tolist(),
        error(observed),
        float(np.quantile(null, 0.95)),
    )


def within_state_ranking(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Correlation of two (S, A) arrays after subtracting each state's mean from both: what PPO lives on."""
    if not (np.ptp(truth, axis=1).any() and np.ptp(predicted, axis=1).any()):
        return float("nan")
    a = (truth - truth.mean(axis=1, keepdims=True)).ravel()
    b = (predicted - predicted.mean(axis=1, keepdims=True)).ravel()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def proportion_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, trials, alpha=1.0 - level, method="wilson")
    return float(low), float(high)
