"""Where conversations come from: the simulator as traffic, or the logs of a team through an importer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.environments.own import Scripted, own_code, own_environment, script_of, version_of
from iterative_ppo.environments.renovation import OUTCOMES, Renovation, Script
from iterative_ppo.environments.rollout import Customer, collect, customers, serve
from iterative_ppo.errors import ConfigError, SourceError
from iterative_ppo.files import content_hash, write_json
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks.assignment import Assigned
from tasks.datasets import LOGGED, inbox, write_once
from tasks.inbox import here_already
from tasks.learning import PolicyVersion
from tasks.progress import progress
from tasks.turn_checks import check_log_probs, check_parts

if TYPE_CHECKING:
    from iterative_ppo.environments.rollout import Environment
    from iterative_ppo.sources import ImportedLog


EXPLORATION = "exploration"
"""The arm of simulated conversations that a persona led: no arm of a test."""


def environment(config: Config) -> Environment:
    """The simulator of `source.kind`. Raises ConfigError where it is not there, or the outcomes are not its own."""
    if config.source.kind == "environment":
        return own_environment(None if config.source.path is None else str(config.source.path))
    if tuple(config.outcomes) != tuple(OUTCOMES):
        raise ConfigError(f"outcomes: the renovation simulator knows {list(OUTCOMES)}, got {list(config.outcomes)}")
    return Renovation(config.simulator.max_business_turns)


def _told_of(config: Config) -> AbstractContextManager[None]:
    """Where code of the user's own may run."""
    return own_code(str(config.source.path)) if config.source.kind == "environment" else nullcontext()


def version_of_environment(config: Config) -> str:
    """The simulator of `source.kind`, for what depends on it; of one's own with a hash of its file."""
    own = config.source.path if config.source.kind == "environment" else None
    return version_of(str(own)) if own else config.source.kind


def scripted_corpus(config: Config) -> list[Conversation]:
    """Conversations of a mediocre scripted agent, for fine-tuning pi_0."""
    s = config.simulator
    world = environment(config)
    agent = Script(s.corpus_skill, config.seed) if isinstance(world, Renovation) else script_of(world, config.seed)
    with _told_of(config):
        return collect(agent, world, s.corpus_conversations, config.seed + 100, "script")


def first_corpus(config: Config) -> tuple[list[Conversation], str]:
    """What a night's pi_0 is made from where there is no champion yet: a corpus and its name.

    Raises ConfigError where only the simulator could give one, and the customers are a team's own.
    """
    kind = config.source.kind
    if kind == "renovation":
        return scripted_corpus(config), "scripted"
    if kind == "environment" and (config.policy.fine_tuned or isinstance(environment(config), Scripted)):
        return scripted_corpus(config), f"scripted, {version_of_environment(config)}"
    if config.policy.fine_tuned:
        raise ConfigError(
            f"no champion yet, and at night source.kind {kind} brings no corpus to fine-tune one on; begin with `ippo "
            f"run --source {kind} --path LOG`, or set policy.init to prompt and policy.base_model to a model that talks"
        )
    return [], "base model"


def simulate(config: Config, policy: PolicyVersion, conversations: int, seed: int) -> list[Conversation]:
    """Conversations of one registered policy with simulated customers."""
    with _told_of(config):
        new = customers(environment(config), conversations, seed, f"{policy.version}-collect-{seed}")
    return _answered(config, policy, new, seed)


def deliver(
    config: Config,
    name: str,
    conversations: int,
    seed: int,
    who: Callable[[str], Assigned],
    policy: Callable[[int], PolicyVersion],
) -> Path:
    """Simulated traffic of one night, left whole in the inbox as live traffic would be, in the order it came.

    Args:
        who: answers the conversation, or the business (`abtest.unit`), of an id. policy: of a version.
    """
    met: dict[Assigned, list[Customer]] = {}
    with _told_of(config):
        come = customers(environment(config), conversations, seed, f"{name}-{seed}")
    for one in come:
        unit = one.business_id if config.abtest.unit == "business" else one.conversation_id
        met.setdefault(who(unit), []).append(one)
    talks = [
        talk
        for k, (chosen, theirs) in enumerate(sorted(met.items(), key=lambda pair: _in_order(pair[0])))
        for talk in _answered(config, policy(chosen.version), theirs, seed + k, _arm(chosen), chosen.persona)
    ]
    frame = to_rows(config, sorted(talks, key=lambda talk: talk.conversation_id))
    check_parts(frame, config)
    return write_once(inbox(config) / f"{name}.parquet", frame, config)


def _in_order(chosen: Assigned) -> tuple[int, str]:
    return chosen.version, chosen.persona or ""


def _arm(chosen: Assigned) -> str:
    return chosen.arm or ("champion" if chosen.persona is None else EXPLORATION)


def _answered(
    config: Config,
    policy: PolicyVersion,
    new: Sequence[Customer],
    seed: int,
    arm: str | None = None,
    persona: str | None = None,
) -> list[Conversation]:
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.runtime import computing

    with computing(config.runtime), progress(f"conversations of policy {policy.version}") as report:
        pi: LanguagePolicy = LanguagePolicy.load(policy.path, device=config.runtime.device)
        speaker = pi if persona is None else pi.led_by(config.exploration.personas[persona])
        with _told_of(config):
            talks = serve(speaker, new, seed, str(policy.version), arm, lambda done: report(done, len(new)))
    return [replace(talk, persona=persona) for talk in talks]


def to_rows(config: Config, talks: Sequence[Conversation]) -> pd.DataFrame:
    return turn_table.to_frame(talks, config.outcomes, config.data.evidence_share, config.data.split_by)


_LOG = logging.getLogger("iterative_ppo.traffic")
EARLY_TOLD = (
    "stands before the end: expected in the last row of its conversation, found in the first; write 0 or null in those "
    "before the last, also where the export repeats it in each"
)

IMPORT = "import.json"
"""Of a round's folder: what its import came to, for the report."""


@dataclass(frozen=True)
class Imported:
    """What an importer made of logs: `name` says their source and content, `set_aside` counts the rest by reason."""

    name: str
    conversations: list[Conversation]
    set_aside: Counter[str]
    quarantine: Path
    """What was set aside, each with its file, row and reason; there where anything was."""
    known: int = 0
    """Conversations left out because they are here already."""

    @property
    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {"conversations": len(self.conversations), "set_aside": dict(self.set_aside.most_common())}

    def told(self) -> Iterator[str]:
        """What a person should know of it, a line each."""
        count = self.set_aside.total()
        where = f", each with its reason in {self.quarantine}" if count else ""
        yield f"{len(self.conversations)} conversations imported, {count} set aside{where}"
        for reason, times in self.set_aside.most_common():
            yield f"set aside: {times} {reason}"
        if self.known:
            yield f"{_counted(self.known, 'conversation')} left out: here already, by an earlier delivery"
        if to_come := sum(_begins_later(talk) for talk in self.conversations):
            yield f"{_counted(to_come, 'conversation')} with a timestamp later than now: a clock is off"
        left_out = [dropped for talk in self.conversations if (dropped := int(talk.extra.get("dropped_turns", "0")))]
        if left_out:
            went, turns = _counted(len(left_out), "conversation"), _counted(sum(left_out), "later turn")
            yield f"{went} went on after the outcome; {turns} left out"


def _begins_later(talk: Conversation) -> bool:
    now = datetime.now(UTC)
    return any(turn.timestamp is not None and turn.timestamp > now for turn in talk.turns)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def name_of_log(config: Config) -> str:
    """Its source and content, by which its file in the inbox is known."""
    source = config.source.path
    return f"{config.source.kind}-{content_hash(source) if source else ''}"


def import_logs(config: Config, before_ours: bool = False) -> tuple[Path | None, Imported]:
    """Logs into the inbox as one turn table. Returns the file and what `read_logs` does, and raises the same.

    A log may grow from import to import: of conversations that are here already nothing is taken twice, and where
    there are no others there is no file.

    Args:
        before_ours: they are older than any policy of this pipeline, so the versions that they name get names that
            none of its has: else its version 2 would be held for the one whom the log calls 2, and learn from returns
            of that. They are a whole round, so they have to hold what it needs (check_parts, check_log_probs).
    """
    log = read_logs(config)
    if before_ours:
        talks = [replace(talk, policy_version=_before_ours(str(talk.policy_version))) for talk in log.conversations]
        log = replace(log, conversations=talks)
    else:
        here = here_already(config)
        talks = [talk for talk in log.conversations if talk.conversation_id not in here]
        log = replace(log, conversations=talks, known=len(log.conversations) - len(talks))
        if not talks:
            return None, log
    rows = to_rows(config, log.conversations)
    if before_ours:
        check_parts(rows, config)
        check_log_probs(rows, config)
    return write_once(inbox(config) / f"{log.name}.parquet", rows, config), log


def _before_ours(version: str) -> str:
    return version if version == LOGGED else f"{LOGGED} {version}"


def read_logs(config: Config) -> Imported:
    """The conversations of logs; what was set aside goes to quarantine.

    Raises SourceError where nothing is left, where more than `data.quarantine_share` of the closed conversations are
    set aside for one outcome's range or place, and what the importer raises.
    """
    from iterative_ppo.sources import import_log

    log = import_log(config)
    source, name = config.source.path, name_of_log(config)
    quarantine = config.data.root / "quarantine" / f"{name}.json"
    if log.set_aside:
        write_json(quarantine, [{**asdict(one), "file": str(one.file)} for one in log.set_aside])
    _check_share(log, config, quarantine)
    if not log.conversations:
        first = f"; the first problem: {log.set_aside[0].reason}" if log.set_aside else ""
        raise SourceError(f"{source}: no usable conversation; see {quarantine}{first}")
    talks = [talk if talk.policy_version else replace(talk, policy_version=LOGGED) for talk in log.conversations]
    return Imported(name, talks, Counter(one.kind for one in log.set_aside), quarantine)


def _check_share(log: ImportedLog, config: Config, quarantine: Path) -> None:
    """What is lost for its outcome is not lost at random, all who bought, say; of other problems there is a warning."""
    bad = [one for one in log.set_aside if not one.still_open]
    closed, allowed = len(log.conversations) + len(bad), config.data.quarantine_share

    def of(count: int) -> str:
        return f"{count} of {closed} conversations ({count / closed:.1%}, data.quarantine_share allows {allowed:.1%})"

    found: dict[tuple[str, bool], list[float]] = {}
    for one in bad:
        if one.outcome is not None:
            found.setdefault((str(one.field), one.early), []).append(one.outcome)
    for (column, early), values in found.items():
        if len(values) > allowed * closed:
            told = EARLY_TOLD if early else _out_of_range(config, column, values)
            raise SourceError(f"{config.source.path}: {column!r} of {of(len(values))} {told}; see {quarantine}")
    if log.conversations and len(bad) > allowed * closed:
        _LOG.warning("%s: %s are set aside; see %s", config.source.path, of(len(bad)), quarantine)


def _out_of_range(config: Config, column: str, values: Sequence[float]) -> str:
    name = next(iter(config.outcomes)) if column == "outcome" else column.removeprefix(turn_table.OUTCOME_PREFIX)
    low, high = config.data.range_of(name)
    found = f"expected {low:g} to {high:g}, found {min(values):g} to {max(values):g} there"
    return f"is out of range: {found}; {ranges_to_set(name)}"


def ranges_to_set(outcome: str) -> str:
    """What to do about an outcome that is out of its range."""
    own = f"{{{outcome}: [LEAST, GREATEST]}}"
    return f"set data.outcome_low and data.outcome_high, or for it alone data.outcome_ranges: {own}"


def for_cloning(config: Config, talks: Sequence[Conversation]) -> list[Conversation]:
    """The fit part of a log: what pi_0 is cloned from, so that the evidence part stays unseen by it too."""
    share, split_by = config.data.evidence_share, config.data.split_by
    return [talk for talk in talks if turn_table.part_of_conversation(talk, share, split_by) == "fit"]
