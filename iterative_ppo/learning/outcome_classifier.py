"""The outcome of a conversation, predicted from what was said in it: TF-IDF and logistic regression, one an outcome.

Fitted on reported outcomes of the fit part; what it is worth is measured on those of the evidence part, whose
conversations it has not seen. Saved as JSON and safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import ClassifierConfig
from iterative_ppo.errors import StoreError, TrainingError
from iterative_ppo.files import read_settings, write_json
from iterative_ppo.mdp.labels import transcripts
from iterative_ppo.mdp.turn_table import last_rows, outcome_columns

SETTINGS, WEIGHTS = "outcome_classifier.json", "outcome_classifier.safetensors"
FORMAT, FOLDS = 2, 5
"""Format 1 knew no outcome below 0."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class OutcomeClassifier:
    """Logistic regression on a conversation's words, with a threshold for each of K outcomes.

    Attributes:
        outcomes: their K names. vocabulary: V words and pairs of words, as `words` gives them. idf: (V,).
        coefficients: (K, V). intercept, threshold: (K,); a probability of at least the threshold is an outcome.
        value: (K,) the outcome that it is then: the mean of those reported above 0. otherwise: (K,) the mean of the
            others, below 0 where some outcomes are.
    """

    outcomes: tuple[str, ...]
    vocabulary: tuple[str, ...]
    idf: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    otherwise: np.ndarray

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(N, K) of each outcome, of conversations as `transcripts` writes them."""
        if not len(texts):
            return np.zeros((0, len(self.outcomes)))
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        return _sigmoid(vectorizer.transform(texts) @ self.coefficients.T + self.intercept)

    def labels(self, frame: pd.DataFrame) -> pd.DataFrame:
        """(C, K) the outcome columns of a turn table's conversations, by their ids."""
        texts = transcripts(frame)
        found = np.where(self.probabilities(texts.tolist()) >= self.threshold, self.value, self.otherwise)
        return pd.DataFrame(found, index=texts.index, columns=outcome_columns(self.outcomes))

    def save(self, path: Path) -> None:
        """Write it into a directory that `load` reads."""
        from safetensors.numpy import save_file

        path.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        write_json(path / SETTINGS, {"format": FORMAT, "outcomes": self.outcomes, "vocabulary": self.vocabulary})
        save_file(arrays, path / WEIGHTS)

    @classmethod
    def load(cls, path: Path) -> OutcomeClassifier:
        """Raises StoreError where the directory holds none that is whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        settings = read_settings(path / SETTINGS, FORMAT)
        try:
            names, words = tuple(settings["outcomes"]), tuple(settings["vocabulary"])
            arrays = load_file(path / WEIGHTS)
            if settings["format"] == 1:
                arrays["otherwise"] = np.zeros(len(names))
            expected = {"idf": (len(words),), "coefficients": (len(names), len(words))}
            for name in _ARRAYS:
                if arrays[name].shape != expected.get(name, (len(names),)):
                    raise ValueError(f"{name} has shape {arrays[name].shape}")
            return cls(names, words, **{name: arrays[name] for name in _ARRAYS})
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise StoreError(f"{path}: not an outcome classifier ({error}); restore it") from None


_ARRAYS = ("idf", "coefficients", "intercept", "threshold", "value", "otherwise")


def fit_outcome_classifier(
    frame: pd.DataFrame, outcomes: Iterable[str], config: ClassifierConfig, seed: int
) -> tuple[OutcomeClassifier, dict[str, float]]:
    """Fit it on conversations with reported outcomes, and measure it on those of the evidence part.

    Args:
        frame: turn table of conversations that are whole, all of them with a reported outcome.

    The metrics are, for each outcome: held-out precision, recall, AUC and cost a conversation, the
    least cost of calling all of them alike, and the threshold.
    Raises TrainingError, with the figure and a remedy, where there are too few, where an outcome is the same in all
    conversations or in all held-out ones, or where too few customers reached it or missed it.
    """
    talks = _Talks.of(frame, tuple(outcomes))
    if len(talks.texts) < config.reported_at_least:
        raise TrainingError(
            f"labels.kind classifier: {len(talks.texts)} conversations have a reported outcome, fewer than "
            f"labels.classifier.reported_at_least = {config.reported_at_least}; report more of them, or set "
            "labels.kind to reported or rule"
        )
    vectorizer = _vectorizer(max_features=config.vocabulary)
    fit = np.flatnonzero(~talks.held)
    words = _fitted_words(vectorizer, [talks.texts[k] for k in fit]) if len(fit) else None
    heads, metrics = [], {"classifier_fit": float(len(fit)), "classifier_held_out": float(talks.held.sum())}
    for k, name in enumerate(talks.outcomes):
        won = talks.values[:, k] > 0
        _check_classes(won, talks, name)
        model, threshold = _head(words, won[fit], talks.customer[fit], config, seed)
        worth = [talks.values[part & ~talks.held, k].mean() for part in (won, ~won)]
        heads.append((model.coef_[0], model.intercept_[0], threshold, *worth))
        score = model.predict_proba(vectorizer.transform([talks.texts[i] for i in np.flatnonzero(talks.held)]))[:, 1]
        found = _held_out(won[talks.held], score, threshold, config)
        metrics |= {f"classifier_{name}_{key}": value for key, value in found.items()}
    fitted = (np.array(part, dtype=float) for part in zip(*heads, strict=True))
    names = tuple(str(word) for word in vectorizer.get_feature_names_out())
    return OutcomeClassifier(talks.outcomes, names, vectorizer.idf_, *fitted), metrics


def _fitted_words(vectorizer: Any, texts: list[str]) -> Any:
    """(C, V) of conversations. Raises TrainingError where none of them has a word."""
    try:
        return vectorizer.fit_transform(texts)
    except ValueError:
        raise TrainingError(
            f"labels.kind classifier: none of {len(texts)} reported conversations holds a word, only signs; it tells "
            "outcomes by words, so set labels.kind to reported or rule"
        ) from None


@dataclass(frozen=True, eq=False)
class _Talks:
    """C conversations: texts, (C, K) outcomes, (C,) customers, and (C,) which are held out."""

    outcomes: tuple[str, ...]
    texts: list[str]
    values: np.ndarray
    customer: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame, outcomes: tuple[str, ...]) -> _Talks:
        ends = frame[last_rows(frame)]
        texts = transcripts(frame).reindex(ends["conversation_id"].astype(object))
        values = ends[outcome_columns(outcomes)].to_numpy(dtype=float)
        return cls(
            outcomes,
            texts.tolist(),
            values,
            ends["customer_id"].to_numpy(dtype=object),
            (ends["part"] != "fit").to_numpy(dtype=bool),
        )


def _check_classes(won: np.ndarray, talks: _Talks, name: str) -> None:
    """Each fold leaves some customers out, so it is customers of both classes that must be enough."""
    everywhere = np.ones(len(won), bool)
    parts = (("in all", everywhere, 1), ("to be fitted on", ~talks.held, FOLDS), ("held out", talks.held, 1))
    for where, rows, least in parts:
        reached, missed = rows & won, rows & ~won
        customers = [len(set(talks.customer[chosen])) for chosen in (reached, missed)]
        if min(customers) < least:
            remedy = "raise data.evidence_share or report more" if where == "held out" else "report more of both"
            raise TrainingError(
                f"labels.kind classifier: of {rows.sum()} reported conversations {where}, {reached.sum()} reached "
                f"outcome {name!r} and {missed.sum()} did not, of {customers[0]} and {customers[1]} customers; at "
                f"least {least} customers of each are needed: {remedy}, or set labels.kind to reported or rule"
            )


def _head(words: Any, won: np.ndarray, customer: np.ndarray, config: ClassifierConfig, seed: int) -> tuple[Any, float]:
    """A fitted regression, and the threshold that costs least where each customer was predicted without their own."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    model = LogisticRegression(C=config.inverse_regularization, max_iter=1000)
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    score = cross_val_predict(model, words, won, groups=customer, cv=folds, method="predict_proba")[:, 1]
    return model.fit(words, won), least_costly(won, score, config)


def least_costly(won: np.ndarray, score: np.ndarray, config: ClassifierConfig) -> float:
    """The threshold at which false positives and false negatives together cost least; the highest of equals.

    Args:
        won: (N,) bool, what happened. score: (N,) predicted probabilities.
    """
    order = np.argsort(-score, kind="stable")
    edges = np.append(score[order], 0.0)
    wrong = np.append(0, np.cumsum(~won[order])) * config.false_positive_cost
    missed = (won.sum() - np.append(0, np.cumsum(won[order]))) * config.false_negative_cost
    cuts = np.flatnonzero(np.append(True, edges[1:] < edges[:-1]))  # with k called positive, all of one score are
    best = cuts[np.argmin((wrong + missed)[cuts])]
    if best == 0:
        return float(max((1.0 + edges[0]) / 2, np.nextafter(edges[0], 2.0)))
    return float((edges[best - 1] + edges[best]) / 2)


def _held_out(won: np.ndarray, score: np.ndarray, threshold: float, config: ClassifierConfig) -> dict[str, float]:
    from sklearn.metrics import precision_score, recall_score, roc_auc_score

    said = score >= threshold
    wrong, missed = config.false_positive_cost, config.false_negative_cost
    cost = wrong * (said & ~won).mean() + missed * (won & ~said).mean()
    return {
        "precision": float(precision_score(won, said, zero_division=np.nan)),
        "recall": float(recall_score(won, said)),
        "auc": float(roc_auc_score(won, score)),
        "cost": float(cost),
        "cost_of_one_class": float(min(wrong * (~won).mean(), missed * won.mean())),
        "threshold": threshold,
    }


def words(transcript: str) -> list[str]:
    """Words and pairs of neighbouring words of a message, each with the side that said it."""
    found = []
    for line in transcript.lower().split("\n"):
        side, _, said = line.partition(": ")
        single = _WORD.findall(said)
        pairs = [f"{one} {other}" for one, other in pairwise(single)]
        found += [f"{side[:1]}:{word}" for word in (*single, *pairs)]
    return found


def _vectorizer(**how: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=words, sublinear_tf=True, **how)


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logit, -700, 700))))
