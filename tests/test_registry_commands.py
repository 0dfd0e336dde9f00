"""`ippo promote`, `rollback`, `approve`, `history` and `lineage` as a person and a program meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from policy_store import opened
from typer.testing import CliRunner

from flows.command_line import app
from iterative_ppo.config import load_config
from iterative_ppo.errors import IterativePPOError
from tasks import experiments, lineage, registry
from tasks.audit import history
from tasks.registry import POLICY, Q
from tasks.state import Approval, Experiment, NightState, save_state

MD5 = ["a0a0a0a0a0.dir", "b1b1b1b1b1.dir"]
TEST = {"champion": {"successes": 20, "conversations": 100}, "challenger": {"successes": 60, "conversations": 100}}


class Pipeline:
    """Policy 1 is pi_0; 2 was promoted over it by an A/B test; 3, made from 2, is being tested."""

    def __init__(self, models: Path, place: Path) -> None:
        place.mkdir()
        shutil.copy(models / "mlflow.db", place / "mlflow.db")
        self.root, self.store = place / "data", opened(place)
        self.sets = [
            f"data.root={self.root}",
            f"tracking.uri=sqlite:///{place}/mlflow.db",
            f"tracking.artifacts={place}/artifacts",
            f"tracking.experiment={place.name}",
        ]
        self.version(POLICY, models / "policy0", 0, source="scripted")
        self.promote(1, {"reason": "pi_0 is the first champion"}, "flow")
        for number in (0, 1):
            self.version(Q, models / "q", number, data_md5=MD5[number], policy=number + 1)
            made = {"data_md5": MD5[number], "parent": number + 1, "q_version": number + 1}
            self.version(POLICY, models / f"policy{number + 1}", number, **made)
            self.tested(number)
        self.promote(2, {"decision": {"reasons": ["60 % against 20 %"]}}, "flow")
        registry.set_challenger(self.store, 3)
        rows = [{"round": n, "champion": n + 1, "challenger": n + 2, "q": n + 1, "data_md5": MD5[n]} for n in (0, 1)]
        offline = {"offline": {"verdict": "test", "reasons": []}}
        state = NightState(phase="test", round=1, champion=2, experiment=experiment(1))
        save_state(self.root, state.advance(rounds=[row | offline for row in rows]))
        arrived = self.root / "rounds" / "0000" / "arrived"
        arrived.mkdir(parents=True)
        (arrived / "monday.parquet").write_bytes(b"1")
        (arrived.parent / "validated").mkdir()
        lineage.write_sources(load_config(overrides=self.sets), arrived, arrived.parent / "validated")

    def version(self, name: str, directory: Path, number: int, **tags: Any) -> None:
        run = self.store.round_run(number)
        made = registry.register(self.store, name, directory, run, {"round": number, **tags})
        lineage.describe(self.store, name, registry.version(self.store, name, made))

    def tested(self, number: int) -> None:
        experiments.start(self.root, experiment(number), MD5[number])
        if number == 0:
            verdict = {"verdict": "promote", "reasons": ["60 % against 20 %"]}
            experiments.end(self.root, experiment(number), verdict, {"test": TEST})

    def promote(self, number: int, evidence: dict[str, Any], actor: str) -> None:
        registry.promote(self.store, number, evidence, actor, self.root)

    def ippo(self, *arguments: str) -> str:
        sets = [word for text in self.sets for word in ("--set", text)]
        done = CliRunner().invoke(app, [*arguments, *sets], env={"COLUMNS": "200"})
        if isinstance(done.exception, IterativePPOError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    def move(self, number: int) -> None:
        self.store.client.set_registered_model_alias(POLICY, "champion", str(number))


def experiment(number: int) -> Experiment:
    return Experiment(salt=f"round-{number:04d}", champion=number + 1, challenger=number + 2)


@pytest.fixture
def it(saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("getpass.getuser", lambda: "someone")
    return Pipeline(saved_models, tmp_path / "place")


def test_history_tells_every_move_and_test(it: Pipeline) -> None:
    it.move(1)
    lines = [line.split("  ") for line in it.ippo("history").splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [row[1:4] for row in rows[1:]] == [
        ["promote", "- > 1", "flow"],
        ["A/B test", "2 vs 1", "flow"],
        ["A/B test: promote", "2 vs 1", "flow"],
        ["A/B test", "3 vs 2", "flow"],
        ["promote", "1 > 2", "flow"],
        ["moved outside", "2 > 1", "somebody; noticed by ippo history"],
        ["A/B test: void", "3 vs 2", "flow"],
    ]
    assert rows[1][-1] == "pi_0 is the first champion"
    assert rows[5][-2:] == ["a0a0a0a0", "60 % against 20 %"]
    assert "1 became the champion" in rows[7][-1]
    assert json.loads(it.ippo("history", "--json")) == history(it.root)


def test_lineage_walks_back_to_pi_0_and_forward_to_the_evidence(it: Pipeline) -> None:
    found = json.loads(it.ippo("lineage", "3", "--json"))
    line = [found, found["from"], found["from"]["from"]]
    assert [(one["policy"], one["round"]) for one in line] == [(3, 1), (2, 0), (1, 0)] and "from" not in line[-1]
    assert [(one["q"] or {}).get("version") for one in line] == [2, 1, None]
    assert [(one["q"] or {}).get("of_policy") for one in line] == [2, 1, None]
    assert [(one["data"] or {}).get("md5") for one in line] == [MD5[1], MD5[0], None]
    assert [one["file"] for one in line[1]["data"]["files"]] == ["monday.parquet"]
    assert line[1]["data"]["source"] == "renovation" and line[2]["corpus"] == "scripted"
    assert [one["aliases"] for one in line] == [["challenger"], ["champion"], ["previous"]]
    tests = [one for one in line[1]["evidence"] if one["what"] == "A/B test"]
    assert [(one["verdict"], one["test"]) for one in tests] == [("promote", TEST)]
    assert [(one["from"], one["to"]) for one in line[1]["evidence"] if one["what"] == "promote"] == [(1, 2)]
    assert json.loads(it.ippo("lineage", "--json"))["policy"] == 2, "the champion, where none is named"


def test_lineage_as_a_tree(it: Pipeline) -> None:
    said = it.ippo("lineage", "challenger")
    for words in (
        "policy 3, challenger, round 1",
        "Q 2, the value of policy 2; run ",
        f"data of round 0, md5 {MD5[0]}, renovation",
        "monday.parquet (",
        "A/B test round-0000, 2 vs 1: promote; 60 % against 20 %",
        "promote 1 > 2 by flow",
        "from policy 1, previous, round 0, promoted, pi_0, fine-tuned on scripted",
    ):
        assert words in said


def test_a_deleted_version_stays_in_the_line(it: Pipeline) -> None:
    registry.promote(it.store, 3, {"reason": "now"}, "me", it.root)
    it.store.client.delete_model_version(POLICY, "2")
    it.store.client.delete_model_version(Q, "1")
    found = json.loads(it.ippo("lineage", "--json"))
    middle = found["from"]
    assert (middle["policy"], middle["deleted"], middle["q"]["version"], middle["q"]["deleted"]) == (2, True, 1, True)
    assert middle["data"]["md5"] == MD5[0] and middle["from"]["policy"] == 1
    assert "from policy 2 (deleted), round 0" in it.ippo("lineage")
    with pytest.raises(IterativePPOError, match=r"has no version 9 \(there are: 1, 2, 3\)"):
        it.ippo("lineage", "9")


def test_mlflow_links_a_version_to_what_it_came_from(it: Pipeline) -> None:
    said = it.store.client.get_model_version(POLICY, "3").description
    run = registry.version(it.store, POLICY, 3).run_id
    assert "made from [iterative-ppo-policy 2](#/models/iterative-ppo-policy/versions/2)" in said
    assert "improved against [iterative-ppo-q 2](#/models/iterative-ppo-q/versions/2)" in said
    assert f"data set `{MD5[1]}` of round 1" in said and f"/runs/{run})" in said
    assert "values [iterative-ppo-policy 1]" in it.store.client.get_model_version(Q, "1").description


def test_promote_and_rollback_by_hand_say_who_and_why_and_end_the_test(it: Pipeline) -> None:
    assert it.ippo("promote", "3", "--reason", "it is better") == (
        "promote: policy version 3 is the champion, after version 2\n"
    )
    move, _, ended = history(it.root)[-3:]
    assert (move["actor"], move["evidence"]) == ("someone, command line", {"reason": "it is better"})
    assert (ended["event"], ended["verdict"]) == ("experiment ended", "void")
    assert it.ippo("rollback", "--reason", "no", "--from", "3").startswith("rollback: policy version 2 is the champion")
    assert "nothing changed" in it.ippo("rollback", "--reason", "no", "--from", "3")
    with pytest.raises(IterativePPOError, match="version 1 is not the champion any more: that is 2"):
        it.ippo("rollback", "--reason", "no", "--from", "1")
    assert it.ippo("rollback", "--reason", "no").startswith("rollback: policy version 1 is the champion")


def test_every_command_notices_what_was_moved_outside(it: Pipeline) -> None:
    for number, words in ((1, ["status"]), (3, ["lineage"]), (2, ["promote", "2", "--reason", "r"])):
        it.move(number)
        it.ippo(*words)
        assert history(it.root)[-1]["event"] in ("done", "experiment ended")
        noticed = [r for r in history(it.root) if r["event"] == "moved outside"][-1]
        assert (noticed["to"], noticed["noticed_by"]) == (number, f"ippo {words[0]}")
    it.move(1)
    assert "version 2 is the champion, after version 1" in it.ippo("rollback", "--reason", "r")


def test_approve_carries_out_what_waits(it: Pipeline) -> None:
    with pytest.raises(IterativePPOError, match=r"nothing waits for an approval \(phase test\)"):
        it.ippo("approve")
    asked(it)
    assert "waits for you: `ippo approve`" in it.ippo("status")
    assert it.ippo("approve", "--reason", "go") == "promote: policy version 3 is the champion, after version 2\n"
    with pytest.raises(IterativePPOError, match="was approved before"):
        it.ippo("approve", "--reject", "no")


def test_approve_reject_declines(it: Pipeline) -> None:
    asked(it)
    assert it.ippo("approve", "--reject", "the tone") == "declined: p; the next night goes on from there\n"
    with pytest.raises(IterativePPOError, match="p was declined before"):
        it.ippo("approve")
    assert registry.champion(it.store) == 2
    assert "promote declined" in it.ippo("history") and "the tone" in it.ippo("history")


def test_a_test_that_was_stopped_cannot_be_approved(it: Pipeline) -> None:
    asked(it)
    it.ippo("abtest", "--stop", "the wrong greeting")
    with pytest.raises(IterativePPOError, match="is void: stopped by someone, command line: the wrong greeting; the"):
        it.ippo("approve", "--reason", "go")
    assert registry.champion(it.store) == 2 and "waits for you" not in it.ippo("status")


def asked(it: Pipeline) -> None:
    evidence = {"experiment": experiment(1).model_dump(), "data_md5": MD5[1]}
    request = Approval(id="p", kind="promote", version=3, reasons=("better",), evidence=evidence, resume="test")
    rows = NightState(phase="approve", round=1, champion=2, experiment=experiment(1), approval=request)
    save_state(it.root, rows)


def test_a_store_that_is_empty_has_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["history", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == []
    assert isinstance(CliRunner().invoke(app, ["lineage"]).exception, IterativePPOError)
