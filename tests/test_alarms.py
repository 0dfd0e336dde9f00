"""A champion that serves worse raises an alarm; one that is as it was raises none, however often one looks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from iterative_ppo.config import load_config
from iterative_ppo.evaluation.alarms import ABSTENTION, ACCEPTANCE, LENGTH, OUTCOME, alarms, measure
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, Suggestion, Turn
from iterative_ppo.mdp.turn_table import to_frame, write
from tasks import watch
from tasks.datasets import round_folder

ALARMS = load_config().alarms
SERVED = {OUTCOME: 0.3, ACCEPTANCE: 0.8, ABSTENTION: 0.1, LENGTH: 10.0}


def served(conversations: int, rng: np.random.Generator, **changed: float) -> dict[str, np.ndarray]:
    """Measures of conversations of four turns."""
    mean = SERVED | changed
    return {
        OUTCOME: (rng.random(conversations) < mean[OUTCOME]).astype(float),
        ACCEPTANCE: rng.binomial(4, mean[ACCEPTANCE], conversations) / 4,
        ABSTENTION: rng.binomial(4, mean[ABSTENTION], conversations) / 4,
        LENGTH: rng.normal(mean[LENGTH], 3, conversations),
    }


@pytest.mark.parametrize(
    ("changed", "measures"),
    [
        ({OUTCOME: 0.15}, [OUTCOME]),
        ({ACCEPTANCE: 0.6}, [ACCEPTANCE]),
        ({ABSTENTION: 0.5}, [ABSTENTION]),
        ({LENGTH: 30.0}, [LENGTH]),
        ({LENGTH: 2.0}, [LENGTH]),
        ({OUTCOME: 0.0, ABSTENTION: 1.0, LENGTH: 0.0}, [OUTCOME, ABSTENTION, LENGTH]),
        ({OUTCOME: 0.6, ACCEPTANCE: 0.99, ABSTENTION: 0.0, LENGTH: 12.0}, []),
    ],
)
def test_what_became_worse_is_named(changed: dict[str, float], measures: list[str]) -> None:
    rng = np.random.default_rng(1)
    found = alarms(served(1500, rng), served(1200, rng, **changed), ALARMS)
    assert [alarm.measure for alarm in found] == measures
    for alarm in found:
        assert alarm.conversations == 1000, "the last look that raised it: at 500, at 1000"
        assert alarm.since == pytest.approx(changed[alarm.measure], abs=0.3)
        assert alarm.level == pytest.approx(ALARMS.alpha / 5 / 6) and alarm.p_value < alarm.level
    assert not found or "worse by more than" in str(found[0])


@pytest.mark.parametrize(("rate", "now", "raised"), [(0.048, 0.0, True), (0.048, 0.01, True), (0.048, 0.03, False)])
def test_of_a_rate_of_a_few_percent_half_may_be_lost(rate: float, now: float, raised: bool) -> None:
    rng = np.random.default_rng(5)
    found = alarms(served(1500, rng, **{OUTCOME: rate}), served(4000, rng, **{OUTCOME: now}), ALARMS)
    assert [alarm.measure for alarm in found] == [OUTCOME] * raised
    assert not found or found[0].margin == pytest.approx(found[0].before / 2)


def test_too_little_is_known_at_first() -> None:
    rng = np.random.default_rng(2)
    before, since = served(1500, rng), served(600, rng, **{OUTCOME: 0.0})
    for count, raised in ((0, False), (499, False), (500, True), (600, True)):
        assert bool(alarms(before, {name: values[:count] for name, values in since.items()}, ALARMS)) == raised
    nothing = {name: np.zeros(0) for name in since}
    assert alarms(nothing, since, ALARMS) == ()


def test_a_conversation_without_a_value_does_not_count() -> None:
    rng = np.random.default_rng(3)
    before, since = served(1500, rng), served(1200, rng, **{ACCEPTANCE: 0.6})
    since[LENGTH][::2] = np.nan
    before[ABSTENTION][:] = np.nan
    assert [alarm.measure for alarm in alarms(before, since, ALARMS)] == [ACCEPTANCE]
    since[ACCEPTANCE][:] = np.nan
    assert alarms(before, since, ALARMS) == ()


def test_false_alarms_over_all_measures_and_looks_stay_below_alpha() -> None:
    """The worst case: every measure is exactly its margin worse, and three looks are taken."""
    config, runs = ALARMS.model_copy(update={"conversations": 200, "alpha": 0.2}), 150
    rng = np.random.default_rng(4)
    edge = {OUTCOME: 0.25, ACCEPTANCE: 0.75, ABSTENTION: 0.15, LENGTH: 15.0}
    raised = sum(bool(alarms(served(1000, rng), served(900, rng, **edge), config)) for _ in range(runs))
    assert raised / runs <= 0.2 + 3 * (0.2 * 0.8 / runs) ** 0.5
    assert raised > 0, "nothing would ever be raised"


def talk(name: str, sold: float, *turns: tuple[Any, str | None]) -> Conversation:
    said = [Turn("hi", (0.0,), action, "ok", adoption) for action, adoption in turns]
    return Conversation(name, (*said, Turn(None, (sold,))), f"customer of {name}")


def test_a_conversation_is_measured_by_its_turns() -> None:
    two, four = Suggestion("two words", "suggested"), Suggestion("these are four words", "suggested")
    missing = Suggestion(None, "missing")
    talks = [
        talk("b", 1.0, (two, "verbatim"), (four, "rejected"), (ABSTAIN, None)),
        talk("a", 0.0, (two, "edited"), (two, "no_reply")),
        talk("c", 0.0, (missing, None)),
    ]
    found = measure(to_frame(talks, {"sold": 1.0}, 0.2))
    order = list(dict.fromkeys(to_frame(talks, {"sold": 1.0}, 0.2)["conversation_id"]))
    by_name = {name: {key: values[k] for key, values in found.items()} for k, name in enumerate(order)}
    assert by_name["b"] == pytest.approx({OUTCOME: 1.0, ACCEPTANCE: 0.5, ABSTENTION: 1 / 3, LENGTH: 14.5})
    assert by_name["a"] == pytest.approx({OUTCOME: 0.0, ACCEPTANCE: 1.0, ABSTENTION: 0.0, LENGTH: 9.0})
    assert by_name["c"][OUTCOME] == 0.0
    assert all(np.isnan(by_name["c"][key]) for key in (ACCEPTANCE, ABSTENTION, LENGTH))


def test_length_is_told_of_languages_without_spaces_too() -> None:
    short, long = (Suggestion(text, "suggested") for text in ("您好。", "您好，感谢您联系我们。"))
    talks = [talk("a", 0.0, (short, None)), talk("b", 0.0, (long, None)), talk("c", 0.0, (short, None), (long, None))]
    assert sorted(measure(to_frame(talks, {"sold": 1.0}, 0.2))[LENGTH]) == [3.0, 7.0, 11.0]


def test_successes_that_came_before_the_failures_of_their_days_do_not_count_yet(tmp_path: Path) -> None:
    """A third of 60 a day sell, for nine days: a sale is here at once, and who leaves is so after 72 hours of silence.

    Of all that is here .43 sold, which a champion would be held against for as long as it serves.
    """
    config = load_config(overrides={"data.root": tmp_path})
    begin, now, here, old = datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=9), [], set()
    for k in range(9 * 60):
        ended, sold = timedelta(minutes=24 * k), k % 3 == 0
        if sold or ended < now - timedelta(hours=72):
            turn = Turn("hi", (0.0,), Suggestion("hello", "suggested"), "hello", "verbatim", begin + ended)
            last = Turn("yes" if sold else None, (float(sold),), timestamp=begin + ended)
            here.append(Conversation(f"{k}", (turn, last), f"customer {k}", policy_version="2"))
            old |= {f"{k}"} if ended < now - timedelta(hours=74) else set()
    write(to_frame(here, config.outcomes, 0.2), round_folder(config, 1) / "arrived" / "a.parquet", config.outcomes)
    kept = pd.read_parquet(watch.keep_what_it_is_promoted_on(config, 0, 2))
    assert old <= set(kept.index) and len(kept) <= len(old) + 5
    assert kept["outcome"].mean() == pytest.approx(1 / 3, abs=0.01)
    assert np.mean([sum(talk.turns[-1].outcomes) for talk in here]) > 0.42
