"""Lines 5 to 7 of Algorithm 1 for language models: what a round's stages call, on a turn table in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import Config, ImproveConfig
from iterative_ppo.errors import NothingToLearn, SameReward, TrainingError
from iterative_ppo.learning.batching import encode
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit import credited
from iterative_ppo.learning.estimators.monte_carlo import MonteCarlo
from iterative_ppo.learning.improve import group_trainers, ppo
from iterative_ppo.learning.improve.best_of_n import improve_by_best
from iterative_ppo.learning.improve.episodes import check_prompts
from iterative_ppo.learning.improve.logged import LoggedData, improve_on_log, turn_advantages
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.objective import head_weights
from iterative_ppo.learning.policy_evaluation import Round, checked, fit_q, transitions
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.regression import Regression, regress
from iterative_ppo.learning.sequences import Prompts
from iterative_ppo.learning.training import Curve, Progress
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.returns import acceptance_rewards, discounted_returns, rewards
from iterative_ppo.mdp.turn_table import conversations, last_rows, outcome_columns

_LOG = logging.getLogger(__name__)
LEFT_OUT = "iteration_left_out"
UPDATES = 50
"""Between two checkpoints of a supervised pass."""


def round_of(policy: LanguagePolicy, frame: pd.DataFrame, config: Config) -> Round:
    """A turn table as tokens, rewards and returns. The myopic reward looks no further than its own turn.

    Turn rewards of a credit assigner come later, from all of a round's conversations (credit.credited).
    """
    return round_from(policy, [frame], config)


def round_from(
    policy: LanguagePolicy, blocks: Iterable[pd.DataFrame], config: Config, place: Path | None = None
) -> Round:
    """The same of a turn table that comes in blocks of whole conversations, one at least; one is held at a time.

    Args:
        place: a file to be made for the tokens; None keeps them in memory.
    """
    numbers: list[dict[str, np.ndarray]] = []

    def talks() -> Iterator[Conversation]:
        for block in blocks:
            numbers.append(_numbers(block, config))
            yield from conversations(block)

    encoded = encode(talks(), policy.renderer, place)
    columns: Any = {name: np.concatenate([part[name] for part in numbers]) for name in numbers[0]}
    return Round(encoded, **columns)


def _numbers(frame: pd.DataFrame, config: Config) -> dict[str, np.ndarray]:
    """Round's columns of some conversations."""
    last = last_rows(frame)
    myopic = config.improve.reward == "acceptance"
    reward = acceptance_rewards(frame) if myopic else rewards(frame)
    columns = {
        "reward": reward,
        "last": last,
        "returns": discounted_returns(reward, last, 0.0 if myopic else config.gamma),
        "fit": (frame["part"] == "fit").to_numpy(),
        "behaviour": frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan),
    }
    heads = head_weights(config)
    if list(heads.values()) == [1.0]:
        return columns
    named = np.stack([rewards(frame, column) for column in outcome_columns(heads)], axis=1)
    returns = discounted_returns(named, last, config.gamma)
    return columns | {"outcome_rewards": named, "outcome_returns": returns}


@dataclass(frozen=True)
class Improvement:
    """An improved policy and how it came about: the curve of each pass that ran, by name, and figures of its Qs."""

    policy: LanguagePolicy
    curves: dict[str, Curve] = field(default_factory=dict)
    report: dict[str, float] = field(default_factory=dict)


def corpus_q(
    policy: LanguagePolicy,
    corpus: Round,
    config: Config,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> QModel | None:
    """A first Q from the outcomes of the corpus that pi_0 was cloned from: a start for round 0's, never used itself.

    None, with a warning, where they teach none: round 0's then starts from the policy's backbone.

    Args:
        checkpoint: where a killed fit goes on from.
    """
    settings, alone = QSettings.of(config), MonteCarlo()
    try:
        data, by_turn = transitions(policy, [corpus], alone, settings), config.improve.reward == "acceptance"
        checked(data, alone, config.q.effective_size_floor, list(settings.outcomes.values()), by_turn)
    except NothingToLearn as error:
        _LOG.warning("the corpus of the first policy gives no Q to start from, round 0's starts anew: %s", error)
        return None
    corpus = credited(policy, corpus, [], config, progress).current
    q = QModel.from_policy(policy, settings, config.seed)
    how = Regression(config.q.corpus_epochs, config.q.learning_rate, 2 * config.q.batch_size, config.q.running_weight)
    regress(q, corpus.encoded, corpus.fit_returns, how, config.seed, progress, checkpoint=checkpoint)
    return q


def evaluate_policy(
    policy: LanguagePolicy,
    current: Round,
    replay: Sequence[Round],
    config: Config,
    start: QModel | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> QModel:
    """Line 5: fit Q^pi, to turn rewards where credit.assigner says so; `current` may bring them, or gets them here.

    Args:
        checkpoint: beside which a killed fit goes on.
    """
    report: dict[str, float] = {}
    if current.assigner != config.credit.assigner:
        credit = credited(policy, current, replay, config, progress)
        current, replay, report = credit.current, credit.replay, credit.report
    if config.improve.reward == "acceptance":
        config = config.model_copy(update={"q": config.q.model_copy(update={"target": "monte_carlo"})})
    q = fit_q(policy, current, replay, config, start, progress, checkpoint)
    q.report |= report
    return q


def improve_policy(
    policy: LanguagePolicy,
    current: Round,
    behaviour: np.ndarray,
    q: QModel,
    prompts: Prompts,
    config: Config,
    seed: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    initial: LanguagePolicy | None = None,
) -> Improvement:
    """Line 7: every configured pass, in as many policy iterations as improve.policy_iterations says.

    The first is against Q^pi as given. Each further one is against Q of the policy so far, fitted to the same
    conversations by fitted Q evaluation. A spent budget ends them, and conversations that support no such Q: the report
    then has LEFT_OUT, which iteration that was.

    Args:
        behaviour: (N,) log-probs of the logged actions that the logged pass goes by, NaN in rows it may not learn from;
            later Qs know those of `current` alone.
        checkpoint: where a killed improvement goes on from.
        initial: pi_0, where improve.best_of_n.initial_share asks for it.

    Raises TrainingError where the logged pass or a later Q would learn from other rewards than Q was fitted to, and
    what the passes raise.
    """
    c = config.improve
    samples = bool(c.best_of_n.epochs or c.ppo.episodes)
    iterations = c.policy_iterations if samples and c.reward != "acceptance" else 1
    if (c.logged.epochs or iterations > 1) and current.assigner != config.credit.assigner:
        name, without = ("logged.epochs", 0) if c.logged.epochs else ("policy_iterations", 1)
        raise TrainingError(
            f"improve.{name} learns from rewards of {current.assigner}, Q was fitted to those of credit.assigner "
            f"{config.credit.assigner}; give it the credited round, or set improve.{name} to {without}"
        )
    if samples:
        check_prompts(policy, prompts)  # before the logged pass trains for nothing
    student, curves, report = policy, dict[str, Curve](), dict[str, float]()
    for number in range(1, 1 + iterations):
        if number > 1:
            try:
                kept = checkpoint and checkpoint.part(f"q-{number}", UPDATES)
                q = _q_of_student(student, current, config, q, progress, kept)
            except NothingToLearn:
                report[LEFT_OUT] = float(number)
                break
            report |= {f"iteration_{number}_{name}": value for name, value in q.report.items()}
        how = Passes(
            policy, current, behaviour, q, prompts, config, seed + number - 1, number, progress, checkpoint, initial
        )
        try:
            student, found = how.improve(student)
        except SameReward as error:
            if number == 1:
                raise
            _LOG.warning("policy iteration %d: %s; the policy so far stands", number, error)
            break
        for name, curve in found.items():
            curves.setdefault(name, []).extend({**entry, "iteration": float(number)} for entry in curve)
        report["policy_iterations"] = float(number)
        if ppo.spent(found.get(c.algorithm, []), c.ppo):
            break
    return Improvement(student, curves, report)


def _q_of_student(
    student: LanguagePolicy,
    current: Round,
    config: Config,
    start: QModel,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> QModel:
    """Q of a policy that has no conversations of its own yet, from those of another. Raises NothingToLearn."""
    fitted = {"target": "fqe", "iterations": config.improve.q_iterations, "expectile": None}
    off_policy = config.model_copy(update={"q": config.q.model_copy(update=fitted)})
    return evaluate_policy(student, current, [], off_policy, start, progress, checkpoint)


@dataclass(frozen=True)
class Passes:
    """One policy iteration's: the logged pass on the fit part, the best of n and PPO (or its like) on the prompts."""

    champion: LanguagePolicy
    current: Round
    behaviour: np.ndarray
    q: QModel
    prompts: Prompts
    config: Config
    seed: int
    number: int
    progress: Progress | None
    checkpoint: Checkpoint | None
    initial: LanguagePolicy | None

    def improve(self, student: LanguagePolicy) -> tuple[LanguagePolicy, dict[str, Curve]]:
        """The student after them, and the curves of those that ran."""
        c, q = self.config.improve, self.q
        values = q.evaluate(self.current.encoded).logged
        usable = self.current.fit & np.isfinite(values.q)
        logged: Curve = []
        if self.number == 1:  # later the logged actions are no longer near the student's own
            gamma = 0.0 if c.reward == "acceptance" else self.config.gamma
            advantage = turn_advantages(self.current.reward, self.current.last, values.v, gamma, c.logged.gae_lambda)
            data = LoggedData(self.current.encoded, advantage, np.where(usable, self.behaviour, np.nan))
            try:
                student, logged = improve_on_log(
                    student, data, c.logged, self.seed, self.progress, self._kept("logged", UPDATES)
                )
            except NothingToLearn as error:
                if not (c.best_of_n.epochs or c.ppo.episodes):
                    raise
                _LOG.warning("the logged pass is left out: %s", error)
        best, sampled = Curve(), Curve()
        try:
            student, best = improve_by_best(
                student,
                q,
                self.prompts,
                c.best_of_n,
                self.seed,
                self.progress,
                self._kept("best_of_n", UPDATES),
                self.initial,
            )
            student, sampled = improve_on_samples(
                student,
                q,
                self.prompts,
                c,
                self.seed,
                reference=student if c.ppo.reference == "start" else self.champion,
                scale=max(float(np.nanstd((values.q - values.v)[usable])), 1e-6),
                progress=self.progress,
                champion=self.champion,
                checkpoint=self._kept(c.algorithm, 1),
            )
        except SameReward as error:
            if not (logged or best):
                raise
            _LOG.warning("what was learnt first left %s nothing to learn: %s", c.algorithm if best else "more", error)
        if sampled and c.ppo.kl_budget is not None and sampled[0]["kl_to_champion"] > c.ppo.kl_budget:
            _LOG.warning(
                "%s made no update: it began %.2g nats a response from the champion, beyond improve.ppo.kl_budget "
                "= %g; lower improve.best_of_n.epochs or improve.logged.epochs, or raise the budget",
                c.algorithm,
                sampled[0]["kl_to_champion"],
                c.ppo.kl_budget,
            )
        if sampled and sampled[0].get("kept") and ppo.shown(sampled) is sampled[0]:
            said = (
                f"{c.algorithm} gives what it began from: what it learnt went beyond improve.ppo.kl_budget at once, or "
                "judges liked it less; lower improve.ppo.learning_rate, or raise the budget"
            )
            if self.number == 1 and not (logged or best):
                raise NothingToLearn(f"{said}; the round is rejected")
            _LOG.warning("%s", said)
        curves = {"logged": logged, "best_of_n": best, c.algorithm: sampled}
        if not any(curves.values()):
            raise NothingToLearn(
                "no pass of the improvement had anything to learn from: improve.logged needs a behaviour_logprob of "
                "what was suggested; set improve.best_of_n.epochs or improve.ppo.episodes above 0"
            )
        return student, {name: curve for name, curve in curves.items() if curve}

    def _kept(self, name: str, every: int) -> Checkpoint | None:
        later = "" if self.number == 1 else f"-{self.number}"
        return self.checkpoint and self.checkpoint.part(f"{name}{later}", every)


def improve_on_samples(
    policy: LanguagePolicy, q: QModel, prompts: Prompts, config: ImproveConfig, seed: int, **how: Any
) -> tuple[LanguagePolicy, Curve]:
    """The configured algorithm on sampled responses; `how` is what ppo.improve and group_trainers.improve share."""
    if config.algorithm == "ppo":
        return ppo.improve(policy, q, prompts, config.ppo, seed, **how)
    return group_trainers.improve(policy, q, prompts, config, seed, **how)
