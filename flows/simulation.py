"""`ippo run`: nights repeated with the simulator as traffic, then the last champion against pi_0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from flows.night import night
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError, TrainingError
from iterative_ppo.evaluation.ab_test import ABTest, Arm, ab_test
from iterative_ppo.files import write_json
from iterative_ppo.learning.objective import success_above
from tasks import registry, rounds, tracking
from tasks.assignment import assigned
from tasks.datasets import arm, round_folder
from tasks.labels import judged
from tasks.stage import run_stage
from tasks.state import load_state
from tasks.traffic import deliver, simulate, to_rows

MAX_NIGHTS = 100
FIRST = 1
"""The version of pi_0."""


@flow(name="simulated-rounds", flow_run_name="simulated rounds")
def simulated_rounds(params_file: str | None = None, overrides: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Nights with simulated traffic until converged or out of budget. Returns the closing test, and who is in it.

    None where `gate.promotion: approve` makes it wait for a person; begun again, it goes on from there.

    Raises TrainingError where a round's conversations taught nothing, for a simulator's next ones will hardly either;
    begun again, with other settings perhaps, it collects them. Raises StoreError where a test waits for more than the
    simulator sends, as for businesses that there are not.
    """
    config = load_config(Path(params_file) if params_file else None, overrides or {})
    before = len(load_state(config.data.root).rounds)
    for _ in range(MAX_NIGHTS):
        phase = night(params_file, overrides)
        if reason := _unlearnt(config, before):
            raise TrainingError(reason)
        if phase == "finished":
            last = registry.champion(tracking.open_tracking(config))
            return {**closing_test(config).as_dict(), "first": FIRST, "last": last}
        if phase == "approve":
            return None
        if not traffic(config) and phase == "test":
            raise StoreError("the A/B test has all of its simulated conversations and still waits; see `ippo abtest`")
    raise StoreError(f"{MAX_NIGHTS} nights did not finish the rounds; see `ippo status`")


def _unlearnt(config: Config, before: int) -> str | None:
    """Why the last round has no challenger, if it has none and came after so many."""
    rounds = load_state(config.data.root).rounds[before:]
    return rounds[-1].get("unlearnt") if rounds else None


def traffic(config: Config) -> bool:
    """One day of simulated customers: the champion alone, or both arms of a running test, assigned as live ones are.

    Where a round still awaits conversations, those that it has are an ended test's, or another champion's: more come.
    False where those of a running test are here already.
    """
    store = tracking.open_tracking(config)
    state = load_state(config.data.root)
    name = f"simulated-{state.gathering:04d}"
    before = len(list((round_folder(config, state.gathering) / "arrived").glob(f"{name}*.parquet")))
    if before and state.experiment:
        return False
    name += f"-{before}" if before else ""
    seed = 1000 * (config.seed + 1) + 10 * state.gathering + before % 10
    champion = registry.champion(store)
    assert champion is not None
    deliver(
        config,
        name,
        config.abtest.conversations if state.experiment else config.simulator.conversations,
        seed,
        lambda unit: assigned(config, state, champion, unit),
        lambda version: rounds.policy_version(store, version),
    )
    return True


def closing_test(config: Config) -> ABTest:
    """The last champion against pi_0, each with fresh customers of its own."""
    store = tracking.open_tracking(config)
    last, first = registry.champion(store), FIRST
    assert last is not None
    count, seed = config.rounds.final_conversations, 777_000 + config.seed
    stage = run_stage(
        config.data.root / "rounds" / "closing",
        {"last": last, "first": first, "conversations": count, "seed": seed},
        lambda draft: _compare(config, store, last, first, draft),
    )
    return ABTest(**_arms(stage.read("closing.json")))


def _compare(config: Config, store: tracking.Tracking, last: int, first: int, draft: Path) -> dict[str, float]:
    count, seed = config.rounds.final_conversations, 777_000 + config.seed
    before, after = (_served(config, store, version, count, seed + k) for k, version in enumerate((first, last)))
    test = ab_test(before, after, config.gate.alpha)
    write_json(draft / "closing.json", test.as_dict())
    return {"first_rate": test.champion.rate, "last_rate": test.challenger.rate, "p_value": test.p_value}


def _served(config: Config, store: tracking.Tracking, version: int, count: int, seed: int) -> Arm:
    """Successes of a policy with fresh customers, told as in an A/B test."""
    talks = simulate(config, rounds.policy_version(store, version), count, seed)
    return arm(judged(to_rows(config, talks), config), str(version), success_above(config))


def _arms(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "champion": Arm(**values["champion"]), "challenger": Arm(**values["challenger"])}
