"""The report says what the run's files say, at every stage of a run, in one file that needs nothing else."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ab_arms import decided
from gate_evidence import GOOD
from matplotlib import rc_context

from iterative_ppo.config import RuleConfig, load_config
from iterative_ppo.environments.phrases import Act, business_phrases, customer_phrases, openings
from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import ABTest, Arm, ab_test, p_in_words
from iterative_ppo.evaluation.gate import offline_gate
from iterative_ppo.evaluation.metrics import proportion_interval
from iterative_ppo.evaluation.non_inferiority import Guardrail, mean, proportion
from iterative_ppo.files import write_json
from iterative_ppo.learning.objective import WITHOUT_COST
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, Suggestion, Turn
from iterative_ppo.mdp.returns import monte_carlo, rewards
from iterative_ppo.mdp.turn_table import to_frame
from iterative_ppo.report import plots, svg, words
from iterative_ppo.report.page import render, write_report
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.rows import examples
from iterative_ppo.report.verdict import verdict

CONFIG = load_config()
OUTCOMES = CONFIG.outcomes
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
ATTACK = '<script>alert("x")</script> & <img src="https://example.org/x.png">'

# --- a run as the flows leave it -------------------------------------------------------------------------------------


def talk(name: str, policy: str, arm: str | None, sold: bool, rng: random.Random) -> Conversation:
    """A renovation conversation in the simulator's own words; a better policy asks, a worse one chats."""
    room, tier, tone = "kitchen", "standard", rng.choice(["brief", "warm"])
    said = [rng.choice(openings(tone, room, False))]
    said += [rng.choice(customer_phrases(kind, None, tone, room, tier)) for kind in ("tells_room", "tells_budget")]
    acts = [Act("ask_room"), Act("ask_budget"), Act("offer", room, tier)]
    turns = []
    for message, act in zip(said, acts if sold else acts[: rng.randint(1, 3)], strict=False):
        text = rng.choice(business_phrases(act if sold else Act("chat")))
        fate = rng.choices(["verbatim", "edited", "rejected", "no_reply"], [0.6, 0.2, 0.15, 0.05])[0]
        sent = None if fate == "no_reply" else text
        action = (ABSTAIN, None) if rng.random() < 0.08 else (Suggestion(text, "suggested", -2.0), fate)
        turns.append(Turn(message, (0.0,), action[0], sent, action[1]))
    last = Turn("Deal." if sold else None, (float(sold),))
    return Conversation(name, (*turns, last), f"customer of {name}", "b1", None, policy, arm)


@cache
def talks(policy: int | str, arm: str | None, counts: Arm, seed: int) -> list[Conversation]:
    rng = random.Random(seed)
    return [
        talk(f"{policy}-{arm}-{seed}-{k:05d}", str(policy), arm, k < counts.successes, rng)
        for k in range(counts.conversations)
    ]


@dataclass(frozen=True)
class Fake:
    """A run folder in the making."""

    root: Path

    def folder(self, number: int) -> Path:
        return self.root / "rounds" / f"{number:04d}"

    def stage(self, path: Path, metrics: dict[str, float], **inputs: Any) -> None:
        write_json(path / "stage.json", {"key": "k", "inputs": inputs, "metrics": metrics, "content": "c"})

    def data(
        self,
        number: int,
        rows: list[Conversation],
        quarantined: int = 0,
        outcomes: dict[str, float] = OUTCOMES,
        **recorded: float,
    ) -> pd.DataFrame:
        """Arrived, validated, frozen turns, and their returns."""
        frame = to_frame(rows, outcomes, CONFIG.data.evidence_share)
        turn_table.write(frame, self.root / "turns" / f"round={number:04d}" / "turns.parquet", outcomes)
        reasons = {"customer_message: must be a text": quarantined} if quarantined else {}
        facts = {"quarantined_conversations": quarantined, "conversations": len(rows), "warnings": [], **recorded}
        validated = self.folder(number) / "validated"
        write_json(validated / "validation.json", {"reasons": reasons, **facts})
        self.stage(validated, {"conversations": len(rows)}, data=json.loads(CONFIG.data.model_dump_json()))
        return turn_table.read(self.root / "turns" / f"round={number:04d}", outcomes)

    def learn(self, number: int, frame: pd.DataFrame, q: float = 0.3) -> None:
        folder = self.folder(number)
        values = monte_carlo(frame, CONFIG.gamma)
        table = frame[["conversation_id", "turn"]].assign(reward=rewards(frame), **{"return": values})
        (folder / "returns").mkdir(parents=True)
        table.to_parquet(folder / "returns" / "returns.parquet", index=False)
        mean = float(values[(frame["turn"] == 1).to_numpy()].mean())
        self.stage(folder / "returns", {"mean_return": mean}, gamma=CONFIG.gamma)
        self.fit_q(number, q)
        curve = [
            {
                "q": q + 0.03 * k,
                "kl_to_reference": (0.2 + q) * k**0.5,
                "entropy": 1.4 - q - 0.1 * k,
                "clip_fraction": 0.1,
            }
            for k in range(4)
        ]
        write_json(folder / "improved" / "curves.json", {"logged": [], "ppo": curve})
        self.stage(folder / "improved", {"ppo_q": q}, improve=CONFIG.improve.model_dump())
        write_json(folder / "improved" / "model" / "policy.json", {"temperature": 0.8, "format": 1})

    def fit_q(self, number: int, q: float) -> None:
        metrics = {"r2": q, "state_only_r2": q - 0.05, "auc": 0.812, "state_only_auc": 0.75, "held_out_turns": 1204.0}
        metrics |= {"calibration_error": 0.021, "calibration_error_by_chance_95": 0.034}
        inputs = {"q": CONFIG.q.model_dump(), "gamma": CONFIG.gamma, "outcomes": OUTCOMES, "seed": 7}
        self.stage(self.folder(number) / "q", metrics, **inputs)
        predicted = [0.04 + 0.08 * k for k in range(10)]
        observed = [p + 0.02 * (-1) ** k * (1 + k % 3) / 2 for k, p in enumerate(predicted)]
        bins = {"predicted": predicted, "observed": observed, "count": [120 + k % 2 for k in range(10)]}
        write_json(self.folder(number) / "q" / "calibration.json", {**bins, "error": 0.021, "chance_95": 0.034})

    def gate(self, number: int, gain: float = 0.05, kl: float = 1.4) -> dict[str, Any]:
        near = Guardrail("kl", "lower", margin=5.0, alpha=0.05)
        found = replace(
            GOOD,
            states=400,
            samples=4,
            q_champion=0.21,
            q_challenger=0.21 + gain,
            q_gain_low=gain - 0.01,
            q_gain_high=gain + 0.01,
            kl_challenger_champion=kl,
            kl_champion_challenger=1.3 * kl,
            missing_eos=0.004,
            repetition=0.021,
            length_ratio=1.12,
            abstained=0.06,
            q_r2=0.3,
            state_baseline_r2=float("nan"),
            guardrails=(mean(near, np.zeros(400), kl + np.linspace(-1, 1, 400)), *GOOD.guardrails),
            differing=300,
        )
        decision, folder = offline_gate(found).as_dict(), self.folder(number) / "gate"
        write_json(folder / "evidence.json", found.as_dict())
        write_json(folder / "decision.json", decision)
        write_json(folder / "examples.json", EXAMPLES)
        self.stage(folder, {}, gate=CONFIG.gate.model_dump(), seed=7)
        return decision

    def state(self, phase: str, number: int, rows: list[dict[str, Any]], experiment: Any = None) -> None:
        values = {"format": 1, "round": number, "phase": phase, "experiment": experiment, "outcome_rates": {}}
        write_json(self.root / "state.json", {**values, "rounds": rows})

    def closing(self, first: Arm, last: Arm, version: int) -> None:
        folder = self.root / "rounds" / "closing"
        write_json(folder / "closing.json", ab_test(first, last, 0.05).as_dict())
        self.stage(folder, {}, first=1, last=version, conversations=first.conversations)


EXAMPLES = [
    {
        "messages": [
            {
                "customer": "Hello there, I am thinking about updating my home.",
                "business": "It is great to hear from you!",
            },
            {"customer": "Great, so what happens now?", "business": None},
        ],
        "champion": {"text": "We love helping people with their homes.", "q": 0.124},
        "challenger": {"text": "Which room are you thinking about?", "q": 0.381},
    },
    {
        "messages": [
            {"customer": "Hi, need work on my kitchen.", "business": "What budget do you have in mind?"},
            {"customer": "About ten thousand.", "business": None},
        ],
        "champion": {"text": "I suggest the premium package for your kitchen.", "q": 0.2},
        "challenger": {"text": "For your kitchen the standard package is a good fit.", "q": 0.83},
    },
    {
        "messages": [{"customer": ATTACK, "business": None}],
        "champion": {"text": "No problem, take your time.", "q": 0.05},
        "challenger": {"text": "(no suggestion)", "q": 0.31},
    },
    {
        "messages": [
            {"customer": "Hi, need some work done.", "business": "Which room are you thinking about?"},
            {"customer": "The bathroom.", "business": "Thanks for reaching out to us!"},
            {"customer": "OK.", "business": "We love helping people with their homes."},
            {"customer": "Sure. So?", "business": None},
        ],
        "champion": {"text": "Thanks for reaching out to us!", "q": 0.08},
        "challenger": {"text": "What budget do you have in mind?", "q": 0.44},
    },
]


def row(number: int, champion: int, offline: dict[str, Any], test: ABTest | None = None) -> dict[str, Any]:
    """A round as the nightly flow records it in state.json."""
    facts = {"round": number, "champion": champion, "challenger": number + 2, "q": number + 1, "offline": offline}
    facts["data_md5"] = f"{number}b1946ac92492d2347c6235b4d2611184.dir"
    if test:
        facts |= {"ab_test": test.as_dict(), "decision": decided(test.champion, test.challenger).as_dict()}
    return facts


FIRST = Arm(61, 300)
TESTS = [(Arm(32, 150), Arm(66, 150)), (Arm(64, 150), Arm(67, 150)), (Arm(66, 150), Arm(104, 150))]


def finished(root: Path, closing: bool = True) -> Fake:
    """Three rounds: promoted, rejected by customers, promoted; then the closing comparison."""
    fake, champion, rows, champions = Fake(root), 1, [], []
    data = talks(1, "champion", FIRST, 0)
    for number, (old, new) in enumerate(TESTS):
        fake.learn(number, fake.data(number, data, quarantined=3 * number), 0.2 + 0.06 * number)
        rows.append(row(number, champion, fake.gate(number, kl=1.2 + 0.2 * number), ab_test(old, new, 0.05)))
        champions.append(champion)
        data = talks(champion, "champion", old, 10 + number) + talks(number + 2, "challenger", new, 20 + number)
        champion = number + 2 if rows[-1]["decision"]["verdict"] == "promote" else champion
    turn_table.write(to_frame(data, OUTCOMES, 0.2), fake.folder(3) / "arrived" / "night.parquet", OUTCOMES)
    fake.state("finished", 2, rows)
    if closing:
        fake.closing(Arm(402, 2000), Arm(1426, 2000), champion)
    return fake


def page(root: Path, tmp_path: Path) -> str:
    return write_report(root, tmp_path / "out" / "report.html", now=NOW).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    parser = Reader()
    parser.feed(html)
    return " ".join(" ".join(parser.seen).split())


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "title")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.seen.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    return page(finished(folder / "data").root, folder)


# --- a finished run --------------------------------------------------------------------------------------------------


def test_the_verdict_is_one_plain_sentence(whole: str) -> None:
    said = text_of(whole)
    assert "After 3 rounds the assistant sells in 71.3% of conversations; it began at 20.1% (p < 0.001)." in said
    assert "Fresh customers, 2,000 conversations each. The gain is +51.2 points" in said


def test_the_figures_are_those_of_the_files(whole: str) -> None:
    said = text_of(whole)
    low, high = proportion_interval(1426, 2000)
    assert f"{100 * low:.1f}–{high:.1%}" in said
    promoted, rejected = ab_test(*TESTS[0], 0.05), ab_test(*TESTS[1], 0.05)
    for test in (promoted, rejected):
        assert words.points(test.gain) in said
        assert words.points_span(test.gain_low, test.gain_high) in said
    assert f"Conversations {300 + 3 * 300:,}" in said
    assert "9 quarantined" in said
    assert "2 of 3 challengers promoted" in said
    assert "1b1946ac" in said
    assert "0.260 0.210 0.812 0.021 0.034 1.40" in said
    assert "Sampling temperature 0.8" in said


def test_reasons_are_in_plain_words_and_marked(whole: str) -> None:
    assert '<li class="failed"><strong>What customers did.</strong> challenger 44.7% of 150' in whole
    assert '<li class="passed"><strong>Stays near the champion.</strong> kl 1.4, champion 0: at most 1.4' in whole


def test_sections_come_in_order_and_all_plots_are_drawn(whole: str) -> None:
    places = [
        whole.index(f'id="{name}"') for name in ("success", "rounds", "examples", "acceptance", "technical", "glossary")
    ]
    assert places == sorted(places)
    assert whole.count("<svg") == 6
    for label in ("successful conversations (%)", "share of suggestions (%)", "nats a response", "discounted return"):
        assert label in whole
    assert "round 1: 0.021 (0.034); round 2: 0.021 (0.034)" in text_of(whole)


def test_footer_names_versions_seed_time_and_settings(whole: str) -> None:
    footer = text_of(whole[whole.index("<footer>") :])
    assert re.search(r"Generated 2026-01-02 03:04 UTC · iterative-ppo \S+ .*seed 7 · settings [0-9a-f]{16} · ", footer)
    assert "temperature 0.8 (part of the policy)" in footer


def test_the_page_needs_nothing_else(whole: str) -> None:
    parser = Reader()
    parser.feed(whole)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parser.tags}
    for tag, attributes in parser.tags:
        for name, value in attributes.items():
            assert not (name in ("src", "href", "xlink:href") and not (value or "").startswith("#")), (tag, name, value)
            assert not name.startswith(("on", "xmlns"))
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?!#)|@import""", whole)
    assert len(whole) < 300_000


def test_references_inside_the_page_have_one_target_each(whole: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:url\(#|href="#)([^")]+)', whole))
    assert wanted <= set(ids)


def test_colours_follow_the_page(whole: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", whole, re.DOTALL):
        assert not re.search(r"(?:fill|stroke): #(?!000000|ffffff)", drawing)
        assert "var(--ink)" in drawing or "var(--muted)" in drawing


def test_text_of_conversations_is_escaped(whole: str) -> None:
    assert "<script>alert" not in whole
    assert "&lt;script&gt;alert" in whole
    assert ATTACK in text_of(whole.replace("&#34;", '"'))


def test_examples_show_both_policies_of_the_last_promoted_round(whole: str) -> None:
    said = text_of(whole)
    assert "The same held-out moments of round 2, once with the champion (policy 2)" in said
    assert "Before (policy 2) Q 0.12 We love helping people with their homes." in said
    assert "After (policy 4) Q 0.38 Which room are you thinking about?" in said
    assert "Suggests nothing and leaves the answer to a person" in said
    assert "2 earlier messages" in said


def test_examples_are_of_the_promoted_round_in_which_most_differ_and_those_come_first(tmp_path: Path) -> None:
    fake = finished(tmp_path / "data")
    alike = [{**EXAMPLES[0], "challenger": EXAMPLES[0]["champion"]}, *EXAMPLES[1:]]
    write_json(fake.folder(0) / "gate" / "examples.json", alike)
    write_json(fake.folder(2) / "gate" / "examples.json", alike[:2])
    shown = examples(RunRecord.read(fake.root))
    assert "moments of round 0, once" in shown["lead"] and "They differ in 300 of 400 states" in shown["lead"]
    same = [talk["before"] == talk["after"] for talk in shown["talks"]]
    assert same == [False, False, False, True]


def test_the_same_run_gives_the_same_page(whole: str, tmp_path: Path) -> None:
    assert page(finished(tmp_path / "data").root, tmp_path) == whole


# --- numbers from the turn table -------------------------------------------------------------------------------------


def test_shares_are_counted_as_a_reader_would(tmp_path: Path) -> None:
    said = Suggestion("Yes", "suggested", -1.0)
    sale = (Turn("a", (0.0,), said, "Yes", "verbatim"), Turn("b", (0.0,), ABSTAIN, "No"), Turn("Deal", (1.0,)))
    loss = (Turn("a", (0.0,), said, "Yes!", "edited"), Turn("b", (0.0,), said, None, "no_reply"), Turn(None, (0.0,)))
    rows = [Conversation("1", sale, "c1", policy_version="5"), Conversation("2", loss, "c2", policy_version="5")]
    fake = Fake(tmp_path)
    fake.learn(0, fake.data(0, rows))
    (group,) = RunRecord.read(tmp_path).rounds[0].groups
    assert (group.policy, group.arm, group.success) == ("5", None, Arm(1, 2))
    assert group.adoption == pytest.approx({"verbatim": 1 / 3, "edited": 1 / 3, "rejected": 0.0, "none": 1 / 3})
    assert (group.abstained, group.turns) == (0.25, 2.0)
    assert group.returned is not None
    assert group.returned.value == pytest.approx(CONFIG.gamma / 2)


# --- runs that are not finished --------------------------------------------------------------------------------------


def nothing(fake: Fake) -> str:
    fake.root.mkdir()
    return "No round has been run yet; there is nothing to report."


def collecting(fake: Fake) -> str:
    fake.root.mkdir()
    fake.state("collect", 0, [])
    return "Conversations are being collected for round 0."


def only_data(fake: Fake) -> str:
    fake.data(0, talks(1, "champion", FIRST, 0))
    fake.state("train", 0, [])
    return "The run is under way: so far the assistant sells in 20.3% of conversations."


def q_without_policy(fake: Fake) -> str:
    fake.data(0, talks(1, "champion", FIRST, 0))
    fake.fit_q(0, 0.3)
    return "In progress"


def running_test(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    arrived = to_frame(talks(2, "challenger", Arm(77, 77), 1), OUTCOMES, 0.2)
    turn_table.write(arrived, fake.folder(1) / "arrived" / "night.parquet", OUTCOMES)
    return "Policy 2 passed the offline checks and is being tested with customers against policy 1."


def running_test_without_arms(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks(1, None, FIRST, 0)))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    return "Policy 2 passed the offline checks and is being tested with customers against policy 1."


def offline_on_logs(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks("logged", None, FIRST, 0)))
    fake.stage(fake.folder(0) / "distance", {"held_out_nats_a_token": 1.31})
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    return (
        "Policy 2, trained on 300 conversations of a log, passed the offline checks; "
        "only an A/B test can tell whether it sells more often. In the log, 20.3% of conversations succeeded."
    )


def rejected_offline(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks("logged", None, FIRST, 0)))
    fake.state("finished", 0, [row(0, 1, fake.gate(0, gain=-0.02, kl=9.0))])
    return "After 1 round no challenger passed the offline checks, so the assistant stays as it was."


def rejected_by_customers(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    fake.state("finished", 0, [row(0, 1, fake.gate(0), ab_test(Arm(50, 200), Arm(48, 200), 0.05))])
    fake.closing(Arm(400, 2000), Arm(405, 2000), 1)
    return (
        "After 1 round no challenger proved better with customers, so the assistant stays as it was. It sells in 20.2%"
    )


def held_back_by_a_guardrail(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    found, none = row(0, 1, fake.gate(0), ab_test(Arm(50, 200), Arm(120, 200), 0.05)), Arm(0, 200)
    rule = Guardrail("pii", "lower", margin=0.01, alpha=0.05)
    found["decision"] = {"verdict": "reject", "reasons": ["not told: guardrail pii 0", "passed: challenger 60.0%"]}
    found["experiment"] = {"champion": 1, "challenger": 2, "guardrails": [proportion(rule, none, none).as_dict()]}
    fake.state("finished", 0, [found, {**found, "round": 1}])
    return (
        "After 2 rounds, 2 challengers did better with customers and were not promoted (guardrail pii not told), so "
        "the assistant stays as it was."
    )


def declined_by_a_person(fake: Fake) -> str:
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    found = row(0, 1, fake.gate(0), ab_test(Arm(50, 200), Arm(120, 200), 0.05))
    found["decision"] = {"verdict": "reject", "reasons": ["failed: declined by ann: not yet", "better: z 6"]}
    fake.state("finished", 0, [found])
    return "After 1 round, 1 challenger did better with customers and was not promoted (declined by ann: not yet), so"


def between_rounds(fake: Fake) -> str:
    test = ab_test(*TESTS[0], 0.05)
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    fake.data(1, talks(1, "champion", TESTS[0][0], 1) + talks(2, "challenger", TESTS[0][1], 2))
    fake.state("train", 1, [row(0, 1, fake.gate(0), test)])
    return "After 1 round the assistant sells in 44.0% of conversations; it began at 20.3%."


def killed_before_the_state_was_saved(fake: Fake) -> str:
    test = ab_test(*TESTS[0], 0.05)
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    found = {"round": 0, "test": test.as_dict(), "decision": decided(*TESTS[0]).as_dict()}
    write_json(fake.folder(0) / "ab_test.json", found)
    return "After 1 round the assistant sells in 44.0% of conversations; it began at 20.3%."


def without_closing(fake: Fake) -> str:
    finished(fake.root, closing=False)
    return (
        "After 3 rounds, 2 challengers proved better with customers; in its last A/B test the assistant sells in 69.3%"
    )


def state_alone(fake: Fake) -> str:
    fake.root.mkdir()
    offline = {"verdict": "test", "reasons": ["passed: all"]}
    fake.state("finished", 0, [row(0, 1, offline, ab_test(*TESTS[0], 0.05))])
    return "After 1 round, 1 challenger proved better with customers"


PARTIAL = (
    nothing,
    collecting,
    only_data,
    q_without_policy,
    running_test,
    running_test_without_arms,
    offline_on_logs,
    rejected_offline,
    rejected_by_customers,
    held_back_by_a_guardrail,
    declined_by_a_person,
    between_rounds,
    killed_before_the_state_was_saved,
    without_closing,
    state_alone,
)


@pytest.mark.parametrize("make", PARTIAL, ids=lambda make: make.__name__)
def test_a_run_that_is_not_finished_shows_what_there_is(make: Callable[[Fake], str], tmp_path: Path) -> None:
    fake = Fake(tmp_path / "data")
    expected = make(fake)
    said = text_of(page(fake.root, tmp_path))
    assert expected in said
    assert "None" not in re.sub(r"Rejected None|Edited None", "", said)
    assert " nan" not in said.lower()


def test_success_in_the_log_is_that_of_all_who_wrote_it(tmp_path: Path) -> None:
    """Whoever wrote most of it; the plot draws the largest and says that there are others."""
    fake = Fake(tmp_path / "data")
    parts = {
        "ann": Arm(0, 90),
        "bob": Arm(41, 70),
        "cy": Arm(26, 40),
        "di": Arm(3, 10),
        "ed": Arm(2, 5),
        "flo": Arm(0, 4),
        "gus": Arm(1, 3),
    }
    rows = [talk for name, arm in parts.items() for talk in talks(f"logged {name}", None, arm, 0)]
    fake.learn(0, fake.data(0, rows))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    said = text_of(page(fake.root, tmp_path))
    assert "In the log, 32.9% of conversations succeeded." in said
    assert "Success in the log 32.9%" in said and "n = 222" in said
    steps = plots.steps(RunRecord.read(fake.root))
    assert [step.name for step in steps] == ["First data"] * 5 + ["First data\nand 1 other"]
    drawn = {point.policy: point.arm for step in steps for point in step.points}
    assert drawn == {f"logged {name}": parts[name] for name in ("ann", "bob", "cy", "di", "ed", "flo")}


def test_a_running_test_is_not_looked_at(tmp_path: Path) -> None:
    running_test(fake := Fake(tmp_path / "data"))
    assert RunRecord.read(fake.root).tested == ()
    assert "100.0%" not in text_of(page(fake.root, tmp_path))


def test_a_policy_is_not_compared_with_itself(tmp_path: Path) -> None:
    rejected_by_customers(fake := Fake(tmp_path / "data"))
    said = text_of(page(fake.root, tmp_path))
    assert "Success now 20.2%" in said
    assert "Gain" not in said
    assert "first and last" not in said
    assert "shaded" not in said
    closing = plots.steps(RunRecord.read(fake.root))[-1]
    assert [(point.role, point.arm) for point in closing.points] == [("champion", Arm(405, 2000))], "one rate on a page"


def test_a_rollback_to_the_first_policy_is_told(tmp_path: Path) -> None:
    fake = finished(tmp_path / "data")
    fake.closing(Arm(400, 2000), Arm(405, 2000), 1)
    assert "the first policy serves again" in verdict(RunRecord.read(fake.root)).sentence


def test_a_finished_run_says_why_it_ended(tmp_path: Path) -> None:
    reason = "customers gain at most +2.2% from the last challenger, less than the least worth finding (5.0%)"
    fake = Fake(tmp_path / "data")
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    found = row(0, 1, fake.gate(0), ab_test(Arm(50, 200), Arm(48, 200), 0.05))
    found["convergence"] = {"over": True, "converged": True, "reason": reason}
    for phase, told in (("finished", True), ("collect", False)):
        fake.state(phase, 0, [found])
        assert verdict(RunRecord.read(fake.root)).detail.endswith(f"Converged: yes, {reason}.") is told
    fake.state("finished", 0, [found])
    fake.closing(Arm(400, 2000), Arm(900, 2000), 2)
    assert verdict(RunRecord.read(fake.root)).detail.endswith(f"Converged: yes, {reason}.")


def trail(fake: Fake, *moves: tuple[str, int]) -> None:
    """The audit trail of moves to these champions, the last one not done."""
    records = []
    for k, (kind, to) in enumerate(moves):
        records += [{"event": "intent", "kind": kind, "id": f"{k}", "to": to}, {"event": "done", "id": f"{k}"}]
    records.append({"event": "intent", "kind": "promote", "id": "open", "to": 99})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (fake.root / "audit.jsonl").write_text(lines + '{"event": "do', encoding="utf-8")


@pytest.mark.parametrize("phase", ["collect", "finished"])
def test_who_serves_is_whom_the_trail_names(tmp_path: Path, phase: str) -> None:
    """Policy 2 was promoted at .44; rolled back, the first policy's own rate in that test counts."""
    test = ab_test(*TESTS[0], 0.05)
    fake = Fake(tmp_path / "data")
    fake.learn(0, fake.data(0, talks(1, "champion", FIRST, 0)))
    fake.state(phase, 1, [row(0, 1, fake.gate(0), test)])
    trail(fake, ("promote", 1), ("promote", 2))
    assert "44.0%" in verdict(RunRecord.read(fake.root)).sentence
    trail(fake, ("promote", 1), ("promote", 2), ("rollback", 1))
    run = RunRecord.read(fake.root)
    assert run.serves == "1" and not run.changed
    told = f"{verdict(run).sentence} {verdict(run).detail}"
    assert "sells in 44.0%" not in told and "sells in 21.3%" in told
    assert ("the first policy serves again" in told) == (phase == "finished")
    trail(fake, ("promote", 1), ("promote", 2), ("promote", 7))
    assert "%" not in verdict(RunRecord.read(fake.root)).sentence, "nothing is known of how policy 7 does"


def test_the_last_tests_conversations_are_shown_as_the_test_judged_them_whoever_wrote_them(tmp_path: Path) -> None:
    fake = finished(tmp_path / "data", closing=False)
    place = fake.folder(3) / "arrived" / "night.parquet"
    frame = turn_table.read(place, OUTCOMES).assign(arm=None, outcome=0.0, outcome_purchase=0.0)
    frame.to_parquet(place, index=False)
    found = {group.policy: (group.role, group.success) for group in RunRecord.read(fake.root).tested}
    assert found == {"2": ("champion", TESTS[2][0]), "4": ("challenger", TESTS[2][1])}


def timed(one: Conversation, hour: int, lasts: float = 1.0, origin: str = "reported") -> Conversation:
    """The conversation begun `hour` hours after NOW, with its outcome said by `origin`."""
    begun = NOW + timedelta(hours=hour)
    *turns, last = (replace(turn, timestamp=begun) for turn in one.turns)
    end = replace(last, timestamp=begun + timedelta(hours=lasts))
    return replace(one, turns=(*turns, end), outcome_origin=origin)


def judged(fake: Fake, **recorded: Any) -> str:
    """A test of 2 against 1 that counted four conversations of each, and what else came of them; its page's text.

    A classifier guessed two sales of the champion's, and one of the challenger's came after its window.
    """
    arms = ((1, "champion", Arm(8, 8)), (2, "challenger", Arm(7, 8)))
    one, two = ([timed(each, k) for k, each in enumerate(talks(*arm, seed=9))] for arm in arms)
    one[:2] = [replace(each, outcome_origin="classifier:1") for each in one[:2]]
    two[0] = timed(two[0], 0, lasts=73.0)
    fake.learn(0, fake.data(0, [replace(each, outcome_origin="classifier:1") for each in talks(1, None, FIRST, 0)]))
    fake.learn(1, fake.data(1, one + two))
    test = ab_test(Arm(2, 4), Arm(3, 4), 0.05)
    settings = {"labels": "reported", "data.outcome_window_hours": 72.0}
    experiment = {"champion": 1, "challenger": 2, "settings": settings}
    found = {"test": test.as_dict(), "decision": decided(test.champion, test.challenger).as_dict()}
    write_json(fake.folder(0) / "ab_test.json", {"experiment": experiment, **found, **recorded})
    fake.state("train", 1, [row(0, 1, fake.gate(0), test)])
    return text_of(page(fake.root, fake.root.parent))


COUNTED = {"from": NOW.isoformat(), "to": (NOW + timedelta(hours=3)).isoformat()}


def test_of_a_test_the_page_shows_what_it_counted_as_it_judged_it(tmp_path: Path) -> None:
    said = judged(fake := Fake(tmp_path / "data"), counted=COUNTED)
    last = RunRecord.read(fake.root).rounds[1]
    assert {group.arm: group.success for group in last.groups} == {"champion": Arm(2, 4), "challenger": Arm(3, 4)}
    assert [group.outcomes["purchase"].value for group in last.groups] == [0.5, 0.75]
    assert last.conversations == 16 and last.origins == {"reported": 14, "classifier:1": 2}
    assert "An outcome that only a classifier said counts as none" in said and "all that came" not in said
    assert "61 by classifier" not in said and "First data policy 1 300 0.0%" in said


def test_of_a_test_that_did_not_say_what_it_counted_all_that_came_is_shown(tmp_path: Path) -> None:
    said = judged(fake := Fake(tmp_path / "data"))
    found = {group.arm: group.success for group in RunRecord.read(fake.root).rounds[1].groups}
    assert found == {"champion": Arm(6, 8), "challenger": Arm(7, 8)}, "without guesses"
    assert "A/B test of round 0, all that came policy 1 (champion) 8 75.0%" in said


def test_guesses_and_what_came_after_the_window_pay_no_return(tmp_path: Path) -> None:
    judged(fake := Fake(tmp_path / "data"), counted=COUNTED)
    returned = [group.returned for one in RunRecord.read(fake.root).rounds for group in one.groups]
    assert returned[0] is not None and returned[0].value == 0.0
    assert returned[1] is not None and returned[1].value == pytest.approx(CONFIG.gamma**2 / 2)
    assert returned[2] is not None and returned[2].value == pytest.approx(CONFIG.gamma**2 * 3 / 4)


def test_conversations_without_times_all_counted(tmp_path: Path) -> None:
    """Nor need they name their arms; while no round has taken them as its data, the test's rules judge them."""
    fake = finished(tmp_path / "data", closing=False)
    place = fake.folder(3) / "arrived" / "night.parquet"
    frame = turn_table.read(place, OUTCOMES)
    frame = frame.assign(arm=None, outcome=0.0, outcome_purchase=0.0, outcome_origin=None)
    turn_table.write(frame, place, OUTCOMES)
    rule = RuleConfig(side="customer", pattern="Deal", first_turn=1, last_turn=None, value=1.0).model_dump(mode="json")
    settings = {"labels": {"purchase": rule}, "data.outcome_window_hours": 72.0}
    experiment = {"champion": 2, "challenger": 4, "settings": settings}
    test = ab_test(*TESTS[2], 0.05)
    found = {"test": test.as_dict(), "decision": decided(*TESTS[2]).as_dict(), "counted": {"from": None, "to": None}}
    write_json(fake.folder(2) / "ab_test.json", {"experiment": experiment, **found})
    tested = RunRecord.read(fake.root).tested
    assert [(group.role, group.success) for group in tested] == [
        ("champion", TESTS[2][0]),
        ("challenger", TESTS[2][1]),
    ]
    assert [group.outcomes["purchase"].value for group in tested] == [arm.rate for arm in TESTS[2]]


def test_many_rounds_are_drawn_without_crowding(run_folder: Path) -> None:
    run = RunRecord.read(run_folder)
    html = render(replace(run, rounds=tuple(replace(run.rounds[k % 3], number=k) for k in range(90))))
    shown = re.findall(r"A/B test of</tspan>|>A/B test of<", html)
    assert html.count("<tbody>") == 90
    assert len(shown) < 40


@pytest.mark.parametrize("rounds", [5, 10])
def test_labels_of_neighbouring_rates_do_not_overprint(run_folder: Path, rounds: int) -> None:
    """At a plateau, where the arms of all tests did about as well."""
    run = RunRecord.read(run_folder)
    flat = [
        replace(run.rounds[k % 3], number=k, test=ab_test(Arm(860, 1000), Arm(850 + k, 1000), 0.05))
        for k in range(rounds)
    ]
    found = plots.steps(replace(run, rounds=tuple(flat)))
    with rc_context(svg.STYLE):
        figure = plots.drawn(found, True)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == plots.rates(found) == 2 * rounds + 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(axes.get_window_extent().y0 < box.y0 and box.y1 < axes.get_window_extent().y1 for box in boxes)


def test_a_gain_that_may_be_chance_is_called_so(tmp_path: Path) -> None:
    fake = finished(tmp_path / "data")
    fake.closing(Arm(400, 2000), Arm(410, 2000), 4)
    assert "and the difference may be chance (p = 0.35)" in verdict(RunRecord.read(fake.root)).sentence


def test_labels_of_a_log_are_text_and_no_markup(tmp_path: Path) -> None:
    fake = Fake(tmp_path / "data")
    fake.learn(0, fake.data(0, talks("$<b>x</b>$", None, Arm(3, 9), 0)))
    html = page(fake.root, tmp_path)
    assert "<b>" not in html
    assert "$&lt;b&gt;x&lt;/b&gt;$" in html


# --- damage ----------------------------------------------------------------------------------------------------------

DAMAGED = (
    "state.json",
    "turns/round=0001/turns.parquet",
    "rounds/0000/validated/validation.json",
    "rounds/0000/returns/returns.parquet",
    "rounds/0000/returns/stage.json",
    "rounds/0001/q/stage.json",
    "rounds/0001/q/calibration.json",
    "rounds/0001/improved/curves.json",
    "rounds/0001/improved/model/policy.json",
    "rounds/0002/gate/evidence.json",
    "rounds/0002/gate/examples.json",
    "rounds/0002/gate/stage.json",
    "rounds/closing/closing.json",
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("run") / "data").root


@pytest.mark.parametrize("damage", [b'{"cut', b'["another", "shape"]'], ids=["cut", "shape"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(run_folder: Path, name: str, damage: bytes, tmp_path: Path) -> None:
    file = run_folder / name
    content = file.read_bytes()
    file.write_bytes(damage)
    try:
        with pytest.raises(StoreError, match=re.escape(str(file))):
            write_report(run_folder, tmp_path / "report.html")
    finally:
        file.write_bytes(content)
    assert not (tmp_path / "report.html").exists()


def test_state_of_a_newer_version_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"format": 2})
    with pytest.raises(StoreError, match=r"state\.json: .*format 2, this program knows up to 1"):
        RunRecord.read(tmp_path)
    with pytest.raises(StoreError, match="no such folder"):
        RunRecord.read(tmp_path / "elsewhere")


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "above", "expected"),
    [
        ({"purchase": 1.0}, 0.0, "sells in"),
        ({"sold": 1.0}, 0.0, "sells in"),
        ({"success": 1.0}, 0.0, "succeeds in"),
        ({"signed up": 1.0}, 0.0, "reaches “signed up” in"),
        ({"purchase": 1.0, "rating": 0.2}, 0.0, "reaches an outcome in"),
        ({}, 0.0, "reaches an outcome in"),
        ({"escalated": -1.0}, WITHOUT_COST, "ends without “escalated” in"),
        ({"sale": -1.0, "refund": -2.0}, WITHOUT_COST, "ends without “refund” or “sale” in"),
        ({"purchase": 1.0, "escalated": -0.5}, 0.0, "gains more than it costs in"),
        ({"rating": 1.0}, 0.5, "succeeds (R above 0.5) in"),
        ({"escalated": -1.0}, -0.5, "succeeds (R above −0.5) in"),
    ],
)
def test_success_has_the_outcomes_name(outcomes: dict[str, float], above: float, expected: str) -> None:
    assert words.succeeds(outcomes, above) == expected


@pytest.mark.parametrize("recorded", [{}, {"success_above": WITHOUT_COST}], ids=["before", "recorded"])
def test_where_outcomes_are_costs_success_is_to_end_without(tmp_path: Path, recorded: dict[str, float]) -> None:
    """36 of 100 conversations escalate, whether or not the round recorded what a success was."""
    fake, cost = Fake(tmp_path / "data"), {"escalated": -1.0}
    fake.learn(0, fake.data(0, talks("logged", None, Arm(36, 100), 0), outcomes=cost, **recorded))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    said = text_of(page(fake.root, tmp_path))
    assert "In the log, 64.0% of conversations ended without “escalated”." in said
    assert "only an A/B test can tell whether it ends without “escalated” more often" in said
    assert "Success in the log 64.0%" in said and "One that ended without “escalated”." in said
    fake.state("collect", 1, [row(0, 1, fake.gate(0), ab_test(Arm(650, 1000), Arm(800, 1000), 0.05))])
    ended = "the assistant ends without “escalated” in 80.0% of conversations; in the log it was 64.0%."
    assert ended in text_of(page(fake.root, tmp_path))


def test_a_threshold_of_its_own_is_that_of_the_round(tmp_path: Path) -> None:
    fake, rated = Fake(tmp_path / "data"), {"rating": 0.5}
    fake.learn(0, fake.data(0, talks("logged", None, Arm(36, 100), 0), outcomes=rated, success_above=0.4))
    fake.state("test", 0, [row(0, 1, fake.gate(0))], {"salt": "round-0000", "champion": 1, "challenger": 2})
    said = text_of(page(fake.root, tmp_path))
    assert "whether it succeeds (R above 0.4) more often. In the log, 36.0% of conversations succeeded." in said
    assert "One whose R, the weighted sum of its outcomes, is above 0.4." in said
    fake.data(0, talks("logged", None, Arm(36, 100), 0), outcomes=rated, success_above=0.5)
    assert "In the log, 0.0% of conversations succeeded." in text_of(page(fake.root, tmp_path))


def test_numbers_are_written_as_readers_expect() -> None:
    assert (words.times(1), words.times(5)) == ("once", "5 times")
    assert words.percent(0.7134) == "71.3%"
    assert words.span(0.6931, 0.7329) == "69.3–73.3%"
    assert words.points(-0.0123) == "−1.2 points"
    assert [p_in_words(p) for p in (1e-9, 0.0123, 0.35)] == ["p < 0.001", "p = 0.012", "p = 0.35"]
    assert [words.count(n, "rounds") for n in (1, 2000)] == ["1 round", "2,000 rounds"]


def test_policies_of_a_log_are_told_from_ours() -> None:
    names = [words.policy(version).replace("\N{NO-BREAK SPACE}", " ") for version in ("2", "logged", "logged 2", "v 1")]
    assert names == ["policy 2", "logged policy", "logged policy 2", "policy v 1"]
