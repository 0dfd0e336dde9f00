"""Outcome labels: what nobody reported is said by rule or by a trained classifier, before the data are validated.

Labels teach Q. What judges a policy, A/B tests and alarms, sees a narrower set, the same for whoever is compared:
reported outcomes and, where labels.kind is rule, the rule's, because a rule defines what the outcome is. A classifier
only guesses it, and a challenger trained on its guesses would be judged by the very mistakes that it learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.evaluation.doubts import label_doubts
from iterative_ppo.files import content_hash, read_json, write_json
from iterative_ppo.mdp.conversation import REPORTED
from iterative_ppo.mdp.labels import CLASSIFIER, RULE, as_reported, by_rule, counts, unreported, with_labels
from iterative_ppo.mdp.labels import judged as judged_by
from iterative_ppo.mdp.turn_table import ORIGIN
from tasks.datasets import arrived, datasets_before
from tasks.stage import Stage, run_stage
from tasks.turn_checks import sound

if TYPE_CHECKING:
    from iterative_ppo.learning.outcome_classifier import OutcomeClassifier

_LOG = logging.getLogger(__name__)
TABLE, FACTS = "labels.parquet", "labels.json"


def judged(frame: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Outcomes that a policy may be judged by: as reported and, where they are labelled by rule, by rule."""
    return judged_by(frame, config.outcomes, config.labels.rules if config.labels.kind == RULE else None)


def definition(config: Config) -> Any:
    """How outcomes that judge a policy come about, JSON-able: it may not change while an A/B test runs."""
    rules = {name: rule.model_dump(mode="json") for name, rule in config.labels.rules.items()}
    return rules if config.labels.kind == RULE else REPORTED


def reported_now(config: Config, round_number: int) -> pd.DataFrame:
    """What has arrived for a round, outcomes as reported."""
    frame = arrived(config, round_number)
    assert frame is not None, "a round is labelled only after conversations have arrived"
    return as_reported(frame, config.outcomes)


def classifier_stage(config: Config, round_number: int, folder: Path) -> Stage | None:
    """A classifier of the outcome, fitted on all that has been reported; None where there is nothing to label by it."""
    if config.labels.kind != CLASSIFIER or unreported(reported_now(config, round_number)).empty:
        return None
    earlier = datasets_before(config, round_number, round_number)
    inputs = {
        "classifier": config.labels.classifier.model_dump(),
        "outcomes": list(config.outcomes),
        "seed": config.seed,
        "arrived": content_hash(folder / "arrived"),
        "earlier": [content_hash(dataset.path) for dataset in earlier],
    }

    def work(draft: Path) -> Mapping[str, float]:
        now, before = reported_now(config, round_number), (dataset.read(config) for dataset in earlier)
        classifier, metrics = _fitted([sound(now, config.outcomes), *before], config)
        for doubt in label_doubts(metrics):
            _LOG.warning("%s", doubt)
        classifier.save(draft / "model")
        return metrics

    return run_stage(folder / "outcome_classifier", inputs, work)


def _fitted(tables: Iterable[pd.DataFrame], config: Config) -> tuple[OutcomeClassifier, dict[str, float]]:
    from iterative_ppo.learning.outcome_classifier import fit_outcome_classifier

    reported = pd.concat([table[table[ORIGIN].eq(REPORTED).fillna(False)] for table in tables], ignore_index=True)
    return fit_outcome_classifier(reported, config.outcomes, config.labels.classifier, config.seed)


def labelled_alone(frame: pd.DataFrame, config: Config) -> tuple[pd.DataFrame, dict[str, float]]:
    """A table labelled as a night's is, by itself: its classifier is registered nowhere, so its version is 0.

    The metrics are the classifier's, where there is one. Raises TrainingError where it cannot be fitted.
    """
    table = judged(frame, config)
    unknown = unreported(table)
    if config.labels.kind != CLASSIFIER or unknown.empty:
        return table, {}
    classifier, metrics = _fitted([sound(table, config.outcomes)], config)
    return with_labels(table, classifier.labels(unknown), f"{CLASSIFIER}:0", config.outcomes), metrics


def labels_stage(config: Config, round_number: int, folder: Path, classifier: tuple[int, Path] | None) -> Stage:
    """The labels of a round's conversations that nobody reported on, a row each, beside what arrived.

    Args:
        classifier: its registered version and directory, where labels.kind is classifier and it is needed.
    """
    inputs = {
        "labels": config.labels.model_dump(mode="json"),
        "outcomes": list(config.outcomes),
        "arrived": content_hash(folder / "arrived"),
        "classifier": [classifier[0], content_hash(classifier[1])] if classifier else None,
    }

    def work(draft: Path) -> Mapping[str, float]:
        table = reported_now(config, round_number)
        found, origin = _labels(table, config, classifier)
        found.rename_axis("conversation_id").reset_index().to_parquet(draft / TABLE, index=False)
        origins = counts(with_labels(table, found, origin, config.outcomes))
        write_json(draft / FACTS, {"origin": origin, "conversations": origins})
        labelled = {f"{column}_labelled": float(found[column].gt(0.0).mean()) for column in found if len(found)}
        return labelled | {"labelled": float(len(found)), "reported": float(origins.get(REPORTED, 0))}

    return run_stage(folder / "labels", inputs, work)


def _labels(table: pd.DataFrame, config: Config, classifier: tuple[int, Path] | None) -> tuple[pd.DataFrame, str]:
    if classifier is not None:
        from iterative_ppo.learning.outcome_classifier import OutcomeClassifier

        version, path = classifier
        return OutcomeClassifier.load(path).labels(unreported(table)), f"{CLASSIFIER}:{version}"
    rules = config.labels.rules if config.labels.kind == RULE else {}
    return by_rule(table, rules), RULE


def labelled(config: Config, round_number: int, labels: Path) -> pd.DataFrame:
    """What has arrived for a round, with the labels of its stage where nobody reported an outcome."""
    found = pd.read_parquet(labels / TABLE).set_index("conversation_id")
    origin = str(read_json(labels / FACTS)["origin"])
    return with_labels(reported_now(config, round_number), found, origin, config.outcomes)


def origin_metrics(frame: pd.DataFrame) -> dict[str, float]:
    """Conversations of a data set by the origin of their outcome; all versions of the classifier together."""
    found: dict[str, float] = {}
    for origin, count in counts(frame).items():
        name = f"outcomes_{origin.partition(':')[0]}"
        found[name] = found.get(name, 0.0) + count
    return found
