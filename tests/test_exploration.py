"""Persona exploration: who is led by whom, the exact behaviour, what it is for, and what it covers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.q_exploration import CHAIN, GAMMA, POLICY, SEEDS, explored_log, value
from iterative_ppo.config import PersonaConfig, load_config
from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.coverage import beyond_reach, coverage
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, State, Suggestion, Turn
from iterative_ppo.mdp.rendering import single
from iterative_ppo.mdp.turn_table import to_frame
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.rows import round_row
from tasks import looks, traffic
from tasks.assignment import Assigned, assigned, persona_of
from tasks.datasets import Dataset, inbox, of_policy, round_folder, served_by, write_once
from tasks.exploration import coverage_metrics
from tasks.learning import PolicyVersion
from tasks.state import Experiment, NightState

SHORT = "keep it short"
SYSTEM = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + SYSTEM
STATE = State((), "hello")


def exploring(**settings: Any) -> Any:
    return load_config(overrides={"exploration.share": 0.5, **settings})


# --- settings and draws ----------------------------------------------------------------------------------------------


def test_it_is_off_by_default() -> None:
    exploration = load_config().exploration
    assert exploration.share == 0.0 and exploration.personas
    assert {persona_of(exploration, f"c{k}") for k in range(200)} == {None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"exploration.personas": {}}, "personas names nobody"),
        ({"exploration.share": 1.0}, "exploration.share"),
        ({"exploration.personas": {"free": {"instruction": "", "temperature": 0.0}}}, "personas.free.temperature"),
        (
            {"q.target": "monte_carlo"},
            "q.target monte_carlo learns from the policy's own conversations alone; set q.target to one_step, fqe",
        ),
        ({"credit.assigner": "norm_itpo"}, "norm_itpo learns from .* alone; set credit.assigner to outcome, or expl"),
        ({"improve.reward": "acceptance"}, "acceptance learns from .* alone; set improve.reward to outcome, or expl"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exploring(**overrides)


def test_a_table_of_personas_replaces_the_default_one() -> None:
    mine = {"calm": {"instruction": "Be calm.", "temperature": 1.0}}
    assert set(exploring(**{"exploration.personas": mine}).exploration.personas) == {"calm"}


def test_each_persona_leads_as_many_and_a_conversation_keeps_its_own() -> None:
    exploration = exploring().exploration
    drawn = Counter(persona_of(exploration, f"c{k}") for k in range(8000))
    assert set(drawn) == {None, *exploration.personas}
    assert abs(drawn[None] - 4000) < 5 * np.sqrt(8000 * 0.25)
    each = 4000 / len(exploration.personas)
    assert all(abs(drawn[name] - each) < 5 * np.sqrt(each) for name in exploration.personas)
    assert persona_of(exploration, "c1") == persona_of(exploration, "c1")


def test_nobody_explores_in_a_test() -> None:
    config, tested = exploring(), Experiment(salt="s", champion=1, challenger=2)
    state = NightState(phase="test", champion=1, experiment=tested)
    said = [assigned(config, state, 1, f"c{k}") for k in range(100)]
    assert all(one.persona is None and one.arm for one in said)
    assert any(assigned(config, NightState(phase="collect"), 1, f"c{k}").persona for k in range(100))


# --- the behaviour ---------------------------------------------------------------------------------------------------


@pytest.fixture
def led(tiny_policy: LanguagePolicy) -> LanguagePolicy:
    return tiny_policy.led_by(PersonaConfig(instruction="hello kitchen", temperature=1.2))


def test_an_instruction_stands_before_the_conversation_and_leaves_the_policy_as_it_was(
    tiny_policy: LanguagePolicy, led: LanguagePolicy
) -> None:
    own, told = tiny_policy.renderer.prompt(STATE).tokens, led.renderer.prompt(STATE).tokens
    assert told == (*led.renderer.ids("hello kitchen\n"), *own) and len(told) > len(own)
    assert led.settings.temperature == 1.2 * tiny_policy.settings.temperature and led.model is tiny_policy.model


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (SYSTEM, f"<|system|>{SHORT}<|end|><|user|>Customer: hello<|end|><|assistant|>"),
        (NO_SYSTEM, f"<|user|>{SHORT}\nCustomer: hello<|end|><|assistant|>"),
    ],
)
def test_a_chat_template_takes_it_as_the_system_or_before_the_first_message(template: str, said: str) -> None:
    from iterative_ppo.learning.tiny import train_tokenizer
    from iterative_ppo.mdp.rendering import Renderer

    config = load_config(overrides={"policy.tokenizer": "bpe", "policy.vocabulary": 320})
    tokenizer = train_tokenizer([SHORT], config.policy)
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, 256, 16, config.policy.abstain)
    renderer.instruction = SHORT
    assert tokenizer.decode(renderer.prompt(STATE).tokens) == said


def test_the_logged_log_prob_is_that_of_the_persona(tiny_policy: LanguagePolicy, led: LanguagePolicy) -> None:
    actions = led.sample([STATE] * 40, seed=3)
    known = [one for one in actions if one.logprob is not None]
    assert len(known) > 5
    for one in known:
        response = led.renderer.response(one)
        as_led, as_itself = (float(policy.score(_table(policy, response))[0]) for policy in (led, tiny_policy))
        assert as_led == pytest.approx(one.logprob, abs=1e-4)
        assert abs(as_itself - as_led) > 1e-3


def _table(policy: LanguagePolicy, response: tuple[int, ...]) -> Any:
    from iterative_ppo.learning.batching import EncodedTable

    return EncodedTable([single(0, policy.renderer.prompt(STATE).tokens, response, True)], 1)


def test_traffic_logs_the_persona_and_its_exact_behaviour(
    tiny_policy: LanguagePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cool = replace(tiny_policy.settings, temperature=0.5)  # else nearly all that it says differs already
    LanguagePolicy(tiny_policy.model, tiny_policy.tokenizer, cool).save(tmp_path / "policy")
    heat = {"calm": 0.5, "free": 2.0, "wild": 4.0}
    table = {name: {"instruction": "", "temperature": temperature} for name, temperature in heat.items()}
    config = exploring(**{"data.root": str(tmp_path / "data"), "exploration.personas": table})
    traffic.deliver(
        config,
        "night",
        60,
        5,
        lambda unit: Assigned(1, persona=persona_of(config.exploration, unit)),
        lambda version: PolicyVersion(version, tmp_path / "policy"),
    )
    frame = pd.read_parquet(inbox(config) / "night.parquet")
    each = frame.drop_duplicates("conversation_id").set_index("conversation_id")
    assert each["persona"].map(lambda name: name or None, na_action="ignore").fillna("own").to_dict() == {
        name: persona_of(config.exploration, name) or "own" for name in each.index
    }
    assert set(each["arm"][each["persona"].notna()]) == {"exploration"}
    mean = frame.groupby(frame["persona"].fillna("own"))["behaviour_logprob"].mean()
    assert mean["calm"] > mean["own"] > mean["free"] > mean["wild"]
    assert served_by(frame, "1").all() and of_policy(frame, "1").equals(frame["persona"].isna())
    for named in ("logged", "some team's v7", None):
        assert of_policy(frame.assign(policy_version=named), "logged").all(), "a log is one policy's, whoever led it"

    write_once(tmp_path / "turns.parquet", frame, config)
    found = coverage_metrics(config, tmp_path / "policy", "1", Dataset(0, tmp_path / "turns.parquet", ""))
    assert 0 < found["coverage_effective_size"] < found["coverage_persona_turns"]
    assert found["coverage_distinct_actions"] > found["coverage_distinct_actions_own"]
    assert 0.0 <= found["coverage_beyond_reach"] <= 1.0

    monkeypatch.setattr("tasks.exploration.SAMPLED_ROWS", len(frame) // 2)
    sampled = coverage_metrics(config, tmp_path / "policy", "1", Dataset(0, tmp_path / "turns.parquet", ""))
    for name in ("coverage_persona_turns", "coverage_effective_size"):
        assert sampled[name] == found[name], "worth is that of all"
    assert sampled["coverage_distinct_actions"] != found["coverage_distinct_actions"]


def test_what_a_persona_led_is_no_evidence_of_a_test(tmp_path: Path) -> None:
    config = exploring(**{"data.root": str(tmp_path), "abtest.ramp": []})
    tested = Experiment(salt="s", champion=1, challenger=2, settings=looks.settings_of(config))
    state = NightState(phase="test", champion=1, experiment=tested, rounds=[{"round": 0}])
    turns = (Turn("hi", (0.0,), Suggestion("so", "suggested", -1.0), "so", "verbatim"), Turn(None, (0.0,)))
    talks = [Conversation(f"{v}-{k}", turns, f"u{v}{k}", policy_version=str(v)) for v in (1, 2) for k in range(5)]
    led = replace(talks[0], conversation_id="led", persona="warm", arm="exploration")
    frame = to_frame([*talks, led], config.outcomes, 0.2)
    write_once(round_folder(config, 1) / "arrived" / "t.parquet", frame, config)
    from datetime import UTC, datetime

    found = looks.evidence(config, state, datetime.now(UTC))
    assert found is not None and found.arms == (5, 5)


# --- what it is for --------------------------------------------------------------------------------------------------


def test_off_policy_evaluation_of_an_explored_log_errs_a_third_of_monte_carlo_at_most() -> None:
    truth = CHAIN.value(POLICY, GAMMA)
    found = np.array([[value(method, seed) for method in ("monte_carlo", "fqe")] for seed in SEEDS])
    monte_carlo, fqe = np.sqrt(np.mean((found - truth) ** 2, axis=0))
    assert fqe <= monte_carlo / 3


def test_the_chains_personas_say_what_they_log() -> None:
    frame = explored_log(0)
    assert frame["persona"].isna().mean() == pytest.approx(0.2, abs=0.05) and frame["persona"].nunique() == 4
    said = frame.dropna(subset=["behaviour_logprob"])
    rate = said.groupby("persona")["behaviour_logprob"].apply(lambda lp: np.exp(lp).mean())
    assert rate["free"] < rate["asking"], "a higher temperature is less sure of what it says"


# --- coverage --------------------------------------------------------------------------------------------------------


def log(*pairs: tuple[str, str], start: int = 0) -> pd.DataFrame:
    """Conversations of one turn: what the customer said, and the suggestion."""
    talks = []
    for k, (heard, said) in enumerate(pairs, start):
        action = Suggestion(said, "suggested", -1.0) if said else ABSTAIN
        talks.append(Conversation(f"c{k:04d}", (Turn(heard, (0.0,), action, "b"), Turn(None, (0.0,))), f"u{k}"))
    return to_frame(talks, {"purchase": 1.0}, 0.2)


def test_actions_are_counted_among_like_states_alone() -> None:
    logged = log(*[("which room", f"number {k % 4}") for k in range(40)], *[("the price please", "ten")] * 40)
    found = coverage(log(("which room", "number 1")), logged)
    assert found is not None and found.neighbours == 20 and 3 <= found.distinct_actions <= 4
    price = coverage(log(("the price please", "ten")), logged)
    assert price is not None and price.distinct_actions == 1.0


def test_q_extrapolates_where_no_like_state_saw_a_like_action() -> None:
    logged = log(*[("which room", "the kitchen, surely")] * 20, *[("the price please", "ten dollars")] * 20)
    asked = [
        ("which room", "The kitchen surely!"),
        ("which room", "ten dollars"),
        ("which room", "a bath"),
        ("which room", ""),
    ]
    shares = [coverage(log(pair), logged).extrapolated for pair in asked]  # type: ignore[union-attr]
    assert shares == [0.0, 1.0, 1.0, 1.0]
    assert coverage(log(*asked), logged).extrapolated == 0.75  # type: ignore[union-attr]
    assert coverage(log(("which room", "")), log(*[("which room", "")] * 3)).extrapolated == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("heard", "said", "like", "unlike"),
    [
        ("我想订一个房间", "请问您要哪个房间", "您要哪个房间", "谢谢光临"),
        ("部屋を予約したい", "どの部屋がよろしいですか", "どの部屋がいいですか", "またね"),
        ("ผมอยากจองห้อง", "คุณต้องการห้องไหน", "ต้องการห้องไหนคะ", "บาย"),
    ],
    ids=["chinese", "japanese", "thai"],
)
def test_languages_without_spaces_have_words_too(heard: str, said: str, like: str, unlike: str) -> None:
    """A customer says nearly the same and is answered nearly the same; as whole clauses nothing would be alike."""
    logged = log(*[(heard, said)] * 20, *[("price?", unlike)] * 20)
    shares = [coverage(log((heard[1:], answer)), logged).extrapolated for answer in (like, unlike)]  # type: ignore[union-attr]
    assert shares == [0.0, 1.0]


def test_more_kinds_of_actions_are_seen_wherever_they_lie_in_the_table() -> None:
    own, other = [("hi", "a")] * 100, [("hi", f"b{k}") for k in range(100)]
    found = [coverage(log(("hi", "a")), log(*rows)) for rows in (own, own + other, other + own)]
    first, second, third = (one.distinct_actions for one in found if one)
    assert first == 1.0 and second > 5 and third > 5


def test_others_states_are_within_reach_where_they_are_as_near_as_the_policys_own() -> None:
    words = [f"word{k}" for k in range(30)]
    rng = np.random.default_rng(0)

    def talks(vocabulary: list[str], count: int) -> pd.DataFrame:
        return log(*[(" ".join(rng.choice(vocabulary, 6)), "a") for _ in range(count)])

    fitted, held_out = talks(words, 400), talks(words, 200)
    assert beyond_reach(talks(words, 200), fitted, held_out) == pytest.approx(0.05, abs=0.06)
    strange = talks([f"other{k}" for k in range(30)], 200)
    assert beyond_reach(strange, fitted, held_out) == 1.0
    half = pd.concat([talks(words, 200), strange.assign(conversation_id="x" + strange["conversation_id"])])
    assert beyond_reach(half.reset_index(drop=True), fitted, held_out) == pytest.approx(0.52, abs=0.08)
    assert beyond_reach(fitted.iloc[:0], fitted, held_out) is None


def test_nothing_is_said_of_nothing() -> None:
    empty = log(("hi", "a")).iloc[1:]
    assert coverage(empty, log(("hi", "a"))) is None and coverage(log(("hi", "a")), empty) is None


def test_the_report_says_what_is_covered() -> None:
    from iterative_ppo.report.round_record import RoundRecord

    found = {"coverage_distinct_actions": 9.25, "coverage_extrapolated": 0.04, "coverage_neighbours": 20.0}
    own = {"coverage_distinct_actions_own": 6.0, "coverage_extrapolated_own": 0.1}
    more = {"coverage_persona_turns": 900.0, "coverage_effective_size": 310.0, "coverage_beyond_reach": 0.3}
    one = RoundRecord(0, q=found | own | more, origins={"reported": 1200, "classifier:3": 40, "none": 7})
    facts = round_row(RunRecord.__new__(RunRecord), one)["facts"]
    assert "Outcomes of its conversations: 1,200 reported, 40 by classifier 3, 7 that nobody reported" in facts
    assert (
        "Among 20 like states Q saw 9.2 different suggestions; for 4.0% of the policy's own it extrapolates "
        "(without personas 6.0 and 10.0%)"
    ) in facts
    assert "Personas made 900 suggestions, worth 310 of the policy's own (effective sample size)" in facts
    told = "30.0% of the states that others reached are farther from the policy's own than 95% of those: V guesses"
    assert told in facts
