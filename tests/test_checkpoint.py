"""An unfinished improvement: gone on from, begun anew on new data, and never dropped for a changed setting."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import killed_improvement
import numpy as np
import pytest
import torch
from bandit import WORDS, build_bandit

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import ModelError, NothingToLearn, SameReward, StoreError, TrainingError
from iterative_ppo.files import content_hash, read_json, write_json
from iterative_ppo.learning import adapters, rounds
from iterative_ppo.learning.checkpoint import Checkpoint, take_up
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from iterative_ppo.mdp.turn_table import to_frame
from tasks import learning, suitability
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, Prompts, fit_q_stage, improve_stage, initial_policy_stage, prompts_stage

torch.set_num_threads(1)

SETTINGS = {"seed": 0, "improve": {"ppo": {"episodes": 64, "kl_budget": None}}}
GIVEN = {"policy": "p", "md5": "m"}

# --- what is taken up ------------------------------------------------------------------------------------------------


def begun(place: Path) -> Checkpoint:
    checkpoint = take_up(place, "key", SETTINGS, GIVEN)
    checkpoint.part("ppo").save({"a": torch.ones(2)}, {})
    return checkpoint


def test_the_same_improvement_goes_on(tmp_path: Path) -> None:
    begun(tmp_path / "improving")
    assert take_up(tmp_path / "improving", "key", SETTINGS, GIVEN).part("ppo").load() is not None


def test_another_configuration_is_an_error_that_names_folder_and_settings(tmp_path: Path) -> None:
    checkpoint = begun(tmp_path / "improving")
    other = {"seed": 1, "improve": {"ppo": {"episodes": 128, "kl_budget": None}, "new": 3}}
    said_so = (
        rf"{tmp_path / 'improving'}: .*\(improve\.new was None, is 3, improve\.ppo\.episodes was 64, is 128, "
        r"seed was 0, is 1\), or by .*; restore that to go on, or remove the folder to begin anew"
    )
    with pytest.raises(StoreError, match=said_so):
        take_up(tmp_path / "improving", "other", other, GIVEN)
    assert checkpoint.part("ppo").load() is not None, "what was done is still there"
    assert take_up(tmp_path / "improving", "key", SETTINGS, GIVEN).part("ppo").load() is not None


@pytest.mark.parametrize("given", [{**GIVEN, "md5": "new"}, {**GIVEN, "policy": "new"}, GIVEN])
def test_other_data_champion_or_q_begin_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, str]
) -> None:
    """The last: same champion, data and settings, but another key, as where Q was fitted anew."""
    begun(tmp_path / "improving")
    settings = SETTINGS if given == GIVEN else {**SETTINGS, "seed": 1}
    with caplog.at_level(logging.WARNING):
        checkpoint = take_up(tmp_path / "improving", "other", settings, given)
    assert "it begins anew" in caplog.text
    assert checkpoint.key == "other" and checkpoint.part("ppo").load() is None


def test_where_nothing_was_kept_another_configuration_is_none_of_its_business(tmp_path: Path) -> None:
    take_up(tmp_path / "improving", "key", SETTINGS, GIVEN)
    assert take_up(tmp_path / "improving", "other", {**SETTINGS, "seed": 1}, GIVEN).part("ppo").load() is None


# --- the stage -------------------------------------------------------------------------------------------------------

QUICK = {"improve.best_of_n.epochs": 1.0, "improve.best_of_n.samples": 2, "improve.ppo.episodes": 64}
QUICK |= {"improve.ppo.rollout": 16, "improve.ppo.minibatch_size": 16, "improve.ppo.epochs": 1}
QUICK |= {"improve.q_iterations": 1, "q.epochs": 1.0, "q.samples": 1}
QUICK |= {"q.effective_size_floor": 1.0}


class Night:
    """Everything that improve_stage is given, in a folder of its own."""

    def __init__(self, root: Path, bandit: LanguagePolicy) -> None:
        self.root, self.champion = root, PolicyVersion(1, root / "champion")
        bandit.save(self.champion.path)
        QModel.from_policy(bandit, QSettings("bce", 0.0, 1.0, 0.95), seed=0).save(root / "q")
        self.dataset = self.data("first", 30)

    @property
    def unfinished(self) -> Path:
        return self.root / "improving"

    @property
    def fitting(self) -> Path:
        return self.root / "fitting"

    def data(self, md5: str, talks: int, number: int = 0, logprob: float | None = -3.0) -> Dataset:
        rows = [
            Conversation(
                f"c{k}",
                (
                    Turn("Hi", (0.0,), Suggestion(WORDS[k % 4], "suggested", logprob), WORDS[k % 4], "verbatim"),
                    Turn(None, (float(k % 4 == 2),)),
                ),
                f"u{k}",
                policy_version="1",
            )
            for k in range(talks)
        ]
        frame = to_frame(rows, {"purchase": 1.0}, 0.2)
        turn_table.write(frame, self.root / md5 / "turns.parquet", {"purchase": 1.0})
        return Dataset(number, self.root / md5, md5)

    def improve(self, **changes: Any) -> Any:
        config: Config = load_config(overrides={**QUICK, "data.root": str(self.root), **changes})
        made = prompts_stage(config, self.champion, self.dataset, self.root)
        return improve_stage(config, self.champion, Prompts(made.path, self.dataset), self.root / "q", self.root)

    def fit_q(self, **changes: Any) -> Any:
        config: Config = load_config(overrides={**QUICK, "data.root": str(self.root), **changes})
        return fit_q_stage(config, self.champion, self.dataset, self.root)


@pytest.fixture
def night(tmp_path: Path, tiny_config: Config) -> Night:
    return Night(tmp_path, build_bandit(tiny_config))


def test_prompts_are_of_states_in_which_a_suggestion_was_logged(night: Night) -> None:
    """Q was fitted there: after them, where staff took over, what it says of a response means nothing."""
    frame = turn_table.read(night.dataset.path, {"purchase": 1.0})
    config: Config = load_config(overrides={**QUICK, "data.root": str(night.root)})
    gone = turn_table.actions(frame) & (np.arange(len(frame)) % 3 == 0)
    frame.loc[gone, ["suggestion", "suggestion_status", "behaviour_logprob"]] = [None, "missing", None]
    turn_table.write(frame, night.root / "taken" / "turns.parquet", {"purchase": 1.0})
    stage = prompts_stage(config, night.champion, Dataset(0, night.root / "taken", "taken"), night.root)
    fit = (frame["part"] == "fit").to_numpy()
    assert stage.metrics["prompts"] == (turn_table.actions(frame) & fit).sum() and (gone & fit).any()


def test_stages_tell_once_of_rates_that_would_undo_a_large_champion(
    night: Night, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of those that it trains with."""

    def told(stage: Callable[..., Any]) -> list[str]:
        caplog.clear()
        stage(**{"improve.ppo.episodes": 16})
        return [line for line in caplog.messages if "learning rates" in line]

    monkeypatch.setattr(suitability, "TINY_WEIGHTS", 100)
    (improved,), again = told(night.improve), told(night.improve)
    assert "improve.ppo.learning_rate" in improved and " q." not in improved
    assert not again, "what is done is not done again"
    (fitted,) = told(night.fit_q)
    assert "q.learning_rate" in fitted and "improve." not in fitted


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Have progress end the stage after so many steps in all, None for never; what it told by then."""

    def armed(after: int | None) -> list[int]:
        told: list[int] = []

        class Bar:
            def __init__(self, _: str) -> None: ...

            def __enter__(self) -> Callable[[int, int], None]:
                return self.report

            def __exit__(self, *_: object) -> None: ...

            def report(self, done: int, total: int) -> None:
                told.append(done)
                if total == 4 and done == after:
                    raise KeyboardInterrupt

        monkeypatch.setattr(learning, "progress", Bar)
        return told

    return armed


def test_a_killed_stage_refuses_another_configuration_and_goes_on_with_its_own(
    night: Night, kill: Callable[[int | None], list[int]]
) -> None:
    kill(2)
    with pytest.raises(KeyboardInterrupt):
        night.improve()
    told = kill(None)
    for changes in ({"improve.algorithm": "rloo"}, {"improve.best_of_n.epochs": 2.0}, {"seed": 1}):
        with pytest.raises(StoreError, match=rf"{night.unfinished}: .*another configuration \({next(iter(changes))}"):
            night.improve(**changes)
        with pytest.raises(StoreError, match=r"another configuration"):
            night.fit_q(**changes)
    assert told == [], "refused before any training, of Q too"
    night.improve()
    assert told[-2:] == [3, 4] and 1 not in told
    assert not night.unfinished.exists()


def test_a_killed_fit_of_q_goes_on_and_another_begins_anew(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rounds, "UPDATES", 1)
    updates: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        updates.append((done, total))
        if len(updates) == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "progress", lambda _: nullcontext(report))
    killed_after = 10**9
    whole, every = content_hash(night.fit_q().path / "model"), len(updates)
    assert not night.fitting.exists()
    for changes in ({}, {"q.epochs": 2.0}):
        shutil.rmtree(night.root / "q")
        updates.clear()
        killed_after = 3
        with pytest.raises(KeyboardInterrupt):
            night.fit_q()
        assert night.fitting.exists()
        updates.clear()
        killed_after = 10**9
        stage = night.fit_q(**changes)
        assert (content_hash(stage.path / "model") == whole) == (not changes)
        assert not night.fitting.exists()
        assert (len(updates) == every - 3) == (not changes)
        assert ("an unfinished training with other data, models or settings" in caplog.text) == bool(changes)


def test_a_killed_first_policy_goes_on_within_its_passes(
    tiny_config: Config, scripted: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "UPDATES", 1)
    talks = scripted[:24]
    updates: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        updates.append((done, total))
        if len(updates) == killed_after:
            raise KeyboardInterrupt

    def made() -> str:
        parts: dict[str, dict[str, Any]] = {
            "data": {"root": tmp_path},
            "supervised": {"epochs": 2.0, "batch_size": 8},
            "q": {"corpus_epochs": 2.0, "batch_size": 6},
        }
        update = {name: getattr(tiny_config, name).model_copy(update=part) for name, part in parts.items()}
        updates.clear()
        path = initial_policy_stage(tiny_config.model_copy(update=update), talks, "talks").path
        assert not (path.parent / "starting").exists()
        return content_hash(path / "model") + content_hash(path / "q")

    monkeypatch.setattr(learning, "progress", lambda _: nullcontext(report))
    killed_after = 10**9
    whole, every = made(), list(updates)
    tuning, fitting = [(k, 6) for k in range(1, 7)], [(k, 4) for k in range(1, 5)]
    assert every == tuning + fitting
    shutil.rmtree(tmp_path / "rounds" / "0000" / "initial_policy")
    killed_after = 3
    with pytest.raises(KeyboardInterrupt):
        made()
    killed_after = 3 + 2  # what is left of pi_0, and half of Q
    with pytest.raises(KeyboardInterrupt):
        made()
    killed_after = 10**9
    assert made() == whole
    assert updates == fitting[2:]


def test_adapters_that_the_policy_cannot_carry_are_refused_before_anything_trains(
    night: Night, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny pi_0 has none yet, nor does fitting Q need any: both are for the improvement that follows."""
    monkeypatch.setattr(learning, "progress", lambda name: pytest.fail(f"{name}, for nothing"))
    changes = {"policy.lora.rank": 2, "policy.lora.target_modules": ["nothing"]}
    with pytest.raises(ModelError, match=r"policy\.lora\.target_modules: .* has no layer named nothing"):
        night.fit_q(**changes)
    with pytest.raises(ModelError, match=r"policy\.lora\.target_modules: llama has no layer named nothing"):
        initial_policy_stage(load_config(overrides=changes | {"data.root": str(night.root)}), scripted[:4], "talks")


@pytest.mark.parametrize(
    "changes",
    [
        {"improve": {"reward": "acceptance"}},
        {"data": {"evidence_share": 0.5}},
        {"data": {"outcome_high": 2.0}},
        {"data": {"split_by": "business"}},
    ],
)
def test_a_first_policys_q_is_made_anew_under_another_objective_or_split(
    tiny_config: Config, scripted: list[Conversation], tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    quick: dict[str, dict[str, Any]] = {"supervised": {"epochs": 0.1}, "q": {"corpus_epochs": 0.1}}

    def made(given: dict[str, dict[str, Any]]) -> bool:
        parts: dict[str, dict[str, Any]] = {"data": {"root": tmp_path}, "improve": {}, **quick}
        update = {
            name: getattr(tiny_config, name).model_copy(update={**part, **given.get(name, {})})
            for name, part in parts.items()
        }
        return initial_policy_stage(tiny_config.model_copy(update=update), scripted[:24], "talks").done_before

    assert [made({}), made({}), made(changes)] == [False, True, False]


def test_a_first_policy_is_made_anew_of_other_weights_under_the_same_path(
    tiny_config: Config, scripted: list[Conversation], tiny_policy: LanguagePolicy, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_policy.save(base)
    update = {
        "data": tiny_config.data.model_copy(update={"root": tmp_path}),
        "policy": tiny_config.policy.model_copy(update={"base_model": str(base), "init": "prompt"}),
        "q": tiny_config.q.model_copy(update={"corpus_epochs": 0.0}),
    }
    config = tiny_config.model_copy(update=update)
    assert [initial_policy_stage(config, scripted[:4], "talks").done_before for _ in range(2)] == [False, True]
    tiny_policy.with_model(adapters.merged(tiny_policy.model, None)).at(0.5).save(base)
    assert not initial_policy_stage(config, scripted[:4], "talks").done_before


def test_what_the_best_of_n_brought_stands_where_it_left_ppo_nothing_to_learn(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def certain(*_: Any, **__: Any) -> Any:
        raise SameReward("Q gives all responses to a prompt the same reward")

    monkeypatch.setattr(rounds, "improve_on_samples", certain)
    stage = night.improve()
    assert "what was learnt first left ppo nothing to learn" in caplog.text
    assert set(learning.curves(stage)) == {"best_of_n"}
    with pytest.raises(SameReward):
        night.improve(**{"improve.best_of_n.epochs": 0.0})


def test_a_later_iteration_that_tells_no_response_from_another_ends_with_the_policy_so_far(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    improve = rounds.Passes.improve

    def once(self: rounds.Passes, student: LanguagePolicy) -> Any:
        if self.number > 1:
            raise SameReward("Q gives all responses to a prompt the same reward")
        return improve(self, student)

    one = night.improve()
    weights = content_hash(one.path / "model")
    monkeypatch.setattr(rounds.Passes, "improve", once)
    two = night.improve(**{"improve.policy_iterations": 2})
    assert "policy iteration 2: Q gives all responses" in caplog.text
    assert content_hash(two.path / "model") == weights and two.metrics["policy_iterations"] == 1.0


def test_a_beginning_beyond_the_budget_is_told(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    far = {"improve.best_of_n.epochs": 4.0, "improve.best_of_n.learning_rate": 0.01, "improve.ppo.kl_budget": 0.001}
    stage = night.improve(**far)
    (only,) = learning.curves(stage)["ppo"]
    assert only["updates"] == 0.0 and only["kl_to_champion"] > 0.001
    assert "ppo made no update: it began" in caplog.text and "lower improve.best_of_n.epochs" in caplog.text


def test_candidates_of_pi_0_come_from_where_the_first_round_left_it(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"improve.best_of_n.initial_share": 0.5}
    with pytest.raises(StoreError, match=r"initial_policy/model: not found"):
        night.improve(**half)
    kept = night.root / "rounds" / "0000" / "initial_policy" / "model"
    LanguagePolicy.load(night.champion.path).at(0.7).save(kept)
    heard: list[float] = []
    respond = LanguagePolicy.respond

    def listened(self: LanguagePolicy, *asked: Any, **how: Any) -> Any:
        heard.append(self.settings.temperature)
        return respond(self, *asked, **how)

    monkeypatch.setattr(LanguagePolicy, "respond", listened)
    stage, temperature = night.improve(**half), LanguagePolicy.load(night.champion.path).settings.temperature
    assert heard[:2] == [temperature * load_config().improve.best_of_n.temperature] * 2, "each as sure as the other"
    assert night.improve(**half).done_before
    LanguagePolicy.load(night.champion.path).at(0.8).save(kept)
    assert not night.improve(**half).done_before and stage.path.exists()


def test_what_makes_a_later_iterations_q_doubtful_is_told(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    night.dataset = night.data("second", 30, logprob=None)
    night.improve(**{"improve.policy_iterations": 2, "improve.logged.epochs": 0.0})
    assert re.search(r"policy iteration 2: (\d+) of \1 logged suggestions have no behaviour_logprob", caplog.text)


def test_new_data_begin_anew(night: Night, kill: Callable[[int | None], list[int]]) -> None:
    kill(2)
    with pytest.raises(KeyboardInterrupt):
        night.improve()
    told = kill(None)
    night.dataset = night.data("second", 40)
    night.improve(**{"improve.ppo.episodes": 32})
    assert told[-2:] == [1, 2] and told.count(1) == 2 and not night.unfinished.exists()


def test_killed_within_a_later_policy_iteration_it_ends_with_the_same_weights(
    night: Night, kill: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    twice = {"improve.policy_iterations": 2}
    whole = content_hash(night.improve(**twice).path / "model")
    shutil.rmtree(tmp_path / "improved")
    rollouts = 0

    def report(done: int, total: int) -> None:
        nonlocal rollouts
        rollouts += total == 4
        if rollouts == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patched:
        patched.setattr(learning, "progress", lambda _: nullcontext(report))
        night.improve(**twice)
    assert (night.unfinished / "ppo-2").exists()
    assert (night.unfinished / "q-2-1").exists()
    told = kill(None)
    stage = night.improve(**twice)
    assert told == [3, 4], "the second iteration's rollouts go on where they stopped, and its Q is not fitted again"
    assert content_hash(stage.path / "model") == whole
    assert stage.metrics["policy_iterations"] == 2.0


def test_an_iteration_left_out_is_told_and_made_up_for_once_the_floor_is_lower(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    stage = night.improve(**{"improve.policy_iterations": 2, "q.effective_size_floor": 1e6})
    assert stage.metrics["policy_iterations"] == 1.0
    assert "policy iteration 2 is left out" in caplog.text and "q.effective_size_floor = 1e+06" in caplog.text
    again = night.improve(**{"improve.policy_iterations": 2})
    assert not again.done_before and again.metrics["policy_iterations"] == 2.0


@pytest.mark.parametrize(("number", "init", "learns"), [(0, "sft", True), (1, "sft", False), (0, "prompt", False)])
def test_a_log_without_log_probs_teaches_the_logged_pass_only_of_the_policy_cloned_from_it(
    night: Night, caplog: pytest.LogCaptureFixture, number: int, init: str, learns: bool
) -> None:
    night.dataset = night.data("bare", 30, number, None)
    policy = {"policy.init": init, "policy.base_model": "a-model" if init == "prompt" else None}
    alone = {"improve.logged.epochs": 1.0, "improve.best_of_n.epochs": 0.0, "improve.ppo.episodes": 0}
    with nullcontext() if learns else pytest.raises(NothingToLearn, match="no pass of the improvement"):
        night.improve(**policy, **alone)
    stage = night.improve(**policy, **(alone if learns else alone | {"improve.ppo.episodes": 16}))
    without = stage.metrics["logged_turns_without_logprob"]
    assert (without == 0) == learns == ("logged" in stage.read("curves.json"))
    said = f"{without:g} of {without:g} logged suggestions have no behaviour_logprob, so the logged pass learns nothing"
    assert (said in caplog.text) == (not learns)


def test_where_the_logged_pass_has_nothing_to_learn_the_others_still_learn(
    night: Night, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one turn with a log-prob, say: it is no better than the others."""

    def of_one(_: object, current: Round, cloned: bool) -> np.ndarray:
        first = np.flatnonzero(current.fit & ~current.last)[0]
        return np.where(np.arange(len(current.last)) == first, -3.0, np.nan)

    monkeypatch.setattr(learning, "behaviour_log_probs", of_one)
    alone = {"improve.logged.epochs": 1.0, "improve.best_of_n.epochs": 0.0, "improve.ppo.episodes": 0}
    with pytest.raises(NothingToLearn, match="advantages are equal, of 1 turns"):
        night.improve(**alone)
    stage = night.improve(**alone | {"improve.ppo.episodes": 16})
    assert set(stage.read("curves.json")) == {"ppo"}
    assert "the logged pass is left out: all logged advantages are equal" in caplog.text


def test_a_failed_training_leaves_nothing_that_forbids_to_mend_its_settings(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: object, **__: object) -> None:
        assert (night.unfinished / "best_of_n").exists(), "the pass before it was kept"
        raise TrainingError("PPO diverged; lower improve.ppo.learning_rate")

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="diverged"):
        patched.setattr(rounds, "improve_on_samples", diverges)
        night.improve()
    night.improve(**{"improve.ppo.learning_rate": 1e-4})
    assert not night.unfinished.exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"curve": None},
        {"curve": "none"},
        {"beta": "much"},
        {"generator": {}},
        {"curve": [{"q": 1.0}]},
    ],
)
def test_a_checkpoint_that_was_written_into_is_an_error(tmp_path: Path, damage: dict[str, Any]) -> None:
    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_improvement.improved(tmp_path / "kept", stop)
    state = read_json(tmp_path / "kept" / "state.json") | damage
    write_json(tmp_path / "kept" / "state.json", {name: value for name, value in state.items() if value is not None})
    with pytest.raises(StoreError, match=rf"{tmp_path / 'kept'}: a damaged checkpoint \(.*remove it to begin anew"):
        killed_improvement.improved(tmp_path / "kept")


@pytest.mark.parametrize("rollouts", [1, 5])
def test_killed_with_sigkill_it_ends_with_the_same_weights(tmp_path: Path, rollouts: int) -> None:
    """Within the rollout or the updates that follow so many told ones, wherever the signal finds it."""
    script = Path(killed_improvement.__file__)
    command = [sys.executable, str(script), str(tmp_path / "kept")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=script.parent) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == rollouts:
                time.sleep(0.05)
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    told: list[int] = []
    resumed, curve = killed_improvement.improved(tmp_path / "kept", lambda done, _: told.append(done))
    whole, unbroken = killed_improvement.improved(None)
    assert rollouts < told[0] <= told[-1] == 12
    assert curve == unbroken
    weights = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
