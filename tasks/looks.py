"""Looks at the running A/B test: the conversations that arrived as evidence, what a look finds, and its guardrails.

A conversation is assigned when it begins, by its first timestamp. Its outcome counts if it comes within
`data.outcome_window_hours`. One that is left without an outcome is here only after a silence as long, so what began
less than two windows ago may lack just those; it is not looked at yet. Simulated customers have no clock that a test
could go by, whatever timestamps they bear: their conversations are ordered as they arrived, and all have matured.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import ConfigError, StoreError, TurnTableError
from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.evaluation.assigned import Counted, assigned
from iterative_ppo.evaluation.clusters import equal_businesses
from iterative_ppo.evaluation.designs import design_of
from iterative_ppo.evaluation.experiment import LEAST_BUSINESSES, History, Look, comparable
from iterative_ppo.evaluation.gate import chances, waiting
from iterative_ppo.evaluation.guardrails import Said, guarded, harm
from iterative_ppo.evaluation.inference import inference
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.ramp import Ramp
from iterative_ppo.learning.objective import more_than_success, success_above
from tasks.datasets import arrived, trained_on_before
from tasks.labels import definition, judged
from tasks.state import Experiment, NightState
from tasks.turn_checks import sifted

log = logging.getLogger("iterative_ppo.looks")
HOUR = pd.Timedelta(hours=1)
DESIGN = ("design", "conversations", "challenger_share", "looks", "mde", "success_above", "ramp", "ramp_hours", "unit")
PAIRED = "business_conversations"
HARM_LEAST = {"conversation": 50, "business": 10}
"""Units of the challenger's before anybody looks for harm."""
WINDOWS = 2
LEAST_HOURS = 24.0
"""Of traffic, before its pace is told: hours of a day differ."""


@dataclass(frozen=True)
class Pace:
    """How fast evidence comes.

    Attributes:
        opens: when the ramp's last stage begins. hourly: conversations that begin an hour, both arms together.
        maturity: hours from then until one has matured.
    """

    opens: datetime
    hourly: float
    maturity: float

    def matured(self, conversations: int) -> datetime:
        """About when so many have matured."""
        return self.opens + timedelta(hours=conversations / self.hourly + self.maturity)


@dataclass(frozen=True)
class Evidence:
    """What may be looked at, and what may not yet.

    Attributes:
        history: the matured conversations of the ramp's last stage.
        turns: their rows of the turn table. begun: the rows of all since the start, for what needs no outcome.
        counted: which conversations the first are.
        ramp, maturing: conversations of the ramp's safety stages, and later ones that have not matured. faulty:
            conversations left out because they break the turn table's rules, as validation will. strangers: because
            they are of neither arm, nor led by a persona. earlier: because they began before the test did. pace: of
            all that began, once a day of timestamps tells it.
    """

    history: History
    turns: pd.DataFrame
    begun: pd.DataFrame
    counted: Counted
    ramp: int
    maturing: int
    faulty: int = 0
    strangers: int = 0
    earlier: int = 0
    pace: Pace | None = None

    @property
    def arms(self) -> tuple[int, int]:
        """Conversations of champion and challenger."""
        challengers = int(self.history.challenger.sum())
        return len(self.history.challenger) - challengers, challengers

    @property
    def missing(self) -> str | None:
        """Why there is nothing to look at, or None."""
        empty = [name for name, count in zip(("champion", "challenger"), self.arms, strict=True) if not count]
        if not empty:
            return None
        whose = f"the {empty[0]} arm holds no" if len(empty) == 1 else "neither arm holds a"
        waiting = f"{self.ramp} of the ramp's first stages, {self.maturing} still maturing"
        waiting += f", {self.earlier} from before it began" if self.earlier else ""
        return f"{whose} matured conversation yet ({waiting})"


@dataclass(frozen=True)
class Finding:
    """What a look found. `test` is None where it compared nothing or the test goes on.

    `counted` tells the conversations that it compared, None where it compared nothing.
    """

    look: Look
    guardrails: tuple[NonInferiority, ...] = ()
    test: ABTest | None = None
    counted: Counted | None = None

    def kept_in(self, tested: Experiment) -> Experiment:
        """The experiment with this look among its own."""
        found = [one.as_dict() for one in self.guardrails]
        return tested.model_copy(update={"looks": [*tested.looks, self.look.as_dict()], "guardrails": found})


def ended(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """A decided experiment with all of its looks, the last one's guardrails, and its figures."""
    tested = evidence["experiment"]
    looks = [*tested.get("looks", []), *([evidence["look"]] if "look" in evidence else [])]
    return {**tested, "looks": looks, "guardrails": evidence.get("guardrails", [])}


def settings_of(config: Config) -> dict[str, Any]:
    """What defines a test's evidence, JSON-able."""
    test = config.abtest.model_dump(mode="json")
    names = (*DESIGN, PAIRED) if config.abtest.design == "anytime" else DESIGN
    return {
        **{f"abtest.{name}": test[name] for name in names},
        "gate.alpha": config.gate.alpha,
        "outcomes": dict(config.outcomes),
        "labels": definition(config),
        "data.outcome_window_hours": config.data.outcome_window_hours,
    }


def running(state: NightState) -> Experiment:
    """The test that runs. Raises StoreError where none is recorded."""
    if state.experiment is None:
        raise StoreError("state.json: phase is test but no experiment is recorded; restore the file")
    return state.experiment


def unchanged(config: Config, tested: Experiment) -> None:
    """Raises ConfigError where what defines the test's evidence is not what it was when the test began."""
    now = settings_of(config)
    for key, began in tested.settings.items():
        if now.get(key) != began:
            raise ConfigError(
                f"{key}: the A/B test {tested.salt!r} began with {began!r}, now it is {now.get(key)!r}; set it back, "
                "or end the test with `ippo abtest --stop` and its reason"
            )


def evidence(config: Config, state: NightState, now: datetime) -> Evidence | None:
    """What has arrived of the running test; None where nothing has.

    Raises TurnTableError for conversations that cannot be evidence, and ConfigError where the arms are defined
    differently or the settings are no longer those that the test began with.
    """
    tested, frame = running(state), arrived(config, state.gathering)
    unchanged(config, tested)
    if frame is None:
        return None
    frame = judged(frame, config)
    frame, faulty = _sound(frame, config, state)
    strangers = _strangers(frame, tested)
    table = _conversations(frame, tested, config)
    began = table["start"]
    if config.source.simulated:
        table = table.assign(start=pd.Series(pd.NaT, began.index, began.dtype))
    earlier = _of_earlier_tests(table, tested, state)
    table = table[~earlier]
    _check(table, config, state)
    times = _times(table, config, tested, now)
    due = times.hours <= times.now - times.maturity
    table = table.assign(hours=times.hours)
    chosen = table[due & times.last_stage].sort_values("hours", kind="stable")
    history = History(
        challenger=chosen["challenger"].to_numpy(dtype=bool),
        outcome=chosen["success"].to_numpy(dtype=float),
        assigned=chosen["hours"].to_numpy(dtype=float),
        now=times.now,
        window=times.maturity,
        business=_business(chosen, config),
        earlier=tuple(Look.from_dict(one) for one in tested.looks),
    )
    turns = frame[frame["conversation_id"].isin(chosen.index)]
    begun = frame[frame["conversation_id"].isin(table.index[times.hours >= 0])]
    ramp, maturing = int((~times.last_stage).sum()), int((times.last_stage & ~due).sum())
    left_out = faulty, strangers, int(earlier.sum())
    counted = Counted.of(began[chosen.index])
    return Evidence(history, turns, begun, counted, ramp, maturing, *left_out, _pace(times, config, tested))


def take(config: Config, tested: Experiment, seen: Evidence) -> Finding:
    """What the configured design makes of the evidence. Guardrails and figures come only with a look that compares.

    An empty arm is waited for, unless so many conversations without it are a fault of their own. While the test goes
    on, a guardrail that the challenger is shown to break in any of the conversations since the start halts it.
    """
    look = design_of(config.abtest, config.gate.alpha).look(seen.history)
    if seen.missing and look.verdict != "halt":
        look = replace(look, verdict="continue", reasons=(seen.missing,))
    if look.verdict == "continue":
        arms, least = _arms(config, tested, seen.begun), HARM_LEAST[config.abtest.unit]
        broken = harm(config.gate.guardrails, *arms, config.gate.alpha, least)
        look = replace(look, verdict="halt", reasons=(broken,)) if broken else look
    if look.verdict == "halt" or (look.verdict == "continue" and (seen.missing or look.statistic is None)):
        return Finding(look)
    level = config.gate.alpha / chances(look, seen.history.earlier)
    guardrails = guarded(config.gate.guardrails, *_arms(config, tested, seen.turns), level)
    look = waiting(look, seen.history.earlier, guardrails)
    decides = look.verdict != "continue"
    test = inference(config.abtest, config.gate.alpha, seen.history, look) if decides else None
    return Finding(look, guardrails, test, seen.counted)


def _arms(config: Config, tested: Experiment, turns: pd.DataFrame) -> tuple[Said, Said]:
    """What champion and challenger said in these rows."""
    unit = "business_id" if config.abtest.unit == "business" else "conversation_id"
    rewarded = more_than_success(config)
    champion, challenger = (
        Said.of_turns(_of(turns, version), unit, rewarded) for version in (tested.champion, tested.challenger)
    )
    return champion, challenger


def _sound(frame: pd.DataFrame, config: Config, state: NightState) -> tuple[pd.DataFrame, int]:
    """The rows that keep the turn table's rules, and how many conversations break them.

    Raises TurnTableError where that is more than validation allows.
    """
    (kept, found), conversations = sifted(frame, config.outcomes), frame["conversation_id"].nunique()
    if len(found) > config.data.quarantine_share * conversations:
        raise TurnTableError(
            f"A/B test: {len(found)} of {conversations} conversations break the turn table's rules, "
            f"data.quarantine_share allows {config.data.quarantine_share:.1%}; the first is {found.index[0]!r}, "
            f"{found.iloc[0]}; mend who logs, and the files in rounds/{state.gathering:04d}/arrived"
        )
    return kept, len(found)


def _conversations(frame: pd.DataFrame, tested: Experiment, config: Config) -> pd.DataFrame:
    """`assigned` of either arm, with whether that is the challenger's and whether it is a success."""
    table = assigned(frame, _versions(tested), config.data.outcome_window_hours)
    success = table["outcome"].where(table["in_time"], 0.0) > success_above(config)
    return table.assign(challenger=(table["version"] == str(tested.challenger)).astype(bool), success=success)


def _of_earlier_tests(table: pd.DataFrame, tested: Experiment, state: NightState) -> pd.Series:
    """(C,) bool: conversations that began before the test did, and are here late, as those are that nobody won.

    Without a time, those of today's champion as the challenger that it was.
    """
    began = pd.Timestamp(tested.started) if tested.started else pd.NaT
    was_challenger = any(one.get("challenger") == tested.champion for one in state.rounds)
    theirs = table["start"].isna() & (table["arm"] == "challenger").fillna(False) & ~table["challenger"]
    return (table["start"] < began) | (theirs & was_challenger)


def _of_either_arm(frame: pd.DataFrame, tested: Experiment) -> pd.Series:
    """(N,) bool: rows that the test's champion or challenger answered."""
    return frame["policy_version"].isin(_versions(tested))


def _versions(tested: Experiment) -> list[str]:
    return [str(tested.champion), str(tested.challenger)]


def _strangers(frame: pd.DataFrame, tested: Experiment) -> int:
    """Conversations of neither arm. A persona's are not meant for the test; others show that somebody logs amiss."""
    plain = frame[frame["persona"].isna()]
    others = plain[~plain["conversation_id"].isin(plain["conversation_id"][_of_either_arm(plain, tested)])]
    if count := int(others["conversation_id"].nunique()):
        pair = f"neither {tested.champion} nor {tested.challenger}"
        versions = ", ".join(sorted(map(str, others["policy_version"].unique()))[:3])
        log.warning("A/B test: %d conversations are of policy_version %s, %s; they are left out", count, versions, pair)
    return count


def _check(table: pd.DataFrame, config: Config, state: NightState) -> None:
    """Raises TurnTableError, naming a conversation, or ConfigError, where these are not a test's two arms."""
    role = table["challenger"].map({True: "challenger", False: "champion"})
    wrong = table[table["arm"].notna() & (table["arm"].astype(object) != role)]
    if len(wrong):
        one = wrong.iloc[0]
        raise TurnTableError(
            f"A/B test: conversation {wrong.index[0]!r} of policy {one['version']} is labelled as of the "
            f"{one['arm']}'s arm; mend who serves or logs, then end the test with `ippo abtest --stop`"
        )
    if (trained_on := trained_on_before(config, table.index, state.gathering)) is not None:
        name, number = trained_on
        raise TurnTableError(
            f"A/B test: conversation {name!r} is in the dataset of round {number}, which the challenger was trained "
            f"on: evidence of another data set; take it out of rounds/{state.gathering:04d}/arrived"
        )
    champion, challenger = table[~table["challenger"]], table[table["challenger"]]
    if len(champion) and len(challenger):
        comparable(_definition(champion, config), _definition(challenger, config))
    if table["start"].isna().any() and table["start"].notna().any():
        name = table.index[table["start"].isna()][0]
        raise TurnTableError(f"A/B test: conversation {name!r} has no timestamp although others have; log it for all")
    if config.abtest.unit == "business" and table["business"].isna().any():
        name = table.index[table["business"].isna()][0]
        raise TurnTableError(f"A/B test: conversation {name!r} has no business_id, but abtest.unit is business")


def _definition(arm: pd.DataFrame, config: Config) -> dict[str, str]:
    found = {"timestamps": _known(arm["start"])}
    return {**found, "business ids": _known(arm["business"])} if config.abtest.unit == "business" else found


def _known(values: pd.Series) -> str:
    return "in all conversations" if values.notna().all() else "in some" if values.notna().any() else "in none"


@dataclass(frozen=True)
class Times:
    """When conversations were assigned, in hours since the test's start, and what that makes of them.

    Attributes:
        hours: (N,). last_stage: (N,) bool, whether the ramp was in its last stage.
        now: the clock. maturity: hours from assignment until a conversation and its outcome are surely here.
    """

    hours: np.ndarray
    last_stage: np.ndarray
    now: float
    maturity: float


def _times(table: pd.DataFrame, config: Config, tested: Experiment, now: datetime) -> Times:
    """The clock is the newest time in the traffic that has been: later traffic may not be here yet, and a date in the
    future is an error of who logs.
    """
    if len(table) and table["start"].isna().all():
        if config.abtest.ramp and not config.source.simulated:
            raise ConfigError(
                "abtest.ramp: the conversations have no timestamps, so its stages cannot be told apart; log "
                "timestamps, or end the test and set abtest.ramp=[]"
            )
        if config.abtest.design == "anytime" and not config.source.simulated:
            raise ConfigError(
                "abtest.design anytime bets on conversations in the order in which they began, and these have no "
                "timestamps; log them, or end the test and set abtest.design to group_sequential"
            )
        return Times(np.zeros(len(table)), np.ones(len(table), dtype=bool), 0.0, 0.0)
    start = pd.Timestamp(tested.started) if tested.started else table["start"].min()
    hours = ((table["start"] - start) / HOUR).to_numpy(dtype=float)
    ends = table["end"][table["end"] <= pd.Timestamp(now)]
    if late := len(table) - len(ends):
        log.warning("A/B test: %d conversations end after now, %s; see who logs", late, f"{now:%Y-%m-%d %H:%M}")
    clock = ((ends.max() if len(ends) else pd.Timestamp(now)) - start) / HOUR
    return Times(hours, Ramp.of(config.abtest).evidence(hours), clock, maturity_hours(config))


def _pace(times: Times, config: Config, tested: Experiment) -> Pace | None:
    begun = int((times.hours >= 0).sum())
    if tested.started is None or times.now < LEAST_HOURS or not begun:
        return None
    opens = tested.started + timedelta(hours=Ramp.of(config.abtest).evidence_from)
    return Pace(opens, begun / times.now, times.maturity)


def maturity_hours(config: Config) -> float:
    """Hours from a conversation's assignment until it and its outcome are surely here."""
    return WINDOWS * config.data.outcome_window_hours


def _business(table: pd.DataFrame, config: Config) -> np.ndarray | None:
    """(N,) ids, where they matter: businesses are assigned, or there are enough of like size.

    Where conversations are assigned the test keeps its level without them, and one large business would be nearly all
    of the score's spread, so that no gain could pass.
    """
    business = table["business"]
    if config.abtest.unit != "business":
        sizes = business.value_counts().to_numpy(dtype=float)
        if business.isna().any() or equal_businesses(sizes) < LEAST_BUSINESSES:
            return None
    return business.to_numpy(dtype=object).astype(str)


def _of(turns: pd.DataFrame, version: int) -> pd.DataFrame:
    """The rows of a version's conversations, by who answered first."""
    first = turns.dropna(subset=["policy_version"]).groupby("conversation_id", sort=False)["policy_version"].first()
    return turns[turns["conversation_id"].isin(first.index[first == str(version)])]
