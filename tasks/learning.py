"""Stages that learn: pi_0, returns, Q, prompts, improvement. Plain functions on directories, thin tasks around them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import SourceError, TrainingError, WorkerLost
from iterative_ppo.evaluation.doubts import doubts
from iterative_ppo.files import content_hash, fingerprint, read_json
from iterative_ppo.learning.objective import success_above
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.returns import monte_carlo, rewards
from tasks.datasets import Dataset, datasets_before, round_folder
from tasks.exploration import coverage_metrics
from tasks.labels import origin_metrics
from tasks.progress import progress
from tasks.q_report import write_q_report
from tasks.round_data import (
    champion_round,
    earlier_round,
    other_rounds,
    read_prompts,
    token_folder,
    write_blocks,
    write_prompts,
)
from tasks.stage import Stage, made_with, run_stage
from tasks.suitability import INITIAL, cut_by_limits, tell_of_rates

if TYPE_CHECKING:
    from iterative_ppo.learning.checkpoint import Checkpoint
    from iterative_ppo.learning.jobs import Evaluation
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import Round
    from iterative_ppo.learning.q_model import QModel

_LOG = logging.getLogger(__name__)
PROMPTS = "prompts.parquet"
RANGES = {"outcome_low", "outcome_high", "outcome_ranges"}
STARTING, CREDITING, FITTING, IMPROVING = "starting", "crediting", "fitting", "improving"
IMPROVED_WITH: Any = {
    **dict.fromkeys(("seed", "gamma", "outcomes", "credit", "q", "improve"), True),
    "policy": {"lora", "save"},
}
"""The configuration that an improved policy depends on, its Q's included."""


@dataclass(frozen=True)
class PolicyVersion:
    """A registered policy, where its files are, and the label that its conversations carry in the turn table."""

    version: int
    path: Path
    logged_as: str | None = None

    @property
    def label(self) -> str:
        return self.logged_as or str(self.version)


@dataclass(frozen=True)
class Prompts:
    """Line 6 of Algorithm 1: the prompts of a dataset's states, as token ids on disk."""

    path: Path
    dataset: Dataset


def initial_policy_stage(config: Config, corpus: list[Conversation], source: str) -> Stage:
    """Line 1: pi_0, the base model as it is or fine-tuned on a corpus, and a Q of the corpus to start from.

    Killed, it goes on from the checkpoint that it keeps beside itself.
    """
    inputs = {
        "q": config.q.model_dump(),
        "gamma": config.gamma,
        "policy": config.policy.model_dump(),
        "supervised": config.supervised.model_dump(),
        "seed": config.seed,
        "source": source,
        "conversations": len(corpus),
        "corpus": fingerprint(*corpus),
        "code": 4,
    } | _credit(config)
    place = Path(config.policy.base_model) if config.policy.base_model else None
    if place and place.exists():  # else it is a name, and what it stands for is not here to be looked at
        from iterative_ppo.learning.loading import base_weights

        inputs["base"] = [content_hash(place), base_weights(place)]
    if config.q.corpus_epochs:
        inputs |= {"reward": config.improve.reward, "outcomes": list(config.outcomes.items())}
        inputs["data"] = config.data.model_dump(include={"evidence_share", "split_by", *RANGES})
    folder = round_folder(config, 0)

    def work(draft: Path) -> Mapping[str, float]:
        from iterative_ppo.learning import adapters
        from iterative_ppo.learning.language_model import LanguagePolicy, PolicySettings
        from iterative_ppo.learning.rounds import UPDATES, corpus_q, round_of
        from iterative_ppo.learning.runtime import computing
        from iterative_ppo.learning.supervised import fine_tune
        from iterative_ppo.learning.tiny import build_policy
        from tasks.training_bar import TrainingBar

        tunes = config.policy.fine_tuned
        if tunes and not corpus:
            raise SourceError(f"{source}: no conversation to fine-tune the first policy on")
        metrics: dict[str, float] = {}
        with resumable(folder / STARTING, fingerprint(inputs)) as checkpoint, computing(config.runtime):
            base, settings = config.policy.base_model, PolicySettings.of(config.policy)
            if base is None:
                policy = build_policy(corpus, config.policy, config.seed, config.runtime.device)
                if config.policy.lora.rank:  # which the improvement trains
                    adapters.check(policy.model, config.policy.lora)
            else:
                policy = LanguagePolicy.load(base, settings, config.runtime.device, config.policy.lora)
                _check_trainable(config, policy, "q", "improve", *(["supervised"] if tunes else []))
            encoded = [policy.renderer.encode(talk) for talk in corpus]
            forgotten = [cut for _, cut in encoded]
            metrics |= cut_by_limits(corpus, forgotten, policy.renderer, config.policy)
            sequences = [sequence for pieces, _ in encoded for sequence in pieces]
            if tunes:
                with progress("fine-tuning pi_0") as report:
                    policy, tuned = fine_tune(
                        policy,
                        sequences,
                        config.supervised,
                        config.seed,
                        callbacks=[TrainingBar(report)],
                        checkpoint=checkpoint.part("policy", UPDATES),
                    )
                metrics |= tuned
            policy.save(draft / "model", config.policy.save)
            if config.q.corpus_epochs and corpus:
                frame = turn_table.to_frame(corpus, config.outcomes, config.data.evidence_share, config.data.split_by)
                with progress("a first Q from the corpus") as report:
                    kept = checkpoint.part("q", UPDATES)
                    first = corpus_q(policy, round_of(policy, frame, config), config, report, kept)
                if first is not None:
                    first.save(draft / "q")
        return {**metrics, "truncated_turns": sum(forgotten)}

    stage = run_stage(folder / INITIAL, inputs, work)
    shutil.rmtree(folder / STARTING, ignore_errors=True)
    return stage


def _check_trainable(config: Config, policy: LanguagePolicy, *sections: str) -> None:
    """Raise ModelError where the policy cannot be trained as configured; tell of rates that would undo it."""
    from iterative_ppo.learning.forward import check_checkpointing

    check_checkpointing(policy.model)
    tell_of_rates(config, sum(weight.numel() for weight in policy.model.parameters()), set(sections))


def returns_stage(config: Config, dataset: Dataset, folder: Path) -> Stage:
    """Monte Carlo returns of every turn, as a table beside the dataset, made some conversations at a time."""
    inputs = {"md5": dataset.md5, "gamma": config.gamma, "outcomes": config.outcomes}

    def work(draft: Path) -> Mapping[str, float]:
        path, first = draft / "returns.parquet", []

        def tables() -> Iterator[pd.DataFrame]:
            for block in dataset.blocks(config):
                returns = monte_carlo(block, config.gamma)
                first.append(returns[(block["turn"] == 1).to_numpy()])
                yield block[["conversation_id", "turn"]].assign(reward=rewards(block), **{"return": returns})

        write_blocks(path, tables())
        values, turns = np.concatenate(first), turn_table.count_rows(path)
        return {"mean_return": float(values.mean()), "conversations": float(len(values)), "turns": turns}

    return run_stage(folder / "returns", inputs, work)


def fit_q_stage(
    config: Config, policy: PolicyVersion, dataset: Dataset, folder: Path, previous_q: Path | None = None
) -> Stage:
    """Line 5: Q of the policy from its own conversations, and what it is worth on held-out ones.

    Killed, it goes on from the checkpoint that it keeps beside itself.
    With a credit assigner all of these figures are about its turn rewards, which it leaves in credit.parquet; the
    metric `objective_is_credited` is 1 then, and credit.json says what that means. A Q that is here already and differs
    by the weights of its outcomes alone is not fitted again: it is read under the new ones.
    """
    replay = datasets_before(config, dataset.round_number, config.q.replay_rounds)
    inputs = {
        "q": config.q.model_dump(),
        "reward": config.improve.reward,
        "gamma": config.gamma,
        "outcomes": config.outcomes,
        "range": config.data.model_dump(include=RANGES),
        "seed": config.seed,
        "policy": content_hash(policy.path),
        "md5": dataset.md5,
        "replay": [content_hash(d.path) for d in replay],
        "start": content_hash(previous_q) if previous_q else None,
    } | _credit(config)

    def work(draft: Path) -> Mapping[str, float]:
        from iterative_ppo.learning.jobs import TURN_REWARDS, Crediting, Evaluation
        from iterative_ppo.learning.rounds import UPDATES
        from iterative_ppo.learning.runtime import computing
        from iterative_ppo.learning.worker import do

        _check_unfinished(config, policy, dataset, folder)
        with computing(config.runtime), token_folder(draft) as tokens:
            current, facts, others = _rounds(config, policy, dataset, replay, tokens)
            start = previous_q if config.q.warm_start else None
            metrics: dict[str, float] = {}
            if config.credit.assigner != "outcome":
                with (
                    resumable(folder / CREDITING, fingerprint(inputs)) as begun,
                    progress("assigning credit to turns") as report,
                ):
                    kept = replace(begun, every=UPDATES)
                    credit = do(Crediting(config, policy.path, current, others, kept), draft, report)
                current, others, metrics = credit.current, credit.replay, credit.report
            job = Evaluation(config, policy.path, start, current, others)
            q = reweighted_q(job, folder / "q", inputs, draft)
            if q is None:
                credited = [content_hash(rewards) for rewards in draft.glob(TURN_REWARDS)]
                with resumable(folder / FITTING, fingerprint(inputs, list(config.outcomes), credited)) as checkpoint:
                    job = replace(job, checkpoint=checkpoint.part("q", UPDATES))
                    with progress("fitting Q") as report:
                        q = do(job, draft, report)
            metrics |= q.report | write_q_report(q, current, facts, draft, success_above(config))
        return metrics | origin_metrics(facts) | coverage_metrics(config, policy.path, policy.label, dataset)

    stage = run_stage(folder / "q", inputs, work)
    for begun in (CREDITING, FITTING):
        shutil.rmtree(folder / begun, ignore_errors=True)
    return stage


@contextmanager
def resumable(
    path: Path, key: str, settings: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None
) -> Iterator[Checkpoint]:
    """For a block that trains, a place to go on from (checkpoint.take_up), emptied where the training itself fails."""
    from iterative_ppo.learning.checkpoint import take_up

    checkpoint = take_up(path, key, settings, given)
    try:
        yield checkpoint
    except TrainingError as error:
        if not isinstance(error, WorkerLost):  # it would come again, and may advise to change a setting
            checkpoint.clear()
        raise


def reweighted_q(job: Evaluation, fitted: Path, inputs: Mapping[str, Any], draft: Path) -> QModel | None:
    """A Q that was fitted under other weights of the same outcomes alone, under today's, saved in `draft`.

    None where there is none, or no head for each outcome.
    """
    from iterative_ppo.learning.objective import head_weights

    weights, before = head_weights(job.config), made_with(fitted, inputs, "outcomes")
    if before is None or weights != job.config.outcomes or before.keys() != weights.keys():
        return None
    q = job.load(fitted).reweighted(weights)
    job.save(q, draft)
    _LOG.info("Q has a head for each outcome, so new weights need no new fit")
    return q


def _credit(config: Config) -> dict[str, Any]:
    """The inputs of a stage that credit assigners bring; none by default, so that earlier stages stay as they are."""
    return {} if config.credit.assigner == "outcome" else {"credit": config.credit.model_dump()}


def _rounds(
    config: Config, policy: PolicyVersion, dataset: Dataset, replay: Sequence[Dataset], folder: Path
) -> tuple[Round, pd.DataFrame, tuple[Round, ...]]:
    from iterative_ppo.learning.language_model import LanguagePolicy

    lora = config.policy.lora  # nobody needs it yet, but what the improvement would refuse is told before Q is fitted
    pi = LanguagePolicy.load(policy.path, device=config.runtime.device, lora=lora)
    _check_trainable(config, pi, "q")
    current, facts = champion_round(pi, policy.label, dataset, config, folder)
    others = [other_rounds(pi, policy.label, d, config, folder) for d in (dataset, *replay)]
    earlier = [earlier_round(pi, policy.label, d, config, folder) for d in replay]
    return current, facts, tuple(r for r in (*others, *earlier) if r)


def prompts_stage(config: Config, policy: PolicyVersion, dataset: Dataset, folder: Path) -> Stage:
    """Line 6: the prompts that the policy uses for the states of the fit part in which a suggestion was logged."""
    inputs = {"policy": content_hash(policy.path), "md5": dataset.md5}

    def work(draft: Path) -> Mapping[str, float]:
        from iterative_ppo.learning.improve.episodes import prompts_of
        from iterative_ppo.learning.language_model import LanguagePolicy
        from iterative_ppo.learning.policy_evaluation import logged_rows

        pi = LanguagePolicy.load(policy.path)
        with token_folder(draft) as tokens:
            current, _ = champion_round(pi, policy.label, dataset, config, tokens)
            prompts = prompts_of(current.encoded.sequences, np.flatnonzero(current.fit & logged_rows(current.encoded)))
            write_prompts(draft / PROMPTS, prompts)
        return {"prompts": len(prompts), "mean_tokens": float(prompts.lengths.mean()) if prompts else 0.0}

    return run_stage(folder / "prompts", inputs, work)


def improve_stage(config: Config, policy: PolicyVersion, prompts: Prompts, q_path: Path, folder: Path) -> Stage:
    """Line 7: SingleTurnOpt with the frozen Q. Killed, it goes on from the checkpoint that it keeps beside itself.

    Raises StoreError where that is of the same champion and data, but of another configuration (checkpoint.take_up).
    """
    inputs = {
        "improve": config.improve.model_dump(),
        "lora": config.policy.lora.model_dump(),
        "save": config.policy.save,
        "gamma": config.gamma,
        "seed": config.seed,
        "policy": content_hash(policy.path),
        "q": content_hash(q_path),
        "prompts": content_hash(prompts.path),
        "md5": prompts.dataset.md5,
    } | _credit(config)
    if config.improve.policy_iterations > 1:  # which fit a Q of their own
        inputs["fit"] = config.q.model_dump()
    initial = round_folder(config, 0) / INITIAL / "model" if config.improve.best_of_n.initial_share else None
    if initial:
        inputs["initial"] = content_hash(initial)

    def work(draft: Path) -> Mapping[str, float]:
        from iterative_ppo.learning.improve.ppo import shown
        from iterative_ppo.learning.jobs import Improving, stored_credit
        from iterative_ppo.learning.rounds import LEFT_OUT
        from iterative_ppo.learning.runtime import computing
        from iterative_ppo.learning.sequences import Beginnings
        from iterative_ppo.learning.worker import do

        begun = _begun_with(config, policy, prompts.dataset)
        with (
            resumable(folder / IMPROVING, fingerprint(inputs), *begun) as checkpoint,
            computing(config.runtime),
            token_folder(draft) as held,
        ):
            current, behaviour, figures = _behaviour(config, policy, prompts.dataset, held)
            states = Beginnings.whole(held / "prompts", read_prompts(prompts.path / PROMPTS))
            if config.credit.assigner != "outcome":
                current = stored_credit(current, q_path.parent, config)
            with progress("improving the policy") as report:
                job = Improving(config, policy.path, q_path, current, behaviour, states, checkpoint, initial)
                result = do(job, draft, report)
        for number in range(2, 1 + config.improve.policy_iterations):
            mark = f"iteration_{number}_"
            fitted = {name.removeprefix(mark): x for name, x in result.report.items() if name.startswith(mark)}
            for doubt in doubts(fitted):
                _LOG.warning("policy iteration %d: %s", number, doubt)
        if left_out := result.report.get(LEFT_OUT):
            _LOG.warning(
                "policy iteration %d is left out: to the policy so far the conversations are worth fewer suggestions "
                "than q.effective_size_floor = %g",
                left_out,
                config.q.effective_size_floor,
            )
        last = {f"{name}_{k}": v for name, curve in result.curves.items() for k, v in shown(curve).items()}
        return figures | last | result.report

    stage = run_stage(folder / "improved", inputs, work)
    shutil.rmtree(folder / IMPROVING, ignore_errors=True)
    return stage


def _check_unfinished(config: Config, policy: PolicyVersion, dataset: Dataset, folder: Path) -> None:
    """Raise StoreError where the round's improvement was begun otherwise, before its Q is fitted for nothing."""
    if (folder / IMPROVING).exists():
        from iterative_ppo.learning.checkpoint import check_settings

        check_settings(folder / IMPROVING, *_begun_with(config, policy, dataset))


def _begun_with(config: Config, policy: PolicyVersion, dataset: Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """An improvement's settings, and what it was given, as take_up keeps them."""
    settings = config.model_dump(mode="json", include=IMPROVED_WITH)
    return settings, {"policy": content_hash(policy.path), "md5": dataset.md5}


def _behaviour(
    config: Config, policy: PolicyVersion, dataset: Dataset, folder: Path
) -> tuple[Round, np.ndarray, dict[str, float]]:
    """The champion's conversations, what the logged pass takes for their log-probs, and how many turns have none."""
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import logged_rows

    pi = LanguagePolicy.load(policy.path, device=config.runtime.device)
    _check_trainable(config, pi, "improve", *(["q"] if config.improve.policy_iterations > 1 else []))
    current, _ = champion_round(pi, policy.label, dataset, config, folder)
    if not config.improve.logged.epochs:
        return current, np.full(len(current.last), np.nan), {}
    behaviour = behaviour_log_probs(pi, current, cloned=config.policy.fine_tuned and dataset.round_number == 0)
    rows = current.fit & logged_rows(current.encoded)
    without = int((rows & np.isnan(behaviour)).sum())
    if without:
        _LOG.warning(
            "%s of %s logged suggestions have no behaviour_logprob, so the logged pass learns nothing from them; log "
            "it when sampling, or set improve.logged.epochs to 0",
            f"{without:,}",
            f"{rows.sum():,}",
        )
    return current, behaviour, {"logged_turns_without_logprob": float(without)}


def behaviour_log_probs(policy: LanguagePolicy, current: Round, cloned: bool) -> np.ndarray:
    """(N,) as logged when sampled, NaN where not; of a log that knows none, those of the policy `cloned` from it.

    What stands in so tells the logged pass where the policy began, and nothing of who wrote the log.
    """
    logged = np.full(len(current.last), np.nan) if current.behaviour is None else current.behaviour
    return policy.score(current.encoded) if cloned and np.isnan(logged).all() else logged


def distance_stage(config: Config, policy: PolicyVersion, dataset: Dataset, folder: Path) -> Stage:
    """How near the first policy is to the log, `cloned` from it or not: nats on held-out actions."""
    inputs = {"policy": content_hash(policy.path), "md5": dataset.md5}

    def work(draft: Path) -> Mapping[str, float]:
        from iterative_ppo.learning.language_model import LanguagePolicy
        from iterative_ppo.learning.runtime import computing

        with computing(config.runtime), token_folder(draft) as tokens:
            pi = LanguagePolicy.load(policy.path, device=config.runtime.device)
            current, _ = champion_round(pi, policy.label, dataset, config, tokens)
            score, lengths = pi.score(current.encoded), np.zeros(current.encoded.rows)
            for span in (s for sequence in current.encoded.sequences for s in sequence.spans):
                lengths[span.row] = span.end - span.start
        metrics = {"cloned": float(config.policy.fine_tuned)}
        for name, part in (("fit", current.fit), ("held_out", ~current.fit)):
            rows = np.flatnonzero(part & np.isfinite(score))
            if len(rows):
                metrics[f"{name}_nats_a_response"] = float(-score[rows].mean())
                metrics[f"{name}_nats_a_token"] = float(-score[rows].sum() / lengths[rows].sum())
        return metrics

    return run_stage(folder / "distance", inputs, work)


def previous_q(config: Config, round_number: int) -> Path | None:
    """Where the round before left its Q, for a warm start; before round 0 that is the corpus's."""
    before = round_folder(config, round_number - 1) / "q" / "model"
    path = before if round_number > 0 else round_folder(config, 0) / INITIAL / "q"
    return path if path.exists() else None


def curves(stage: Stage) -> dict[str, list[dict[str, float]]]:
    """The training curves that a stage left, by name."""
    path = stage.path / "curves.json"
    return read_json(path) if path.exists() else {}
