"""How good a Q is on conversations it has not seen: R2, AUC of the outcome, calibration, ranking within a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from iterative_ppo.errors import TrainingError

Method = Literal["isotonic", "temperature"]
LOG_TEMPERATURES = (-5.0, 5.0)
"""Between which a calibration's is sought: from a logit made 148 times as large to one made as much smaller."""


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
        predicted: (N,) in [0, 1]. observed: (N,). group: (N,) conversation ids.
    """
    place, redrawn = _bin_of(predicted, bins), _redraws(predicted, observed, group, seed)
    null = [_binned(predicted, redrawn(), place).error for _ in range(draws)]
    return replace(_binned(predicted, observed, place), chance_95=float(np.quantile(null, 0.95)))


def recalibration(
    predicted: np.ndarray,
    observed: np.ndarray,
    group: np.ndarray,
    method: Method,
    bins: int = 10,
    draws: int | None = None,
    seed: int = 0,
) -> Calibration:
    """The same of predictions as `recalibrated` maps them. Chance then knows that the map was fitted to few outcomes.

    Under the null the mapped predictions are true: outcomes are drawn from them, and the maps fitted to those anew. So
    what a map errs by because it saw few conversations is not held against Q.

    Args:
        draws: sets of outcomes; None means 100, or fewer where a large evidence part makes each dear, 20 at least.

    Raises TrainingError, as `recalibrated`.
    """
    folds = _folds(group)
    mapped = _mapped(predicted, observed, folds, method)
    redrawn, null = _redraws(mapped, observed, group, seed), list[float]()
    for _ in range(draws or min(100, max(20, 2_000_000 // len(predicted)))):
        drawn = redrawn()
        try:
            again = _mapped(predicted, drawn, folds, method)
            null.append(_binned(again, drawn, _bin_of(again, bins)).error)
        except TrainingError:  # all drawn alike
            null.append(0.0)
    return replace(_binned(mapped, observed, _bin_of(mapped, bins)), chance_95=float(np.quantile(null, 0.95)))


def _bin_of(predicted: np.ndarray, bins: int) -> np.ndarray:
    """(N,) the bin of equal mass that each prediction is in."""
    edges = np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1])
    return np.searchsorted(edges, predicted, side="right")


def _binned(predicted: np.ndarray, observed: np.ndarray, place: np.ndarray) -> Calibration:
    """Means of each bin and their error, given `_bin_of` each prediction; what chance gives is not known here."""
    count = np.bincount(place)
    used = count > 0
    said, was = (np.bincount(place, x)[used] / count[used] for x in (predicted, observed))
    error = float((np.abs(was - said) * count[used]).sum() / len(predicted))
    return Calibration(said.tolist(), was.tolist(), count[used].tolist(), error, float("nan"))


def _redraws(predicted: np.ndarray, observed: np.ndarray, group: np.ndarray, seed: int) -> Callable[[], np.ndarray]:
    """(N,) outcomes as they may be where the predictions are true, another set at each call.

    A conversation's are drawn together: where all observed are 0 or 1, each succeeds where one uniform number a
    conversation is below the prediction; any others err as far as they did, on a side drawn for the conversation (the
    wild bootstrap by cluster of Cameron, Gelbach and Miller 2008).
    """
    rng = np.random.default_rng(seed)
    _, unit = np.unique(group, return_inverse=True)
    units, succeeds_or_fails = int(unit.max()) + 1, bool(np.isin(observed, (0.0, 1.0)).all())

    def drawn() -> np.ndarray:
        if succeeds_or_fails:
            return (rng.random(units)[unit] < predicted).astype(float)
        return predicted + rng.choice((-1.0, 1.0), units)[unit] * (observed - predicted)

    return drawn


def calibrator(predicted: np.ndarray, observed: np.ndarray, method: Method) -> Callable[[np.ndarray], np.ndarray]:
    """A rising map from predictions to the observed share, fitted on (N,) predictions and outcomes in [0, 1].

    isotonic: any rising step (Zadrozny and Elkan 2002); temperature: the logit over one positive number (Guo et al.
    2017, arXiv 1706.04599). Raises TrainingError where the outcomes are all equal.
    """
    from scipy.optimize import isotonic_regression, minimize_scalar
    from scipy.special import expit

    if np.ptp(observed) == 0:
        raise TrainingError(
            f"all {len(observed)} held-out outcomes are {observed[0]:g}: calibration needs successes and failures; "
            "collect more conversations, or raise data.evidence_share"
        )
    if method == "isotonic":
        said, place, count = np.unique(predicted, return_inverse=True, return_counts=True)
        steps = isotonic_regression(np.bincount(place, observed) / count, weights=count).x
        return lambda values: np.interp(values, said, steps)
    logit = _logit(predicted)

    def loss(log_temperature: float) -> float:
        scaled = logit * np.exp(-log_temperature)
        return float((np.logaddexp(0.0, scaled) - observed * scaled).mean())

    temperature = np.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x)
    return lambda values: np.asarray(expit(_logit(values) / temperature))


def _logit(share: np.ndarray) -> np.ndarray:
    """(N,) log odds."""
    held = np.clip(share, 1e-6, 1.0 - 1e-6)
    return np.asarray(np.log(held / (1.0 - held)))


def recalibrated(
    predicted: np.ndarray, observed: np.ndarray, group: np.ndarray, method: Method, folds: int = 5
) -> np.ndarray:
    """(N,) predictions in [0, 1], each mapped by a calibrator that has not seen its own conversation.

    Args:
        observed: (N,) in [0, 1]. group: (N,) conversation ids.

    Raises TrainingError where there are fewer conversations than folds, or all outcomes outside a fold are equal.
    """
    return _mapped(predicted, observed, _folds(group, folds), method)


def _folds(group: np.ndarray, folds: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows outside each fold, and those in it; a conversation is in one."""
    from sklearn.model_selection import GroupKFold

    if (conversations := len(np.unique(group))) < folds:
        raise TrainingError(
            f"{conversations} held-out conversations, calibration needs at least {folds}; raise data.evidence_share"
        )
    return list(GroupKFold(folds).split(group, groups=group))


def _mapped(
    predicted: np.ndarray, observed: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], method: Method
) -> np.ndarray:
    mapped = np.empty(len(predicted))
    for others, mine in folds:
        mapped[mine] = calibrator(predicted[others], observed[others], method)(predicted[mine])
    return mapped


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
