"""One offline round on real logs: import, validate, version, Q, pi_0 cloned from the log, PPO, gate, challenger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow
from prefect.logging import get_run_logger

from flows import champions
from flows.night import challenge, experiment, outcome_rates, tell_verdict
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import ConfigError, SourceError
from iterative_ppo.files import write_json
from iterative_ppo.mdp.turn_table import conversations
from tasks import experiments, registry, rounds, tracking
from tasks.datasets import Dataset, arrived, round_folder
from tasks.inbox import take_up
from tasks.learning import PolicyVersion
from tasks.state import NightState, load_state, only_one, save_state
from tasks.suitability import check_base, tell_of_kept_settings
from tasks.traffic import IMPORT, LOGGED, import_logs, name_of_log
from tasks.turn_checks import divided_as_set


@flow(name="offline-round", flow_run_name="offline round")
def offline_round(params_file: str | None = None, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """One round on logs that a team already has. Ends with a challenger that awaits an A/B test, or a rejected one."""
    config = load_config(Path(params_file) if params_file else None, overrides or {})
    with only_one(config.data.root):
        return _round(config)


def _round(config: Config) -> dict[str, Any]:
    store = tracking.open_tracking(config)
    champions.settle(config, store, "offline round")
    state = load_state(config.data.root)
    if registry.champion(store) is not None:
        check_base(config)
    if state.round or state.phase in ("test", "approve"):
        done = f"nights have gone on to round {state.round}" if state.round else "its challenger awaits its A/B test"
        get_run_logger().warning("nothing is done: the round of a log is the first, and %s", done)
        return state.rounds[-1]
    frame = _taken_up(config)
    context = rounds.open_round(config, store, state.round)
    dataset = rounds.freeze_dataset(context, state.outcome_rates, rounds.label_outcomes(context))
    if registry.champion(store) is None:
        if config.policy.base_model is None:
            get_run_logger().warning(
                "policy.base_model is null: the first policy is a tiny model made from this log alone, which shows how "
                "the pipeline works; name a causal language model, by path, to have suggestions for customers"
            )
        fit = frame[frame["part"] == "fit"]  # so that the evidence part stays unseen by pi_0 too
        rounds.initialize(context, list(conversations(fit)), str(config.source.path))
    champion = registry.champion(store)
    assert champion is not None
    pi = rounds.policy_version(store, champion, logged_as=LOGGED)
    tell_of_kept_settings(config, champion, pi.path)
    return _improve(config, store, state, pi, dataset)


def _taken_up(config: Config) -> pd.DataFrame:
    """The log's rows. Raises ConfigError where it was divided by other settings than today's."""
    if arrived(config, 0) is None:
        _, log = import_logs(config, before_ours=True)
        for line in log.told():
            get_run_logger().info("%s", line)
        write_json(round_folder(config, 0) / IMPORT, log.summary)
        take_up(config, 0)
    elif not (round_folder(config, 0) / "arrived" / f"{name_of_log(config)}.parquet").exists():
        raise SourceError(
            f"{config.source.path}: {config.data.root} holds the round of another log, or of this one as it was; give "
            "this one a data.root and a tracking store of its own"
        )
    frame = arrived(config, 0)
    assert frame is not None
    if not divided_as_set(frame, config):
        raise ConfigError(
            f"data.split_by and data.evidence_share are {config.data.split_by} and {config.data.evidence_share:g}, and "
            f"{config.data.root} holds the log divided by others; put those back, or give it a data.root and a "
            "tracking store of its own"
        )
    return frame


def _improve(
    config: Config, store: tracking.Tracking, state: NightState, champion: PolicyVersion, dataset: Dataset
) -> dict[str, Any]:
    context = rounds.open_round(config, store, state.round)
    distance = rounds.distance(context, champion, dataset)
    record = challenge(context, champion, dataset) | {"distance": distance}
    passed = record["offline"]["verdict"] == "test"
    tested = experiments.start(config.data.root, experiment(config, record), dataset.md5) if passed else None
    tell_verdict(config, record, record["offline"])
    state = state.advance(
        phase="test" if passed else "finished",
        experiment=tested,
        rounds=[record],
        outcome_rates=outcome_rates(dataset, config),
    )
    save_state(config.data.root, state)
    store.finish(context.run_id)
    return record
