"""The nightly flow: one idempotent step over persisted state (registry, turn table, `state.json`).

Ingest what arrived. If an A/B test runs, look at it and decide. Otherwise, once the champion's conversations are here,
train a challenger from them and start its test. Started twice, or after a kill, it does what is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow
from prefect.logging import get_run_logger

from flows import champions
from iterative_ppo.algorithm import policy_iteration_step
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import NothingToLearn, TurnTableError
from iterative_ppo.evaluation.convergence import Convergence, RoundFigures, convergence
from iterative_ppo.evaluation.gate import Decision, outcome_gate
from iterative_ppo.evaluation.plan import misgivings
from iterative_ppo.files import write_json
from iterative_ppo.learning.objective import success_above
from tasks import approvals, experiments, looks, notify, registry, rounds, tracking, watch
from tasks.datasets import Dataset, arm, arrived, closed, trained_on_before, turns_folder
from tasks.gating import figures_of
from tasks.inbox import take_up
from tasks.learning import PolicyVersion, Prompts
from tasks.rounds import Candidate, QVersion, RoundContext
from tasks.state import Approval, Experiment, NightState, load_state, only_one, save_state
from tasks.suitability import check_base, tell_of_kept_settings
from tasks.traffic import first_corpus


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
    """One night. Returns the phase that the pipeline is in afterwards: collect, test, approve or finished.

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
    champions.settle(config, store, "night")
    state = load_state(config.data.root)
    if registry.champion(store) is None:
        corpus = first_corpus(config)
        first = rounds.initialize(rounds.open_round(config, store, 0), *corpus)
        log.info("policy %d is pi_0 and the first champion", first.version)
    else:
        check_base(config)
    state = further(config, store, follow(config, store, state))
    take_up(config, state.gathering)
    state = _saved(config, champions.watched(config, store, state))
    if state.approval is not None:
        state = answered(config, store, state)
    state = follow(config, store, state)
    if state.phase == "test":
        state = look(config, store, state)
    if state.phase == "collect":
        state = await_conversations(config, store, state)
    if state.phase == "train":
        state = train(config, store, state)
    return state


def follow(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Go on from the champion that there is: a test that it makes void ends, and data of another are not trained on."""
    reason = champions.end_void_test(config, store, state)
    if reason is not None:
        assert state.experiment is not None
        record = {**state.rounds[-1], "void": reason, "experiment": state.experiment.model_dump(mode="json")}
        return _close_round(config, store, state.advance(rounds=[*state.rounds[:-1], record]), "collect")
    if state.phase == "train" and state.champion not in (None, registry.champion(store)):
        return _saved(config, state.advance(phase="collect"))
    return state


def further(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Go on from a last round that is the last no longer: the budget was raised, or it was a log's, rejected."""
    if state.phase != "finished" or converged(config, state.rounds).over:
        return state
    return next_round(config, store, state)


def next_round(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Its data are the last round's test's, if there was one and the champion is one of the two that it tested."""
    last = state.rounds[-1]
    if "decision" in last and registry.champion(store) in (last["champion"], last["challenger"]):
        return freeze(config, store, state, state.round + 1)
    return _saved(config, state.advance(round=state.round + 1, phase="collect"))


def answered(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Go on once a person has answered what waits; what they approved is done already."""
    request, trail = state.approval, registry.history(config.data.root)
    assert request is not None
    declined = approvals.refusal(trail, request)
    if not approvals.approved(trail, request) and declined is None:
        get_run_logger().warning("%s", approvals.command(request))
        return state
    state = state.advance(phase=request.resume, approval=None)
    if request.kind == "rollback":
        return _saved(config, state)
    evidence = request.evidence
    if declined is not None:
        decision = Decision("reject", (f"failed: {declined}", *request.reasons))
        evidence = {**evidence, **judgement(config, state, evidence["test"], decision)}
    return conclude(config, store, state, evidence)


def await_conversations(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Freeze the round's dataset once enough conversations of the champion are here."""
    label = str(registry.champion(store))
    frame = arrived(config, state.round)
    if frame is not None and (known := trained_on_before(config, frame["conversation_id"], state.round)) is not None:
        raise TurnTableError(
            f"conversation {known[0]!r} arrived again: it is in the dataset of round {known[1]}; take it out of "
            f"rounds/{state.round:04d}/arrived"
        )
    here = arm(frame, label).conversations if frame is not None else 0
    if here < config.simulator.conversations:
        wanted = config.simulator.conversations
        get_run_logger().info("%d of %d conversations of policy %s are here", here, wanted, label)
        return state
    return freeze(config, store, state, state.round)


def freeze(config: Config, store: tracking.Tracking, state: NightState, number: int) -> NightState:
    """Validate and version what arrived for round `number`; training is next."""
    context = rounds.open_round(config, store, number)
    dataset = rounds.freeze_dataset(context, state.outcome_rates, rounds.label_outcomes(context))
    rates, champion = outcome_rates(dataset, config), registry.champion(store)
    return _saved(config, state.advance(round=number, phase="train", champion=champion, outcome_rates=rates))


def outcome_rates(dataset: Dataset, config: Config) -> dict[str, float]:
    """Success rate of each policy version in a dataset, to notice a shift of the same version later."""
    last = [closed(block)[["policy_version", "persona", "outcome"]] for block in dataset.blocks(config)]
    ends = pd.concat(last).dropna(subset=["policy_version"])
    ends = ends[ends["persona"].isna()]
    rates = (ends["outcome"] > success_above(config)).groupby(ends["policy_version"].astype(str)).mean()
    return {str(version): float(rate) for version, rate in rates.items()}


def train(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Lines 5 to 7 on the round's dataset, then the offline gate; a challenger that passes goes into an A/B test.

    Data that teach nothing reject the round, so that the next one can have its own.
    """
    version = registry.champion(store)
    assert version is not None
    context, dataset = rounds.open_round(config, store, state.round), frozen(config, state.round)
    champion = rounds.policy_version(store, version)
    tell_of_kept_settings(config, version, champion.path)
    try:
        record = challenge(context, champion, dataset)
    except NothingToLearn as error:
        get_run_logger().warning("round %d is rejected: %s", state.round, error)
        record = unlearnt(state.round, version, dataset, error)
    if record["offline"]["verdict"] != "test":
        tell_verdict(config, record, record["offline"])
        ended = converged(config, [*state.rounds, record])
        state = state.advance(rounds=[*state.rounds, {**record, "convergence": asdict(ended)}])
        return _close_round(config, store, state, "finished" if ended.over else "collect")
    for told in misgivings(config, state.champion_rate):
        get_run_logger().warning("the A/B test of round %d begins: %s", state.round, told)
    state = state.advance(rounds=[*state.rounds, record])
    started = experiments.start(config.data.root, experiment(config, record), record["data_md5"])
    return _saved(config, state.advance(phase="test", experiment=started))


def challenge(context: RoundContext, champion: PolicyVersion, dataset: Dataset) -> dict[str, Any]:
    """Returns, lines 5 to 7 of Algorithm 1, the offline gate, registration; the round's record in the state."""
    rounds.returns(context, dataset)
    q, candidate = policy_iteration_step(champion, dataset, TaskSteps(context))
    assert isinstance(candidate, Candidate)
    decision, evidence = rounds.gate(context, champion, candidate, q, dataset)
    challenger = rounds.register(context, champion, candidate, q, dataset, decision)
    get_run_logger().info("round %d: policy %d, offline gate: %s", context.round_number, challenger, decision.verdict)
    return {
        "round": context.round_number,
        "champion": champion.version,
        "challenger": challenger,
        "q": q.version,
        "data_md5": dataset.md5,
        "offline": decision.as_dict(),
        **figures_of(evidence),
    }


def unlearnt(number: int, champion: int, dataset: Dataset, error: NothingToLearn) -> dict[str, Any]:
    """The record of a round that has no challenger."""
    decision = Decision("reject", (f"failed: {error}",))
    record = {"round": number, "champion": champion, "data_md5": dataset.md5, "offline": decision.as_dict()}
    return {**record, "unlearnt": str(error)}


def experiment(config: Config, record: dict[str, Any]) -> Experiment:
    """The A/B test that a round's record calls for; a new salt for each challenger."""
    salt, arms = f"round-{record['round']:04d}-policy-{record['challenger']}", ("champion", "challenger")
    return Experiment(salt=salt, settings=looks.settings_of(config), **{arm: record[arm] for arm in arms})


def frozen(config: Config, number: int) -> Dataset:
    """A round's versioned dataset."""
    from tasks.versioning import version

    return Dataset(number, turns_folder(config, number), version(number, config).md5)


def look(config: Config, store: tracking.Tracking, state: NightState) -> NightState:
    """Look at the running A/B test; where its design decides, promote or reject, or ask a person to."""
    tested = looks.running(state)
    decided = experiments.decided(config.data.root, tested)
    if decided is not None:  # and then a kill came: later conversations change nothing
        return conclude(config, store, state, decided)
    seen = looks.evidence(config, state, datetime.now(UTC))
    if seen is None:
        get_run_logger().info("A/B test of round %d: nothing has arrived", state.round)
        return state
    found = looks.take(config, tested, seen)
    decision = outcome_gate(found.look, found.guardrails)
    if decision.verdict == "promote" and registry.was_rolled_back(store, tested.challenger):
        decision = Decision("reject", ("failed: somebody rolled this version back", *decision.reasons))
    get_run_logger().info("A/B test of round %d: %s (%s)", state.round, decision.verdict, decision.reasons[0])
    if found.test is None:
        return looked(config, store, state, found)
    evidence = test_evidence(config, store, state, found, decision)
    if decision.verdict == "promote" and config.gate.promotion == "approve":
        kept = state.advance(experiment=found.kept_in(tested))
        return _saved(config, champions.asked(config, kept, approval(tested, evidence)))
    return conclude(config, store, state, evidence)


def looked(config: Config, store: tracking.Tracking, state: NightState, found: looks.Finding) -> NightState:
    """Keep a look after which the test goes on, or halts; a halt is told once."""
    tested, look = state.experiment, found.look.as_dict()
    assert tested is not None
    if (found.look.statistic is None and found.look.verdict != "halt") or found.look.fraction in tested.fractions:
        return state
    if found.look.verdict == "halt":
        body = "\n".join(found.look.reasons)
        notify.tell(config, "alarm", f"round {state.round}: the A/B test is halted", body)
    context, kept = rounds.open_round(config, store, state.round), found.kept_in(tested)
    store.log_json(context.run_id, {"experiment": kept.model_dump(mode="json"), "look": look}, "ab_test.json")
    return _saved(config, state.advance(experiment=kept))


def approval(tested: Experiment, evidence: dict[str, Any]) -> Approval:
    """What a person is asked after a test that found its challenger better."""
    name = f"promotion of version {tested.challenger} ({tested.salt})"
    reasons = tuple(evidence["decision"]["reasons"])
    return Approval(
        id=name, kind="promote", version=tested.challenger, reasons=reasons, evidence=evidence, resume="test"
    )


def test_evidence(
    config: Config, store: tracking.Tracking, state: NightState, found: looks.Finding, decision: Decision
) -> dict[str, Any]:
    """All that a verdict rests on, also on the round's MLflow run."""
    tested, test, counted = state.experiment, found.test, found.counted
    assert tested is not None and test is not None and counted is not None
    context = rounds.open_round(config, store, state.round)
    evidence = {
        "round": state.round,
        "experiment": tested.model_dump(mode="json"),
        "data_md5": state.rounds[-1]["data_md5"],
        "test": test.as_dict(),
        "counted": counted.as_dict(),
        "look": found.look.as_dict(),
        "guardrails": [one.as_dict() for one in found.guardrails],
        **judgement(config, state, test.as_dict(), decision),
    }
    if decision.verdict == "promote":
        watch.keep_what_it_is_promoted_on(config, state.round, tested.challenger)
    metrics = {"ab_gain": test.gain, "ab_p_value": test.p_value, "champion_rate": test.champion.rate}
    store.log(context.run_id, metrics=metrics)
    store.log_json(context.run_id, evidence, "ab_test.json")
    return evidence


def judgement(config: Config, state: NightState, test: dict[str, Any], decision: Decision) -> dict[str, Any]:
    """A verdict, and whether the rounds are over with it."""
    record = {**state.rounds[-1], "ab_test": test, "decision": decision.as_dict()}
    ended = converged(config, [*state.rounds[:-1], record])
    over = out_of_budget(config, state) or ended.over
    return {"decision": decision.as_dict(), "convergence": asdict(ended), "last": over}


def conclude(config: Config, store: tracking.Tracking, state: NightState, evidence: dict[str, Any]) -> NightState:
    """Carry a verdict out, once however often it is begun; then the test's conversations are the next round's data."""
    tested, decision, root = state.experiment, evidence["decision"], config.data.root
    assert tested is not None
    promotion = experiments.promotion_by(registry.history(root), tested.salt)
    if decision["verdict"] == "promote" and promotion is None:
        data, champion = evidence["data_md5"], tested.champion
        registry.promote(store, tested.challenger, evidence, "flow", root, instead_of=champion, data_md5=data)
    experiments.end(root, tested, decision, evidence)
    if decision["verdict"] != "promote":
        registry.reject(store, tested.challenger, "; ".join(decision["reasons"]))
    context = rounds.open_round(config, store, state.round)
    write_json(context.folder / "ab_test.json", evidence)
    store.log(context.run_id, artifacts=[context.folder / "ab_test.json"])
    record = {**state.rounds[-1], "ab_test": evidence["test"], "decision": decision}
    record["convergence"] = evidence.get("convergence")
    record["experiment"] = looks.ended(evidence)
    tell_verdict(config, record, decision)
    state = state.advance(rounds=[*state.rounds[:-1], record])
    if evidence["last"]:
        return _close_round(config, store, state, "finished")
    store.finish(context.run_id)
    return next_round(config, store, state.advance(experiment=None, approval=None))


def tell_verdict(config: Config, record: dict[str, Any], decision: dict[str, Any]) -> None:
    """A round's verdict, to whom `notify` names."""
    challenger = f"policy {record['challenger']}" if "challenger" in record else "no challenger"
    subject = f"round {record['round']}: {challenger} against {record['champion']}"
    notify.tell(config, "verdict", f"{subject}: {decision['verdict']}", "\n".join(decision["reasons"]))


def out_of_budget(config: Config, state: NightState) -> bool:
    return state.round + 1 >= config.rounds.max_rounds


def converged(config: Config, records: Sequence[dict[str, Any]]) -> Convergence:
    """Line 9 of Algorithm 1, over the rounds' records."""
    ended = convergence([RoundFigures.of(record) for record in records], config)
    get_run_logger().info("converged: %s", ended.words)
    return ended


def _close_round(config: Config, store: tracking.Tracking, state: NightState, phase: Any) -> NightState:
    """End a round without new data: finished, or collecting for the next one."""
    context = rounds.open_round(config, store, state.round)
    store.finish(context.run_id)
    if phase == "collect":
        phase = "finished" if out_of_budget(config, state) else "collect"
    following = state.round if phase == "finished" else state.round + 1
    return _saved(config, state.advance(round=following, phase=phase, experiment=None, approval=None))


def _saved(config: Config, state: NightState) -> NightState:
    save_state(config.data.root, state)
    return state
