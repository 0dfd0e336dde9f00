"""A version loads however one loads it; what cannot be promoted is refused; the trail says who spoke before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from policy_store import copied, registered
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from flows import doctor
from iterative_ppo.config import load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.mdp.conversation import State
from tasks import audit, registry
from tasks.audit import append, audit_file
from tasks.model_versions import check_promotable
from tasks.registry import POLICY, Q, history, promote, recover, register, rollback
from tasks.tracking import Tracking

STATE = State((), "how much is it?")


@pytest.fixture(scope="module")
def models(saved_models: Path) -> Path:
    return saved_models


@pytest.fixture
def tracking(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return copied(models, tmp_path / "a folder é")


@pytest.fixture
def three(tracking: Tracking, models: Path) -> Tracking:
    """Three registered policies; none speaks."""
    for number in range(3):
        assert registered(tracking, models, number) == number + 1
    return tracking


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([[5, 6, 7]])).logits


def test_a_version_is_made_once_and_its_weights_are_stored_once(tracking: Tracking, models: Path) -> None:
    run = tracking.round_run(1)
    tags = {"round": 1, "verdict": "challenger", "data_md5": "a" * 32 + ".dir"}
    first = register(tracking, POLICY, models / "policy0", run, tags)
    assert register(tracking, POLICY, models / "policy0", run, {**tags, "verdict": "rejected"}) == first == 1
    assert register(tracking, POLICY, models / "policy0", run, {"round": 2}) == 2
    assert register(tracking, POLICY, models / "policy1", run, {"round": 1}) == 3
    assert register(tracking, Q, models / "q", run, {"round": 1, "policy": 1}) == 1
    one, two, _ = registry.versions(tracking, POLICY)
    assert (one.number, one.run_id, one.ready, one.aliases) == (1, run, True, ())
    assert one.tags.items() >= {"round": "1", "verdict": "rejected", "data_md5": tags["data_md5"]}.items()
    assert one.tags["content"] == two.tags["content"]
    files = [path.name for path in tracking.artifacts.rglob("*") if path.is_file()]
    assert files.count("model.safetensors") == 3
    assert not [name for name in files if Path(name).suffix not in (".json", ".safetensors", "")], files


def test_a_version_loads_in_every_way(tracking: Tracking, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    run = tracking.round_run(0)
    register(tracking, POLICY, models / "policy3", run, {"round": 0})
    register(tracking, Q, models / "q", run, {"round": 0})
    place, q_place = registry.fetch(tracking, POLICY, 1), registry.fetch(tracking, Q, "1")
    policy, q = LanguagePolicy.load(models / "policy3"), QModel.load(models / "q")
    assert LanguagePolicy.load(place).settings == policy.settings
    assert AutoTokenizer.from_pretrained(place).get_vocab() == policy.tokenizer.get_vocab()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(place)), logits(policy.model))
    assert torch.equal(logits(AutoModelForTokenClassification.from_pretrained(q_place)), logits(q.model))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    promote(tracking, 1, {}, "test", tracking.artifacts)
    prompt = policy.renderer.prompt(STATE).tokens
    text = policy.tokenizer.decode(list(prompt))
    served = mlflow.pyfunc.load_model("models:/iterative-ppo-policy@champion")
    said = served.predict(pd.DataFrame({"prompt": [text]}))
    assert said == [policy.sample([STATE], seed=0)[0].text]
    others = [served.predict(pd.DataFrame({"prompt": [text]}), params={"seed": seed})[0] for seed in range(5)]
    assert others[0] == said[0] and len(set(others)) > 1
    check_promotable(tracking, 1)  # MLflow has left a file of its own there
    value = mlflow.pyfunc.load_model("models:/iterative-ppo-q/1").predict(pd.DataFrame({"tokens": [list(prompt)]}))
    with torch.inference_mode():
        expected = torch.sigmoid(q.head(last_hidden(q.model, torch.tensor([prompt]))))[0, -1]
    np.testing.assert_allclose(value, [float(expected)], rtol=1e-6)


def test_what_does_not_load_is_not_registered(tracking: Tracking, models: Path, tmp_path: Path) -> None:
    run = tracking.round_run(0)
    broken = shutil.copytree(models / "policy0", tmp_path / "broken")
    (broken / "policy.json").unlink()
    for name, directory in (
        (POLICY, broken),
        (POLICY, tmp_path / "none"),
        (POLICY, models / "q"),
        (Q, models / "policy0"),
    ):
        with pytest.raises(StoreError, match=f"{directory.name} does not load: "):
            register(tracking, name, directory, run, {})
    assert registry.versions(tracking, POLICY) == registry.versions(tracking, Q) == []


def test_a_registration_that_was_killed_is_taken_up(
    tracking: Tracking, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("create_registered_model", "log_model_artifacts", "finalize_logged_model", "create_model_version"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"mlflow.MlflowClient.{step}", interrupted)
            registered(tracking, models, 0)
        assert registry.versions(tracking, POLICY) == []
    assert registered(tracking, models, 0) == 1
    LanguagePolicy.load(registry.fetch(tracking, POLICY, 1))
    assert len(list(tracking.artifacts.rglob("model.safetensors"))) == 1


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_versions_that_are_gone_are_told(three: Tracking) -> None:
    three.client.delete_model_version(POLICY, "2")
    with pytest.raises(StoreError, match=r"iterative-ppo-policy has no version 2: .* \(there are: 1, 3\)"):
        registry.fetch(three, POLICY, 2)
    with pytest.raises(StoreError, match=r"iterative-ppo-q has no version 1: .* \(there are: none\)"):
        registry.fetch(three, Q, 1)
    with pytest.raises(StoreError, match=r"no alias 'champion' \(there are: none\)"):
        registry.fetch(three, POLICY, "champion")
    shutil.rmtree(registry.fetch(three, POLICY, 3))
    with pytest.raises(StoreError, match=r"iterative-ppo-policy version 3: .* is gone; restore it from a backup"):
        registry.fetch(three, POLICY, 3)


def test_aliases_follow_promotions_and_a_rollback(three: Tracking, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert registry.champion(three) is registry.challenger(three) is None
    assert str(promote(three, 1, {"reason": "pi_0"}, "flow", data)) == "promote: policy version 1 is the champion"
    registry.set_challenger(three, 2)
    assert (registry.challenger(three), registry.resolve(three, "challenger")) == (2, 2)
    assert promote(three, 2, {"p": 0.01}, "flow", data).outcome == "done"
    assert registry.aliases(three, POLICY) == {"champion": 2, "previous": 1}
    again = promote(three, 2, {}, "flow", data)
    assert str(again) == "policy version 2 is the champion already; nothing changed"
    registry.set_challenger(three, 3)
    back = rollback(three, {"reason": "complaints"}, "me", data)
    assert str(back) == "rollback: policy version 1 is the champion, after version 2"
    assert registry.aliases(three, POLICY) == {"champion": 1, "challenger": 3}
    one, two, _ = registry.versions(three, POLICY)
    assert (one.tags["verdict"], two.tags["verdict"], two.aliases) == ("promoted", "rolled back", ())
    told = history(data)
    assert [record["event"] for record in told] == ["intent", "done"] * 3
    assert [(r["kind"], r["from"], r["to"]) for r in told[::2]] == [
        ("promote", None, 1), ("promote", 1, 2), ("rollback", 2, 1),
    ]  # fmt: skip
    assert told[2]["evidence"] == {"p": 0.01} and told[4]["actor"] == "me"
    assert [record["data_md5"] for record in told[::2]] == ["0d.dir", "1d.dir", "0d.dir"]
    with pytest.raises(StoreError, match=r"no previous champion to go back to"):
        rollback(three, {}, "me", data)
    for refused in (lambda: promote(three, 2, {}, "me", data), lambda: registry.set_challenger(three, 2)):
        with pytest.raises(StoreError, match=r"version 2 was rolled back; such a version is never proposed again"):
            refused()
    three.client.delete_model_version_tag(POLICY, "2", "iterative_ppo.rolled_back")
    with pytest.raises(StoreError, match=r"version 2 was rolled back"):
        promote(three, 2, {}, "me", data)
    assert history(data) == told


def test_a_rollback_after_a_rollback_goes_one_champion_further_back(
    three: Tracking, models: Path, tmp_path: Path
) -> None:
    registered(three, models, 3)
    for number in (1, 2, 1, 3, 4):
        promote(three, number, {}, "me", tmp_path)
    three.client.delete_model_version(POLICY, "3")
    passed = rollback(three, {}, "me", tmp_path)
    assert (passed.source, passed.target) == (4, 1)
    assert "version 3: it was deleted" in history(tmp_path)[-2]["passed_over"][0]
    assert registry.aliases(three, POLICY) == {"champion": 1, "previous": 2}
    assert rollback(three, {}, "me", tmp_path).target == 2, "1 spoke before 2 too, but 1 was rolled back just now"
    with pytest.raises(StoreError, match=r"no previous champion"):
        rollback(three, {}, "me", tmp_path)
    assert registry.aliases(three, POLICY) == {"champion": 2}


def test_a_rollback_of_one_version_is_done_once(three: Tracking, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        promote(three, number, {}, "me", tmp_path)
    with pytest.raises(StoreError, match=r"version 2 is not the champion any more: that is 3"):
        rollback(three, {}, "alarm", tmp_path, leaving=2)
    assert rollback(three, {}, "alarm", tmp_path, leaving=3).target == 2
    assert rollback(three, {}, "alarm", tmp_path, leaving=3).outcome == "unchanged"
    assert registry.champion(three) == 2


def test_evidence_about_something_else_is_refused(three: Tracking, tmp_path: Path) -> None:
    for number in (1, 2):
        promote(three, number, {}, "me", tmp_path)
    told = history(tmp_path)
    with pytest.raises(StoreError, match=r"compares it with version 1, but the champion is 2; test it against that"):
        promote(three, 3, {}, "flow", tmp_path, instead_of=1)
    with pytest.raises(StoreError, match=r"another data set: it names 0d.dir, .* version 3 was made from 2d.dir"):
        promote(three, 3, {}, "flow", tmp_path, instead_of=2, data_md5="0d.dir")
    assert history(tmp_path) == told and registry.champion(three) == 2
    assert promote(three, 3, {}, "flow", tmp_path, instead_of=2, data_md5="2d.dir").outcome == "done"


def test_what_cannot_be_promoted_changes_nothing(three: Tracking, models: Path, tmp_path: Path) -> None:
    run = three.round_run(0)
    with pytest.raises(StoreError, match=r"no previous champion to go back to"):
        rollback(three, {}, "me", tmp_path)
    promote(three, 1, {}, "me", tmp_path)
    before, told = registry.aliases(three, POLICY), history(tmp_path)
    three.client.create_model_version(POLICY, str(models / "policy0"), run)
    (registry.fetch(three, POLICY, 3) / "model.safetensors").write_bytes(b"torn")
    for number, said in (
        (9, "no version 9"),
        (4, "was not registered by this program"),
        (3, "version 3 does not load"),
    ):
        with pytest.raises(StoreError, match=said):
            promote(three, number, {}, "me", tmp_path)
    with pytest.raises(StoreError, match=r"no previous champion to go back to"):
        rollback(three, {}, "me", tmp_path)
    with pytest.raises(StoreError, match=r"version 1 is the champion; it cannot challenge itself"):
        registry.set_challenger(three, 1)
    for evidence in ({"p": float("nan")}, {"p": object()}):
        with pytest.raises(StoreError, match=r"audit.jsonl: cannot be added to .*; nothing was changed"):
            promote(three, 2, evidence, "me", tmp_path)
    assert registry.aliases(three, POLICY) == before and history(tmp_path) == told


def spoilt(weights: bytes) -> bytes:
    """Some numbers of the first layers are others, and still numbers."""
    at = len(weights) // 2
    return weights[:at] + bytes(byte & 0x3F for byte in weights[at : at + 4000]) + weights[at + 4000 :]


@pytest.mark.parametrize("change", ["weights", "lost", "more"])
def test_files_that_are_not_those_registered_are_found(three: Tracking, tmp_path: Path, change: str) -> None:
    """They load, and are another policy."""
    store = {"tracking.uri": three.uri, "tracking.experiment": three.experiment}
    config = load_config(None, store | {"tracking.artifacts": str(three.artifacts), "data.root": str(tmp_path)})
    for number in (1, 2):
        promote(three, number, {}, "me", tmp_path)
    assert doctor._champion(config) == "policy version 2 loads"
    place = registry.fetch(three, POLICY, 2)
    if change == "weights":
        (place / "model.safetensors").write_bytes(spoilt((place / "model.safetensors").read_bytes()))
    elif change == "lost":
        (place / "generation_config.json").unlink()
    else:
        (place / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eos|>", encoding="utf-8")
    said = r"version 2: its files in .* are not those that were registered"
    with pytest.raises(StoreError, match=rf"{said}.*; restore its files"):
        check_promotable(three, 2)
    with pytest.raises(StoreError, match=rf"{said}.*; restore them, or .* `ippo rollback --reason"):
        doctor._champion(config)
    assert rollback(three, {}, "me", tmp_path).target == 1


def test_a_rejected_challenger_is_no_challenger(three: Tracking, models: Path) -> None:
    registry.set_challenger(three, 2)
    registry.reject(three, 3, "too long")
    assert registry.challenger(three) == 2
    registry.reject(three, 2, "KL 7 > 5")
    assert registry.challenger(three) is None
    assert registry.version(three, POLICY, 2).tags.items() >= {"verdict": "rejected", "reasons": "KL 7 > 5"}.items()


def test_the_intent_counts_not_the_aliases(three: Tracking, tmp_path: Path) -> None:
    for number in (1, 2):
        promote(three, number, {}, "me", tmp_path)
    moved = {"kind": "rollback", "from": 2, "to": 1, "previous": None, "challenger": None, "evidence": {}}
    append(tmp_path, {"event": "intent", "id": "x", **moved, "actor": "me"})
    three.client.delete_registered_model_alias(POLICY, "previous")  # killed after its first step
    registry.set_challenger(three, 3)
    done = promote(three, 3, {}, "me", tmp_path)
    assert (done.source, done.target) == (1, 3)
    assert registry.aliases(three, POLICY) == {"champion": 3, "previous": 1}
    assert registry.version(three, POLICY, 2).tags["verdict"] == "rolled back"
    assert [r["event"] for r in history(tmp_path)][-4:] == ["intent", "done", "intent", "done"]


def test_a_move_to_a_version_that_was_deleted_since_is_undone(three: Tracking, tmp_path: Path) -> None:
    promote(three, 1, {}, "me", tmp_path)
    moved = {"kind": "promote", "from": 1, "to": 2, "previous": 1, "challenger": 2, "evidence": {}, "actor": "me"}
    append(tmp_path, {"event": "intent", "id": "x", **moved})
    for alias, number in (("previous", "1"), ("champion", "2")):
        three.client.set_registered_model_alias(POLICY, alias, number)
    three.client.delete_model_version(POLICY, "2")
    (done,) = recover(three, tmp_path)
    assert "for policy version 2 was deleted; champion: 1" in str(done)
    assert registry.aliases(three, POLICY) == {"champion": 1} and recover(three, tmp_path) == ()
    with pytest.raises(StoreError, match="no previous champion"):
        rollback(three, {}, "me", tmp_path)
    assert promote(three, 3, {}, "me", tmp_path).source == 1


def test_a_torn_last_line_is_told_and_kept(three: Tracking, tmp_path: Path) -> None:
    promote(three, 1, {}, "me", tmp_path)
    whole = history(tmp_path)
    with audit_file(tmp_path).open("ab") as file:
        file.write('{"event": "intent", "id": "é'.encode()[:-1])
    torn = history(tmp_path)
    assert torn[:-1] == whole and torn[-1]["event"] == "torn" and torn[-1]["text"].startswith('{"event": "intent"')
    assert recover(three, tmp_path) == ()
    promote(three, 2, {}, "me", tmp_path)
    assert [record["event"] for record in history(tmp_path)] == ["intent", "done", "torn", "intent", "done"]
    assert [json.loads(line) for line in audit_file(tmp_path).read_text(encoding="utf-8").splitlines()][:2] == whole
    lines = audit_file(tmp_path).read_bytes().splitlines()
    audit_file(tmp_path).write_bytes(b"\n".join([lines[0], b"{damaged", *lines[1:]]) + b"\n")
    with pytest.raises(StoreError, match=r"audit.jsonl: line 2 is damaged; restore the file from a backup"):
        promote(three, 3, {}, "me", tmp_path)
    assert registry.champion(three) == 2


def test_a_disk_that_fills_up_leaves_the_trail_as_it_was(
    three: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(three, 1, {}, "me", tmp_path)
    with audit_file(tmp_path).open("ab") as file:
        file.write(b'{"event": "torn by a kill')
    before, real = audit_file(tmp_path).read_bytes(), os.write

    def half(handle: int, content: bytes) -> int:
        real(handle, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreError, match=r"No space left.*; nothing was changed"):
        patched.setattr(os, "write", half)
        promote(three, 2, {}, "me", tmp_path)
    assert audit_file(tmp_path).read_bytes() == before and registry.champion(three) == 1
    promote(three, 2, {}, "me", tmp_path)
    assert registry.champion(three) == 2


def test_a_folder_that_cannot_be_written_to_is_named(three: Tracking, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(StoreError, match=r"data: cannot be written to .*; nothing was changed"):
        promote(three, 1, {}, "me", tmp_path / "data")
    assert registry.champion(three) is None


def test_a_move_that_waits_too_long_is_told(three: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / "registry.lock"), pytest.raises(StoreError, match=r"has run for 0.1 seconds"):
        promote(three, 1, {}, "me", tmp_path)
    assert registry.champion(three) is None and history(tmp_path) == []
