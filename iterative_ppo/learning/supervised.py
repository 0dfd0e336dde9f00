"""Supervised fine-tuning through TRL: pi_0 from a corpus, and the filtered behaviour cloning baseline."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence

import numpy as np
from transformers import PrinterCallback, TrainerCallback

from iterative_ppo.config import SupervisedConfig
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.mdp.rendering import Encoded

IGNORED = -100


def labels(sequence: Encoded, whole: bool) -> list[int]:
    """Token targets: the whole conversation, or the logged responses alone."""
    if whole:
        return list(sequence.tokens)
    keep = np.zeros(len(sequence.tokens), bool)
    for span in sequence.spans:
        keep[span.start : span.end] |= span.trains
    return np.where(keep, sequence.tokens, IGNORED).tolist()


def fine_tune(
    policy: LanguagePolicy,
    sequences: Sequence[Encoded],
    config: SupervisedConfig,
    seed: int,
    whole: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[LanguagePolicy, dict[str, float]]:
    """A copy of `policy` fine-tuned on some conversations, and the last training loss.

    Args:
        whole: learn every message (a model that must first learn the language) or the suggestions alone.

    Raises TrainingError where no sequence holds a suggestion, or the loss is not finite.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": list(s.tokens), "labels": labels(s, whole)} for s in sequences if any(x.trains for x in s.spans)
    ]
    if not rows:
        raise TrainingError("no conversation holds a logged suggestion to clone")
    model = copy.deepcopy(policy.model)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=None,
            train_sampling_strategy="group_by_length",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    if not np.isfinite(loss):
        raise TrainingError(f"supervised loss is {loss}; lower supervised.learning_rate")
    # The trainer leaves hooks on the model that it trained (its cached generation differs), so only weights are taken.
    fresh = copy.deepcopy(policy.model)
    fresh.load_state_dict(model.state_dict())
    return LanguagePolicy(fresh, policy.tokenizer, policy.settings), {"loss": float(loss)}
