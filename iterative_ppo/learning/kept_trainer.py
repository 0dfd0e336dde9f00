"""A transformers trainer that goes on after a kill from our checkpoint; its own has pickles and may be half written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.checkpoint import (
    Checkpoint,
    below_prefix,
    load_optimizer,
    optimizer_tensors,
    resume_schedule,
    with_prefix,
)
from iterative_ppo.learning.language_model import LanguagePolicy

DIVERGED = "supervised fine-tuning diverged (loss {}); lower supervised.learning_rate"


@dataclass(frozen=True)
class Done:
    """How far a training has come: updates, of how many, the sum of their losses, and whether an epoch is begun."""

    updates: int = 0
    of: int = 1
    loss: float = 0.0
    within_epoch: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Done:
        """What `asdict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        kept = int(values["updates"]), int(values["of"]), float(values["loss"]), bool(values["within_epoch"])
        return cls(*kept)


class KeptTrainer:
    """Laid over a trainer of `policy`'s model: where it reads a checkpoint of its own, it reads ours.

    Within an epoch it passes over the batches that were learnt from, in the order that the epoch's first random state
    brings about again; dropout then draws on from where it was.
    """

    def __init__(
        self, policy: LanguagePolicy, checkpoint: Checkpoint | None, callbacks: Sequence[TrainerCallback], **given: Any
    ) -> None:
        self.policy, self.kept = policy, checkpoint or Checkpoint(Path(), "")
        found = checkpoint.load() if checkpoint else None
        self.tensors, self.done = found[0] if found else {}, Done()
        if found:
            with self.kept.understood():
                self.done = Done.read(found[1])
        keeper = [Keeper(self, checkpoint)] if checkpoint else []
        super().__init__(callbacks=[*keeper, *callbacks], **given)  # type: ignore[call-arg]

    def mean_loss(self) -> float:
        """Train what is left to train. Returns the mean loss of all updates, those before a kill too."""
        trainer: Any = self
        if not self.done.updates:
            return float(trainer.train().training_loss)
        if self.done.updates == self.done.of:
            self._load_from_checkpoint()
            return self.done.loss / self.done.of
        folder = trainer.args.output_dir
        begun = TrainerState(global_step=self.done.updates, train_batch_size=trainer._train_batch_size)
        begun.save_to_json(str(Path(folder, TRAINER_STATE_NAME)))
        return float(trainer.train(resume_from_checkpoint=folder).training_loss)

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        with self.kept.understood():
            self.policy.load_training_state(below_prefix("weights", self.tensors))

    def _load_optimizer_and_scheduler(self, *_: Any) -> None:
        trainer: Any = self
        with self.kept.understood():
            load_optimizer(trainer.optimizer, self.tensors)
            resume_schedule(trainer.lr_scheduler, self.done.updates)
        self.tensors = {n: t for n, t in self.tensors.items() if n.startswith(("random.", "epoch."))}

    def _load_scaler(self, *_: Any) -> None:
        """There is none: no loss of ours is scaled."""

    def _load_rng_state(self, *_: Any) -> None:
        with self.kept.understood():
            _set_random_state(below_prefix("random", self.tensors))


class Keeper(TrainerCallback):
    """Writes the checkpoint, and sets what a trainer's own would not tell it: the epoch's order and the loss so far."""

    def __init__(self, trainer: Any, checkpoint: Checkpoint) -> None:
        self.trainer, self.checkpoint, self.resumes = trainer, checkpoint, trainer.done.updates > 0
        self.epoch: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resumes:
            self.trainer._initial_global_step = 0
            self.trainer._tr_loss += self.trainer.done.loss

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resumes:
            began = self.trainer.done.within_epoch
            with self.checkpoint.understood():
                _set_random_state(below_prefix("epoch" if began else "random", self.trainer.tensors))
            self.resumes = False
        self.epoch = _random_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done, last = state.global_step, state.global_step == state.max_steps
        if done % self.checkpoint.every and not last:
            return
        loss = float(self.trainer._tr_loss)
        if not math.isfinite(loss):  # it is a sum, so no later one mends it
            raise TrainingError(DIVERGED.format(loss))
        tensors = with_prefix("weights", self.trainer.policy.training_state())
        if not last:
            tensors |= optimizer_tensors(self.trainer.optimizer)
            tensors |= with_prefix("random", _random_state()) | with_prefix("epoch", self.epoch)
        begun = not float(state.epoch).is_integer()
        self.checkpoint.save(tensors, asdict(Done(done, state.max_steps, loss, begun)))


def _random_state() -> dict[str, torch.Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return found | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
