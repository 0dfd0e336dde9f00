"""Lines 5 to 7 of Algorithm 1 for language models: what a round's stages call, on a turn table in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.learning.batching import encode_table
from iterative_ppo.learning.improve import ppo
from iterative_ppo.learning.improve.logged import LoggedData, improve_on_log, turn_advantages
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import QModel, QSettings, Regression, Round, fit_q, regress
from iterative_ppo.mdp.returns import acceptance_rewards, discounted_returns, rewards
from iterative_ppo.mdp.turn_table import last_rows

Progress = Callable[[int, int], None]


def round_of(policy: LanguagePolicy, frame: pd.DataFrame, config: Config) -> Round:
    """A turn table as tokens, rewards and returns. The myopic reward looks no further than its own turn."""
    last = last_rows(frame)
    myopic = config.improve.reward == "acceptance"
    reward = acceptance_rewards(frame) if myopic else rewards(frame)
    returns = discounted_returns(reward, last, 0.0 if myopic else config.gamma)
    fit = (frame["part"] == "fit").to_numpy()
    return Round(encode_table(frame, policy.renderer), reward, last, returns, fit)


@dataclass(frozen=True)
class Improvement:
    """An improved policy and how it came about."""

    policy: LanguagePolicy
    logged_curve: list[dict[str, float]] = field(default_factory=list)
    ppo_curve: list[dict[str, float]] = field(default_factory=list)


def corpus_q(policy: LanguagePolicy, corpus: Round, config: Config, progress: Progress | None = None) -> QModel:
    """A first Q from the outcomes of the corpus that pi_0 was cloned from: a start for round 0's, never used itself."""
    q = QModel.from_policy(policy, QSettings.of(config), config.seed)
    how = Regression(config.q.corpus_epochs, config.q.learning_rate, 2 * config.q.batch_size, config.q.running_weight)
    regress(q, corpus.encoded, corpus.fit_returns, how, config.seed, progress)
    return q


def evaluate_policy(
    policy: LanguagePolicy,
    current: Round,
    replay: Sequence[Round],
    config: Config,
    start: QModel | None = None,
    progress: Progress | None = None,
) -> QModel:
    """Line 5: fit Q^pi."""
    if config.improve.reward == "acceptance":
        config = config.model_copy(update={"q": config.q.model_copy(update={"target": "monte_carlo"})})
    return fit_q(policy, current, replay, config, start, progress)


def improve_policy(
    policy: LanguagePolicy,
    current: Round,
    behaviour: np.ndarray,
    q: QModel,
    prompts: ppo.Prompts,
    config: Config,
    seed: int,
    progress: Progress | None = None,
) -> Improvement:
    """Line 7: the logged pass on the fit part, then PPO on the prompts.

    Args:
        behaviour: (N,) log-probs of the logged actions as sampled, NaN where unknown.
    """
    values = q.evaluate(current.encoded)
    gamma = 0.0 if config.improve.reward == "acceptance" else config.gamma
    advantage = turn_advantages(current.reward, current.last, values.v, gamma, config.improve.logged.gae_lambda)
    usable = current.fit & np.isfinite(values.q)
    data = LoggedData(current.encoded, advantage, np.where(usable, behaviour, np.nan))
    student, logged_curve = improve_on_log(policy, data, config.improve.logged, seed, progress)
    scale = max(float(np.nanstd((values.q - values.v)[usable])), 1e-6)
    reference = student if config.improve.ppo.reference == "logged" else policy
    student, ppo_curve = ppo.improve(
        student, q, prompts, config.improve.ppo, seed, reference=reference, scale=scale, progress=progress
    )
    return Improvement(student, logged_curve, ppo_curve)
