"""From the turn table to the verdict of an A/B test: what counts as evidence, what is refused, what a night keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ab_arms import abtest, history
from prefect.logging import disable_run_logger
from scipy.stats import norm
from typer.testing import CliRunner

from flows import night, simulation
from flows.abtest_views import lines, standing
from flows.command_line import app
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.renovation import Script
from iterative_ppo.environments.rollout import Customer, serve
from iterative_ppo.errors import ConfigError, IterativePPOError, StoreError, TurnTableError
from iterative_ppo.evaluation.ab_test import Arm, ab_test, assign
from iterative_ppo.evaluation.assigned import Counted
from iterative_ppo.evaluation.bounds import bounds
from iterative_ppo.evaluation.designs import design_of
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.gate import outcome_gate
from iterative_ppo.evaluation.inference import inference, repeated_p_value
from iterative_ppo.evaluation.spending import upper_bounds
from iterative_ppo.learning.objective import success_above
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from tasks import experiments, looks, registry, rounds, tracking
from tasks.assignment import assigned, share_in_force
from tasks.audit import history as trail
from tasks.datasets import arrived, inbox, round_folder, turns_folder, write_once
from tasks.inbox import take_up
from tasks.state import Experiment, NightState, load_state, save_state
from tasks.traffic import to_rows

START = datetime(2026, 3, 2, tzinfo=UTC)
LATER = START + timedelta(days=60)
SIMULATED: dict[str, Any] = {"source__kind": "renovation", "source__path": None}
WINDOW = 72.0


def talk(
    name: str,
    version: int,
    success: bool = False,
    hour: float | None = None,
    lasts: float = 1.0,
    said: str = "which room is it",
    **more: Any,
) -> Conversation:
    """One suggestion, sent as it was; `hour` after the test's start."""
    stamp = None if hour is None else START + timedelta(hours=hour)
    end = None if stamp is None else stamp + timedelta(hours=lasts)
    turns = (
        Turn("hello", (0.0,), Suggestion(said, "suggested", -1.0), said, "verbatim", stamp),
        Turn("yes" if success else None, (float(success),), timestamp=end),
    )
    return Conversation(name, turns, f"customer-{name}", policy_version=str(version), **more)


def arm(version: int, successes: int, count: int, first: float | None = None, **more: Any) -> list[Conversation]:
    """`count` conversations, one an hour from hour `first`, successes spread evenly."""
    won = np.diff(np.floor(np.linspace(0, successes, count + 1) + 1e-9)) > 0
    hours = [None if first is None else first + k for k in range(count)]
    return [
        talk(f"{version}-{first}-{k}", version, bool(w), hour, **more)
        for k, (w, hour) in enumerate(zip(won, hours, strict=True))
    ]


class Test:
    """Policy 2 is tested against 1 below a folder of its own."""

    __test__ = False

    def __init__(self, root: Path, **settings: Any) -> None:
        self.overrides = {
            "data.root": str(root / "data"),
            "source.kind": "table",  # real customers, who have a clock
            "source.path": "log.jsonl",
            "abtest.conversations": 400,
            "abtest.ramp": [],
            "gate.guardrails.pii.margin": 0.02,  # which 200 conversations in an arm can tell
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        self.tested = Experiment(
            salt="s", champion=1, challenger=2, started=START, settings=looks.settings_of(self.config)
        )

    @property
    def config(self) -> Config:
        return load_config(overrides=self.overrides)

    @property
    def state(self) -> NightState:
        return NightState(phase="test", champion=1, experiment=self.tested, rounds=[{"round": 0, "data_md5": "d"}])

    def arrive(self, name: str, *talks: Sequence[Conversation]) -> None:
        frame = to_rows(self.config, [one for some in talks for one in some])
        write_once(round_folder(self.config, 1) / "arrived" / f"{name}.parquet", frame, self.config)

    def evidence(self, now: datetime = LATER) -> looks.Evidence:
        found = looks.evidence(self.config, self.state, now)
        assert found is not None
        return found

    def take(self, now: datetime = LATER) -> looks.Finding:
        return looks.take(self.config, self.tested, self.evidence(now))


# --- what a success is, and what else must hold -----------------------------------------------------------------------


def ended(version: int, k: int, *outcomes: float, **more: Any) -> Conversation:
    """A conversation of several outcomes."""
    said, none = Suggestion("which room is it", "suggested", -1.0), (0.0,) * len(outcomes)
    turns = (
        Turn("hello", none, said, said.text, more.pop("adoption", "verbatim")),
        Turn("well" if any(outcomes) else None, outcomes),
    )
    return Conversation(f"{version}-{k}", turns, f"customer-{version}-{k}", policy_version=str(version), **more)


def decided_by(test: Test, *talks: Sequence[Conversation]) -> tuple[str, str]:
    test.arrive("all", *talks)
    found = test.take()
    decision = outcome_gate(found.look, found.guardrails)
    return decision.verdict, decision.reasons[0]


def test_more_successes_that_are_worth_less_are_no_better(tmp_path: Path) -> None:
    """30 % buy for .3; 5 % buy and half leave an address, which weighs a tenth, for .1."""
    test = Test(tmp_path, outcomes={"contact": 0.1, "purchase": 1.0})
    usual = [ended(1, k, 0.0, float(k % 10 < 3)) for k in range(200)]
    worse = [ended(2, k, float(k % 2), float(k % 20 == 0)) for k in range(200)]
    assert decided_by(test, usual, worse)[0] == "reject" and "guardrail reward" in decided_by(test, usual, worse)[1]
    better = [ended(2, k, float(k % 2), float(k % 10 < 6)) for k in range(200)]
    assert decided_by(Test(tmp_path / "b", outcomes={"contact": 0.1, "purchase": 1.0}), usual, better)[0] == "promote"


def test_of_costs_alone_it_is_a_success_to_have_none(tmp_path: Path) -> None:
    test = Test(tmp_path, outcomes={"cost": 1.0}, data__outcome_low=-1.0, data__outcome_high=0.0)
    dear = [ended(1, k, -float(k % 10 < 6)) for k in range(200)]
    cheap = [ended(2, k, -float(k % 10 < 2)) for k in range(200)]
    assert decided_by(test, dear, cheap)[0] == "promote"
    assert success_above(test.config) < 0 < 1e-6 + success_above(test.config)


def test_ratings_need_a_success_of_their_own(tmp_path: Path) -> None:
    rated = {"outcomes": {"rating": 1.0}, "data__outcome_high": 5.0}
    talks = [ended(1, k, 1.0 + k % 3) for k in range(200)], [ended(2, k, 3.0 + k % 3) for k in range(200)]
    verdict, why = decided_by(Test(tmp_path / "a", **rated), *talks)
    assert verdict == "reject" and "set abtest.success_above" in why
    assert decided_by(Test(tmp_path / "b", **rated, abtest__success_above=3.5), *talks)[0] == "promote"


def test_what_nobody_logs_of_either_arm_guards_nothing(tmp_path: Path) -> None:
    usual = [ended(1, k, float(k % 10 < 3), adoption=None) for k in range(200)]
    better = [ended(2, k, float(k % 10 < 6), adoption=None) for k in range(200)]
    assert decided_by(Test(tmp_path / "a"), usual, better)[0] == "promote"
    known = [ended(1, k, float(k % 10 < 3)) for k in range(200)]
    verdict, why = decided_by(Test(tmp_path / "b"), known, better)
    assert verdict == "reject" and "guardrail acceptance: cannot tell" in why, "it must not go away with its log"
    assert decided_by(Test(tmp_path / "c", gate__guardrails__acceptance=None), known, better)[0] == "promote"


def test_one_large_business_does_not_hide_a_gain(tmp_path: Path) -> None:
    def of(version: int, won: int) -> list[Conversation]:
        names = ["large" if k % 10 < 7 else f"b{k % 31}" for k in range(200)]
        return [ended(version, k, float(k % 10 < won), business_id=name) for k, name in enumerate(names)]

    assert decided_by(Test(tmp_path), of(1, 3), of(2, 6))[0] == "promote"


def test_a_win_waits_for_guardrails_that_are_not_told_yet(tmp_path: Path) -> None:
    """One in fifty messages of either policy holds a number: of a hundred that tells nothing, of a thousand it does."""

    def said(version: int, count: int, won: int) -> list[Conversation]:
        texts = ["call +49 30 1234567 now" if k % 50 == 25 else "which room is it" for k in range(count)]
        return [talk(f"{version}-{k}", version, k % 10 < won, said=text) for k, text in enumerate(texts)]

    test = Test(tmp_path / "a", abtest__conversations=3000, gate__guardrails__pii__margin=0.02)
    test.arrive("first", said(1, 300, 3), said(2, 300, 6))
    early = test.take()
    assert early.look.verdict == "continue" and early.test is None
    assert "better, and the test goes on to its end, for guardrails are not told yet: pii" in early.look.reasons[0]
    test.tested = early.kept_in(test.tested)
    whole = Test(tmp_path / "b", abtest__conversations=3000, gate__guardrails__pii__margin=0.02)
    whole.tested = test.tested
    whole.arrive("all", said(1, 1500, 3), said(2, 1500, 6))
    found = whole.take()
    assert found.look.verdict == "promote" and outcome_gate(found.look, found.guardrails).verdict == "promote"


def test_harm_in_the_ramp_halts_the_test(tmp_path: Path) -> None:
    def during(hours: float, said: str) -> looks.Finding:
        test = Test(tmp_path / f"{hours}{len(said)}", abtest__ramp=[0.1], abtest__conversations=3000)
        usual = [talk(f"c{k}", 1, k % 3 == 0, hour=k * 0.02, lasts=0.01) for k in range(int(hours / 0.02))]
        new = [talk(f"n{k}", 2, False, hour=k * 0.1, lasts=0.01, said=said) for k in range(int(hours / 0.1))]
        test.arrive("all", usual, new)
        return test.take(START + timedelta(hours=hours))

    assert during(10, "which room is it").look.verdict == "continue"
    assert during(4, "write to jim.doe@example.org").look.verdict == "continue", "of forty"
    found = during(10, "write to jim.doe@example.org").look
    assert found.verdict == "halt" and "guardrail pii 1, champion 0: broken" in found.reasons[0]


def test_the_anytime_design_needs_an_order(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__design="anytime", source__kind="table", source__path="log.jsonl")
    test.arrive("all", arm(1, 5, 20), arm(2, 5, 20))
    with pytest.raises(ConfigError, match="in the order in which they began, and these have no timestamps"):
        test.evidence()


# --- evidence --------------------------------------------------------------------------------------------------------


def test_nothing_and_an_empty_arm_are_no_evidence_yet(tmp_path: Path) -> None:
    test = Test(tmp_path)
    assert looks.evidence(test.config, test.state, LATER) is None
    test.arrive("none", [talk("before", 1, hour=-1.0)])
    assert str(test.evidence().missing).startswith("neither arm holds a matured conversation yet")
    test = Test(tmp_path / "one")
    test.arrive("one", arm(1, 5, 20))
    seen = test.evidence()
    assert seen.arms == (20, 0)
    assert seen.missing is not None and "the challenger arm holds no matured conversation" in seen.missing
    found = test.take()
    assert (found.look.verdict, found.look.reasons, found.test) == ("continue", (seen.missing,), None)


def test_conversations_without_a_clock_have_matured_and_come_as_they_arrived(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__ramp=[0.01, 0.1], **SIMULATED)
    test.arrive("b", arm(2, 4, 10))
    test.arrive("a", arm(1, 3, 10))
    test.arrive("c", [talk("other", 7)])
    found = test.evidence().history
    assert found.matured == 20 and list(found.challenger) == [False] * 10 + [True] * 10
    assert found.outcome.sum() == 7 and test.evidence().arms == (10, 10)


def test_only_what_surely_is_here_counts_as_matured(tmp_path: Path) -> None:
    """The newest conversations are 200 h old by the test's clock; what began 144 h before that has matured."""
    test = Test(tmp_path)
    test.arrive("all", arm(1, 50, 100, 0.0), arm(2, 50, 100, 99.0))
    seen = test.evidence()
    assert seen.history.now == pytest.approx(199.0) and seen.arms == (56, 0) and seen.maturing == 144
    begun = [START, START + timedelta(hours=55)]
    assert seen.counted == Counted.from_dict(dict(zip(("from", "to"), (at.isoformat() for at in begun), strict=True)))
    earlier = test.evidence(START + timedelta(hours=160))
    assert earlier.arms == (17, 0), "by the clock, where rows claim to be of the future"


def test_an_outcome_counts_only_within_its_window(tmp_path: Path) -> None:
    test = Test(tmp_path)
    slow, soon = (talk(name, 2, True, 1.0, WINDOW + more) for name, more in (("slow", 1), ("soon", -1)))
    test.arrive("all", [slow, soon], [talk("new", 1, False, 1000.0)])
    assert list(test.evidence().history.outcome) == [0.0, 1.0]


def test_the_ramps_safety_stages_are_no_evidence(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__ramp=[0.01, 0.1], abtest__ramp_hours=24.0)
    early = [talk("before", 1, True, -5.0)]
    test.arrive("all", early, arm(1, 9, 60, 0.0), arm(2, 9, 60, 0.5), [talk("new", 1, False, 1000.0)])
    seen = test.evidence()
    assert seen.ramp == 48 + 48 and seen.arms == (12, 12) and seen.maturing == 1
    assert set(seen.turns["conversation_id"]) == {
        f"{v}-{f}-{k}" for v, f in ((1, 0.0), (2, 0.5)) for k in range(48, 60)
    }
    assert (np.diff(seen.history.assigned) >= 0).all()


def test_businesses_are_given_to_the_design(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__unit="business")
    talks = [talk(f"t{k}", 1 + k % 2, k % 4 < 2, business_id=f"b{k % 40}") for k in range(400)]
    test.arrive("all", talks)
    business = test.evidence().history.business
    assert business is not None and len(set(business)) == 40
    look = test.take().look
    assert look.design_effect is not None and look.design_effect != 1.0


def test_a_test_says_that_it_waits_for_businesses(tmp_path: Path) -> None:
    """At the plan's end too; nobody is rejected for them, and only a person can end it where none come."""
    test = Test(tmp_path, abtest__unit="business")
    test.arrive("all", [talk(f"t{k}", 1 + k % 2, k % 4 < 2, business_id=f"b{k % 18}") for k in range(400)])
    found = test.take()
    assert (found.look.verdict, found.look.fraction, found.test) == ("continue", 1.0, None)
    told = list(lines(standing(test.config, test.state, LATER)))
    assert "next look: none yet" in told and "verdict so far: continue" in told
    assert f"  {found.look.reasons[0]}" in told and "9.0 businesses of equal size" in told[-1]


def test_of_a_business_in_both_arms_the_standing_is_told_all_the_same(tmp_path: Path) -> None:
    """The night's look fails for it; who looks what is wrong sees the reason and the counts."""
    test = Test(tmp_path, abtest__unit="business")
    mixed = [talk("x", 1, business_id="both"), talk("y", 2, business_id="both")]
    test.arrive("all", [*(talk(f"t{k}", 1 + k % 2, business_id=f"b{k % 40}") for k in range(80)), *mixed])
    found = standing(test.config, test.state, LATER)
    assert (found["verdict"], found["next_look"]) == ("continue", None)
    assert found["reasons"] == ["A/B test: business 'both' is in both arms, but businesses are assigned"]
    assert found["matured"] == {"champion": 41, "challenger": 41}


def test_simulated_customers_end_where_a_test_waits_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = Test(tmp_path)
    test.arrive("simulated-0001", arm(1, 5, 20))
    save_state(test.config.data.root, test.state)
    monkeypatch.setattr(simulation.tracking, "open_tracking", lambda config: None)
    monkeypatch.setattr(simulation, "night", lambda params, overrides: "test")
    with pytest.raises(StoreError, match="has all of its simulated conversations and still waits; see `ippo abtest`"):
        simulation.simulated_rounds.fn(None, test.overrides)


@pytest.mark.parametrize("design", ["group_sequential", "anytime"])
def test_simulated_customers_have_no_clock_whatever_their_timestamps(tmp_path: Path, design: str) -> None:
    test = Test(tmp_path, abtest__ramp=[0.1], abtest__design=design, **SIMULATED)
    late = talk("late", 2, True, -1000.0, lasts=test.config.data.outcome_window_hours + 1)
    test.arrive("all", arm(1, 60, 200, -1000.0), arm(2, 150, 199, -1000.0), [late])
    seen = test.evidence(START)
    assert (seen.arms, seen.ramp, seen.maturing, seen.earlier) == ((200, 200), 0, 0, 0)
    assert seen.history.outcome.sum() == 210, "what comes after the outcome window is no outcome"
    assert test.take(START).look.verdict == "promote"
    began = seen.turns.groupby("conversation_id")["timestamp"].min()
    assert seen.counted(began).all() and seen.counted.first == began.min(), "the report finds them"


def test_a_few_conversations_that_break_the_tables_rules_are_left_out_and_counted(tmp_path: Path) -> None:
    test = Test(tmp_path)
    back = talk("back", 2, True, 5.0, lasts=-2.0)
    test.arrive("all", arm(1, 5, 20, 0.0), arm(2, 5, 20, 0.0), [back], [talk("new", 1, False, 1000.0)])
    seen = test.evidence()
    assert (seen.arms, seen.faulty) == ((20, 20), 1) and "back" not in set(seen.turns["conversation_id"])
    assert "left out, for they break the turn table's rules: 1" in lines(standing(test.config, test.state, LATER))


def test_conversations_of_neither_arm_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = Test(tmp_path)
    test.arrive(
        "all", arm(1, 5, 20, 0.0), arm(2, 5, 20, 0.0), [talk("lost", 10, True, 7.0)], [talk("new", 1, False, 1000.0)]
    )
    assert test.evidence().strangers == 1
    assert "1 conversations are of policy_version 10, neither 1 nor 2" in caplog.text
    assert "left out, for their policy_version is of neither arm: 1" in lines(standing(test.config, test.state, LATER))


def test_nothing_but_conversations_from_before_the_test_is_waited_over(tmp_path: Path) -> None:
    """As on its first nights, with a team's own traffic and a ramp: they have timestamps, all of them too early."""
    test = Test(tmp_path, source__kind="table", source__path="log.csv", abtest__ramp=[0.1])
    test.arrive("early", arm(1, 3, 12, -40.0))
    found = test.take()
    assert (found.look.verdict, found.test) == ("continue", None)
    assert "12 from before it began" in found.look.reasons[0]


@pytest.mark.parametrize("first", [-30.0, None], ids=["timed", "timeless"])
def test_late_conversations_of_the_test_that_the_champion_won_are_left_out(tmp_path: Path, first: float | None) -> None:
    """Nobody won them, so they are here a window later, and their arm is the challenger's, which the champion was."""
    test = Test(tmp_path)
    hour = None if first is None else 1.0
    test.arrive("new", arm(1, 20, 100, hour, arm="champion"), arm(2, 30, 100, hour, arm="challenger"))
    before = test.evidence()
    late = [replace(one, conversation_id=f"late-{k}") for k, one in enumerate(arm(1, 0, 7, first, arm="challenger"))]
    test.arrive("late", late)
    won = [*test.state.rounds, {"round": 1, "champion": 0, "challenger": 1}]
    found = looks.evidence(test.config, test.state.advance(rounds=won), LATER)
    assert found is not None
    assert (found.arms, found.ramp, found.maturing) == (before.arms, 0, before.maturing)
    assert not set(found.begun["conversation_id"]) & {one.conversation_id for one in late}
    if first is None:  # where it never was one, somebody labels amiss
        with pytest.raises(TurnTableError, match="labelled as of the challenger's arm"):
            test.evidence()


def test_one_date_in_the_future_does_not_set_the_clock(tmp_path: Path) -> None:
    def matured(*more: Conversation) -> tuple[int, int]:
        test = Test(tmp_path / str(len(more)))
        test.arrive("all", arm(1, 5, 20, 0.0), arm(2, 5, 20, 0.0), [talk("new", 1, False, 10.0)], list(more))
        return test.evidence().arms

    assert matured(talk("odd", 1, False, 24.0 * 365 * 20)) == matured()


# --- refusals --------------------------------------------------------------------------------------------------------

BOTH = (arm(1, 5, 20), arm(2, 5, 20))
REFUSED: dict[str, tuple[dict[str, Any], list[Conversation], type[IterativePPOError], str]] = {
    "mislabelled": ({}, [talk("x", 2, arm="champion")], TurnTableError, r"'x' of policy 2 is labelled as of the champ"),
    "one without a time": (
        {},
        [talk("x", 1, hour=1.0), talk("y", 1), talk("u", 2, hour=1.0), talk("v", 2)],
        TurnTableError,
        r"'v' has no timestamp",
    ),
    "another definition": (
        {},
        [*arm(1, 5, 20, 0.0), *arm(2, 5, 20)],
        ConfigError,
        r"arms differ in timestamps: 'in all conversations' for the champion and 'in none' for the challenger",
    ),
    "no business": (
        {"abtest.unit": "business"},
        [talk("x", 1, business_id="b"), talk("y", 1), talk("z", 2), talk("w", 2, business_id="b")],
        TurnTableError,
        r"'y' has no business_id",
    ),
    "a business in both arms": (
        {"abtest.unit": "business"},
        [talk("x", 1, business_id="b"), talk("y", 2, business_id="b")],
        TurnTableError,
        r"business 'b' is in both arms",
    ),
    "rules broken too often": (
        {},
        [talk("x", 2, hour=5.0, lasts=-2.0), talk("y", 1, hour=1.0), talk("z", 2, hour=1.0)],
        TurnTableError,
        r"1 of 3 conversations break .* allows 10.0%; the first is 'x', turn 2, timestamp: must not go back; mend",
    ),
    "a ramp without a clock": (
        {"source.kind": "table", "abtest.ramp": [0.1]},
        [*BOTH[0], *BOTH[1]],
        ConfigError,
        r"abtest.ramp: the conversations have no timestamps",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_evidence_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    settings, talks, error, reason = REFUSED[name]
    test = Test(tmp_path, **settings)
    test.arrive("all", talks)
    save_state(test.config.data.root, test.state)
    with pytest.raises(error, match=reason), disable_run_logger():
        night.look(test.config, SimpleNamespace(), test.state)  # type: ignore[arg-type]
    assert load_state(test.config.data.root) == test.state, "nothing changed"


def test_conversations_that_trained_the_challenger_are_refused(tmp_path: Path) -> None:
    test = Test(tmp_path)
    test.arrive("all", *BOTH)
    frame = to_rows(test.config, BOTH[0][:1])
    write_once(turns_folder(test.config, 0) / "turns.parquet", frame, test.config)
    with pytest.raises(TurnTableError, match=r"'1-None-0' is in the dataset of round 0.*another data set"):
        test.evidence()


@pytest.mark.parametrize(
    ("key", "value"), [("abtest.mde", 0.04), ("gate.alpha", 0.1), ("outcomes", {"purchase": 2.0}), ("abtest.looks", 3)]
)
def test_a_test_keeps_the_settings_that_it_began_with(tmp_path: Path, key: str, value: Any) -> None:
    test = Test(tmp_path)
    test.arrive("all", *BOTH)
    test.overrides[key] = value
    with pytest.raises(ConfigError, match=rf"{key}: the A/B test 's' began with .* set it back"):
        test.evidence()


def test_a_test_of_another_data_set_does_not_start(tmp_path: Path) -> None:
    tested = Experiment(salt="s", champion=1, challenger=2, settings={"gate.alpha": 0.05})
    started = experiments.start(tmp_path, tested, "first.dir")
    assert experiments.start(tmp_path, tested, "first.dir") == started and started.started is not None
    before = trail(tmp_path)
    with pytest.raises(StoreError, match=r"data first.dir, and this one is of second.dir"):
        experiments.start(tmp_path, tested, "second.dir")
    assert trail(tmp_path) == before


# --- looks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    heard: list[tuple[str, ...]] = []
    monkeypatch.setattr(night.notify, "tell", lambda config, *message: heard.append(message))
    monkeypatch.setattr(rounds, "open_round", lambda *_: SimpleNamespace(run_id="run"))
    return heard


def nightly(test: Test, name: str, *talks: Sequence[Conversation]) -> NightState:
    """A night on what arrived until it, with a store that only takes JSON."""
    if talks:
        test.arrive(name, *talks)
    store: Any = SimpleNamespace(log_json=lambda run, value, file: json.dumps(value, allow_nan=False))
    with disable_run_logger():
        state = night.look(test.config, store, test.state)
    assert state.experiment is not None
    test.tested = state.experiment
    return state


def test_a_night_keeps_looks_that_spent_evidence(tmp_path: Path, told: list[Any]) -> None:
    test = Test(tmp_path, abtest__looks=4)
    nightly(test, "a", arm(1, 10, 30), arm(2, 10, 30))
    assert not test.tested.looks, "a look is due at 100 matured conversations"
    nightly(test, "b", [talk(f"b{k}", 1 + k % 2, k % 3 == 0) for k in range(60)])
    nightly(test, "nothing new")
    assert test.tested.fractions == [pytest.approx(120 / 400)] and test.tested.guardrails
    assert load_state(test.config.data.root).experiment == test.tested
    nightly(test, "c", [talk(f"c{k}", 1 + k % 2, k % 3 == 0) for k in range(120)])
    assert test.tested.fractions == pytest.approx([0.3, 0.6]) and not told
    spent = [Look.from_dict(one).bound for one in test.tested.looks]
    assert spent == pytest.approx(upper_bounds([0.3, 0.6], 0.05)), "the second bound knows of the first look"


@pytest.mark.parametrize("challengers", [0, 60])
def test_arms_of_the_wrong_size_halt_and_are_told_once(tmp_path: Path, told: list[Any], challengers: int) -> None:
    test = Test(tmp_path)
    for _ in range(2):
        state = nightly(test, "a", arm(1, 30, 200), arm(2, challengers // 2, challengers))
        assert state.phase == "test" and test.tested.looks[-1]["verdict"] == "halt"
    assert [event for event, *_ in told] == ["alarm"] and "sample-ratio mismatch" in told[0][2]
    assert len(test.tested.looks) == 1
    assert share_in_force(test.config, test.tested, LATER) == 0.0, "customers meet the champion alone"


def test_a_guardrail_of_the_arms_blocks_a_promotion(tmp_path: Path) -> None:
    good, wordy = "which room is it", "which room is it and may I say how very glad we all are to hear from you today"
    for said, verdict in ((good, "promote"), (wordy, "reject")):
        test = Test(tmp_path / verdict)
        test.arrive("all", arm(1, 40, 200), arm(2, 120, 200, said=said))
        found = test.take()
        assert found.look.verdict == "promote" and found.test is not None and found.test.p_value < 1e-6
        decision = outcome_gate(found.look, found.guardrails)
        assert decision.verdict == verdict
        failed = [reason for reason in decision.reasons if reason.startswith("failed")]
        assert all("guardrail length" in reason for reason in failed) and bool(failed) == (verdict == "reject")


def test_a_gain_that_is_ruled_out_rejects_before_the_end(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__conversations=1000)
    test.arrive("all", arm(1, 150, 300), arm(2, 60, 300))
    found = test.take()
    assert found.look.verdict == "stop_futile" and found.test is not None and found.test.gain_high < 0
    assert outcome_gate(found.look, found.guardrails).verdict == "reject"


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_the_p_value_agrees_with_the_verdict(design: str) -> None:
    for successes in (30, 36, 42, 48, 80):
        arms = Arm(30, 150), Arm(successes, 150)
        config, seen = abtest(design=design, conversations=300), history(*arms)
        look = design_of(config, 0.05).look(seen)
        found = inference(config, 0.05, seen, look)
        assert (found.p_value < 0.05) == (look.verdict == "promote")
        assert (found.champion, found.challenger) == arms
        assert look.low is not None and look.high is not None
        assert found.gain_low < look.low < found.gain < look.high < found.gain_high


def test_one_look_at_the_planned_size_is_a_plain_test() -> None:
    arms = Arm(100, 500), Arm(125, 500)
    plain = ab_test(*arms, 0.05)
    for design in ("fixed", "group_sequential"):
        config, seen = abtest(design=design, conversations=1000), history(*arms)
        found = inference(config, 0.05, seen, design_of(config, 0.05).look(seen))
        assert found.p_value == pytest.approx(plain.p_value, rel=0.01)
        assert (found.gain_low, found.gain_high) == pytest.approx((plain.gain_low, plain.gain_high), abs=2e-3)


def test_the_repeated_p_value_is_the_level_at_which_the_bound_is_met() -> None:
    fractions = [0.2, 0.5, 0.8]
    for alpha in (0.01, 0.05, 0.3):
        assert repeated_p_value(fractions, upper_bounds(fractions, alpha)[-1]) == pytest.approx(alpha, rel=1e-4)
    assert repeated_p_value(fractions, 7.9) <= 1e-9 and repeated_p_value(fractions, -3.0) > 0.9
    assert repeated_p_value([1.2], 1.3) == pytest.approx(norm.sf(1.3))


def test_arms_that_do_not_vary_have_the_figures_of_a_fixed_sample() -> None:
    config, seen = abtest(conversations=200), history(Arm(0, 100), Arm(0, 100))
    look = design_of(config, 0.05).look(seen)
    assert look.verdict == "reject" and inference(config, 0.05, seen, look) == ab_test(Arm(0, 100), Arm(0, 100), 0.05)


def test_bounds_are_those_taken_then_those_planned() -> None:
    config = abtest(looks=4)
    look = design_of(config, 0.05).look(history(Arm(400, 1000), Arm(405, 1000)))
    found = bounds(config.design, config.looks, 0.05, [look])
    assert [one.fraction for one in found] == pytest.approx([2000 / 3000, 0.75, 1.0])
    assert [one.statistic is None for one in found] == [False, True, True] and found[0].bound == look.bound
    (fixed,) = bounds("fixed", 4, 0.05, [])
    assert (fixed.fraction, fixed.bound) == (1.0, pytest.approx(1.645, abs=1e-3))


# --- who answers -----------------------------------------------------------------------------------------------------


def test_the_share_follows_the_ramp_and_units_stay(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__ramp=[0.01, 0.1], abtest__ramp_hours=24.0)
    config, state = test.config, test.state
    shares = [share_in_force(config, test.tested, START + timedelta(hours=h)) for h in (-1, 0, 23.9, 24, 48, 900)]
    assert shares == [0.0, 0.01, 0.01, 0.1, 0.5, 0.5], "what began before the test stays the champion's"
    met: set[str] = set()
    for hour in (1, 30, 60):
        now = START + timedelta(hours=hour)
        who = {u: assigned(config, state, 1, u, now) for u in map(str, range(3000))}
        challenged = {u for u, one in who.items() if one.arm == "challenger"}
        assert met <= challenged and {who[u].version for u in challenged} <= {2}
        assert all((assign(u, "s", 0.5) == "challenger") >= (u in challenged) for u in who)
        met = challenged
    assert abs(len(met) / 3000 - 0.5) < 0.03


def test_without_a_test_or_after_it_the_champion_answers(tmp_path: Path) -> None:
    test = Test(tmp_path)
    config, state, nobody = test.config, test.state, NightState()
    assert assigned(config, nobody, 4, "u", LATER).version == 4
    assert assigned(config, state, 3, "u", LATER) == assigned(config, nobody, 3, "u", LATER)
    assert {assigned(config, state, 1, str(u), LATER).version for u in range(50)} == {1, 2}
    experiments.end(config.data.root, test.tested, {"verdict": "reject", "reasons": []}, {})
    assert {assigned(config, state, 1, str(u), LATER).version for u in range(50)} == {1}


def test_simulated_customers_are_assigned_as_live_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the hash of the id that it is logged under, in the order in which they come."""
    monkeypatch.setattr(simulation.tracking, "open_tracking", lambda config: None)
    monkeypatch.setattr(simulation.registry, "champion", lambda store: 1)
    monkeypatch.setattr(simulation.rounds, "policy_version", lambda store, version: SimpleNamespace(version=version))
    monkeypatch.setattr("tasks.traffic._answered", scripted)
    for unit in ("conversation", "business"):
        test = Test(tmp_path / unit, abtest__unit=unit, abtest__ramp=[0.01])
        save_state(test.config.data.root, test.state)
        simulation.traffic(test.config)
        take_up(test.config, 1)
        simulation.traffic(test.config)
        frame = arrived(test.config, 1)
        assert frame is not None and not list(inbox(test.config).glob("*")), "a day comes once"
        first = frame.groupby("conversation_id", sort=False)[["arm", "policy_version", "business_id"]].first()
        ids = first.index if unit == "conversation" else first["business_id"]
        assert list(first["arm"]) == [assign(str(one), "s", 0.5) for one in ids] and len(first) == 400
        assert list(first.index) == sorted(first.index)
        assert list(first["policy_version"]) == [{"champion": "1", "challenger": "2"}[arm] for arm in first["arm"]]
        assert 0 < (first["arm"] == "challenger").sum() != 200, "by hash, not by count"
    save_state(test.config.data.root, NightState(round=5))
    simulation.traffic(test.config)
    take_up(test.config, 5)
    alone = arrived(test.config, 5)
    assert alone is not None and set(alone["arm"]) == {"champion"} and set(alone["policy_version"]) == {"1"}


def scripted(
    config: Config, policy: Any, new: Sequence[Customer], seed: int, arm: str, persona: str | None
) -> list[Conversation]:
    assert persona is None, "nobody explores in a test"
    return serve(Script(0.5), new, seed, str(policy.version), arm)


def test_a_conversation_keeps_its_arm_while_the_ramp_rises(tmp_path: Path) -> None:
    test = Test(tmp_path, abtest__ramp=[0.01, 0.1])
    config, state, began = test.config, test.state, START + timedelta(hours=23.9)
    units = [str(u) for u in range(2000)]
    met = {u for u in units if assigned(config, state, 1, u, began).version == 2}
    later = {u for u in units if assigned(config, state, 1, u, began + timedelta(hours=30)).version == 2}
    assert met < later and 5 <= len(met) <= 45, "what begins later is ramped up; what began keeps its stage"
    before = START - timedelta(minutes=1)
    assert {assigned(config, state, 1, u, before).version for u in units} == {1}


def test_a_conversation_under_way_must_say_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = Test(tmp_path, abtest__ramp=[0.01])
    save_state(test.config.data.root, test.state)
    asked: list[Any] = []
    monkeypatch.setattr(tracking, "open_tracking", lambda config: None)
    monkeypatch.setattr("flows.suggesting.answerer", lambda config, store, *who: asked.append(who) or 1 / 0)
    first = {"messages": [{"customer": "hi"}]}
    second = {"messages": [{"customer": "hi"}, {"business": "hello"}, {"customer": "how much?"}]}
    for talk, more in ((first, ()), (second, ("--began", "2026-03-02T10:00:00+01:00"))):
        path = tmp_path / "talk.json"
        path.write_text(json.dumps(talk), encoding="utf-8")
        assert isinstance(ippo(test, "suggest", str(path), "--unit", "u", *more).exception, ZeroDivisionError)
    assert asked[1] == ("u", START + timedelta(hours=9)) and asked[0][1] > START
    refused = ippo(test, "suggest", str(path), "--unit", "u").exception
    assert isinstance(refused, ConfigError) and "--began" in str(refused)
    for wrong in ("yesterday", "2026-03-02T10:00:00"):
        refused = ippo(test, "suggest", str(path), "--unit", "u", "--began", wrong).exception
        assert isinstance(refused, ConfigError) and "its offset" in str(refused)
    assert len(asked) == 2


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_moved_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands begin by looking into MLflow; here it says nothing new."""
    monkeypatch.setattr(tracking, "open_tracking", lambda config: None)
    monkeypatch.setattr("flows.champions.settle", lambda *_: ())
    monkeypatch.setattr("flows.champions.end_void_test", lambda *_: None)


def ippo(test: Test, *arguments: str) -> Any:
    sets = [f"--set={key}={json.dumps(value)}" for key, value in test.overrides.items()]
    return CliRunner().invoke(app, [*arguments, *sets])


def test_abtest_shows_the_running_test(tmp_path: Path, told: list[Any]) -> None:
    test = Test(tmp_path, abtest__looks=4)
    nightly(test, "a", [talk(f"a{k}", 1 + k % 2, k % 3 == 0) for k in range(120)])
    plots = [tmp_path / f"path.{kind}" for kind in ("png", "svg", "html")]
    for plot in plots:
        shown = ippo(test, "abtest", "--plot", str(plot))
        assert shown.exit_code == 0, shown.output
    for words in (
        "policy version 2 against 1",
        "120 of 400",
        "next look: at 200",
        "verdict so far: continue",
        "length",
    ):
        assert words in shown.output
    assert plots[0].read_bytes().startswith(b"\x89PNG") and "<svg" in plots[1].read_text(encoding="utf-8")
    assert plots[2].read_text(encoding="utf-8").startswith("<!doctype html>")
    values = json.loads(ippo(test, "abtest", "--json").stdout)
    assert values["matured"] == {"champion": 60, "challenger": 60} and values["looks"] == test.tested.looks
    assert [one["statistic"] is None for one in values["bounds"]] == [False, True, True, True]


def test_the_next_look_has_a_date_once_a_day_of_traffic_tells_its_pace(tmp_path: Path) -> None:
    """10 an hour from hour 0; the ramp's stage takes 24 h; 400 are planned, a look at each 100; 144 h to mature."""
    test = Test(tmp_path, abtest__looks=4, abtest__ramp=[0.1], abtest__ramp_hours=24.0)
    assert standing(test.config, test.state, START)["next_look"]["expected"] is None
    talks = [talk(f"t{k}", 1 + k % 2, hour=k / 10, lasts=0.0) for k in range(101)]
    test.arrive("a", talks)
    early = standing(test.config, test.state, START + timedelta(hours=10))
    assert early["next_look"]["expected"] is None and "about" not in "".join(lines(early))
    test.arrive("b", [talk(f"u{k}", 1 + k % 2, hour=10.1 + k / 10, lasts=0.0) for k in range(200)])
    now = START + timedelta(hours=30)
    told = standing(test.config, test.state, now)
    expected = datetime.fromisoformat(told["next_look"]["expected"])
    assert abs(expected - (START + timedelta(hours=24 + 100 / 10 + 144))) < timedelta(minutes=10)
    assert told["next_look"]["conversations"] == 100 and told["next_look"]["conversations_per_day"] == 240.8
    assert "next look: at 100 matured conversations, about 2026-03-09 at 240.8 conversations a day" in "\n".join(
        lines(told)
    )
    late = START + timedelta(hours=2000)
    assert datetime.fromisoformat(standing(test.config, test.state, late)["next_look"]["expected"]) == late


def test_abtest_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    test = Test(tmp_path)
    assert isinstance(ippo(test, "abtest").exception, StoreError)
    assert isinstance(ippo(test, "abtest", "--plot", "path.gif").exception, ConfigError)
    assert not list(tmp_path.rglob("path.*"))


def test_abtest_shows_the_last_test_that_ended(tmp_path: Path) -> None:
    test = Test(tmp_path)
    test.arrive("all", arm(1, 40, 200), arm(2, 120, 200))
    found = test.take()
    assert found.test is not None
    evidence = {
        "experiment": test.tested.model_dump(mode="json"),
        "look": found.look.as_dict(),
        "guardrails": [one.as_dict() for one in found.guardrails],
    }
    decision = outcome_gate(found.look, found.guardrails).as_dict()
    record = {"round": 3, "experiment": looks.ended(evidence), "ab_test": found.test.as_dict(), "decision": decision}
    shown = standing(test.config, NightState(rounds=[record]), LATER)
    assert (shown["running"], shown["round"], shown["verdict"]) == (False, 3, "promote")
    assert len(shown["looks"]) == 1 and shown["guardrails"]
    json.dumps(shown, allow_nan=False)


def test_abtest_shows_a_test_that_became_void(tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    test = Test(tmp_path)
    nightly(test, "a", [talk(f"a{k}", 1 + k % 2, k % 3 == 0) for k in range(120)])
    monkeypatch.setattr(night.champions, "end_void_test", lambda *_: "another became the champion")
    closed = night.follow(test.config, SimpleNamespace(finish=lambda run: None), test.state)  # type: ignore[arg-type]
    shown = standing(test.config, closed, LATER)
    assert (closed.experiment, closed.phase, shown["running"]) == (None, "collect", False)
    assert (shown["verdict"], shown["reasons"]) == ("void", ["another became the champion"])
    assert shown["looks"] == test.tested.looks


def test_a_test_that_is_stopped_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = Test(tmp_path)
    root, withdrawn = test.config.data.root, []
    save_state(root, test.state)
    monkeypatch.setattr(registry, "withdraw", lambda store, number, reason: withdrawn.append(number))
    done = ippo(test, "abtest", "--stop", "the shares are off")
    assert done.exit_code == 0 and withdrawn == [2]
    reason = experiments.void(root, test.tested, {1, 2})
    assert reason is not None and "the shares are off" in reason
    assert isinstance(ippo(test, "abtest", "--stop", "again").exception, StoreError)
    assert len(trail(root)) == 1
    shown = ippo(test, "abtest").output
    assert "verdict so far: void" in shown and "the shares are off" in shown and "meets 0% of customers" in shown


def test_plan_names_a_size_for_each_design(tmp_path: Path) -> None:
    test = Test(tmp_path)
    arguments = ("plan", "--base", ".3", "--mde", ".1", "--power", ".9", "--alpha", ".01", "--per-day", "100")
    values = {one["design"]: one for one in json.loads(ippo(test, *arguments, "--json").stdout)}
    assert set(values) == {"fixed", "group_sequential", "anytime"}
    assert values["fixed"]["most"] < values["group_sequential"]["most"] < values["anytime"]["most"]
    assert values["fixed"]["most_days"] == pytest.approx(6 + values["fixed"]["most"] / 100, abs=0.1)
    shown = ippo(test, *arguments).stdout
    assert f"set abtest.conversations={values['group_sequential']['most']}" in shown
    assert isinstance(ippo(test, "plan", "--base", ".99").exception, ConfigError)
    assert "the smaller arm expects" not in shown and "abtest.mde" not in shown
    assert "set abtest.mde to about 0.005" in ippo(test, "plan", "--base", ".02").stdout
    small = Test(tmp_path, gate__guardrails__pii__margin=0.01)
    shown = ippo(small, "plan", "--base", ".3", "--mde", ".14").stdout
    assert "400 conversations: enough for the outcome\nguardrail pii needs " in shown
    assert "the smaller arm expects 2.0 conversations of the rarer end" in ippo(test, "plan", "--base", ".01").stdout
