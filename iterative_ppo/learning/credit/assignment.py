"""Turn rewards in place of a round's outcome, by the assigner of credit.assigner.

A process reward model learns from the fit part's outcomes, on top of the policy that collected them; then it scores
every turn. Whoever is paid by turn rewards maximises them: Theorem 1 speaks of their sum, and not of the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.errors import NothingToLearn, TrainingError
from iterative_ppo.learning.batching import step_count
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit.process_reward import Scored, fit
from iterative_ppo.learning.credit.rewards import turn_rewards
from iterative_ppo.learning.credit.stability import Watch, kendall_tau, watched
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.objective import outcome_range
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.training import Progress
from iterative_ppo.mdp.returns import discounted_returns

OBJECTIVE = (
    "Q is fitted to the turn rewards of {}, not to the outcome: its values, and what improvement makes of them, are "
    "about the credited objective; the gate and the A/B test go on judging the outcome"
)


@dataclass(frozen=True)
class Credit:
    """Rounds whose rewards are turn rewards, and figures of how they came about."""

    current: Round
    replay: tuple[Round, ...] = ()
    report: dict[str, float] = field(default_factory=dict)


def credited(
    policy: LanguagePolicy,
    current: Round,
    replay: Sequence[Round],
    config: Config,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Credit:
    """The rounds with turn rewards; as they are where credit.assigner is outcome.

    Norm-ITPO's turn reward holds the conversation's outcome, so it depends on who went on speaking: conversations of
    other policies then teach nothing of this one's Q, and are left out of `replay`.

    Raises NothingToLearn where the fit part's outcomes are all equal or it holds no logged suggestion, TrainingError
    where they are out of range.
    """
    c = config.credit
    if c.assigner == "outcome":
        return Credit(current, tuple(replay))
    data = Scored.of(policy, current, c.batch_size)
    turns, low_high = data.turns, outcome_range(config)
    fitted = turns.totals(current.fit) > 0
    chosen = np.flatnonzero(fitted & turns.scored)
    _check(data.outcome[chosen], int(turns.totals(current.fit).sum()), c.assigner, low_high)
    unit = (data.outcome - low_high[0]) / (low_high[1] - low_high[0])
    batches = drawn(chosen, c.batch_size, c.epochs, config.seed)
    phi = policy.trainable_copy()
    held = ~fitted & turns.scored
    model, looks = (checkpoint and checkpoint.part(name) for name in ("reward_model", "looks"))
    watch = Watch(phi, data, watched(turns, held), len(batches), looks)
    losses = fit(phi, data, batches, unit, c, progress, watch.look, model)
    telling = [r for r in replay if r.own or c.assigner == "itpo"]
    earlier = [Scored.of(policy, r, c.batch_size) for r in telling]
    ratio = data.log_ratio(phi)
    logit = turns.totals(turns.sums(c.beta * ratio))
    report = {
        "objective_is_credited": 1.0,
        "credit_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "credit_kendall_tau": kendall_tau(logit[held], data.outcome[held]),
        "credit_held_out_conversations": float(held.sum()),
        "credit_conversations_without_suggestion": float((~turns.scored).sum()),
        "credit_conversations_of_others_left_out": float(_conversations(replay) - _conversations(telling)),
        **watch.figures(),
    }
    rounds = [
        with_rewards(r, _rewards(d, r, d.log_ratio(phi) if d is not data else ratio, config), config)
        for r, d in zip([current, *telling], [data, *earlier], strict=True)
    ]
    return Credit(rounds[0], tuple(rounds[1:]), report)


def _conversations(rounds: Sequence[Round]) -> int:
    return sum(int(r.last.sum()) for r in rounds)


def with_rewards(data: Round, rewards: np.ndarray, config: Config) -> Round:
    """A round whose rewards (N,) are the configured assigner's, and whose returns are what is to come of them."""
    returns = discounted_returns(rewards, data.last, config.gamma)
    return replace(data, reward=rewards, returns=returns, assigner=config.credit.assigner)


def drawn(conversations: np.ndarray, size: int, epochs: float, seed: int) -> list[np.ndarray]:
    """Shuffled batches of conversations, `epochs` (also a fraction) passes."""
    rng = np.random.default_rng(seed)
    steps = step_count(len(conversations), size, epochs)
    found: list[np.ndarray] = []
    while len(found) < steps:
        order = rng.permutation(conversations)
        found += [order[i : i + size] for i in range(0, len(order), size)]
    return found[:steps]


def _rewards(data: Scored, origin: Round, log_ratio: np.ndarray, config: Config) -> np.ndarray:
    """(N,) turn rewards; a conversation without a logged suggestion, which teaches nothing, keeps its outcome."""
    found = turn_rewards(log_ratio, data.turns, data.outcome, config.credit)
    return np.where(data.turns.scored[data.turns.conversation], found, origin.reward)


def _check(outcome: np.ndarray, rows: int, assigner: str, low_high: tuple[float, float]) -> None:
    """The outcomes to learn from, of the fit part's conversations with a logged suggestion."""
    remedy = "or set credit.assigner to outcome"
    if not len(outcome):
        raise NothingToLearn(
            f"none of the {rows} rows of the fit part holds a logged suggestion, whose tokens credit.assigner "
            f"{assigner} scores; log what was suggested, {remedy}"
        )
    if np.ptp(outcome) == 0:
        raise NothingToLearn(
            f"all {len(outcome)} outcomes of the fit part are {outcome[0]:g}: none differs, so credit.assigner "
            f"{assigner} cannot tell which turns matter; collect more conversations, or check how outcomes are labelled"
        )
    low, high = low_high
    if outcome.min() < low - 1e-9 or outcome.max() > high + 1e-9:
        raise TrainingError(
            f"outcomes of the fit part go from {outcome.min():g} to {outcome.max():g}, expected {low:g} to {high:g}: "
            "set data.outcome_low and data.outcome_high, or data.outcome_ranges, which credit scales by"
        )
