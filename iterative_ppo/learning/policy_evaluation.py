"""Line 5 of Algorithm 1: Q^pi from conversations, by the estimator that q.target names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.errors import NothingToLearn, SupportError, TrainingError, TurnTableError
from iterative_ppo.learning.batching import EncodedTable
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.estimators import Estimator, Transitions, estimator_of
from iterative_ppo.learning.estimators.network import Log, Network
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.training import Progress
from iterative_ppo.mdp.turn_table import conversation_numbers

LOGPROB_ROUNDING = 1e-6
SAME = 1e-9
"""Values that differ by no more than this share of their size are the same up to rounding."""


@dataclass(frozen=True)
class Round:
    """One round's encoded conversations with its rewards, for fitting Q.

    Attributes:
        reward, returns: (N,) r_i and G_i of the weighted outcome. last: (N,) last rows. fit: (N,) not held out.
        behaviour: (N,) log b(a_i | s_i) as logged, NaN where unknown; None where no row knows it.
        assigner: what made `reward`, the outcome or a credit assigner.
        own: of a round of replay, whether the policy itself collected it, as where its challenger was rejected since.
        outcome_rewards, outcome_returns: (N, K) the same of each named outcome, where Q has a head for each.
    """

    encoded: EncodedTable
    reward: np.ndarray
    last: np.ndarray
    returns: np.ndarray
    fit: np.ndarray
    behaviour: np.ndarray | None = None
    outcome_rewards: np.ndarray | None = None
    outcome_returns: np.ndarray | None = None
    assigner: str = "outcome"
    own: bool = False

    @property
    def head_rewards(self) -> np.ndarray:
        """(N, K) what each outcome's head is about."""
        return self.reward[:, None] if self.outcome_rewards is None else self.outcome_rewards

    @property
    def head_returns(self) -> np.ndarray:
        """(N, K) returns of `head_rewards`."""
        return self.returns[:, None] if self.outcome_returns is None else self.outcome_returns

    @property
    def fit_returns(self) -> np.ndarray:
        """(N, K) returns of the fit part, NaN in the evidence part: what a regression may see."""
        return np.where(self.fit[:, None], self.head_returns, np.nan)


def fit_q(
    policy: LanguagePolicy,
    current: Round,
    replay: Iterable[Round],
    config: Config,
    start: QModel | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> QModel:
    """Line 5 of Algorithm 1: Q^pi from conversations of pi, and, where the estimator takes them, of other policies.

    Args:
        replay: earlier conversations, of other policies or, where they say so, of the policy itself.
        start: the previous round's Q, for a warm start; of one with other heads the trunk alone. None starts from the
            policy's backbone, as lstd_q always does.
        checkpoint: beside which a killed fit goes on.

    The result's `report` says how many turns it was fitted on, how many lack a behaviour log-prob, and their effective
    sample size. Raises TrainingError where no row can be fitted, the outcomes are all equal or the log does not support
    the estimator, TurnTableError where a log-prob is above 0 or infinite.
    """
    estimator, settings = estimator_of(config.q), QSettings.of(config)
    rounds = [current, *(r for r in replay if r.own or not estimator.own_only)]
    data = transitions(policy, rounds, estimator, settings)
    by_turn = current.assigner != "outcome" or config.improve.reward == "acceptance"
    report = checked(data, estimator, config.q.effective_size_floor, list(settings.outcomes.values()), by_turn)
    weights = bootstrap_weights(data.last, settings, config.seed)
    log = Log(policy, [r.encoded for r in rounds], config.q, config.seed, weights, progress, checkpoint)
    q = _first(None if config.q.target == "lstd_q" else start, policy, settings, config.seed)
    estimator.fit(Network(q, log), data)
    q.report |= report
    return q


def _first(start: QModel | None, policy: LanguagePolicy, settings: QSettings, seed: int) -> QModel:
    if start is not None and start.settings.outcomes.keys() == settings.outcomes.keys():
        start = start.reweighted(settings.outcomes)
    if start is not None and start.settings.same_network(settings):
        return QModel(copy.deepcopy(start.model), settings, start.pad)
    return QModel.from_policy(start or policy, settings, seed)


def transitions(
    policy: LanguagePolicy, rounds: Sequence[Round], estimator: Estimator, settings: QSettings
) -> Transitions:
    """The rounds' turns, flat; the first round is the policy's own in any case. Ratios for off-policy estimators."""
    members = settings.members + settings.judges
    ratios = [log_ratios(policy, r) if estimator.off_policy else np.full(len(r.last), np.nan) for r in rounds]
    return Transitions(
        reward=np.tile(np.concatenate([r.head_rewards for r in rounds]), (1, members)),
        returns=np.tile(np.concatenate([r.head_returns for r in rounds]), (1, members)),
        last=np.concatenate([r.last for r in rounds]),
        own=np.concatenate([np.full(len(r.last), k == 0 or r.own) for k, r in enumerate(rounds)]),
        fit=np.concatenate([r.fit for r in rounds]),
        logged=np.concatenate([logged_rows(r.encoded) for r in rounds]),
        log_ratio=np.concatenate(ratios),
        gamma=settings.gamma,
    )


def logged_rows(encoded: EncodedTable) -> np.ndarray:
    """(N,) bool: rows whose action was logged and may train."""
    logged = np.zeros(encoded.rows, bool)
    logged[[span.row for s in encoded.sequences for span in s.spans if span.trains]] = True
    return logged


def log_ratios(policy: LanguagePolicy, data: Round) -> np.ndarray:
    """(N,) log rho_i over whole responses: NaN where the behaviour's log-prob is unknown, -inf where pi never says it.

    Raises TurnTableError where a logged one is above 0, or -inf: what was said had a probability.
    """
    if data.behaviour is None:
        return np.full(len(data.last), np.nan)
    wrong = np.flatnonzero((data.behaviour > LOGPROB_ROUNDING) | np.isneginf(data.behaviour))
    if wrong.size:
        raise TurnTableError(
            f"row {wrong[0]}: behaviour_logprob is {data.behaviour[wrong[0]]:g}, expected finite and at most 0 "
            f"({wrong.size} such rows); log probabilities are natural logarithms, summed over a response's tokens"
        )
    return policy.score(data.encoded) - data.behaviour


def effective_size(log_ratio: np.ndarray) -> float:
    """(sum rho)^2 / sum rho^2 over rows with a known ratio (Kish): how many rows of pi's own they are worth.

    What pi never says, log ratio -inf, is worth nothing.
    """
    known = log_ratio[~np.isnan(log_ratio)]
    top = known.max(initial=-np.inf)
    if np.isneginf(top):
        return 0.0
    rho = np.exp(known - top)
    return float(rho.sum() ** 2 / (rho**2).sum())


def checked(
    data: Transitions,
    estimator: Estimator,
    effective_size_floor: float,
    weights: Sequence[float],
    by_turn: bool = False,
) -> dict[str, float]:
    """Figures of what is to be fitted. Raises TrainingError, with the figure and a remedy, where it teaches no Q^pi.

    Outcomes are compared by conversation and without discount: where all are equal, returns differ by length alone, and
    Q would learn how soon a conversation ends.

    Args:
        weights: in R, of each head of one member. by_turn: whether turns are paid each by itself (a credit assigner's
            rewards, acceptance), so that their returns are what must differ.
    """
    rows = data.fit & data.logged
    mine = rows if estimator.off_policy else rows & data.own
    known = rows & ~np.isnan(data.log_ratio)
    figures = {"fit_turns": float(rows.sum())}
    if not mine.any():
        whose = "" if estimator.off_policy else " of the policy's own"
        raise NothingToLearn(
            f"none of {data.logged.sum()} logged suggestions is in the fit part{whose}: Q has nothing to be fitted to; "
            "collect more conversations with logged suggestions, or lower data.evidence_share"
        )
    figures["fit_constant_outcomes"] = float(_alike(data, mine, weights, by_turn))
    if estimator.iterations is not None:
        turns = np.bincount(data.conversation)[np.unique(data.conversation[mine])] - 1
        figures["fit_longest_conversation"] = float(turns.max())
        figures["fit_share_beyond_iterations"] = float((turns > estimator.iterations).mean())
    if not estimator.off_policy:
        return figures
    figures["fit_turns_without_logprob"] = float(rows.sum() - known.sum())
    if estimator.needs_ratios and not known.any():
        raise TrainingError(
            f"none of {rows.sum()} logged suggestions has a behaviour_logprob, which q.target retrace needs; log it "
            "when sampling, or set q.target to fqe, which needs none"
        )
    if known.any():
        size = figures["fit_effective_size"] = effective_size(data.log_ratio[known])
        worth = size if estimator.needs_ratios else size * rows.sum() / known.sum()  # the others are taken to be alike
        if worth < effective_size_floor:
            raise SupportError(
                f"{known.sum()} logged suggestions are worth {size:.1f} of the policy's own (effective sample size), "
                f"fewer than q.effective_size_floor = {effective_size_floor:g}; collect conversations nearer to the "
                "policy, or set q.target to one_step"
            )
    return figures


def _alike(data: Transitions, rows: np.ndarray, weights: Sequence[float], by_turn: bool) -> int:
    """How many heads of a member learn of nothing that differs in some rows.

    Raises NothingToLearn where all do, or their weighted sum R does not differ.
    """
    told = data.returns[rows] if by_turn else data.outcomes[np.unique(data.conversation[rows])]
    told = told[:, : len(weights)]
    worth = told * np.array(weights)
    constant, total = np.ptp(told, axis=0) <= SAME * np.abs(told).max(axis=0), worth.sum(axis=1)
    what = "returns of turns" if by_turn else "conversations' outcomes"
    if not constant.all() and np.ptp(total) <= SAME * np.abs(worth).sum(axis=1).max():
        raise NothingToLearn(
            f"all {len(told)} {what} come to R = {total[0]:g}, the sum of those that differ by their weights "
            f"{', '.join(f'{weight:g}' for weight in weights)}: no conversation is better than another; collect more "
            "conversations, or give other weights in `outcomes`"
        )
    if constant.all():
        found = ", ".join(f"{value:g}" for value in told[0])
        raise NothingToLearn(
            f"all {len(told)} {what} are {found}: no outcome differs, so Q has nothing to learn but how soon they "
            "come; collect more conversations, until some end otherwise, or check how outcomes are labelled"
        )
    return int(constant.sum())


def bootstrap_weights(last: np.ndarray, settings: QSettings, seed: int) -> np.ndarray | None:
    """(N, H) Poisson(1) weights, one for each conversation and member, or judge; a single member sees all (None)."""
    members = settings.members + settings.judges
    if members == 1:
        return None
    drawn = np.random.default_rng(seed).poisson(1.0, (int(last.sum()), members))
    if settings.members == 1:
        drawn[:, 0] = 1
    return np.repeat(drawn[conversation_numbers(last)], len(settings.outcomes), axis=1).astype(np.float32)
