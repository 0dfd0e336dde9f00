"""The audit trail as a table, a lineage as a tree: for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tasks.audit import ABANDONED, DONE, OPENINGS, kind_of
from tasks.experiments import ENDED, STARTED

Record = Mapping[str, Any]


def history_table(records: Sequence[Record]) -> Table:
    """A row a move, test, alarm or answer, oldest first."""
    outcome = {record.get("id"): record["event"] for record in records if record["event"] in (DONE, ABANDONED)}
    table = Table("when (UTC)", "what", "versions", "by", "data", "why", box=None, pad_edge=False)
    for record in records:
        if record["event"] not in (DONE, ABANDONED):
            table.add_row(*(Text(cell) for cell in (_when(record), *_row(record, outcome))))
    return table


def _row(record: Record, outcome: Mapping[str | None, str]) -> tuple[str, str, str, str, str]:
    event = record["event"]
    if event in OPENINGS:
        ends = {DONE: "", ABANDONED: " (undone)"}.get(outcome.get(record["id"], ""), " (cut off)")
        versions = f"{record['from'] or '-'} > {record['to'] or '-'}"
        by = record.get("actor") or f"somebody; noticed by {record.get('noticed_by')}"
        return kind_of(record) + ends, versions, by, (record.get("data_md5") or "")[:8], _why(record)
    if event == STARTED:
        return "A/B test", _pair(record), "flow", record["data_md5"][:8], record["salt"]
    if event == ENDED:
        return f"A/B test: {record['verdict']}", _pair(record), "flow", "", "; ".join(record["reasons"][:1])
    if event == "alarm":
        return event, str(record["version"]), "flow", "", "; ".join(one["measure"] for one in record["alarms"])
    if event == "declined":
        return f"{record['kind']} declined", str(record["version"]), record["actor"], "", record["reason"]
    return event, "", "", "", str(record.get("text", ""))


def _why(record: Record) -> str:
    evidence = record.get("evidence", {})
    decision = evidence.get("decision", {}).get("reasons", [])
    reasons = [record.get("reason"), evidence.get("reason"), evidence.get("approval", {}).get("reason")]
    return "; ".join(str(reason) for reason in [*reasons, evidence.get("alarm"), *decision[:1]] if reason)


def _pair(record: Record) -> str:
    return f"{record['challenger']} vs {record['champion']}"


def _when(record: Record) -> str:
    return str(record.get("at", ""))[:19].replace("T", " ")


def lineage_tree(found: Record) -> Tree:
    """From a policy to pi_0, each with its Q, data, source files and evidence."""
    tree = Tree(Text(_title(found)))
    _grow(tree, found)
    return tree


def _grow(tree: Tree, policy: Record) -> None:
    _branch(tree, "evidence", map(_evidence, policy["evidence"]))
    if q := policy["q"]:
        tree.add(Text(f"Q {q['version']}, the value of policy {q['of_policy']}{_gone(q)}; run {q['run']}"))
    if data := policy["data"]:
        files = (f"{one['file']} ({one['content']})" for one in data["files"])
        source = f", {data['source']}{' ' + data['path'] if data['path'] else ''}" if data["source"] else ""
        _branch(tree, f"data of round {data['round']}, md5 {data['md5']}{source}", files)
    if parent := policy.get("from"):
        _grow(tree.add(Text(f"from {_title(parent)}")), parent)


def _title(policy: Record) -> str:
    parts = [f"policy {policy['policy']}{_gone(policy)}", *policy["aliases"]]
    parts += [f"round {policy['round']}"] if policy["round"] is not None else []
    parts += [policy["verdict"]] if policy["verdict"] else []
    parts += [f"pi_0, fine-tuned on {policy['corpus']}"] if policy["corpus"] else []
    return ", ".join(parts)


def _evidence(one: Record) -> str:
    if one["what"] == "A/B test":
        test = f"A/B test {one['salt']}, {one['challenger']} vs {one['champion']}: {one['verdict']}"
        return f"{_when(one)} {test}; {'; '.join(one['reasons'][:1])}"
    return f"{_when(one)} {one['what']} {one['from'] or '-'} > {one['to'] or '-'} by {one['actor']}"


def _branch(tree: Tree, title: str, leaves: Iterable[str]) -> None:
    branch = tree.add(Text(title))
    for leaf in leaves:
        branch.add(Text(leaf))


def _gone(one: Record) -> str:
    return " (deleted)" if one["deleted"] else ""
