"""The offline gate as a stage: evidence on held-out conversations, then a pure decision."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import NothingToLearn
from iterative_ppo.evaluation.certificate import certify
from iterative_ppo.evaluation.degeneration import repeated_ngrams
from iterative_ppo.evaluation.evidence import OfflineEvidence, paired_gain
from iterative_ppo.evaluation.gate import Decision, offline_gate
from iterative_ppo.evaluation.guardrails import Said, guarded
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.ope import Estimate, LoggedTurns, estimates, untold
from iterative_ppo.files import content_hash, fingerprint, write_json
from iterative_ppo.learning.objective import outcome_range
from iterative_ppo.mdp import turn_table
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, resumable
from tasks.progress import progress
from tasks.q_report import judged
from tasks.round_data import champion_round, conversations_of, token_folder
from tasks.stage import Stage, load_stage, run_stage

if TYPE_CHECKING:
    from iterative_ppo.learning.checkpoint import Checkpoint
    from iterative_ppo.learning.compare import Spoken
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import Round
    from iterative_ppo.learning.q_model import QModel

_LOG = logging.getLogger(__name__)
EXAMPLES = 8
JUDGING = "judging"


def gate_stage(
    config: Config, champion: PolicyVersion, candidate: Path, q_stage: Path, dataset: Dataset, folder: Path
) -> Stage:
    """Evidence and decision: `evidence.json`, `decision.json`, and what both policies say in a few states.

    Killed while it fits the challenger's own Q (gate.fqe), that goes on from its checkpoint.
    """
    inputs = {
        "gate": config.gate.model_dump(),
        "champion": content_hash(champion.path),
        "candidate": content_hash(candidate),
        "q": content_hash(q_stage / "model"),
        "md5": dataset.md5,
        "seed": config.seed,
    }

    def work(draft: Path) -> Mapping[str, float]:
        key = fingerprint(inputs, config.q.model_dump(), config.outcomes, config.gamma)
        with resumable(folder / JUDGING, key) if config.gate.fqe else nullcontext() as checkpoint:
            evidence, examples = gather(config, champion, candidate, q_stage, dataset, draft, checkpoint)
        decision = offline_gate(evidence)
        write_json(draft / "evidence.json", evidence.as_dict())
        write_json(draft / "decision.json", decision.as_dict())
        write_json(draft / "examples.json", examples)
        numbers = {k: v for k, v in evidence.as_dict().items() if isinstance(v, int | float)}
        return {**numbers, "passed": float(decision.verdict == "test")}

    stage = run_stage(folder / "gate", inputs, work)
    shutil.rmtree(folder / JUDGING, ignore_errors=True)
    return stage


def decision_of(stage: Stage) -> Decision:
    """The decision that a gate stage left."""
    value = stage.read("decision.json")
    return Decision(value["verdict"], tuple(value["reasons"]))


def figures_of(stage: Path) -> dict[str, Any]:
    """What a round's record keeps of a gate stage for the rule of convergence."""
    evidence = load_stage(stage).read("evidence.json")
    certificate, guardrails = evidence["certificate"], [*map(NonInferiority.from_dict, evidence["guardrails"])]
    return {
        "kl": evidence["kl_challenger_champion"],
        "guardrails_held": all(one.holds or one.missed for one in guardrails),
        "guardrails_broken": any(one.broken for one in guardrails),
        "certificate_high": None if certificate["refusal"] else certificate["high"],
    }


@dataclass(frozen=True)
class Speakers:
    """Champion and challenger, and what each says in the same held-out states."""

    champion: LanguagePolicy
    challenger: LanguagePolicy
    before: Spoken
    after: Spoken

    @property
    def differ(self) -> np.ndarray:
        """(S,) bool: whether the first response of each, drawn with the same random numbers, is another."""
        samples = self.before.q.shape[1]
        first = (said.responses.tokens[::samples] for said in (self.before, self.after))
        return np.array([ours != theirs for ours, theirs in zip(*first, strict=True)], dtype=bool)


def gather(
    config: Config,
    champion: PolicyVersion,
    candidate: Path,
    q_stage: Path,
    dataset: Dataset,
    draft: Path,
    checkpoint: Checkpoint | None = None,
) -> tuple[OfflineEvidence, list[dict[str, Any]]]:
    """Both policies on the evidence part, whose tokens lie in `draft` meanwhile.

    With gate.fqe, conversations that support no Q of the challenger leave that estimate refused, with the reason.

    Raises NothingToLearn where it holds no action.
    """
    from iterative_ppo.learning.compare import speak
    from iterative_ppo.learning.improve.episodes import prompts_of
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.learning.runtime import computing

    with computing(config.runtime), token_folder(draft) as tokens:
        old = LanguagePolicy.load(champion.path, device=config.runtime.device)
        new = LanguagePolicy.load(candidate, device=config.runtime.device)
        q = QModel.load(q_stage / "model", config.runtime.device)
        current, facts = champion_round(old, champion.label, dataset, config, tokens)
        group = facts["conversation_id"].to_numpy(dtype=str)
        rows = held_out_rows(current.fit, turn_table.actions(facts), group, config.gate.states)
        prompts = prompts_of(current.encoded.sequences, rows)
        before = speak(old, new, q, prompts, config.gate.samples, config.seed)
        after = speak(new, old, q, prompts, config.gate.samples, config.seed)
        turns = logged_turns(new, q, current, rows, after.q.mean(axis=1), config)
        modelled, refused = turns, dict[str, Estimate]()
        model: Literal["q_model", "fqe"] = "q_model"
        if config.gate.fqe:
            try:
                own = fqe(new, q, current, config, checkpoint)
                sampled = speak(new, old, own, prompts, config.gate.samples, config.seed).q.mean(axis=1)
                modelled, model = logged_turns(new, own, current, rows, sampled, config), "fqe"
            except NothingToLearn as error:  # the logs cannot tell, the A/B test can
                refused = {"fqe": untold("fqe", int(turns.last.sum()), str(error))}
                _LOG.warning("the challenger's own Q (gate.fqe) is refused, so the champion's stands in: %s", error)
    speakers = Speakers(old, new, before, after)
    stage = load_stage(q_stage)
    said = _said(old, before, group[rows], np.zeros(before.own.size))
    said_now = _said(new, after, group[rows], (after.own - after.other).ravel())
    said_now = replace(said_now, calibration=judged(q_stage))
    low, high = paired_gain(before.judged.mean(axis=1), after.judged.mean(axis=1), group[rows])
    evidence = OfflineEvidence(
        states=len(rows),
        samples=config.gate.samples,
        q_champion=float(before.judged.mean()),
        q_challenger=float(after.judged.mean()),
        q_gain_low=low,
        q_gain_high=high,
        kl_challenger_champion=after.kl,
        kl_champion_challenger=before.kl,
        missing_eos=float(1.0 - after.responses.finished.mean()),
        repetition=float(np.mean([repeated_ngrams(tokens) for tokens in after.responses.tokens])),
        length_ratio=float(after.lengths.mean() / before.lengths.mean()),
        abstained=float(said_now.abstained.mean()),
        q_r2=stage.metrics.get("r2", float("nan")),
        state_baseline_r2=stage.metrics.get("state_only_r2", float("nan")),
        certificate=certify(turns, config.gate, config.seed),
        estimates=estimates(modelled, config.gate, config.seed, model) | refused,
        guardrails=guarded(config.gate.guardrails, said, said_now, config.gate.alpha),
        differing=int(speakers.differ.sum()),
    )
    return evidence, examples(config, dataset, facts.iloc[rows], speakers)


def fqe(
    challenger: LanguagePolicy, start: QModel, current: Round, config: Config, checkpoint: Checkpoint | None = None
) -> QModel:
    """The challenger's own Q by fitted Q evaluation on the fit part, from the champion's Q on.

    It is about the rewards of `current`, so of the outcome where the champion's is of credited turns; the champion's
    itself where that is of acceptance, which no later turn changes.
    """
    from iterative_ppo.learning.policy_evaluation import fit_q
    from iterative_ppo.learning.rounds import UPDATES

    if config.improve.reward == "acceptance":
        return start
    fitted: dict[str, Any] = {"target": "fqe", "expectile": None}
    if config.credit.assigner != "outcome":
        config = config.model_copy(update={"credit": config.credit.model_copy(update={"assigner": "outcome"})})
        fitted["outcome_heads"] = False
    config = config.model_copy(update={"q": config.q.model_copy(update=fitted)})
    kept = checkpoint and checkpoint.part("q", UPDATES)
    with progress("fitting the challenger's own Q") as report:
        return fit_q(challenger, current, [], config, start, report, kept)


def held_out_rows(fit: np.ndarray, actions: np.ndarray, group: np.ndarray, most: int) -> np.ndarray:
    """Table rows of the evidence part that hold an action, of whole conversations, spread evenly, about `most` rows."""
    rows = np.flatnonzero(~fit & actions)
    if not len(rows):
        raise NothingToLearn("no held-out conversation with an action: collect more, or raise data.evidence_share")
    _, code = np.unique(group[rows], return_inverse=True)
    count = int(code.max()) + 1
    wanted = max(1, min(count, int(count * most / len(rows))))
    chosen = np.zeros(count, bool)
    chosen[_spread(np.arange(count), wanted)] = True
    return rows[chosen[code]]


def logged_turns(
    challenger: LanguagePolicy, q: QModel, current: Round, rows: np.ndarray, sampled_q: np.ndarray, config: Config
) -> LoggedTurns:
    """The evidence part for off-policy estimates, under log-probs as they were logged when sampling.

    Args:
        rows: (S,) where the challenger was sampled. sampled_q: (S,) its mean Q there.
    """
    from iterative_ppo.learning.policy_evaluation import log_ratios

    turns = np.flatnonzero(~current.fit & ~current.last)
    values, sampled = q.evaluate(current.encoded), np.full(len(current.last), np.nan)
    sampled[rows] = sampled_q
    myopic, (low, high) = config.improve.reward == "acceptance", outcome_range(config)
    return LoggedTurns(
        last=current.last[turns + 1],
        reward=current.reward[turns],
        log_ratio=log_ratios(challenger, current)[turns],
        baseline=values.v[turns],
        q=values.q[turns],
        sampled_q=sampled[turns],
        gamma=0.0 if myopic else config.gamma,
        low=min(0.0, low),
        high=max(1.0 if myopic else 0.0, high),
    )


def _said(policy: LanguagePolicy, spoken: Spoken, group: np.ndarray, log_ratio: np.ndarray) -> Said:
    actions = [policy.suggestion(tokens) for tokens in spoken.responses.tokens]
    return Said(
        unit=np.repeat(group, spoken.q.shape[1]),
        texts=[action.text or "" for action in actions],
        pieces=spoken.responses.tokens,
        abstained=np.array([action.status == "abstained" for action in actions]),
        finished=spoken.responses.finished,
        log_ratio=log_ratio,
    )


def examples(config: Config, dataset: Dataset, states: pd.DataFrame, speakers: Speakers) -> list[dict[str, Any]]:
    """What both policies say in a few of the states, for the report."""
    chosen = telling(speakers.differ)
    talks = conversations_of(dataset, config, states["conversation_id"].iloc[chosen].astype(str).tolist())
    found, samples = [], config.gate.samples
    for k in chosen:
        state = talks[str(states["conversation_id"].iloc[k])].state(int(states["turn"].iloc[k]) - 1)
        before, after = (
            {"text": p.suggestion(s.responses.tokens[k * samples]).text or "(no suggestion)", "q": float(s.q[k, 0])}
            for p, s in ((speakers.champion, speakers.before), (speakers.challenger, speakers.after))
        )
        history = [{"customer": turn.customer_message, "business": turn.business_message} for turn in state.history]
        history.append({"customer": state.customer_message, "business": None})
        found.append({"messages": history, "champion": before, "challenger": after})
    return found


def telling(differ: np.ndarray) -> np.ndarray:
    """Places of a few states: those in which the policies differ come first, and others where these are too few.

    Args:
        differ: (S,) bool, whether they do.
    """
    there = _spread(np.flatnonzero(differ), EXAMPLES)
    return np.concatenate([there, _spread(np.flatnonzero(~differ), EXAMPLES - len(there))])


def _spread(places: np.ndarray, most: int) -> np.ndarray:
    """So many of them, evenly spread."""
    return places[np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)]
