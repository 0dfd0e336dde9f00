"""A fresh MLflow store and tiny saved policies, made once; a copy of the store costs a file, not a migration."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import logging

from iterative_ppo.config import load_config
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.tiny import build_policy
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from tasks.registry import POLICY, register
from tasks.tracking import Tracking, open_tracking

TALK = Conversation("c", (Turn("how much is it?", (), Suggestion("10 dollars", "suggested")), Turn("thanks")), "u")


def save_models(place: Path) -> Path:
    """Five policies and a Q, saved, beside a fresh store."""
    logging.disable_progress_bar()
    config = load_config(overrides={"policy.hidden_size": 16})
    for seed in range(5):
        policy = build_policy([TALK], config.policy, seed)
        policy.save(place / f"policy{seed}")
    QModel.from_policy(policy, QSettings("bce", 0.0, 1.0, 0.95), 0).save(place / "q")
    opened(place)
    return place


def opened(place: Path) -> Tracking:
    where = {"tracking.uri": f"sqlite:///{place}/mlflow.db", "tracking.artifacts": f"{place}/artifacts"}
    return open_tracking(load_config(overrides={**where, "tracking.experiment": place.name}))


def copied(models: Path, place: Path) -> Tracking:
    """The fresh store at another place."""
    place.mkdir()
    shutil.copy(models / "mlflow.db", place / "mlflow.db")
    return opened(place)


def registered(tracking: Tracking, models: Path, number: int) -> int:
    """Policy `number` of the saved ones as a version, made in the round of that number."""
    run = tracking.round_run(number)
    tags = {"round": number, "reasons": "", "data_md5": f"{number}d.dir"}
    return register(tracking, POLICY, models / f"policy{number}", run, tags)
