"""The sampled pass: of several responses a state, the one that Q likes best is learnt as it stands.

Observation 1's greedy policy within reach of the policy: it only ever raises what the policy itself said, so it neither
leaves the support in which Q was fitted nor unlearns how to write. The candidates are what the policy is surer of: at
its full temperature the best of n is too often a slip that Q, fitted on few of them, does not know to be one. The
projection onto the network is maximum likelihood, as in MPO (Abdolmaleki et al. 2018, arXiv 1806.06920).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iterative_ppo.config import BestOfNConfig
from iterative_ppo.errors import ModelError, NothingToLearn, TrainingError
from iterative_ppo.learning import distributed
from iterative_ppo.learning.batching import Batch, step_count, training_batches
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve.episodes import NO_NUMBER, RewardModel, check_prompts, differ, nothing_differs
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import set_by
from iterative_ppo.learning.sequences import Answered, Prompts, some_of
from iterative_ppo.learning.training import Curve, Progress, train
from iterative_ppo.mdp.rendering import single

PROMPTS = 1024
"""Prompts whose candidates are held at a time."""


def best(q: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """(S,) which of each state's (S, n) responses Q likes best; one cut at the limit only where all of them were."""
    cut = ~finished & finished.any(axis=1, keepdims=True)
    chosen: np.ndarray = np.where(cut, -np.inf, q).argmax(axis=1)
    return chosen


def improve_by_best(
    policy: LanguagePolicy,
    q: RewardModel,
    prompts: Prompts,
    config: BestOfNConfig,
    seed: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    initial: LanguagePolicy | None = None,
) -> tuple[LanguagePolicy, Curve]:
    """A copy of `policy` moved towards what Q prefers of its own responses, and its curve. Zero epochs change nothing.

    Args:
        initial: pi_0, where config.initial_share of the responses are its.

    Raises TrainingError where there is no prompt, Q is not a number or the same for all responses to every prompt, or
    the pass diverges, and where pi_0 is asked for and not given; ModelError where a prompt is longer than the model's
    context, or pi_0 knows other tokens.
    """
    if not config.epochs:
        return policy, []
    check_prompts(policy, prompts)
    prompts = some_of(prompts, config.prompts, np.random.default_rng((seed, len(prompts))))
    said_by = _speakers(policy, initial, config)
    liked = Answered(prompts, _choose(said_by, q, prompts, seed, progress, checkpoint))
    student = policy.trainable_copy()
    steps = step_count(len(liked), config.batch_size, config.epochs)
    usual = sum(map(len, liked.responses)) / step_count(len(liked), config.batch_size, 1.0)

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_p, _ = student.token_log_probs(batch, np.arange(len(batch.row)))
        return -log_p.sum() / usual, {}

    batches = training_batches(liked, config.batch_size, config.epochs, policy.pad, np.random.default_rng(seed))
    with set_by("improve.best_of_n.learning_rate"):
        curve = train(student, batches, steps, objective, config.learning_rate, progress, checkpoint)
    return student, curve


Speakers = Sequence[tuple[LanguagePolicy, int]]
"""Whose candidates there are, and how many of each to a prompt."""


def _speakers(policy: LanguagePolicy, initial: LanguagePolicy | None, config: BestOfNConfig) -> Speakers:
    of_initial = config.of_initial
    surer = policy.at(config.temperature * policy.settings.temperature)
    if not of_initial:
        return [(surer, config.samples)]
    if initial is None:
        raise TrainingError("improve.best_of_n.initial_share is above 0, and pi_0 is not at hand; set it to 0")
    if initial.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            "pi_0 and the policy have other tokens, so neither can answer for the other; set "
            "improve.best_of_n.initial_share to 0"
        )
    both = [(surer, config.samples - of_initial), (initial.at(surer.settings.temperature), of_initial)]
    return [(speaker, count) for speaker, count in both if count]


def _choose(
    speakers: Speakers,
    q: RewardModel,
    prompts: Prompts,
    seed: int,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> list[tuple[int, ...]]:
    """The response to each prompt that Q likes best; the candidates of a block of prompts are held at a time.

    What was chosen for a block is kept: drawing is the longer part of the pass.
    """
    rng = np.random.default_rng(seed)
    chosen: list[tuple[int, ...]] = []
    spread, largest, various = 0.0, 0.0, False
    for number, begin in enumerate(range(0, len(prompts), PROMPTS)):
        kept = checkpoint and checkpoint.beside(f"chosen-{number}")
        block = kept and _kept_block(kept, rng)
        if not block:
            block = _chosen_block(speakers, q, prompts[begin : begin + PROMPTS], rng)
            if kept:
                _keep(kept, block, rng)
            if progress:
                progress(begin + len(block.responses), len(prompts))
        chosen += block.responses
        spread, largest = max(spread, block.spread), max(largest, block.largest)
        various = various or block.various
    if spread <= 1e-6 * largest:
        raise nothing_differs(various)
    return chosen


@dataclass(frozen=True)
class Block:
    """The chosen responses to some prompts; of all candidates, Q's widest range in a prompt and its largest size.

    `various`: whether some prompt had two that differ.
    """

    responses: list[tuple[int, ...]]
    spread: float
    largest: float
    various: bool


def _chosen_block(speakers: Speakers, q: RewardModel, prompts: Prompts, rng: np.random.Generator) -> Block:
    said = [(speaker.respond(prompts, rng, samples=count), count) for speaker, count in speakers]
    n = sum(count for _, count in said)
    answers = [a for k in range(len(prompts)) for one, m in said for a in one.tokens[k * m : (k + 1) * m]]
    finished = np.concatenate([one.finished.reshape(-1, m) for one, m in said], axis=1)
    candidates = [single(k, prompts[k // n], tokens, True) for k, tokens in enumerate(answers)]
    worth = np.array([values[-1] for values in distributed.by_shares(candidates, q.running_values, n)]).reshape(-1, n)
    if not np.isfinite(worth).all():
        raise NothingToLearn(NO_NUMBER)
    liked = [answers[k * n + j] for k, j in enumerate(best(worth, finished))]
    various = differ(answers[k * n : (k + 1) * n] for k in range(len(prompts)))
    return Block(liked, float(np.ptp(worth, axis=1).max()), float(np.abs(worth).max()), various)


def _keep(place: Checkpoint, block: Block, rng: np.random.Generator) -> None:
    tensors = {
        "tokens": torch.tensor([token for response in block.responses for token in response]),
        "lengths": torch.tensor([len(response) for response in block.responses]),
    }
    figures = {"spread": block.spread, "largest": block.largest, "various": block.various}
    place.save(tensors, {**figures, "generator": rng.bit_generator.state})


def _kept_block(place: Checkpoint, rng: np.random.Generator) -> Block | None:
    """What was kept of a block, the generator then set to where it was after it."""
    found = place.load()
    if not found:
        return None
    tensors, values = found
    with place.understood():
        rng.bit_generator.state = values["generator"]
        responses = [tuple(part.tolist()) for part in tensors["tokens"].split(tensors["lengths"].tolist())]
        return Block(responses, float(values["spread"]), float(values["largest"]), bool(values.get("various", True)))
