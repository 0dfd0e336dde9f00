"""Killed between any two writes, the champion loads and the trail is true; what people move in MLflow is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from policy_store import copied, registered

from iterative_ppo.errors import StoreError
from iterative_ppo.learning.language_model import LanguagePolicy
from tasks import registry
from tasks.audit import append, audit_file, history, open_intent, standing
from tasks.registry import POLICY, aliases, promote, recover, rollback
from tasks.tracking import Tracking

BROKEN, FOREIGN = 5, 6


@dataclass(frozen=True)
class Place:
    """A store of six policy versions, of which the fifth does not load and the sixth is nobody's, and a data root."""

    tracking: Tracking
    data: Path

    def copy(self, to: Path) -> Place:
        """The same at another place, whatever was there; model files are shared."""
        shutil.rmtree(to / "data", ignore_errors=True)
        (to / "data").mkdir(parents=True)
        shutil.copy(self.tracking.uri.removeprefix("sqlite:///"), to / "mlflow.db")
        if audit_file(self.data).exists():
            shutil.copy(audit_file(self.data), audit_file(to / "data"))
        return Place(replace(self.tracking, uri=f"sqlite:///{to}/mlflow.db"), to / "data")

    def move(self, number: int | None, alias: str = "champion") -> None:
        """What a person does in MLflow's UI."""
        if number is None:
            self.tracking.client.delete_registered_model_alias(POLICY, alias)
        else:
            self.tracking.client.set_registered_model_alias(POLICY, alias, str(number))

    def delete(self, number: int) -> None:
        self.tracking.client.delete_model_version(POLICY, str(number))

    @property
    def aliases(self) -> dict[str, int]:
        return aliases(self.tracking, POLICY)

    @property
    def told(self) -> int | None:
        return standing(history(self.data)).champion

    def recover(self) -> str:
        return "; ".join(map(str, recover(self.tracking, self.data, "a test")))

    def champion_loads(self) -> None:
        LanguagePolicy.load(registry.fetch(self.tracking, POLICY, "champion"))


@pytest.fixture(scope="module")
def built(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Champion 2, promoted after 1, with challenger 3; 4 is in waiting.

    No connection stays open, so that a store's file may be replaced and a process that knows it may fork.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        root = tmp_path_factory.mktemp("moves")
        tracking = copied(saved_models, root / "store")
        for number in range(5):
            registered(tracking, saved_models, number)
        (registry.fetch(tracking, POLICY, BROKEN) / "model.safetensors").write_bytes(b"torn")
        tracking.client.create_model_version(POLICY, str(saved_models / "policy0"))
        for number in (1, 2):
            promote(tracking, number, {}, "me", root / "data")
        registry.set_challenger(tracking, 3)
        yield Place(tracking, root / "data")


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all kills: a store that was opened once is opened quickly."""
    return tmp_path_factory.mktemp("arena")


@pytest.fixture
def place(built: Place, tmp_path: Path) -> Place:
    return built.copy(tmp_path / "place")


# --- what people move ------------------------------------------------------------------------------------------------


def test_a_promotion_in_mlflow_is_a_promotion(place: Place) -> None:
    place.move(4)
    assert place.recover() == (
        "moved outside: policy version 4 is the champion, after version 2; somebody moved its alias"
    )
    assert place.aliases == {"champion": 4, "previous": 2, "challenger": 3}
    told = history(place.data)[-2:]
    assert told[0].items() >= {"event": "moved outside", "from": 2, "to": 4, "noticed_by": "a test"}.items()
    assert told[1]["event"] == "done" and told[0]["at"]
    assert registry.version(place.tracking, POLICY, 4).tags["verdict"] == "promoted"
    assert place.recover() == ""
    assert rollback(place.tracking, {}, "me", place.data).target == 2


def test_the_challenger_that_was_promoted_in_mlflow_challenges_no_more(place: Place) -> None:
    place.move(3)
    place.recover()
    assert place.aliases == {"champion": 3, "previous": 2}


def test_going_back_in_mlflow_keeps_the_order_of_champions(place: Place) -> None:
    place.move(1)
    place.recover()
    assert place.aliases == {"champion": 1, "previous": 2, "challenger": 3}
    assert rollback(place.tracking, {}, "me", place.data).target == 2


def rolled_back(place: Place) -> int:
    promote(place.tracking, 4, {}, "me", place.data)
    rollback(place.tracking, {}, "me", place.data)
    return 4


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (lambda place: BROKEN, "version 5 does not load"),
        (lambda place: FOREIGN, "version 6 was not registered by this program"),
        (rolled_back, "version 4 was rolled back; such a version is never proposed again"),
        (lambda place: None, "the alias champion of iterative-ppo-policy was deleted"),
    ],
)
def test_what_could_not_be_promoted_here_is_put_back(
    place: Place, version: Callable[[Place], int | None], reason: str
) -> None:
    asked = version(place)
    before = place.aliases
    place.move(asked)
    said = place.recover()
    assert said.startswith("refused outside: ") and reason in said and said.endswith("version 2 is the champion")
    assert place.aliases == before
    refused = history(place.data)[-2]
    assert refused.items() >= {"event": "refused outside", "from": 2, "asked": asked, "to": 2}.items()
    assert reason in refused["reason"] and place.recover() == ""
    assert rollback(place.tracking, {}, "me", place.data).target == 1


def test_where_the_champion_was_deleted_the_last_good_one_speaks(place: Place) -> None:
    promote(place.tracking, 3, {}, "me", place.data)
    place.delete(2)
    place.delete(3)
    assert place.aliases == {}
    said = place.recover()
    assert "has no version 3: it was deleted" in said and said.endswith("policy version 1 is the champion")
    assert place.aliases == {"champion": 1}
    assert history(place.data)[-2]["to"] == 1
    with pytest.raises(StoreError, match="no previous champion"):
        rollback(place.tracking, {}, "me", place.data)


def test_where_no_champion_is_left_that_is_told_once(place: Place) -> None:
    for number in (1, 2):
        place.delete(number)
    assert place.recover().endswith("there is no champion")
    assert place.recover() == "" and place.aliases == {"challenger": 3} and place.told is None
    promote(place.tracking, 4, {}, "me", place.data)
    assert place.aliases == {"champion": 4}


def test_trouble_with_the_store_is_no_reason_to_forget_the_champions(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: str, __: Path, called: str) -> None:
        if not called.endswith("version 4"):
            raise StoreError("the disk is away")

    place.move(None)
    monkeypatch.setattr("tasks.model_versions.check_loads", unreadable)
    told = history(place.data)
    with pytest.raises(StoreError, match=r"no earlier champion loads \(the disk is away; .*; restore the store"):
        place.recover()
    assert history(place.data) == told
    promote(place.tracking, 4, {}, "me", place.data)
    assert place.aliases == {"champion": 4, "previous": 2}, "a promotion is the way out"


def test_a_trail_that_is_new_or_lost_begins_with_what_mlflow_says(place: Place) -> None:
    audit_file(place.data).unlink()
    place.recover()
    assert place.aliases == {"champion": 2, "previous": 1, "challenger": 3}
    first = history(place.data)[0]
    assert (first["event"], first["from"], first["to"]) == ("moved outside", 1, 2)
    assert rollback(place.tracking, {}, "me", place.data).target == 1


def test_promote_and_rollback_notice_too(place: Place) -> None:
    place.move(4)
    moved = promote(place.tracking, 3, {}, "me", place.data)
    assert moved.source == 4
    place.move(1)
    assert rollback(place.tracking, {}, "me", place.data).target == 3
    assert [r["event"] for r in history(place.data)[4:]] == ["moved outside", "done", "intent", "done"] * 2


def test_a_move_in_mlflow_after_a_kill_is_not_undone(place: Place) -> None:
    opened = {"event": "intent", "id": "x", "kind": "promote", "from": 2, "to": 3, "previous": 2, "challenger": 3}
    append(place.data, {**opened, "evidence": {}, "actor": "me"})
    place.move(4)
    assert place.recover().count(";") == 2
    assert place.aliases == {"champion": 4, "previous": 3}
    assert standing(history(place.data)).line == (1, 2, 3, 4)


# --- kills -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A move that is killed: what leads to it, what it is, where it ends, and where a rollback then goes."""

    lead_to: Callable[[Place], object]
    what: str
    version: int
    aliases: dict[str, int]
    then: int | None
    points: int
    """Moments among its writes: before each, and in the middle of each line of the trail."""
    loads_throughout: bool = True
    """False where the person who moved the alias left no champion that loads, so that it does only afterwards."""

    def run(self, place: Place) -> None:
        if self.what == "promote":
            promote(place.tracking, self.version, {"p": 0.01}, "a test", place.data)
        elif self.what == "rollback":
            rollback(place.tracking, {"p": 0.01}, "a test", place.data)
        else:
            place.recover()


SCENARIOS = {
    "promote": Scenario(lambda place: None, "promote", 3, {"champion": 3, "previous": 2}, 2, 8),
    "rollback": Scenario(
        lambda place: promote(place.tracking, 3, {}, "me", place.data),
        "rollback",
        0,
        {"champion": 2, "previous": 1},
        1,
        8,
    ),
    "moved outside": Scenario(lambda place: place.move(3), "recover", 0, {"champion": 3, "previous": 2}, 2, 7),
    "refused outside": Scenario(
        lambda place: place.move(BROKEN),
        "recover",
        0,
        {"champion": 2, "previous": 1, "challenger": 3},
        1,
        5,
        loads_throughout=False,
    ),
    "deleted outside": Scenario(
        lambda place: place.delete(2),
        "recover",
        0,
        {"champion": 1, "challenger": 3},
        None,
        6,
        loads_throughout=False,
    ),
}


Jobs = list[tuple[Place, str, int, int]]
Killer = Callable[[Jobs], list[tuple[int, str]]]


@pytest.fixture(scope="module")
def killer(built: Place, arena: Path) -> Iterator[Killer]:
    """Processes that move and are killed; see killed_moves.py."""
    script = Path(__file__).with_name("killed_moves.py")
    environment = {**os.environ, "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=environment, **pipes) as process:
        assert process.stdin and process.stdout

        def begin(jobs: Jobs) -> None:
            lines = []
            for place, what, version, point in jobs:
                t = place.tracking
                store = [t.uri, t.experiment, t.experiment_id, str(t.artifacts)]
                lines.append([store, str(place.data), what, version, point])
            process.stdin.write(json.dumps(lines) + "\n")
            process.stdin.flush()

        def run(jobs: Jobs) -> list[tuple[int, str]]:
            begin(jobs)
            return [(status, said) for status, said in json.loads(process.stdout.readline())]

        begin([(built.copy(arena), "promote", 3, 0)])
        assert process.stdout.readline() == "ready\n"
        yield run
        process.stdin.close()


def killed_everywhere(scenario: Scenario, built: Place, folder: Path, arena: Path, killer: Killer) -> int:
    """Kill the move at each point, look, begin it again, look again. Returns how many points there were."""
    start = built.copy(folder)
    scenario.lead_to(start)
    moves_before = len([r for r in history(start.data) if r["event"] == "done"])
    for point in range(1, 20):
        place = start.copy(arena)
        ((status, said),) = killer([(place, scenario.what, scenario.version, point)])
        if status == 0:
            return point - 1
        assert status == -9, said
        if scenario.loads_throughout:
            place.champion_loads()
        opened = open_intent(place.data)
        if scenario.what != "recover":
            assert place.aliases["champion"] in {place.told, opened["to"] if opened else place.told}
        scenario.run(place)
        place.champion_loads()
        assert place.aliases == scenario.aliases
        assert place.told == scenario.aliases["champion"] and open_intent(place.data) is None
        told = [r["event"] for r in history(place.data)]
        assert told.count("done") == moves_before + 1, "carried out once, however often it was begun"
        assert place.recover() == ""
        if scenario.then is None:
            with pytest.raises(StoreError, match="no previous champion"):
                rollback(place.tracking, {}, "me", place.data)
        else:
            assert rollback(place.tracking, {}, "me", place.data).target == scenario.then
    raise AssertionError("the move never ended")


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_between_any_two_writes(name: str, built: Place, tmp_path: Path, arena: Path, killer: Killer) -> None:
    scenario = SCENARIOS[name]
    assert killed_everywhere(scenario, built, tmp_path, arena, killer) == scenario.points


@pytest.mark.slow
@pytest.mark.parametrize("again", range(20))
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_between_any_two_writes_twenty_times(
    name: str, again: int, built: Place, tmp_path: Path, arena: Path, killer: Killer
) -> None:
    assert killed_everywhere(SCENARIOS[name], built, tmp_path, arena, killer) == SCENARIOS[name].points


@pytest.mark.parametrize("again", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 20))])
def test_two_promotions_at_once_come_one_after_the_other(again: int, place: Place, killer: Killer) -> None:
    answers = killer([(place, "promote", number, 0) for number in (3, 4, 3, 4)])
    assert [status for status, _ in answers] == [0] * 4, answers
    told = history(place.data)[4:]
    assert [r["event"] for r in told] == ["intent", "done"] * (len(told) // 2), "none began within another"
    moves = [(r["from"], r["to"]) for r in told[::2]]
    assert all(before[1] == after[0] for before, after in zip([(0, 2), *moves], moves, strict=False))
    assert place.aliases == {"champion": moves[-1][1], "previous": moves[-1][0]}
    place.champion_loads()
