"""The report's section on the A/B test: its looks, bounds and guardrails, while it runs and however it ends."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from ab_arms import abtest, history
from test_report import NOW, Fake, page, row, talks, text_of

from flows.abtest_views import guardrail_table
from iterative_ppo.config import load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.designs import design_of
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.gate import outcome_gate
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.evaluation.inference import inference
from iterative_ppo.evaluation.non_inferiority import Found, Guardrail, NonInferiority, proportion
from iterative_ppo.files import read_json, write_json
from iterative_ppo.report.page import render
from iterative_ppo.report.record import RunRecord

ALPHA = 0.05
SETTINGS = {"abtest.conversations": 2000, "abtest.looks": 4, "gate.alpha": ALPHA}
FIRST, SECOND = (Arm(60, 250), Arm(70, 250)), (Arm(118, 500), Arm(150, 500))
THIRD = (Arm(180, 750), Arm(240, 750))
LENGTH = Guardrail("length", "lower", margin=0.1, alpha=ALPHA)


def guardrail(successes: int) -> NonInferiority:
    return proportion(LENGTH, Arm(100, 500), Arm(successes, 500))


HELD, BROKEN = guardrail(90), guardrail(300)


@dataclass(frozen=True)
class Test:
    """A test of policy 2 against 1 with its looks taken."""

    __test__ = False

    arms: tuple[tuple[Arm, Arm], ...] = ()
    design: str = "group_sequential"
    guardrails: tuple[NonInferiority, ...] = (HELD,)

    @property
    def config(self) -> Any:
        return abtest(design=self.design, conversations=2000, looks=4)

    @property
    def looks(self) -> list[Look]:
        taken: list[Look] = []
        for arms in self.arms:
            taken.append(design_of(self.config, ALPHA).look(history(*arms, taken)))
        return taken

    def experiment(self) -> dict[str, Any]:
        return {
            "salt": "s",
            "champion": 1,
            "challenger": 2,
            "started": NOW.isoformat(),
            "settings": {**SETTINGS, "abtest.design": self.design},
            "looks": [look.as_dict() for look in self.looks],
            "guardrails": [one.as_dict() for one in self.guardrails] if self.arms else [],
        }

    def ended(self, offline: dict[str, Any]) -> dict[str, Any]:
        """The round's row as the nightly flow leaves it."""
        last = self.looks[-1]
        test = inference(self.config, ALPHA, history(*self.arms[-1], self.looks[:-1]), last)
        decision = outcome_gate(last, self.guardrails)
        facts = {"experiment": self.experiment(), "ab_test": test.as_dict(), "decision": decision.as_dict()}
        return {**row(0, 1, offline), **facts}


def begun(root: Path) -> tuple[Fake, dict[str, Any]]:
    """A round whose challenger passed the offline gate."""
    fake = Fake(root / "data")
    fake.learn(0, fake.data(0, talks(1, "champion", Arm(10, 40), 0)))
    return fake, fake.gate(0)


def running(root: Path, test: Test, phase: str = "test") -> str:
    fake, offline = begun(root)
    fake.state(phase, 0, [row(0, 1, offline)], test.experiment())
    return page(fake.root, root)


def section(html: str) -> str:
    return html[html.index('<section id="abtest">') : html.index('<section id="examples">')]


def test_a_running_test_shows_its_looks_and_what_is_ahead(tmp_path: Path) -> None:
    test = Test((FIRST, SECOND))
    html = section(running(tmp_path, test))
    said = text_of(html)
    assert "The running A/B test goes on" in said and "against policy 1, round 0: 2,000" in said
    first, second = test.looks
    for look in (first, second):
        assert look.statistic and look.bound
        assert f"{look.statistic:.3g} {look.bound:.3g}" in said
    assert "24.0% of 250 28.0% of 250 +4.0 points" in said and "23.6% of 500 30.0% of 500 +6.4 points" in said
    assert "Gain 90% interval" in said, "each end at alpha"
    assert html.count(">planned<") == 2
    assert "Length, 95th percentile 0.2 0.18" in said and "holds" in said and "broken" not in said
    assert html.count("<svg") == 1 and ">what was found<" in html and "matured conversations (% of 2,000)" in html


def test_before_the_first_look_only_bounds_are_shown(tmp_path: Path) -> None:
    html = section(running(tmp_path, Test()))
    assert "no look has been taken yet" in html and ">what was found<" not in html and html.count(">planned<") == 4
    assert "Its guardrails" not in html


def test_a_test_that_ended_with_its_first_look_has_no_path(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    fake.state("finished", 0, [Test(((Arm(240, 1000), Arm(330, 1000)),)).ended(offline)])
    html = page(fake.root, tmp_path)
    assert "<svg" not in section(html) and "the test was looked at once, at 100% of them." in text_of(section(html))
    assert "The A/B test was looked at once, at 100% of its plan" in text_of(html)


@pytest.mark.parametrize(("design", "statistic"), [("fixed", "z"), ("anytime", "e-value")])
def test_each_design_has_its_statistic(tmp_path: Path, design: str, statistic: str) -> None:
    html = section(running(tmp_path, Test((SECOND,), design)))
    assert f"<th>{statistic}</th>" in html and f">{statistic}</text>" in html


def test_a_halted_test_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    test = Test(((Arm(60, 300), Arm(30, 150)),))
    html = running(tmp_path, test)
    said = text_of(html)
    assert "A/B test halted" in said and "sample-ratio mismatch: 150 of 450 units" in said
    assert "`ippo abtest --stop`" in said and 'class="pill bad">halted' in section(html)
    assert section(html).count(">planned<") == 4, "a look that halted compared nothing"


def test_what_awaits_approval_says_so(tmp_path: Path) -> None:
    html = running(tmp_path, Test((FIRST, SECOND, THIRD)), "approve")
    assert 'class="pill open">awaits approval' in section(html)
    assert "A person is asked for approval" in text_of(html)


def test_a_void_test_says_why(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    void = {"experiment": Test((FIRST,)).experiment(), "void": "3 became the champion <b>meanwhile</b>"}
    fake.state("collect", 1, [{**row(0, 1, offline), **void}])
    html = page(fake.root, tmp_path)
    assert "The last A/B test" in html and 'class="pill plain">void' in section(html)
    assert section(html).count("3 became the champion &lt;b&gt;meanwhile") == 1
    assert "The A/B test ended without a verdict: 3 became" in html and 'class="pill plain">test void' in html


def test_a_broken_guardrail_rejects_a_better_challenger(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    test = Test((FIRST, SECOND, THIRD), guardrails=(BROKEN,))
    assert test.looks[-1].verdict == "promote"
    fake.state("collect", 1, [test.ended(offline)])
    html = page(fake.root, tmp_path)
    assert 'class="pill bad">rejected' in section(html)
    assert re.search(r'<li class="failed"><strong>Keeps to the usual length.</strong> length', section(html))
    assert re.search(r'<li class="passed"><strong>What customers did.</strong> challenger 32.0%', section(html))
    assert re.search(r"challenger 32.0% of 750, champion 24.0% of 750: \+8.0% \(90% interval \+", section(html))
    assert "A/B test 95% interval" in text_of(html)
    assert '<td class="broken">broken</td>' in html


def test_a_guardrail_that_cannot_be_told_is_not_called_broken(tmp_path: Path) -> None:
    """By the page, by the table at a terminal and by the offline gate's: 8 conversations tell nothing."""
    fake, offline = begun(tmp_path)
    few = proportion(replace(LENGTH, measure="pii"), Arm(0, 9), Arm(0, 8))
    test = Test((FIRST, SECOND, THIRD), guardrails=(few, HELD, BROKEN))
    fake.state("collect", 1, [test.ended(offline)])
    evidence = fake.folder(0) / "gate" / "evidence.json"
    limit = replace(few, measure=f"pii{LIMIT}", loss=0.2, p_value=1.0)
    write_json(evidence, read_json(evidence) | {"guardrails": [one.as_dict() for one in (few, HELD, BROKEN)]})
    html = page(fake.root, tmp_path)
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in section(html).split("<tr>")]
    found = {row[0]: row[-1] for row in rows if len(row) == 6 and row[-1] in get_args(Found)}
    assert found == {"Personal data": "not told", "Length, 95th percentile": "broken"}
    assert '<li class="unknown"><strong>Keeps personal data to itself.</strong> Not told: pii 0, champion 0' in html
    (column,) = guardrail_table({"guardrails": test.experiment()["guardrails"]}).columns[-1:]
    assert list(column.cells) == ["not told", "holds", "broken"]
    assert '<td>0<span class="sub">0</span><span class="sub">not told</span></td>' in html
    write_json(evidence, read_json(evidence) | {"guardrails": [few.as_dict(), limit.as_dict()]})
    assert RunRecord.read(fake.root).rounds[0].guardrails["pii"].found == "broken", "by its limit"


def test_a_limit_of_its_own_is_no_champions_value(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    limit = replace(HELD, measure=f"repetition{LIMIT}", champion=0.5, challenger=0.25, margin=0.0)
    fake.state("collect", 1, [Test((FIRST, SECOND, THIRD), guardrails=(HELD, limit)).ended(offline)])
    row = section(page(fake.root, tmp_path)).partition("Repeated bigrams, limit")[2].partition("</tr>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row)[:2] == ["", "0.25"] and "limit 0.5" in row


def test_a_promotion_shows_the_path_to_it(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    fake.state("collect", 1, [Test((FIRST, SECOND, THIRD)).ended(offline)])
    html = section(page(fake.root, tmp_path))
    assert 'class="pill good">promoted' in html and html.count(">planned<") == 1


def test_runs_without_a_test_have_no_section(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    old = {key: value for key, value in Test((FIRST,)).experiment().items() if key != "settings"}
    for experiment in (None, old):
        fake.state("test" if experiment else "collect", 0, [row(0, 1, offline)], experiment)
        assert 'id="abtest"' not in render(RunRecord.read(fake.root), now=NOW)


def test_damage_names_the_file(tmp_path: Path) -> None:
    fake, offline = begun(tmp_path)
    for broken in ({"looks": [{"verdict": "continue", "reasons": []}]}, {"settings": {"abtest.design": "fixed"}}):
        fake.state("test", 0, [row(0, 1, offline)], Test((FIRST,)).experiment() | broken)
        with pytest.raises(StoreError, match=r"state.json: not what a run writes"):
            page(fake.root, tmp_path)


def test_the_shipped_settings_are_enough(tmp_path: Path) -> None:
    """The names that a test keeps are those that the report reads."""
    from tasks.looks import settings_of

    assert {*SETTINGS, "abtest.design"} <= set(settings_of(load_config()))
