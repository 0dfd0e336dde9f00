"""Jobs of tests, in a module that launched processes can import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from iterative_ppo.config import Config
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning import distributed
from iterative_ppo.learning.batching import Batch, EncodedTable, training_batches
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import descend, optimizer_for
from iterative_ppo.learning.sharding import sharded
from iterative_ppo.learning.training import Progress


@dataclass(frozen=True)
class Cloning:
    """Likelihood of logged responses, with a sample of the student after each update: a loss curve and what it says."""

    config: Config
    policy: Path
    table: EncodedTable
    prompts: list[tuple[int, ...]]

    def run(self, progress: Progress | None = None) -> tuple[LanguagePolicy, list[dict[str, float]]]:
        student = LanguagePolicy.load(self.policy).trainable_copy()
        curve = []

        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return -student.response_log_probs(batch, np.arange(len(batch.row))).sum() / 100.0, {}

        with sharded(student):
            optimizer, schedule = optimizer_for(student.model, 0.003, 10)
            for batch in training_batches(self.table.sequences, 7, 2.0, student.pad, np.random.default_rng(0)):
                told = descend(batch, objective, optimizer, schedule)
                said = student.respond(self.prompts, 1)
                curve.append(told | {"said": float(sum(sum(tokens) for tokens in said.tokens))})
            state = student.training_state()
            student.load_training_state(state)
        return student, curve

    def save(self, result: tuple[LanguagePolicy, list[dict[str, float]]], folder: Path) -> None:
        result[0].save(folder / "model")
        write_json(folder / "curve.json", result[1])

    def load(self, folder: Path) -> tuple[LanguagePolicy, list[dict[str, float]]]:
        return LanguagePolicy.load(folder / "model"), read_json(folder / "curve.json")


@dataclass(frozen=True)
class Dying:
    """The second process dies without a word while the first waits for it."""

    config: Config

    def run(self, progress: Progress | None = None) -> None:
        if distributed.rank() == 1:
            os._exit(9)
        distributed.wait()

    def save(self, result: None, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
