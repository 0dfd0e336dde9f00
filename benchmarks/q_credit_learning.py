"""Learning curves of credit assigners with PPO, GRPO and RLOO, beside Monte Carlo returns of the outcome.

On the conversations of q_credit, in which one turn decides: whoever says there what sells always sells. Every
assigner's Q is fitted by Monte Carlo, so that what pays the turns is the one difference. A round in which all of the
fit part succeed leaves the policy as it is, because nothing is left to learn. Resumable by assigner,
algorithm, seed and round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.q_cells import FITTED, WORK, Row, sections
from benchmarks.q_credit import ANSWERS, MORE, QUESTION, SMALL, TALK, conversations
from benchmarks.results_file import averaged
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.rollout import collect
from iterative_ppo.files import fingerprint, read_json, whole_directory, write_json
from iterative_ppo.mdp.conversation import Conversation, State, Suggestion, Turn
from iterative_ppo.mdp.turn_table import last_rows, to_frame

ASSIGNERS = {"outcome": "Monte Carlo", "norm_itpo": "norm_itpo", "itpo": "itpo"}
ALGORITHMS = ("ppo", "grpo", "rloo")
CORPUS, ROUND, EVALUATION, ROUNDS = 600, 600, 1500, 3
IMPROVER = {
    "improve.best_of_n.epochs": 0.0,
    "improve.ppo.episodes": 2048,
    "improve.ppo.kl_coefficient": 0.3,
    "improve.ppo.learning_rate": 0.001,
}
"""The same for all three algorithms and assigners."""
GIVEN: dict[str, Any] = {**SMALL, **MORE, **IMPROVER, "q.target": "monte_carlo", "q.replay_rounds": 0}


class Talk:
    """A conversation of q_credit under way: the customer asks once, and what is said then alone decides."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.length = rng, int(rng.integers(3, 7))
        self.asked = int(rng.integers(self.length))
        self.turns: list[Turn] = []
        self.sold = self.closed = False
        self._hear()

    @property
    def state(self) -> State:
        return State(tuple(self.turns), self.heard)

    def step(self, suggestion: Suggestion) -> None:
        abstained = suggestion.status == "abstained"
        says, fate = ("well", None) if abstained else (suggestion.text, "verbatim")
        self.sold |= len(self.turns) == self.asked and suggestion.text == ANSWERS[0]
        self.turns.append(Turn(self.heard, (0.0,), suggestion, says, fate))
        if len(self.turns) < self.length:
            self._hear()
            return
        self.closed = True
        self.turns.append(Turn("sold" if self.sold else None, (float(self.sold),)))

    def _hear(self) -> None:
        self.heard = QUESTION if len(self.turns) == self.asked else str(self.rng.choice(TALK))


class Talks:
    """Such conversations as an environment."""

    def start(self, conversations: int, seed: int) -> list[Talk]:
        return [Talk(np.random.default_rng((seed, k))) for k in range(conversations)]

    def business_of(self, k: int) -> str:
        return "b"


def configuration(assigner: str, algorithm: str, seed: int) -> Config:
    return load_config(None, {**GIVEN, "seed": seed, "credit.assigner": assigner, "improve.algorithm": algorithm})


def first_policy(seed: int) -> Path:
    """pi_0 of a seed, cloned from answers at random."""
    from iterative_ppo.learning.supervised import fine_tune
    from iterative_ppo.learning.tiny import build_policy

    config = configuration("outcome", "ppo", seed)
    place = WORK / "credit_learning" / f"pi_0-{seed}-{fingerprint(CORPUS, sections(config, 'policy', 'supervised'))}"
    if not place.exists():
        talks = conversations(CORPUS, 100 + seed)
        untrained = build_policy(talks, config.policy, seed)
        sequences = [s for talk in talks for s in untrained.renderer.encode(talk)[0]]
        with whole_directory(place) as draft:
            policy, _ = fine_tune(untrained, sequences, config.supervised, seed)
            policy.save(draft / "model")
            write_json(draft / "result.json", success(policy, seed))
    return place


def success(policy: Any, seed: int) -> dict[str, float]:
    """Shares of fresh conversations that succeed, and of suggestions that are answers."""
    talks = collect(policy, Talks(), EVALUATION, 5_000_000 + seed, "evaluation")
    said = [turn.suggestion.text in ANSWERS for talk in talks for turn in talk.turns if turn.suggestion]
    return {"success": float(np.mean([_sold(talk) for talk in talks])), "answers": float(np.mean(said))}


def _sold(talk: Conversation) -> bool:
    return talk.turns[-1].outcomes[0] > 0


def curve(assigner: str, algorithm: str, seed: int) -> list[dict[str, float]]:
    """What each round reached, from pi_0 on."""
    config = configuration(assigner, algorithm, seed)
    key = fingerprint(CORPUS, ROUND, EVALUATION, sections(config, *FITTED, "supervised", "improve"))
    folder = WORK / "credit_learning" / f"{assigner}-{algorithm}-{seed}-{key}"
    before = first_policy(seed)
    found = [read_json(before / "result.json")]
    for number in range(1, ROUNDS + 1):
        place = folder / f"{number}"
        if not place.exists():
            began = time.process_time()
            with whole_directory(place) as draft:
                policy, told = improved(config, before / "model", 10_000 * (seed + 1) + number)
                policy.save(draft / "model")
                took = time.process_time() - began
                told |= success(policy, 1000 * seed + number) | {"cpu_seconds": took}
                write_json(draft / "result.json", told)
            print(f"credit learning, {assigner}, {algorithm}, seed {seed}, round {number}: {told}", flush=True)
        found.append(read_json(place / "result.json"))
        before = place
    return found


def improved(config: Config, model: Path, seed: int) -> tuple[Any, dict[str, float]]:
    """One round: collect, credit, fit Q, improve."""
    from iterative_ppo.learning.improve.episodes import prompts_of
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.rounds import evaluate_policy, improve_policy, round_of

    policy = LanguagePolicy.load(model)
    talks = collect(policy, Talks(), ROUND, seed, "pi")
    frame = to_frame(talks, config.outcomes, config.data.evidence_share)
    if frame["outcome"][last_rows(frame) & (frame["part"] == "fit")].min() > 0:
        return policy, {}
    current = round_of(policy, frame, config)
    q = evaluate_policy(policy, current, [], config)
    behaviour = frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan)
    prompts = prompts_of(current.encoded.sequences, np.flatnonzero(current.fit))
    made = improve_policy(policy, current, behaviour, q, prompts, config, config.seed)
    told = {name: value for name, value in q.report.items() if name.startswith("credit_")}
    return made.policy, told | {"kl": made.curves[config.improve.algorithm][-1]["kl_to_reference"]}


def credit_learning(seeds: Sequence[int]) -> list[Row]:
    """Success by round of every assigner and algorithm, and what credit gains or loses beside Monte Carlo's."""
    pairs = list(product(ASSIGNERS, ALGORITHMS))
    found = {pair: [curve(*pair, seed) for seed in seeds] for pair in pairs}

    def of(pair: tuple[str, str], number: int) -> np.ndarray:
        return np.array([one[number]["success"] for one in found[pair]])

    def told(name: str, values: np.ndarray, cpu: float | None = None) -> Row:
        return averaged(f"one decisive turn, {name}", values, seeds, cpu_seconds=cpu)

    rows = [told("pi_0", of(pairs[0], 0))]
    for pair, number in product(pairs, range(1, ROUNDS + 1)):
        cpu = float(np.mean([one[number]["cpu_seconds"] for one in found[pair]]))
        rows.append(told(f"{ASSIGNERS[pair[0]]}, {pair[1]}, success after round {number}", of(pair, number), cpu))
    for (assigner, algorithm), number in product(pairs[len(ALGORITHMS) :], (1, ROUNDS)):
        less = of((assigner, algorithm), number) - of(("outcome", algorithm), number)
        rows.append(told(f"{assigner} less Monte Carlo, {algorithm}, round {number}", less))
    return rows
