"""Fitting Q and improving a policy as jobs: they name their models by path, so that any process can do them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit import OBJECTIVE, Credit, credited, with_rewards
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.learning.rounds import Improvement, evaluate_policy, improve_policy
from iterative_ppo.learning.sequences import Prompts
from iterative_ppo.learning.training import Progress

Result = TypeVar("Result")
REPORT, CURVES = "report.json", "curves.json"
CREDIT, TURN_REWARDS = "credit.json", "credit.parquet"


class Job(Protocol[Result]):
    """Work whose result can be saved in a folder and loaded from there."""

    @property
    def config(self) -> Config:
        """What it is done with."""

    def run(self, progress: Progress | None) -> Result:
        """Do it, alone or, in each of several processes, together."""

    def save(self, result: Result, folder: Path) -> None:
        """Write a result into an empty folder."""

    def load(self, folder: Path) -> Result:
        """Read it again."""


@dataclass(frozen=True)
class Crediting:
    """Before line 5, where a credit assigner is configured: its turn rewards (credit.credited)."""

    config: Config
    policy: Path
    current: Round
    replay: tuple[Round, ...]
    checkpoint: Checkpoint | None = None

    def run(self, progress: Progress | None = None) -> Credit:
        device, lora = self.config.runtime.device, self.config.policy.lora
        policy = LanguagePolicy.load(self.policy, device=device, lora=lora)
        return credited(policy, self.current, self.replay, self.config, progress, self.checkpoint)

    def save(self, result: Credit, folder: Path) -> None:
        rounds = [result.current, *result.replay]
        rewards = np.concatenate([r.reward for r in rounds])
        number = np.repeat(np.arange(len(rounds)), [len(r.last) for r in rounds])
        pd.DataFrame({"round": number, "reward": rewards}).to_parquet(folder / TURN_REWARDS, index=False)
        objective = OBJECTIVE.format(self.config.credit.assigner)
        write_json(folder / CREDIT, {"objective": objective, "metrics": _told(result.report)})

    def load(self, folder: Path) -> Credit:
        last = pd.read_parquet(folder / TURN_REWARDS)["round"].iloc[-1]
        current, *replay = (
            stored_credit(r, folder, self.config, k) for k, r in enumerate([self.current, *self.replay][: last + 1])
        )
        return Credit(current, tuple(replay), read_json(folder / CREDIT)["metrics"])


def _told(report: Mapping[str, float]) -> dict[str, float]:
    """The figures that could be told, as a rank correlation of conversations that ended alike cannot."""
    return {name: value for name, value in report.items() if np.isfinite(value)}


def stored_credit(data: Round, folder: Path, config: Config, number: int = 0) -> Round:
    """A round with the turn rewards that Q in this folder was fitted to. Raises StoreError where they are another's."""
    table = pd.read_parquet(folder / TURN_REWARDS)
    rewards = table["reward"][table["round"] == number].to_numpy()
    if len(rewards) != len(data.last):
        raise StoreError(
            f"{folder / TURN_REWARDS}: holds {len(rewards)} turn rewards for {len(data.last)} rows; fit Q again"
        )
    return with_rewards(data, rewards, config)


@dataclass(frozen=True)
class Evaluation:
    """Line 5: fit Q^pi (rounds.evaluate_policy)."""

    config: Config
    policy: Path
    start: Path | None
    current: Round
    replay: tuple[Round, ...]
    checkpoint: Checkpoint | None = None

    def run(self, progress: Progress | None = None) -> QModel:
        device = self.config.runtime.device
        policy = LanguagePolicy.load(self.policy, device=device)
        start = QModel.load(self.start, device) if self.start else None
        return evaluate_policy(policy, self.current, self.replay, self.config, start, progress, self.checkpoint)

    def save(self, result: QModel, folder: Path) -> None:
        result.save(folder / "model")
        write_json(folder / REPORT, _told(result.report))

    def load(self, folder: Path) -> QModel:
        q = QModel.load(folder / "model", self.config.runtime.device)
        q.report |= read_json(folder / REPORT)
        return q


@dataclass(frozen=True)
class Improving:
    """Line 7: every configured pass against the frozen Q (rounds.improve_policy)."""

    config: Config
    policy: Path
    q: Path
    current: Round
    behaviour: np.ndarray
    prompts: Prompts
    checkpoint: Checkpoint | None = None
    initial: Path | None = None

    def run(self, progress: Progress | None = None) -> Improvement:
        runtime, config = self.config.runtime, self.config
        policy = LanguagePolicy.load(self.policy, device=runtime.device, lora=config.policy.lora)
        q = QModel.load(self.q, runtime.device)
        initial = LanguagePolicy.load(self.initial, device=runtime.device) if self.initial else None
        return improve_policy(
            policy,
            self.current,
            self.behaviour,
            q,
            self.prompts,
            config,
            config.seed,
            progress,
            self.checkpoint,
            initial,
        )

    def save(self, result: Improvement, folder: Path) -> None:
        result.policy.save(folder / "model", self.config.policy.save)
        write_json(folder / CURVES, result.curves)
        write_json(folder / REPORT, result.report)

    def load(self, folder: Path) -> Improvement:
        policy = LanguagePolicy.load(folder / "model", device=self.config.runtime.device, lora=self.config.policy.lora)
        return Improvement(policy, read_json(folder / CURVES), read_json(folder / REPORT))
