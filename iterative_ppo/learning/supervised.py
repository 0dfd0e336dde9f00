"""Supervised fine-tuning through TRL: pi_0 from a corpus, and the filtered behaviour cloning baseline."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from iterative_ppo.config import SupervisedConfig
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning import runtime
from iterative_ppo.learning.batching import lengths_of, shuffled_batches
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.kept_trainer import DIVERGED, KeptTrainer
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.mdp.rendering import Encoded

IGNORED = -100


def labels(sequence: Encoded) -> list[int]:
    """Token targets: the logged responses alone. Other messages would drown what in a state decides a suggestion."""
    keep = np.zeros(len(sequence.tokens), bool)
    for span in sequence.spans:
        keep[span.start : span.end] |= span.trains
    return np.where(keep, sequence.tokens, IGNORED).tolist()


def fine_tune(
    policy: LanguagePolicy,
    sequences: Sequence[Encoded],
    config: SupervisedConfig,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Checkpoint | None = None,
) -> tuple[LanguagePolicy, dict[str, float]]:
    """A copy of `policy` fine-tuned on the suggestions of some conversations, and the mean training loss.

    Args:
        checkpoint: where a killed training goes on from.

    Raises TrainingError where no sequence holds a suggestion, or the loss is not finite.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class KeptSFTTrainer(KeptTrainer, SFTTrainer):
        def _get_train_sampler(self, _: Dataset | None = None) -> Sampler[int]:
            return LikeLengths(lengths_of(taught), config.batch_size)

    taught = [s for s in sequences if any(span.trains for span in s.spans)]
    if not taught:
        raise TrainingError("no conversation holds a logged suggestion to clone")
    student = policy.trainable_copy()
    micro = config.micro_batch_size or config.batch_size
    with lent(student.model) as model, tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=None,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # which would count such a loss as the mean of the others
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            bf16=False,  # the runtime's autocast holds here too
            gradient_checkpointing=runtime.current().gradient_checkpointing,
            dataloader_pin_memory=False,
            seed=seed,
        )
        _ = arguments.device
        arguments._n_gpu = 1  # one process trains on one device, however many there are
        trainer = KeptSFTTrainer(
            policy=student,
            checkpoint=checkpoint,
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": list(s.tokens), "labels": labels(s)} for s in taught]),
            processing_class=copy.deepcopy(policy.tokenizer),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.mean_loss()
    if not np.isfinite(loss) or not finite(student):
        raise TrainingError(DIVERGED.format(loss))
    return student, {"loss": loss}


class LikeLengths(Sampler[int]):
    """`shuffled_batches` anew each epoch, drawn from torch's random state, which a checkpoint keeps."""

    def __init__(self, lengths: np.ndarray, batch_size: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        batches = shuffled_batches(self.lengths, self.batch_size, rng)
        batches.sort(key=len, reverse=True)  # an incomplete one between others would tear those after it apart
        return iter(np.concatenate(batches).tolist())


def finite(policy: LanguagePolicy) -> bool:
    """Whether all that TRL trained is numbers; its trainers do not ask."""
    return all(bool(torch.isfinite(p).all()) for p in policy.trainable_parameters())


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model for one of TRL's trainers, which afterwards generates as before.

    They put a `forward` of their own on the object, with a vocabulary head that knows no cache, and leave its cache and
    evaluation mode off.
    """
    before = {name: getattr(model.config, name, None) for name in ("use_cache", "pad_token_id", "bos_token_id")}
    try:
        yield model
    finally:
        model.__dict__.pop("forward", None)
        for name, value in before.items():
            setattr(model.config, name, value)
        model.eval()
