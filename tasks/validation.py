"""Validation of the turn table with Great Expectations: broken conversations leave whole, and each says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from iterative_ppo.config import Config
from iterative_ppo.errors import TurnTableError, ValidationStopped
from iterative_ppo.files import whole_directory
from iterative_ppo.learning.objective import success_above
from iterative_ppo.mdp.turn_table import conform
from tasks.datasets import closed, whole_until
from tasks.turn_checks import Rows, checks, grouped, turn_suite

TEXTS = ("context", "customer_message", "suggestion", "business_message")
REASONS_SHOWN = 3
LONG_LISTS = ("unexpected_list", "unexpected_index_list", "unexpected_index_query", "partial_unexpected_index_list")


@dataclass(frozen=True, eq=False)
class Validation:
    """Rows to use, rows set aside (with a column `reason`), and conversations counted by reason."""

    good: pd.DataFrame
    bad: pd.DataFrame
    reasons: dict[str, int]
    warnings: list[str]
    statistics: dict[str, Any]


class Verdict(NamedTuple):
    """One expectation: the field, what it must do, and the row numbers where it does not."""

    field: str
    must: str
    rows: list[int]


def validate(
    frame: pd.DataFrame, config: Config, reference_rates: Mapping[str, float] = {}, round_number: int = 0
) -> Validation:
    """Part good conversations from bad ones; write Data Docs and the quarantine, or remove it where no row is bad.

    Args:
        frame: (N, columns) a turn table.
        reference_rates: earlier outcome rate by policy version; a move beyond `data.outcome_rate_bound` is a warning.
        round_number: names the quarantine's folder and the page in the Data Docs.

    Raises TurnTableError where a column is missing or does not cast; ValidationStopped, after the quarantine is
    written, where there are no rows, too large a share of conversations is bad, or none is left.
    """
    if frame.empty:
        raise ValidationStopped(f"round {round_number}: no rows to validate; collect conversations first")
    rows = grouped(conform(frame, config.outcomes))
    name = f"round={round_number:04d}"
    verdicts = _run_suite(rows, config, name)
    found = _findings(rows, verdicts)
    good, bad = _parted(rows, found)
    good = conform(good, config.outcomes)  # a null turn among the bad rows had made the column floating
    folder = config.data.root / "quarantine" / name
    if len(bad):
        quarantine(bad, folder)
    elif folder.exists():
        shutil.rmtree(folder)  # of an earlier try
    facts = _statistics(rows, bad, found, verdicts)
    rates = _outcome_rates(good, config)["mean"]
    facts["outcome_rates"] = {str(version): float(rate) for version, rate in rates.items()}
    validation = Validation(good, bad, _counts(found), _warnings(good, config, reference_rates), facts)
    _stop_if_too_bad(validation, config, folder)
    return validation


def quarantine(bad: pd.DataFrame, path: Path) -> None:
    """Write rows that failed to `path`/turns.parquet and `path`/turns.csv, both or neither, replacing what was there.

    A column that holds mixed types, which Parquet knows not, is written as text.
    """
    columns = []
    for name in bad.columns:
        try:
            columns.append(pa.Array.from_pandas(bad[name]))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns.append(pa.Array.from_pandas(bad[name].map(str, na_action="ignore"), type=pa.string()))
    with whole_directory(path) as draft:
        pq.write_table(pa.table(columns, names=list(bad.columns)), draft / "turns.parquet", compression="zstd")
        bad.to_csv(draft / "turns.csv", index=False)


def _run_suite(rows: Rows, config: Config, run_name: str) -> list[Verdict]:
    """What each expectation found, with every failing row; Data Docs get the same without the long lists."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral", project_config=_project(config.data.root.absolute()))
    suite = context.suites.add(turn_suite(config))
    asset = context.data_sources.add_pandas("turns").add_dataframe_asset("turns")
    table = pd.concat([rows.frame, pd.DataFrame(checks(rows, config.outcomes), index=rows.frame.index)], axis=1)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table})
    result = batch.validate(suite, result_format={"result_format": "COMPLETE"})
    verdicts = [_verdict(one) for one in result.results]
    _write_docs(context, result, run_name)
    return verdicts


def _verdict(result: Any) -> Verdict:
    meta = result.expectation_config.meta
    rows = [] if result.success else result.result.get("unexpected_index_list")
    if rows is None:
        raise TurnTableError(f"{meta['field']}: must {meta['must']}; Great Expectations says {result.exception_info}")
    return Verdict(meta["field"], meta["must"], rows)


def _project(root: Path) -> Any:
    """A context in memory whose validation results and Data Docs lie in files, so that the index lists all rounds."""
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    def folder(name: str) -> dict[str, str]:
        return {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(root / name)}

    site = {"class_name": "SiteBuilder", "show_how_to_buttons": False, "store_backend": folder("data_docs")}
    project = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={"site": site | {"site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}}},
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    results = {"class_name": "ValidationResultsStore", "store_backend": folder("gx/validations")}
    project.stores["validation_results_store"] = results
    return project


def _write_docs(context: Any, result: Any, run_name: str) -> None:
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )

    for one in result.results:
        for key in LONG_LISTS:
            one.result.pop(key, None)
    suite, run = ExpectationSuiteIdentifier("turns"), RunIdentifier(run_name=run_name)
    page = ValidationResultIdentifier(expectation_suite_identifier=suite, run_id=run, batch_identifier="turns")
    result.meta["run_id"] = run
    context.validation_results_store.set(page, result)
    context.build_data_docs(resource_identifiers=[page, suite])


def _findings(rows: Rows, verdicts: list[Verdict]) -> pd.DataFrame:
    """(F, 4) talk, row, field, must: the first failing row of each conversation and expectation, in suite order."""
    talk_of = pd.Series(rows.talk, index=rows.frame.index)
    found = [pd.DataFrame({"talk": np.zeros(0, int), "row": np.zeros(0, int), "field": "", "must": ""})]
    for verdict in verdicts:
        if verdict.rows:
            talk = talk_of.loc[verdict.rows].to_numpy()
            here = pd.DataFrame({"talk": talk, "row": verdict.rows, "field": verdict.field, "must": verdict.must})
            found.append(here.drop_duplicates("talk"))
    return pd.concat(found, ignore_index=True)


def _parted(rows: Rows, found: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good rows, and bad rows with their `reason`, both in the order of the table as given."""
    failed = np.isin(rows.talk, found["talk"])
    bad = rows.frame[failed].assign(reason=pd.Series(rows.talk[failed]).map(_reasons(rows, found)).to_numpy())
    good = rows.frame[~failed]
    return good.sort_index().reset_index(drop=True), bad.sort_index().reset_index(drop=True)


def _reasons(rows: Rows, found: pd.DataFrame) -> pd.Series:
    """What is wrong with each bad conversation, by talk: its first few findings in words."""
    shown = found.groupby("talk").head(REASONS_SHOWN)
    words = [
        _in_words(rows.frame, row, field, must)
        for row, field, must in zip(shown["row"], shown["field"], shown["must"], strict=True)
    ]
    text = pd.Series(words, index=shown["talk"], dtype=object).groupby(level=0).agg("; ".join)
    more = (found.groupby("talk").size() - REASONS_SHOWN).clip(lower=0)
    return text + more.map(lambda n: f"; and {n} more" if n else "")


def _in_words(frame: pd.DataFrame, row: int, field: str, must: str) -> str:
    given = "" if field in TEXTS or field not in frame else f" (found {frame.at[row, field]})"
    return f"row {row}, turn {frame.at[row, 'turn']:g}, {field}: must {must}{given}"


def _counts(found: pd.DataFrame) -> dict[str, int]:
    counts = (found["field"] + ": must " + found["must"]).value_counts()
    return {str(reason): int(count) for reason, count in counts.items()}


def _statistics(rows: Rows, bad: pd.DataFrame, found: pd.DataFrame, verdicts: list[Verdict]) -> dict[str, Any]:
    conversations, quarantined = int(rows.talk.max()) + 1, int(found["talk"].nunique())
    return {
        "rows": len(rows.frame),
        "conversations": conversations,
        "quarantined_rows": len(bad),
        "quarantined_conversations": quarantined,
        "quarantined_share": quarantined / conversations,
        "expectations": len(verdicts),
        "failed_expectations": sum(bool(verdict.rows) for verdict in verdicts),
    }


def _outcome_rates(good: pd.DataFrame, config: Config) -> pd.DataFrame:
    """(versions, 2) by policy version: the share of conversations that succeeded, and how many there are.

    Without those that a persona led.
    """
    good = good[good["persona"].isna()]
    worth = good["outcome"].groupby([good["policy_version"], good["conversation_id"]], sort=False).sum()
    reached = worth > success_above(config)
    return reached.groupby(level=0).agg(["mean", "size"])


def _warnings(good: pd.DataFrame, config: Config, reference_rates: Mapping[str, float]) -> list[str]:
    bound, said = config.data.outcome_rate_bound, []
    for version, rate, size in _outcome_rates(good, config).itertuples():
        before = reference_rates.get(str(version), rate)
        if abs(rate - before) > bound:
            said.append(
                f"policy version {version}: outcome rate {rate:.3f} over {size} conversations, was {before:.3f}; "
                f"moved by more than data.outcome_rate_bound {bound:g}"
            )
    ends = closed(good)
    early, won = ends["timestamp"] > whole_until([good], config), ends["outcome"] > success_above(config)
    if early.any() and not early.all() and abs(won.mean() - won[~early].mean()) > bound:
        said.append(
            f"outcome rate {won.mean():.3f} over {len(ends)} conversations, {won[~early].mean():.3f} without the "
            f"{early.sum()} whose last turn is of the newest {config.data.outcome_window_hours:g} hours: of those the "
            "ones without an outcome are not here yet, so Q will hope for too much; collect for longer, by a larger "
            "simulator.conversations"
        )
    unit = "customer_id" if config.data.split_by == "customer" else "business_id"
    both = int(good.groupby(unit)["part"].nunique().gt(1).sum())
    return said + ([f"{both} {unit} values have conversations in both the fit and the evidence part"] if both else [])


def _stop_if_too_bad(validation: Validation, config: Config, folder: Path) -> None:
    facts, bound = validation.statistics, config.data.quarantine_share
    share = facts["quarantined_share"]
    if share <= bound and len(validation.good):
        return
    top = "; ".join(f"{reason} ({count})" for reason, count in list(validation.reasons.items())[:REASONS_SHOWN])
    raise ValidationStopped(
        f"validation failed for {facts['quarantined_conversations']} of {facts['conversations']} conversations "
        f"({share:.1%}, data.quarantine_share allows {bound:.1%}): {top}; their rows and reasons are in {folder}; "
        "conversations that are mended take the place of those in the round's folder `arrived`"
    )


validate_round = task(name="validate", cache_policy=NO_CACHE, persist_result=False)(validate)
