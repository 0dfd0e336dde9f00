"""Rounds end when another could gain nothing worth having, and never because a round did nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gate_evidence import GOOD
from tabular import EVIDENCE_SHARE, OUTCOMES, TabularSteps, pairs

from benchmarks import idle
from benchmarks.chain_logs import CHAIN, GAMMA, Log, divergence, explored, tilted_by
from iterative_ppo.algorithm import iterative_ppo
from iterative_ppo.config import Config, load_config
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.certificate import Certificate, certify
from iterative_ppo.evaluation.convergence import Convergence, RoundFigures, convergence
from iterative_ppo.evaluation.non_inferiority import Guardrail, proportion
from iterative_ppo.files import write_json
from iterative_ppo.mdp.returns import rewards
from iterative_ppo.mdp.turn_table import actions, last_rows
from tasks.gating import figures_of

BUDGET, EPSILON, MDE, MOST = 0.5, 0.01, 0.05, 10
MOVED = RoundFigures(kl=0.4, guardrails_held=True)
NEAR = replace(MOVED, certificate_high=0.005)
FAR = replace(MOVED, certificate_high=0.05)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(
        overrides={
            "rounds.kl_budget": BUDGET,
            "rounds.converged_below": EPSILON,
            "rounds.max_rounds": MOST,
            "abtest.mde": MDE,
        }
    )


def verdict(config: Config, *rounds: RoundFigures) -> tuple[bool, bool]:
    ended = convergence(rounds, config)
    return ended.over, ended.converged


@pytest.mark.parametrize(
    ("rounds", "converged"),
    [
        ((), False),
        ((NEAR,), False),
        ((NEAR, NEAR), True),
        ((FAR, NEAR, NEAR), True),
        ((NEAR, FAR), False),
        ((NEAR, FAR, NEAR), False),
        ((NEAR, MOVED), False),
        ((NEAR, MOVED, NEAR), False),
        ((NEAR, NEAR, FAR), False),
        ((NEAR, replace(NEAR, certificate_high=EPSILON)), False),
        ((NEAR, replace(NEAR, certificate_high=-0.2)), True),
        ((NEAR, replace(NEAR, certificate_high=float("nan"))), False),
    ],
)
def test_the_certificate_must_rule_a_gain_out_in_two_rounds_running(
    rounds: tuple[RoundFigures, ...], converged: bool, config: Config
) -> None:
    assert verdict(config, *rounds) == (converged, converged)


@pytest.mark.parametrize(
    ("high", "converged"),
    [(0.049, True), (0.05, False), (0.2, False), (-0.01, True), (None, False), (float("nan"), False)],
)
def test_one_ab_test_that_rules_the_least_worthwhile_gain_out_is_enough(
    high: float | None, converged: bool, config: Config
) -> None:
    assert verdict(config, replace(FAR, ab_high=high)) == (converged, converged)


def test_an_earlier_ab_test_counts_no_more(config: Config) -> None:
    assert verdict(config, replace(FAR, ab_high=0.0), FAR) == (False, False)


def test_a_round_that_promoted_is_none_to_end_with(config: Config) -> None:
    """However little the bound leaves, of a rate of 2 % a gain of 3 points is more than twice as much."""
    won = replace(NEAR, ab_high=0.03, promoted=True)
    assert verdict(config, won) == verdict(config, NEAR, won) == (False, False)
    assert "challenger won" in convergence([won], config).reason
    assert verdict(config, won, replace(won, promoted=False)) == (True, True)
    assert verdict(config, *[won] * MOST) == (True, False)


IDLE = [
    {"kl": 0.0},
    {"kl": 0.249},
    {"kl": None},
    {"kl": float("nan")},
    {"guardrails_held": False},
]


@pytest.mark.parametrize("idle", IDLE)
def test_rounds_that_did_nothing_or_broke_a_guardrail_show_nothing(idle: dict[str, Any], config: Config) -> None:
    quiet = replace(NEAR, ab_high=0.0, **idle)
    for rounds in ((quiet, quiet), (NEAR, quiet), (quiet, NEAR), (quiet,) * (MOST - 1)):
        assert verdict(config, *rounds) == (False, False)
    ended = convergence([quiet] * MOST, config)
    assert ended == Convergence(True, False, f"the budget of {MOST} rounds is spent"), "over, but never converged"


def test_idle_rounds_look_converged_but_for_the_rule() -> None:
    none, a_third, all_of_it = (row["value"] for row in idle.rows(runs=5))
    assert (none, a_third, all_of_it) == (0.0, 0.0, 1.0)


def test_half_of_the_budget_is_enough(config: Config) -> None:
    assert verdict(config, *[replace(NEAR, kl=BUDGET / 2)] * 2) == (True, True)


def test_reasons_carry_the_figure(config: Config) -> None:
    assert (
        "single turns gain at most +0.0050 and +0.0050 in two rounds running" in convergence([NEAR] * 2, config).reason
    )
    assert "customers gain at most +1.0%" in convergence([replace(FAR, ab_high=0.01)], config).reason
    assert "up to +0.0500" in convergence([FAR], config).reason
    assert "customers may gain up to +20.0%" in convergence([replace(FAR, ab_high=0.2)], config).reason
    assert "0.10 nats a response, less than half of 0.5" in convergence([replace(FAR, kl=0.1)], config).reason
    assert "cannot tell" in convergence([MOVED], config).reason
    assert convergence([replace(FAR, kl=0.12, ab_high=0.013)], config).reason == (
        "customers gain at most +1.3% from the last challenger, but it moved 0.12 nats a response, too little to show "
        "what another could gain (half of 0.5 and more does)"
    )
    assert "challenger won" in convergence([replace(FAR, kl=0.1, ab_high=0.2, promoted=True)], config).reason
    assert "no round" in convergence([], config).reason


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (True, "its challenger broke a guardrail"),
        (False, "a guardrail of its challenger is not told"),
        (None, "no challenger is known to hold its guardrails"),
    ],
)
def test_a_guardrail_that_is_not_told_is_not_called_broken(broken: bool | None, said: str, config: Config) -> None:
    last = replace(FAR, guardrails_held=False, guardrails_broken=broken)
    assert convergence([last], config).reason == f"the last round shows nothing: {said}"


def test_a_rounds_record_tells_a_broken_guardrail_from_one_that_is_not_told(tmp_path: Path) -> None:
    limit = Guardrail("repetition", "lower", margin=0.1, alpha=0.05)
    worse = {"holds": (0, 400), "not told": (1, 3), "broken": (200, 400)}
    for found, counts in worse.items():
        guardrail = proportion(limit, Arm(0, counts[1]), Arm(*counts))
        assert guardrail.found == found
        evidence = replace(GOOD, guardrails=(guardrail,)).as_dict()
        write_json(tmp_path / found / "evidence.json", evidence)
        write_json(tmp_path / found / "stage.json", {"key": "", "metrics": {}, "content": ""})
        record = figures_of(tmp_path / found)
        assert (record["guardrails_held"], record["guardrails_broken"]) == (found == "holds", found == "broken")
        assert RoundFigures.of(record).guardrails_broken == record["guardrails_broken"]


def test_figures_come_from_a_rounds_record() -> None:
    record = {"kl": 0.3, "guardrails_held": True, "certificate_high": 0.1, "ab_test": {"gain_high": 0.2}}
    assert RoundFigures.of(record) == RoundFigures(0.3, True, 0.1, 0.2)
    assert RoundFigures.of({}) == RoundFigures(None, False), "a record of an older version counts for nothing"
    assert RoundFigures.of({"decision": {"verdict": "promote"}}).promoted
    assert not RoundFigures.of({"decision": {"verdict": "reject"}}).promoted
    none = {"successes": 0, "conversations": 900}
    alike = {"gain_high": 0.002, "champion": none, "challenger": none}
    assert RoundFigures.of({**record, "ab_test": alike}).ab_high is None, "nobody reports outcomes any more"
    assert RoundFigures.of({**record, "ab_test": None, "certificate_high": None}) == RoundFigures(0.3, True)


# --- on the chain ----------------------------------------------------------------------------------------------------


@dataclass
class Certified(TabularSteps):
    """Rounds that spend a KL budget on Q from the fit part, and end by the rule, on the evidence part's certificate."""

    settings: Config = field(default_factory=load_config)
    kl_budget: float = 0.1
    figures: list[RoundFigures] = field(default_factory=list)
    ended: Convergence | None = None

    def fit_q(self, policy: np.ndarray, data: pd.DataFrame) -> np.ndarray:
        return super().fit_q(policy, data[data["part"] == "fit"].reset_index(drop=True))

    def improve(self, policy: np.ndarray, prompts: np.ndarray, q: np.ndarray) -> np.ndarray:
        """As far towards Q as the budget allows; a share of exploration keeps every action within the logs' reach."""
        self.improved = policy if self.kl_budget == 0 else explored(tilted_by(policy, q, self.kl_budget), 0.05)
        return self.improved

    def converged(self, q: np.ndarray, policy: np.ndarray, data: pd.DataFrame) -> bool:
        self.history.append(q)
        found = self.certificate(q, policy, data[data["part"] == "evidence"].reset_index(drop=True))
        moved = divergence(self.improved, policy)
        self.figures.append(RoundFigures(moved, True, None if found.refusal else found.high))
        self.ended = convergence(self.figures, self.settings)
        return self.ended.over

    def certificate(self, q: np.ndarray, policy: np.ndarray, evidence: pd.DataFrame) -> Certificate:
        acting = actions(evidence)
        state, action = pairs(self.chain, evidence)
        log = Log(policy, state, action, rewards(evidence)[acting], np.append(last_rows(evidence)[1:], False)[acting])
        return certify(log.turns(self.improved, q, (policy * q).sum(axis=1), np.zeros(len(state))), self.settings.gate)


def settings(**changes: Any) -> Config:
    chosen = {"rounds.kl_budget": 0.1, "rounds.converged_below": 0.03, "rounds.max_rounds": 12}
    return load_config(overrides={**chosen, **changes})


def gained(policy: np.ndarray) -> float:
    best, start = float(CHAIN.start @ CHAIN.optimal(GAMMA)[0]), CHAIN.value(CHAIN.uniform(), GAMMA)
    return (CHAIN.value(policy, GAMMA) - start) / (best - start)


def test_the_evidence_part_of_a_turn_table_gives_the_chains_certificate() -> None:
    steps = Certified(conversations=2000, settings=settings(**{"rounds.max_rounds": 1}))
    iterative_ppo(steps)
    data = steps.collect(CHAIN.uniform())
    share = data[data["part"] == "evidence"]["conversation_id"].nunique() / 2000
    assert share == pytest.approx(EVIDENCE_SHARE, abs=0.03) and list(OUTCOMES) == ["purchase"]
    assert steps.figures[0].kl == pytest.approx(0.09, abs=0.02)
    assert steps.figures[0].certificate_high is not None and steps.figures[0].certificate_high > 0.03


def test_a_policy_that_is_left_as_it_is_never_converges_on_the_chain() -> None:
    steps = Certified(conversations=2000, kl_budget=0.0, settings=settings(**{"rounds.max_rounds": 4}))
    iterative_ppo(steps)
    assert steps.ended == Convergence(True, False, "the budget of 4 rounds is spent")
    assert all(one.certificate_high is not None and one.certificate_high < 0.03 for one in steps.figures), (
        "the certificate alone would have said that nothing is to be gained"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_at_the_stop_at_least_70_percent_of_the_possible_gain_is_reached(seed: int) -> None:
    """20,000 conversations a round; the certificate says stop, at a tenth of V*, before the budget of rounds does."""
    steps = Certified(conversations=20_000, seed=seed, settings=settings())
    policy = iterative_ppo(steps)
    assert steps.ended is not None and steps.ended.converged, steps.ended
    assert gained(policy) >= 0.7
