"""A night and its champion: verdicts that wait for a person, tests that become void, alarms that roll back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from policy_store import registered
from prefect.logging import disable_run_logger

from flows import champions, night, simulation
from flows.abtest_views import lines, standing
from flows.reporting import status_lines
from flows.suggesting import answerer, suggestion_for
from iterative_ppo.config import Config, TrackingConfig, load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import StoreError
from iterative_ppo.files import read_json
from iterative_ppo.mdp.conversation import State
from iterative_ppo.report.record import RunRecord
from tasks import approvals, experiments, notify, registry
from tasks.assignment import assigned
from tasks.audit import audit_file, history
from tasks.datasets import inbox, write_once
from tasks.registry import POLICY
from tasks.state import Experiment, NightState, load_state, save_state
from tasks.tracking import Tracking, open_tracking
from tasks.traffic import to_rows

SIZE = 60
LATE = datetime.now(UTC) + timedelta(days=30)
"""After the ramp."""
TESTED = Experiment(salt="round-0000-policy-2", champion=1, challenger=2)
OFFLINE = {"verdict": "test", "reasons": []}
ROUND = {"round": 0, "champion": 1, "challenger": 2, "q": 1, "data_md5": "1d.dir", "offline": OFFLINE}


@pytest.fixture(scope="module", autouse=True)
def _without_a_server() -> Iterator[None]:
    """Nor do connections to the store stay open, so that its file may be replaced."""
    with pytest.MonkeyPatch.context() as patched, disable_run_logger():
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        patched.setattr(night, "freeze", frozen)
        patched.setattr(night, "train", lambda config, store, state: state)
        yield


def frozen(config: Config, store: Tracking, state: NightState, number: int) -> NightState:
    """What `freeze` leaves, without validation and DVC."""
    return night._saved(config, state.advance(round=number, phase="train", champion=registry.champion(store)))


class Told(list[tuple[str, str, str]]):
    """What people are told: event, subject, body."""

    @property
    def events(self) -> list[str]:
        return [event for event, _, _ in self]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    heard = Told()
    monkeypatch.setattr(notify, "tell", lambda config, *message: heard.append(message))
    return heard


class Night:
    """A data root whose A/B test of policy 2 against 1 runs; 3 is there too."""

    def __init__(self, place: Path) -> None:
        self.overrides = {
            "data.root": str(place / "data"),
            "tracking.uri": f"sqlite:///{place}/mlflow.db",
            "tracking.artifacts": f"{place}/artifacts",
            "tracking.experiment": place.name,
            "abtest.design": "fixed",
            "abtest.conversations": 2 * SIZE,
            "simulator.conversations": SIZE,
            "alarms.conversations": SIZE,
            "rounds.converged_below": -1.0,
            "gate.guardrails.pii.margin": 0.1,  # which 60 conversations in an arm can tell
        }
        self.config = load_config(overrides=self.overrides)
        self.root = self.config.data.root
        self.store = open_tracking(self.config)

    def begin(self, models: Path) -> None:
        for number in range(3):
            registered(self.store, models, number)
        registry.promote(self.store, 1, {"reason": "pi_0"}, "flow", self.root)
        registry.set_challenger(self.store, 2)
        tested = experiments.start(self.root, night.experiment(self.config, ROUND), ROUND["data_md5"])
        assert tested.salt == TESTED.salt
        save_state(self.root, NightState(phase="test", champion=1, experiment=tested, rounds=[ROUND]))

    def set(self, **overrides: Any) -> None:
        self.overrides |= {key.replace("__", "."): value for key, value in overrides.items()}
        self.config = load_config(overrides=self.overrides)

    def arrive(self, name: str, **skills: float) -> None:
        """Conversations of a scripted agent under policies' names: `champion_1=.2` is the champion's arm, version 1."""
        talks = []
        for k, (who, skill) in enumerate(skills.items()):
            arm, version = who.split("_")
            seed = 100 * len(list(self.root.rglob("*.parquet"))) + k
            talks += collect(Script(skill), Renovation(), SIZE, seed, version, arm)
        write_once(inbox(self.config) / f"{name}.parquet", to_rows(self.config, talks), self.config)

    def step(self) -> NightState:
        state = night.step(self.config)
        assert state == load_state(self.root)
        return state

    @property
    def champion(self) -> int | None:
        return registry.champion(self.store)

    def move(self, number: int) -> None:
        self.store.client.set_registered_model_alias(POLICY, "champion", str(number))

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [record for record in history(self.root) if record["event"] in kinds]

    @property
    def moves(self) -> list[tuple[str, int | None, int | None]]:
        return [(r.get("kind", r["event"]), r["from"], r["to"]) for r in history(self.root) if "from" in r]

    @property
    def status(self) -> str:
        return "\n".join(status_lines(self.config))


@pytest.fixture(scope="module")
def begun(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A place, and a copy of what it was when the test had begun."""
    place, kept = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("kept") / "all"
    shutil.copy(saved_models / "mlflow.db", place / "mlflow.db")
    Night(place).begin(saved_models)
    shutil.copytree(place, kept, ignore=shutil.ignore_patterns("artifacts"))
    return place, kept


@pytest.fixture
def it(begun: tuple[Path, Path]) -> Night:
    place, kept = begun
    shutil.rmtree(place / "data")
    shutil.copytree(kept, place, dirs_exist_ok=True)
    return Night(place)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_verdict_is_carried_out_recorded_and_told(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    state = it.step()
    assert (it.champion, state.phase, state.round, state.experiment) == (2, "train", 1, None)
    assert state.rounds[0]["decision"]["verdict"] == "promote"
    (promotion,) = [r for r in it.events("intent") if r["to"] == 2]
    assert promotion["actor"] == "flow" and promotion["data_md5"] == "1d.dir"
    assert promotion["evidence"]["experiment"].items() >= {"salt": TESTED.salt, "champion": 1, "challenger": 2}.items()
    assert promotion["evidence"]["test"] == state.rounds[0]["ab_test"]
    (ended,) = it.events("experiment ended")
    assert ended["verdict"] == "promote"
    assert read_json(it.root / "rounds" / "0000" / "ab_test.json")["counted"] == {"from": None, "to": None}
    assert told == [
        ("verdict", "round 0: policy 2 against 1: promote", "\n".join(state.rounds[0]["decision"]["reasons"]))
    ]


def test_a_larger_budget_goes_on_from_the_last_test(it: Night, told: Told) -> None:
    """Its conversations are the next round's data, as they would have been."""
    it.set(rounds__max_rounds=1)
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    for _ in range(2):
        assert it.step().phase == "finished"
    it.set(rounds__max_rounds=2)
    state = it.step()
    assert (state.phase, state.round, state.champion) == ("train", 1, 2)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_larger_budget_waits_for_conversations_of_a_champion_who_was_not_tested(
    it: Night, told: Told, saved_models: Path, deleted: bool
) -> None:
    """Put back by a person, or a pi_0 made anew where all versions were deleted: the test's are none of its own."""
    it.set(rounds__max_rounds=1)
    it.arrive("simulated-0001", champion_1=0.2, challenger_2=1.0)
    assert it.step().phase == "finished"
    assert "converged: no, the budget of 1 rounds is spent" in it.status
    if deleted:
        for version in (1, 2, 3):
            it.store.client.delete_model_version(POLICY, str(version))
        registry.promote(it.store, registered(it.store, saved_models, 3), {"reason": "pi_0"}, "flow", it.root)
    else:
        it.move(3)
    it.set(rounds__max_rounds=2)
    state = it.step()
    assert (state.phase, state.round) == ("collect", 1)
    simulation.traffic(it.config)
    state = it.step()
    assert (state.phase, state.round, state.champion) == ("train", 1, 4 if deleted else 3)


def test_a_larger_budget_goes_on_after_a_round_that_was_not_tested(it: Night, told: Told) -> None:
    fell = {**ROUND, "offline": {"verdict": "reject", "reasons": ["failed: "]}}
    save_state(it.root, NightState(phase="finished", champion=1, rounds=[fell]))
    it.set(rounds__max_rounds=1)
    it.arrive("served", champion_1=0.2)
    assert it.step().phase == "finished"
    it.set(rounds__max_rounds=2, simulator__conversations=SIZE + 1)
    state = it.step()
    assert (state.phase, state.round) == ("collect", 1)
    it.set(simulator__conversations=SIZE)
    assert it.step().phase == "train", "what arrived meanwhile is the next round's"


def test_a_rejection_is_recorded_and_told(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=1.0, challenger_2=0.2)
    state = it.step()
    assert (it.champion, state.phase, state.rounds[0]["decision"]["verdict"]) == (1, "train", "reject")
    assert registry.challenger(it.store) is None and told.events == ["verdict"]
    assert [r["verdict"] for r in it.events("experiment ended")] == ["reject"]


FIRST = {True: ("registry.promote", "experiments.end"), False: ("experiments.end", "registry.reject")}


@pytest.mark.parametrize("better", [True, False])
def test_killed_within_a_verdict_it_stays_the_same_verdict(
    it: Night, told: Told, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the kill more conversations arrive, which alone would say the opposite."""
    it.set(alarms__enabled=False)
    good, bad = (0.2, 1.0) if better else (1.0, 0.2)
    it.arrive("test", champion_1=good, challenger_2=bad)
    opposite = {"champion_1": bad, "challenger_2": good}
    for step in (*FIRST[better], "notify.tell", "tracking.Tracking.log", "freeze"):
        for late in (False, True):
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                kill(patched, step, late)
                it.step()
            if opposite and (it.champion == 2 or it.events("experiment ended")):
                it.arrive("other", **opposite)
                opposite.clear()
    state = it.step()
    verdict = "promote" if better else "reject"
    assert state.rounds[0]["decision"]["verdict"] == verdict and it.champion == (2 if better else 1)
    assert [r["verdict"] for r in it.events("experiment ended")] == [verdict]
    assert it.moves.count(("promote", 1, 2)) == int(better)


def kill(patched: pytest.MonkeyPatch, step: str, late: bool) -> None:
    """Die before, or after, a function that a verdict calls."""
    owner: Any = night
    *path, name = step.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if late:
            function(*args, **kwargs)
        raise KeyboardInterrupt

    patched.setattr(owner, name, dying)


def test_a_promotion_by_hand_during_the_verdict_is_not_overruled(it: Night, told: Told) -> None:
    """The evidence compares with 1; 3 has become champion since."""
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(night, "test_evidence", promoting_3(it, night.test_evidence))
        with pytest.raises(StoreError, match=r"compares it with version 1, but the champion is 3"):
            it.step()
    assert it.champion == 3
    assert it.step().phase == "collect" and it.champion == 3
    assert [r["verdict"] for r in it.events("experiment ended")] == ["void"]


def promoting_3(it: Night, function: Any) -> Any:
    def call(*args: Any) -> Any:
        found = function(*args)
        registry.promote(it.store, 3, {"reason": "now"}, "me", it.root)
        return found

    return call


# --- approval --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asking(it: Night, told: Told) -> Night:
    """A night that found policy 2 better and asks."""
    it.set(gate__promotion="approve")
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    state = it.step()
    assert (state.phase, it.champion, told.events) == ("approve", 1, ["approval"])
    return it


def answer(it: Night, reason: str = "fine") -> registry.Move:
    return approvals.approve(it.store, load_state(it.root), reason, "me", it.root)


def test_a_promotion_waits_and_says_so(asking: Night, told: Told) -> None:
    before = load_state(asking.root)
    assert "`ippo approve`" in told[0][2] and "challenger" in told[0][2]
    assert "waits for you: `ippo approve` or `ippo approve --reject" in asking.status
    assert "phase approve" in asking.status
    asking.arrive("late", champion_1=1.0, challenger_2=0.0)
    assert asking.step() == before and asking.champion == 1, "what arrives meanwhile changes nothing"
    assert told.events == ["approval"], "one is asked once"
    assert {assigned(asking.config, before, 1, str(unit)).version for unit in range(50)} == {1, 2}


def test_what_waits_is_in_the_report_and_among_the_looks(asking: Night) -> None:
    tested = load_state(asking.root).experiment
    assert tested is not None and [look["verdict"] for look in tested.looks] == ["promote"] and tested.guardrails
    shown = RunRecord.read(asking.root)
    assert shown.ab is not None and (shown.ab.verdict, len(shown.ab.looks)) == ("awaits approval", 1)
    answer(asking)
    assert len(asking.step().rounds[0]["experiment"]["looks"]) == 1


def test_the_status_of_a_round_that_a_kill_left_half_written(it: Night) -> None:
    save_state(it.root, load_state(it.root).advance(rounds=[{"round": 0}], experiment=None, phase="train"))
    assert "round 0: policy - from -, not gated yet" in it.status


def test_once_approved_it_goes_on(asking: Night, told: Told) -> None:
    assert str(answer(asking)) == "promote: policy version 2 is the champion, after version 1"
    assert answer(asking).outcome == "unchanged"
    assert "approved: promotion of version 2" in asking.status and "waits for you" not in asking.status
    shown = standing(asking.config, load_state(asking.root), datetime.now(UTC))
    assert shown["verdict"] == "promote" and "customers" not in "".join(list(lines(shown))[:4])
    with pytest.raises(StoreError, match=r"was approved before and is done"):
        approvals.decline(load_state(asking.root), "no", "me", asking.root)
    state = asking.step()
    assert (state.phase, state.round, state.approval) == ("train", 1, None)
    assert state.rounds[0]["decision"]["verdict"] == "promote"
    promotion = asking.events("intent")[-1]
    assert promotion["actor"] == "me" and promotion["evidence"]["approval"]["reason"] == "fine"
    assert told.events == ["approval", "verdict"] and asking.moves.count(("promote", 1, 2)) == 1
    with pytest.raises(StoreError, match=r"nothing waits for an approval \(phase train\)"):
        answer(asking)


def test_once_approved_another_may_be_promoted_before_the_night(asking: Night, told: Told) -> None:
    answer(asking)
    registry.promote(asking.store, 3, {"reason": "now"}, "me", asking.root)
    state = asking.step()
    assert (state.phase, state.round, state.experiment, state.approval) == ("collect", 1, None, None)
    assert state.rounds[0]["decision"]["verdict"] == "promote"


def test_once_declined_it_goes_on(asking: Night, told: Told) -> None:
    for _ in range(2):
        approvals.decline(load_state(asking.root), "the tone", "me", asking.root)
    assert len(asking.events("declined")) == 1 and "declined by me: the tone" in asking.status
    with pytest.raises(StoreError, match=r"was declined before"):
        answer(asking)
    state = asking.step()
    assert (state.phase, state.round, asking.champion) == ("train", 1, 1)
    assert state.rounds[0]["decision"]["verdict"] == "reject"
    assert state.rounds[0]["decision"]["reasons"][0] == "failed: declined by me: the tone"
    assert "won" not in state.rounds[0]["convergence"]["reason"]
    assert registry.version(asking.store, POLICY, 2).tags["verdict"] == "rejected"
    assert "declined by me" in told[-1][2]


def test_killed_while_a_person_answers_nothing_is_lost(asking: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill(patched, "registry.tag", False)
        patched.setattr("tasks.moves.tag", night.registry.tag)
        answer(asking)
    assert asking.champion == 2, "killed before its end"
    with pytest.raises(StoreError, match=r"was approved before"):
        approvals.decline(load_state(asking.root), "no", "me", asking.root)
    assert asking.step().phase == "train" and asking.champion == 2
    assert asking.moves.count(("promote", 1, 2)) == 1


def test_what_waits_for_approval_can_become_void(asking: Night) -> None:
    asking.move(3)
    assert "void" in asking.status and "waits for you" not in asking.status
    with pytest.raises(StoreError, match=r"is void: policy version 2 was tested against 1, but 3 became the champion"):
        answer(asking)
    state = asking.step()
    assert (state.phase, state.round, state.approval, asking.champion) == ("collect", 1, None, 3)


# --- tests that become void ------------------------------------------------------------------------------------------


def test_a_move_in_mlflow_ends_the_test_that_it_makes_void(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    it.move(3)
    assert "the A/B test is void: policy version 2 was tested against 1, but 3 became the champion" in it.status
    assert told.events == ["champion", "verdict"] and load_state(it.root).phase == "test"
    assert registry.challenger(it.store) is None
    assert registry.version(it.store, POLICY, 2).tags["verdict"] == "void"
    it.move(1)
    assert "void" in it.status, "an ended test does not begin again when the alias comes back"
    state = it.step()
    assert (state.phase, state.round, state.experiment, it.champion) == ("train", 1, None, 1)
    assert "3 became the champion" in state.rounds[0]["void"] and "decision" not in state.rounds[0]
    assert len(it.events("experiment ended")) == 1
    assert [kind for kind, _, _ in it.moves] == ["promote", "moved outside", "moved outside"]


def test_the_night_collects_for_the_champion_that_there_is(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    it.move(3)
    assert it.step().phase == "collect", "nobody has talked to 3 yet"
    it.arrive("more", champion_3=0.5)
    state = it.step()
    assert (state.phase, state.round, state.champion) == ("train", 1, 3)


def test_the_challenger_promoted_in_mlflow_needs_no_test(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=1.0, challenger_2=0.2)
    it.move(2)
    state = it.step()
    assert (state.phase, state.champion, it.champion) == ("train", 2, 2), "its conversations are here already"
    assert registry.version(it.store, POLICY, 2).tags["verdict"] == "promoted"


def test_a_deleted_challenger_ends_its_test(it: Night, told: Told) -> None:
    it.store.client.delete_model_version(POLICY, "2")
    state = it.step()
    assert (state.phase, state.round) == ("collect", 1) and "was deleted" in state.rounds[0]["void"]


def test_a_deleted_challenger_meets_no_customer_and_cannot_win(it: Night, told: Told) -> None:
    """Whoever asks first notices: here a customer, and then a night to which conversations say that it is better."""
    assert {answerer(it.config, it.store, str(unit), LATE).version for unit in range(30)} == {1, 2}
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    it.store.client.delete_model_version(POLICY, "2")
    assert {answerer(it.config, it.store, str(unit), LATE).version for unit in range(30)} == {1}
    assert [r["verdict"] for r in it.events("experiment ended")] == ["void"] and told.events == ["verdict"]
    assert "policy version 2, the challenger, was deleted" in it.status
    state = it.step()
    assert (state.phase, state.round, it.champion) == ("train", 1, 1) and "was deleted" in state.rounds[0]["void"]
    assert "A/B void: policy version 2, the challenger, was deleted" in it.status
    assert it.moves == [("promote", None, 1)] and told.events == ["verdict"]


def test_what_waits_for_approval_and_was_deleted_cannot_be_approved(asking: Night, told: Told) -> None:
    asking.store.client.delete_model_version(POLICY, "2")
    before = history(asking.root)
    with pytest.raises(StoreError, match="has no version 2: it was deleted"):
        answer(asking)
    assert history(asking.root) == before and asking.champion == 1
    assert "was deleted" in asking.step().rounds[0]["void"] and asking.champion == 1


def test_a_challenger_that_was_rolled_back_is_tested_no_more(it: Night, told: Told) -> None:
    """Promoted and taken back before anybody noticed: the champion is who it was when the test began."""
    registry.promote(it.store, 2, {"reason": "now"}, "me", it.root)
    registry.rollback(it.store, {"reason": "oops"}, "me", it.root)
    assert "the A/B test is void: policy version 2, the challenger, was rolled back" in it.status
    assert {answerer(it.config, it.store, str(unit), LATE).version for unit in range(30)} == {1}


def test_a_test_without_a_champion_says_so(it: Night, told: Told) -> None:
    for version in (1, 2, 3):
        it.store.client.delete_model_version(POLICY, str(version))
    assert "was tested against 1, but there is no champion any more" in it.status


def test_another_store_ends_no_test(it: Night, told: Told, tmp_path: Path) -> None:
    """As by a misspelt MLFLOW_TRACKING_URI: nothing is written down, and with the right store the test goes on."""
    before = (it.root / "audit.jsonl").read_bytes()
    other = open_tracking(it.config.model_copy(update={"tracking": elsewhere(it.config, tmp_path)}))
    with pytest.raises(StoreError, match=r"other.db: has no .*-policy, but .*audit.jsonl tells of champion 1"):
        champions.settle(it.config, other, "status")
    assert (it.root / "audit.jsonl").read_bytes() == before
    assert it.step().phase == "test"


def test_a_test_is_not_dropped_where_its_state_is_not(it: Night, told: Told, tmp_path: Path) -> None:
    """As on another machine, with the right store and its own data root. What suggests leaves nothing there."""
    serving = load_config(overrides=it.overrides | {"data.root": str(tmp_path / "serving")})
    state = State((), "how much is it?")
    said = r"data\.root .*serving: has no state\.json, but .* tests policy version 2; name the data\.root"
    with pytest.raises(StoreError, match=said):
        suggestion_for(serving, state, "champion", 0, "u", LATE)
    assert suggestion_for(serving, state, "champion", 0)["policy_version"] == 1
    assert not serving.data.root.exists() and it.moves == [("promote", None, 1)] and not told
    assert suggestion_for(it.config, state, "champion", 0, "u", LATE)["arm"]


def elsewhere(config: Config, folder: Path) -> TrackingConfig:
    return config.tracking.model_copy(update={"uri": f"sqlite:///{folder / 'other.db'}", "artifacts": folder / "other"})


def test_a_challenger_that_won_and_does_not_load_is_not_promoted(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    weights = registry.fetch(it.store, POLICY, 2) / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"torn")
    try:
        with pytest.raises(StoreError, match=r"version 2 does not load: .*; restore its files .* `ippo abtest --stop`"):
            it.step()
        assert it.champion == 1 and it.moves == [("promote", None, 1)]
    finally:
        weights.write_bytes(kept)
    assert it.step().champion == 2, "with its files back, the same verdict is carried out"


def test_a_promotion_by_hand_ends_the_test_too(it: Night, told: Told) -> None:
    registry.promote(it.store, 3, {"reason": "now"}, "me", it.root)
    assert it.step().phase == "collect" and [r["verdict"] for r in it.events("experiment ended")] == ["void"]


def test_killed_while_a_test_ends_as_void(it: Night, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    it.move(3)
    for step in ("registry.withdraw", "notify.tell", "experiments.end", "_close_round"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            kill(patched, step, late=step != "_close_round")
            it.step()
    assert it.step().phase == "collect"
    assert [r["verdict"] for r in it.events("experiment ended")] == ["void"]


def test_data_of_another_champion_are_not_trained_on(it: Night, told: Told) -> None:
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    assert it.step().champion == 2
    it.move(3)
    assert it.step().phase == "collect"
    it.move(1)
    state = it.step()
    assert (state.phase, state.round, state.champion) == ("train", 1, 1), "1 has conversations in this round"


def test_a_lost_trail_is_begun_again_and_the_test_goes_on(it: Night, told: Told) -> None:
    audit_file(it.root).unlink()
    assert it.step().phase == "test"
    assert it.moves == [("moved outside", None, 1)]


# --- alarms ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(it: Night, told: Told) -> Night:
    """Policy 2, promoted on .9 or so, serves."""
    it.arrive("test", champion_1=0.2, challenger_2=1.0)
    assert it.step().champion == 2
    rounds = [*load_state(it.root).rounds, {**ROUND, "round": 1, "champion": 2, "challenger": 3}]
    it.set(abtest__conversations=100 * SIZE)
    following = experiments.start(it.root, night.experiment(it.config, rounds[-1]), "2d.dir")
    save_state(it.root, load_state(it.root).advance(phase="test", experiment=following, rounds=rounds))
    told.clear()
    return it


def test_a_champion_that_serves_as_before_stays(serving: Night, told: Told) -> None:
    serving.arrive("served", champion_2=1.0, challenger_3=0.0)
    assert serving.step().phase == "test" and serving.champion == 2 and not told


def test_a_champion_that_serves_worse_is_rolled_back(serving: Night, told: Told) -> None:
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    state = serving.step()
    assert (serving.champion, state.phase, state.round) == (1, "collect", 2)
    (alarm,) = serving.events("alarm")
    assert alarm["version"] == 2 and "outcome" in {one["measure"] for one in alarm["alarms"]}
    back = serving.events("intent")[-1]
    assert (back["kind"], back["from"], back["to"], back["actor"]) == ("rollback", 2, 1, "alarm")
    assert back["evidence"]["alarm"] == alarm["alarm"]
    assert registry.was_rolled_back(serving.store, 2)
    assert told.events == ["alarm", "alarm", "verdict"]
    assert "outcome" in told[0][2] and "rollback: policy version 1 is the champion" in told[1][1]
    assert "2 was tested" not in state.rounds[-1]["void"] and "1 became the champion" in state.rounds[-1]["void"]
    assert serving.step().phase == "collect" and len(serving.events("alarm")) == 1


def test_a_length_that_was_kept_in_words_raises_no_alarm(serving: Night, told: Told) -> None:
    """Before, the column was `length`, and in words."""
    (kept,) = serving.root.glob("rounds/*/promoted_on.parquet")
    older = pd.read_parquet(kept).rename(columns={"characters": "length"})
    older.assign(length=older["length"] / 5).to_parquet(kept)
    serving.arrive("served", champion_2=1.0, challenger_3=0.0)
    assert serving.step().phase == "test" and serving.champion == 2 and not told


def test_alarms_can_be_off(serving: Night, told: Told) -> None:
    serving.set(alarms__enabled=False)
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    assert serving.step().phase == "test" and serving.champion == 2


def test_killed_within_an_alarm_it_rolls_back_once(serving: Night, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    for step in ("notify.tell", "watch.note", "registry.rollback"):
        for late in (False, True):
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                kill(patched, step, late)
                serving.step()
            if (step, late) == ("watch.note", True):  # from here on the alarm is told: only its rollback is left
                break
    assert serving.step().phase == "collect" and serving.champion == 1
    assert len(serving.events("alarm")) == 1 and serving.moves.count(("rollback", 2, 1)) == 1


def test_an_alarm_with_nowhere_to_go_back_is_told_once(serving: Night, told: Told) -> None:
    serving.store.client.delete_model_version(POLICY, "1")
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    for _ in range(2):
        assert serving.step().phase == "test" and serving.champion == 2
    assert len(serving.events("alarm")) == 1
    assert "no previous champion to go back to" in told[1][2]


def test_with_approval_an_alarm_asks(serving: Night, told: Told) -> None:
    serving.set(gate__promotion="approve")
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    state = serving.step()
    assert (state.phase, serving.champion, told.events) == ("approve", 2, ["alarm", "approval"])
    assert state.gathering == 2, "the test's traffic goes on arriving where it did"
    assert str(answer(serving)) == "rollback: policy version 1 is the champion, after version 2"
    assert answer(serving).outcome == "unchanged"
    state = serving.step()
    assert (state.phase, state.round, state.approval) == ("collect", 2, None)


@pytest.mark.parametrize("by_alias", [False, True])
def test_a_rollback_that_is_asked_for_may_be_done_by_hand(serving: Night, told: Told, by_alias: bool) -> None:
    serving.set(gate__promotion="approve")
    state = load_state(serving.root)
    save_state(serving.root, state.advance(phase="collect", round=2, experiment=None, rounds=state.rounds[:1]))
    serving.arrive("served", champion_2=0.1)
    assert serving.step().phase == "approve"
    if by_alias:
        serving.move(1)
    else:
        registry.rollback(serving.store, {"reason": "a bad week"}, "me", serving.root)
    state = serving.step()
    assert (state.phase, state.approval, serving.champion) == ("collect", None, 1)
    serving.arrive("again", champion_1=0.2)
    assert serving.step().phase == "train"


def test_a_declined_rollback_is_not_asked_for_again(serving: Night, told: Told) -> None:
    serving.set(gate__promotion="approve")
    serving.arrive("served", champion_2=0.1, challenger_3=1.0)
    serving.step()
    approvals.decline(load_state(serving.root), "a bad week", "me", serving.root)
    for _ in range(2):
        state = serving.step()
        assert (state.phase, state.approval, serving.champion) == ("test", None, 2)
    assert told.events == ["alarm", "approval"]
    serving.arrive("worse", champion_2=0.1, challenger_3=1.0)
    assert serving.step().phase == "approve", "twice as many conversations say it again"


def test_alarms_go_on_after_the_last_round(serving: Night, told: Told) -> None:
    serving.set(rounds__max_rounds=1)
    state = load_state(serving.root)
    finished = state.advance(phase="finished", round=0, experiment=None, rounds=state.rounds[:1])
    save_state(serving.root, finished)
    serving.arrive("served", champion_2=0.1)
    state = serving.step()
    assert (state.phase, state.round, serving.champion) == ("finished", 0, 1)
    assert not (serving.root / "rounds" / "0001" / "arrived" / "served.parquet").exists(), "that is the test's folder"


# --- experiments -----------------------------------------------------------------------------------------------------


def test_a_salt_serves_one_experiment_and_an_experiment_begins_once(it: Night) -> None:
    before = history(it.root)
    experiments.start(it.root, TESTED, "1d.dir")
    assert history(it.root) == before, "begun again before its end it is the same test"
    with pytest.raises(StoreError, match=r"'round-0000-policy-2' assigned version 2 against 1 before; a salt serves"):
        experiments.start(it.root, TESTED.model_copy(update={"challenger": 3}), "1d.dir")
    assert history(it.root) == before
    experiments.end(it.root, TESTED, {"verdict": "reject", "reasons": []}, {})
    with pytest.raises(StoreError, match=r"ended \(reject, .*\) and is not started twice"):
        experiments.start(it.root, TESTED, "1d.dir")


def test_settling_twice_tells_once(it: Night, told: Told) -> None:
    it.move(3)
    assert [str(move)[:13] for move in champions.settle(it.config, it.store, "a test")] == ["moved outside"]
    assert champions.settle(it.config, it.store, "a test") == () and told.events == ["champion", "verdict"]
