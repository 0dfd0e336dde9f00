"""Where conversations come from: the simulator as traffic, or the logs of a team through an importer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.environments.renovation import OUTCOMES, Renovation, Script, copying_curriculum
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import ConfigError, SourceError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.files import content_hash, write_json
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks.datasets import inbox, write_once
from tasks.learning import PolicyVersion
from tasks.progress import progress

if TYPE_CHECKING:
    from iterative_ppo.environments.rollout import Environment
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.sources import SetAside


LOGGED = "logged"


def environment(config: Config) -> Environment:
    """The simulator of `source.kind`. Raises ConfigError where the outcomes are not the simulator's."""
    if tuple(config.outcomes) != tuple(OUTCOMES):
        raise ConfigError(f"outcomes: the renovation simulator knows {list(OUTCOMES)}, got {list(config.outcomes)}")
    return Renovation(config.simulator.max_business_turns)


def scripted_corpus(config: Config) -> list[Conversation]:
    """Conversations of a mediocre scripted agent, for fine-tuning pi_0."""
    s = config.simulator
    agent = Script(s.corpus_skill, config.seed)
    return collect(agent, environment(config), s.corpus_conversations, config.seed + 100, "script")


def copying_lessons(config: Config) -> list[Conversation]:
    """A short curriculum in copying from the prompt, which a tiny model learns last."""
    lessons = copying_curriculum(
        int(config.simulator.copying_share * config.simulator.corpus_conversations), config.seed
    )
    return [Conversation(f"copying-{k}", turns, f"copying-{k}") for k, turns in enumerate(lessons)]


def simulate(
    config: Config, policy: PolicyVersion, conversations: int, seed: int, arm: str | None = None
) -> list[Conversation]:
    """Conversations of one registered policy with simulated customers."""
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.runtime import computing

    with computing(config.runtime), progress(f"conversations of policy {policy.version}") as report:
        pi: LanguagePolicy = LanguagePolicy.load(policy.path, device=config.runtime.device)
        return collect(
            pi,
            environment(config),
            conversations,
            seed,
            str(policy.version),
            arm,
            lambda done: report(done, conversations),
        )


def deliver(config: Config, name: str, arms: Sequence[tuple[PolicyVersion, str | None, int]], seed: int) -> Path:
    """Simulated traffic of one night, left whole in the inbox as live traffic would be."""
    talks = [
        talk
        for k, (policy, arm, conversations) in enumerate(arms)
        for talk in simulate(config, policy, conversations, seed + k, arm)
    ]
    frame = to_rows(config, talks)
    return write_once(inbox(config) / f"{name}.parquet", frame, config)


def to_rows(config: Config, talks: Sequence[Conversation]) -> pd.DataFrame:
    return turn_table.to_frame(talks, config.outcomes, config.data.evidence_share, config.data.split_by)


def outcome_of(talks: Sequence[Conversation]) -> Arm:
    """Successes among conversations."""
    return Arm(sum(sum(talk.turns[-1].outcomes) > 0 for talk in talks), len(talks))


def import_logs(config: Config) -> tuple[Path, list[Conversation], Counter[str]]:
    """Logs into the inbox as one turn table; what was set aside goes to quarantine, each with its reason.

    Returns the file, the conversations, and how many were set aside by reason. Raises SourceError where nothing is
    left, and what the importer raises.
    """
    from iterative_ppo.sources import import_log

    log = import_log(config)
    source = config.source.path
    name = f"{config.source.kind}-{content_hash(source) if source else ''}"
    reasons: Counter[str] = Counter(_kind_of_reason(s) for s in log.set_aside)
    if log.set_aside:
        rows = [
            {
                "conversation_id": s.conversation_id,
                "file": str(s.file),
                "row": s.row,
                "field": s.field,
                "reason": s.reason,
            }
            for s in log.set_aside
        ]
        write_json(config.data.root / "quarantine" / f"{name}.json", rows)
    if not log.conversations:
        raise SourceError(f"{source}: no usable conversation; see {config.data.root / 'quarantine' / name}.json")
    talks = [talk if talk.policy_version else replace(talk, policy_version=LOGGED) for talk in log.conversations]
    return write_once(inbox(config) / f"{name}.parquet", to_rows(config, talks), config), talks, reasons


def _kind_of_reason(aside: SetAside) -> str:
    """A reason without its place, for counting."""
    return "open: not closed yet" if aside.still_open else aside.reason.partition(": ")[2] or aside.reason
