"""A simulated business of the user's own: from a module in the working folder through a whole round."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flower_shop
import pytest
from gate_evidence import UNGUARDED
from test_command_line import ippo, refused

from flows import simulation
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.own import own_environment
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import ConfigError, SourceError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.files import content_hash
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import ABSTAIN, State, Suggestion, Turn
from tasks.state import load_state
from tasks.traffic import first_corpus
from tasks.tryout import try_out

NAMED = {"order": 1.0, "large": 0.5}
SMALL = {
    "outcomes": NAMED,
    "simulator.corpus_conversations": 80,
    "simulator.conversations": 80,
    "abtest.conversations": 80,
    "rounds.max_rounds": 1,
    "rounds.final_conversations": 40,
    "policy.hidden_size": 16,
    "policy.heads": 2,
    "policy.layers": 1,
    "policy.tokenizer": "word",
    "supervised.epochs": 60.0,
    "q.epochs": 1.0,
    "improve.ppo.episodes": 64,
    "improve.best_of_n.epochs": 1.0,
    "improve.best_of_n.samples": 2,
    **UNGUARDED,
}


def config_of(reference: str | None, **changes: object) -> Config:
    return load_config(None, {"source.kind": "environment", "source.path": reference, "outcomes": NAMED} | changes)


def test_a_round_on_a_module_of_the_working_folder(tmp_path: Path) -> None:
    shutil.copy(flower_shop.__file__, tmp_path / "my_shop.py")
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    done = ippo(tmp_path, "run", "--source", "environment", "--path", "my_shop:Florist", *sets)
    assert done.returncode == 0, done.stderr
    assert load_state(tmp_path / "data").phase == "finished"
    turns = turn_table.read(tmp_path / "data" / "turns" / "round=0000", NAMED)
    assert turns["conversation_id"].nunique() == SMALL["simulator.conversations"]
    assert set(turns["business_id"]) == {"florist"}
    assert set(turns["outcome"]) <= {0.0, 1.0, 1.5}
    assert (tmp_path / "report.html").exists()


def test_the_closing_comparison_counts_successes_as_an_ab_test_does(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = collect(flower_shop.Apprentice(0), flower_shop.Florist(), 60, 1, "3")
    monkeypatch.setattr(simulation, "simulate", lambda *_: talks)
    monkeypatch.setattr(simulation.rounds, "policy_version", lambda *_: None)

    def served(**changes: object) -> Arm:
        return simulation._served(config_of("flower_shop:Florist", **changes), None, 3, 60, 1)  # type: ignore[arg-type]

    small = sum(talk.turns[-1].outcomes == (1.0, 0.0) for talk in talks)
    assert small and served(outcomes={"order": 1.0, "large": -1.0}) == Arm(small, 60)
    told = sum(any(turn.customer_message == "It is a birthday." for turn in talk.turns) for talk in talks)
    rule = {"side": "customer", "pattern": "birthday", "first_turn": 1, "last_turn": None, "value": 1.0}
    ended = Turn(None, (0.0, 0.0))
    unreported = [replace(talk, outcome_origin=None, turns=(*talk.turns[:-1], ended)) for talk in talks]
    monkeypatch.setattr(simulation, "simulate", lambda *_: unreported)
    assert served(**{"labels.kind": "rule", "labels.rules": {"order": rule}}) == Arm(told, 60)


def test_its_script_writes_the_corpus() -> None:
    corpus, name = first_corpus(config_of("flower_shop:Florist", **{"simulator.corpus_conversations": 30}))
    assert len(corpus) == 30
    assert name == f"scripted, flower_shop:Florist {content_hash(Path(flower_shop.__file__))}"
    said = {turn.suggestion.text for talk in corpus for turn in talk.turns if turn.suggestion}
    assert said == {flower_shop.ASK, flower_shop.OFFER, flower_shop.CHAT}


def test_without_a_script_pi_0_is_a_base_model_as_it_is() -> None:
    for begins in (try_out, first_corpus):
        with pytest.raises(ConfigError, match=r"source.path: Unscripted has no script\(seed\).*policy.init to prompt"):
            begins(config_of("flower_shop:Unscripted", **{"data.root": "nowhere"}))
    as_it_is = {"policy.init": "prompt", "policy.base_model": "somewhere"}
    assert first_corpus(config_of("flower_shop:Unscripted", **as_it_is)) == ([], "base model")


def test_an_instance_or_a_function_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_shop, "shop", flower_shop.Florist(), raising=False)
    monkeypatch.setattr(flower_shop, "made", partial(flower_shop.Florist), raising=False)
    talks = [
        collect(flower_shop.Apprentice(0), own_environment(f"flower_shop:{name}"), 20, 3, "x")
        for name in ("shop", "made", "Florist")
    ]
    assert talks[0] == talks[1] == talks[2]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (None, "needs module:name"),
        ("flower_shop", "expected module:name, found"),
        ("flower_shop:Nursery", "cannot be imported"),
        ("no_such_shop:Florist", "no_such_shop.*PYTHONPATH"),
        (":Florist", "expected module:name, found"),
        ("flower_shop:Closed", "has no method 'start'"),
        ("flower_shop:Order", r"cannot be made without arguments: TypeError: .*missing 1 required .*'rng'"),
    ],
)
def test_what_is_no_environment_is_named(reference: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^source.path: .*{words}"):
        own_environment(reference)


def broken(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> Config:
    """The florist with some methods of an order, or of the shop, replaced."""
    orders = {name: value for name, value in methods.items() if hasattr(flower_shop.Order, name)}
    session = type("Order", (flower_shop.Order,), orders)
    shop = {name: value for name, value in methods.items() if name not in orders}

    def start(self: Any, conversations: int, seed: int) -> list[flower_shop.Order]:
        return [session(order.rng) for order in flower_shop.Florist.start(self, conversations, seed)]

    monkeypatch.setattr(flower_shop, "broken", type("Broken", (flower_shop.Florist,), {"start": start, **shop}), False)
    return config_of("flower_shop:broken")


def closing_with(turn: Turn) -> Any:
    def step(self: flower_shop.Order, suggestion: Suggestion) -> None:
        self.turns += [Turn(self.message, (0.0, 0.0), suggestion, "x", "verbatim"), turn]
        self.closed = True

    return step


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"step": lambda self, suggestion: None}, "20 of 20 conversations are still open after 1000 turns"),
        ({"step": lambda self, suggestion: 1 // 0}, r"ZeroDivisionError: .*test_own_environment.py, line \d+"),
        ({"step": closing_with(Turn(None, (0.0,)))}, "1 outcomes, expected 2 .*order, large"),
        (
            {"step": closing_with(Turn("Bye.", (0.0, 0.0)))},
            "20 of the first 20 .*customer_message: must be null in a terminal",
        ),
        (
            {"step": closing_with(Turn(None, (2.0, 0.0)))},
            r"turn 2, outcome 'order': expected 0 to 1, found 2.0; set .*ranges: \{order: ",
        ),
        (
            {"step": closing_with(Turn(None, (0.0, float("nan"))))},
            "turn 2, outcome 'large': expected a number, found nan$",
        ),
        ({"step": closing_with(Turn(None, ("yes", 0.0)))}, "outcome 'order': expected a number, found 'yes'$"),  # type: ignore[arg-type]
        ({"state": property(lambda self: None)}, "state of an open session: expected a State, found None$"),
        (
            {"state": property(lambda self: State(tuple(self.turns), 5))},  # type: ignore[arg-type]
            "customer_message in the state of an open session: expected text, found 5$",
        ),
        ({"step": closing_with(Turn(5, (0.0, 0.0)))}, "column 'customer_message': expected string, .* 'int' object$"),  # type: ignore[arg-type]
        ({"business_of": lambda self, k: 7}, "column 'business_id': expected string, .*int64$"),
        ({"step": closing_with(Turn(None, (0.0, 0.0), ABSTAIN))}, "suggestion_status: must be null"),
        ({"start": lambda self, conversations, seed: []}, r"start\(20, seed\) returned 0 sessions"),
        ({"script": lambda self: None}, "TypeError: .*takes 1 positional argument"),
        (
            {"__init__": lambda self, rng: vars(self).update(rng=rng, turns=[], closed=True)},
            "20 of 20 .*without a turn",
        ),
    ],
)
def test_what_is_wrong_with_it_is_told_before_anything_trains(
    monkeypatch: pytest.MonkeyPatch, methods: dict[str, Any], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        try_out(broken(monkeypatch, **methods))


def test_what_goes_wrong_later_is_told_with_its_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = broken(monkeypatch, step=lambda self, suggestion: {}["price"])
    with pytest.raises(SourceError, match=r"^flower_shop:broken: KeyError: 'price' \(.*test_own_environment.py, line"):
        first_corpus(config)


def test_a_module_that_fails_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typo_shop.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "failing_shop.py").write_text("x = 1\nx / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"typo_shop:X' cannot be imported: SyntaxError: .*line 2"):
        own_environment("typo_shop:X")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: .*\(.*failing_shop.py, line 2\)"):
        own_environment("failing_shop:X")


def test_a_sound_one_passes() -> None:
    try_out(config_of("flower_shop:Florist"))
    try_out(config_of("flower_shop:Florist", **{"data.outcome_high": 2.0, "data.outcome_ranges": {"order": [0, 1]}}))
    try_out(config_of("flower_shop:Unscripted", **{"policy.init": "prompt", "policy.base_model": "somewhere"}))


def test_it_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    done = ippo(tmp_path, "run", "--source", "environment", "--path", "no_such_shop:Florist")
    refused(done, 2, "source.path", "no_such_shop")
