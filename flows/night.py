"""The nightly flow: one idempotent step over persisted state (registry, turn table, `state.json`).

Ingest what arrived. If an A/B test runs, look at it and decide. Otherwise, once the champion's conversations are here,
train a challenger from them and start its test. Started twice, or after a kill, it does what is left to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from iterative_ppo.algorithm import policy_iteration_step
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import ABTest, ab_test
from iterative_ppo.evaluation.gate import Decision, outcome_gate
from iterative_ppo.files import write_json
from tasks import registry, rounds, tracking
from tasks.datasets import Dataset, arm, arrived, closed, take_up, turns_folder
from tasks.learning import PolicyVersion, Prompts
from tasks.rounds import Candidate, QVersion, RoundContext
from tasks.state import Experiment, NightState, load_state, only_one, save_state
from tasks.traffic import copying_lessons, scripted_corpus


@dataclass(frozen=True)
class TaskSteps:
    """Lines 5 to 7 of Algorithm 1 with Prefect tasks as the steps."""

    context: RoundContext

    def fit_q(self, policy: PolicyVersion | Candidate, data: Dataset) -> QVersion:
        assert isinstance(policy, PolicyVersion)
        return rounds.fit_q(self.context, policy, data)

    def prompts(self, policy: PolicyVersion | Candidate, data: Dataset) -> Prompts:
        assert isinstance(policy, PolicyVersion)
        return rounds.prompts(self.context, policy, data)

    def improve(self, policy: PolicyVersion | Candidate, prompts: Prompts, q: QVersion) -> PolicyVersion | Candidate:
        assert isinstance(policy, PolicyVersion)
        return rounds.improve(self.context, policy, prompts, q)


@flow(name="nightly-round", flow_run_name="night")
def night(params_file: str | None = None, overrides: dict[str, Any] | None = None) -> str:
    """One night. Returns the phase that the pipeline is in afterwards: collect, test or finished.

    Args:
        params_file: a params.yaml; None means the defaults.
        overrides: `{"section.key": value}`, as `--set` on the command line.
    """
    config = load_config(Path(params_file) if params_file else None, overrides or {})
    with only_one(config.data.root):
        return step(config).phase


def step(config: Config) -> NightState:
    """The night's body, under the lock."""
    log = get_run_logger()
    store = tracking.open_tracking(config)
    registry.recover(store, config.data.root)
    state = load_state(config.data.root)
    if registry.champion(store) is None:
        context = rounds.open_round(config, store, 0)
        first = rounds.initialize(context, scripted_corpus(config), "scripted", copying_lessons(config))
        log.info("policy %d is pi_0 and the first champion", first.version)
    if state.phase == "finished":
        return state
    take_up(config, state.gathering)
    if state.phase == "test":
        state = look(config, store, state)
    if state.phase == "collect":
        state = await_conversations(config, store, state)
    if state.phase == "train":
        state = train(config, store, state)
    return state


def await_conversations(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Freeze the round's dataset once enough conversations of the champion are here."""
    label = str(registry.champion(store))
    frame = arrived(config, state.round)
    here = arm(frame, label).conversations if frame is not None else 0
    if here < config.simulator.conversations:
        wanted = config.simulator.conversations
        get_run_logger().info("%d of %d conversations of policy %s are here", here, wanted, label)
        return state
    return freeze(config, store, state, state.round)


def freeze(config: Config, store: tracking.Tracking, state: NightState, number: int) -> NightState:
    """Validate and version what arrived for round `number`; training is next."""
    context = rounds.open_round(config, store, number)
    dataset = rounds.freeze_dataset(context, state.outcome_rates)
    return _saved(config, state.advance(round=number, phase="train", outcome_rates=outcome_rates(dataset, config)))


def outcome_rates(dataset: Dataset, config: Config) -> dict[str, float]:
    """Success rate of each policy version in a dataset, to notice a shift of the same version later."""
    ends = closed(dataset.read(config)).dropna(subset=["policy_version"])
    rates = (ends["outcome"] > 0).groupby(ends["policy_version"].astype(str)).mean()
    return {str(version): float(rate) for version, rate in rates.items()}


def train(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Lines 5 to 7 on the round's dataset, then the offline gate; a challenger that passes goes into an A/B test."""
    version = registry.champion(store)
    assert version is not None
    context = rounds.open_round(config, store, state.round)
    champion = rounds.policy_version(store, version)
    record = challenge(context, champion, frozen(config, state.round))
    state = state.advance(rounds=[*state.rounds, record])
    if record["offline"]["verdict"] != "test":
        return _close_round(config, store, state, "collect")
    return _saved(config, state.advance(phase="test", experiment=experiment(record)))


def challenge(context: RoundContext, champion: PolicyVersion, dataset: Dataset) -> dict[str, Any]:
    """Returns, lines 5 to 7 of Algorithm 1, the offline gate, registration; the round's record in the state."""
    rounds.returns(context, dataset)
    q, candidate = policy_iteration_step(champion, dataset, TaskSteps(context))
    assert isinstance(candidate, Candidate)
    decision, _ = rounds.gate(context, champion, candidate, q, dataset)
    challenger = rounds.register(context, champion, candidate, q, dataset, decision)
    get_run_logger().info("round %d: policy %d, offline gate: %s", context.round_number, challenger, decision.verdict)
    return {
        "round": context.round_number,
        "champion": champion.version,
        "challenger": challenger,
        "q": q.version,
        "data_md5": dataset.md5,
        "offline": decision.as_dict(),
    }


def experiment(record: dict[str, Any]) -> Experiment:
    """The A/B test that a round's record calls for; a new salt each round."""
    salt = f"round-{record['round']:04d}"
    return Experiment(salt=salt, champion=record["champion"], challenger=record["challenger"])


def frozen(config: Config, number: int) -> Dataset:
    """A round's versioned dataset."""
    from tasks.versioning import version

    return Dataset(number, turns_folder(config, number), version(number, config).md5)


def look(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Look at the running A/B test; at its planned size, promote or reject, and its conversations are the next data."""
    test = current_test(config, state)
    if test is None:
        return state
    assert state.experiment is not None
    decision = outcome_gate(test, config.abtest.conversations)
    if decision.verdict == "promote" and registry.was_rolled_back(store, state.experiment.challenger):
        decision = Decision("reject", ("failed: somebody rolled this version back", *decision.reasons))
    get_run_logger().info("A/B test of round %d: %s (%s)", state.round, decision.verdict, decision.reasons[0])
    if decision.verdict == "continue":
        return state
    decide(config, store, state, test, decision)
    record = {**state.rounds[-1], "ab_test": test.as_dict(), "decision": decision.as_dict()}
    state = state.advance(rounds=[*state.rounds[:-1], record])
    if out_of_budget(config, state) or converged(config, test):
        return _close_round(config, store, state, "finished")
    number = state.round + 1
    return freeze(config, store, state.advance(experiment=None), number)


def current_test(config: Config, state: NightState) -> ABTest | None:
    """The running test on the conversations that have arrived; None while an arm is empty."""
    if state.experiment is None:
        raise StoreError("state.json: phase is test but no experiment is recorded; restore the file")
    frame = arrived(config, state.gathering)
    if frame is None:
        return None
    champion = arm(frame, str(state.experiment.champion))
    challenger = arm(frame, str(state.experiment.challenger))
    if not champion.conversations or not challenger.conversations:
        return None
    return ab_test(champion, challenger, config.gate.alpha)


def decide(config: Config, store: tracking.Tracking, state: NightState, test: ABTest, decision: Decision) -> None:
    """Carry a verdict out: in the registry, in the audit trail, and on the round's MLflow run."""
    assert state.experiment is not None
    context = rounds.open_round(config, store, state.round)
    evidence = {"round": state.round, "test": test.as_dict(), "decision": decision.as_dict()}
    write_json(context.folder / "ab_test.json", evidence)
    store.log(
        context.run_id,
        metrics={"ab_gain": test.gain, "ab_p_value": test.p_value, "champion_rate": test.champion.rate},
        artifacts=[context.folder / "ab_test.json"],
    )
    if decision.verdict == "promote":
        registry.promote(store, state.experiment.challenger, evidence, "flow", config.data.root)
    else:
        registry.reject(store, state.experiment.challenger, "; ".join(decision.reasons))
    store.finish(context.run_id)


def out_of_budget(config: Config, state: NightState) -> bool:
    return state.round + 1 >= config.rounds.max_rounds


def converged(config: Config, test: ABTest) -> bool:
    """Line 9 of Algorithm 1, in a first form: the test rules out a gain worth having."""
    return test.gain_high < config.rounds.converged_below


def _close_round(config: Config, store: tracking.Tracking, state: NightState, phase: Any) -> NightState:
    """End a round without new data: finished, or collecting for the next one."""
    context = rounds.open_round(config, store, state.round)
    store.finish(context.run_id)
    if phase == "collect":
        phase = "finished" if out_of_budget(config, state) else "collect"
    following = state.round if phase == "finished" else state.round + 1
    return _saved(config, state.advance(round=following, phase=phase, experiment=None))


def _saved(config: Config, state: NightState) -> NightState:
    save_state(config.data.root, state)
    return state
