"""The A/B test whose conversations became a round's data: which of them it counted, and how it judged them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from iterative_ppo.config import RuleConfig
from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.evaluation.assigned import Counted, assigned
from iterative_ppo.mdp.conversation import REPORTED
from iterative_ppo.mdp.labels import without_outcome
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group
from iterative_ppo.report.stored import optional, shaped, test_of

TEST = "ab_test.json"


@dataclass(frozen=True)
class Tested:
    """A decided A/B test of two policy versions.

    Attributes:
        counted: what its last look counted. window: hours within which an outcome counted.
        rules: of what nobody reported, by outcome; empty where only reports judged.
    """

    champion: str
    challenger: str
    test: ABTest
    counted: Counted
    window: float
    rules: Mapping[str, RuleConfig]

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows without those of its two policies that it did not count, with arms, and outcomes in time alone."""
        arms = {self.champion: CHAMPION, self.challenger: CHALLENGER}
        table, ids = assigned(frame, arms, self.window), frame["conversation_id"]
        counted = table[self.counted(table["start"])]
        arm = frame["arm"].fillna(ids.map(counted["version"].map(arms)))
        late = ids.isin(counted.index[~counted["in_time"]])
        found = without_outcome(frame.assign(arm=arm), late)
        return found[~ids.isin(table.index) | ids.isin(counted.index)]

    def judged(self, group: Group) -> Group:
        """The group with the test's own count of successes, where it is one of its arms."""
        if (group.arm, group.policy) == (CHAMPION, self.champion):
            return replace(group, success=self.test.champion)
        if (group.arm, group.policy) == (CHALLENGER, self.challenger):
            return replace(group, success=self.test.challenger)
        return group


def read_tested(path: Path) -> Tested | None:
    """Of a round's ab_test.json; None where there is none, or where an earlier version did not say what it counted."""
    values = optional(path)
    with shaped(path):
        if values is None or "counted" not in values:
            return None
        tested, test = values["experiment"], test_of(values["test"])
        labels, window = (tested["settings"].get(key) for key in ("labels", "data.outcome_window_hours"))
        if test is None or labels is None or window is None:
            return None
        rules = {} if labels == REPORTED else {name: RuleConfig(**rule) for name, rule in labels.items()}
        pair = str(tested["champion"]), str(tested["challenger"])
        return Tested(*pair, test, Counted.from_dict(values["counted"]), float(window), rules)
