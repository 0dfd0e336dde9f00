"""Turn rewards of ITPO and Norm-ITPO: the formulas written out, the decisive turn, and a round that lives on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import q_credit, q_credit_learning
from iterative_ppo.config import Config, LoRAConfig, load_config
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import ConfigError, StoreError, TrainingError
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning.batching import EncodedTable, collate
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit import credited
from iterative_ppo.learning.credit.process_reward import Scored, fit
from iterative_ppo.learning.credit.rewards import Turns, norm_itpo, token_rewards, turn_rewards
from iterative_ppo.learning.credit.stability import Watch, kendall_tau, rank_stability
from iterative_ppo.learning.improve.episodes import prompts_of
from iterative_ppo.learning.jobs import Crediting, stored_credit
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.objective import head_range
from iterative_ppo.learning.optimization import optimizer_for, take_step
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.q_model import QSettings
from iterative_ppo.learning.rounds import corpus_q, evaluate_policy, improve_policy, round_of
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import MISSING, Conversation, State, Suggestion
from iterative_ppo.mdp.rendering import single
from iterative_ppo.mdp.returns import discounted_returns
from iterative_ppo.mdp.turn_table import to_frame
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, Prompts, fit_q_stage, improve_stage
from tasks.round_data import write_prompts

torch.set_num_threads(1)

OUTCOMES = {"purchase": 1.0}
QUICK = {
    "credit.epochs": 1.0,
    "q.epochs": 0.5,
    "q.value_epochs": 0.5,
    "improve.ppo.episodes": 32,
    "improve.ppo.rollout": 32,
    "improve.ppo.minibatch_size": 16,
    "improve.best_of_n.epochs": 0.0,
}


def config_of(assigner: str = "norm_itpo", **changes: Any) -> Config:
    return load_config(overrides=QUICK | {"credit.assigner": assigner} | changes)


def a_round(policy: LanguagePolicy, talks: list[Conversation], config: Config) -> Round:
    return round_of(policy, to_frame(talks, config.outcomes, 0.3), config)


def parameters(policy: LanguagePolicy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def conversation_of(data: Round) -> np.ndarray:
    return np.cumsum(data.last) - data.last


def totals(data: Round, values: np.ndarray) -> np.ndarray:
    return np.bincount(conversation_of(data), values)


def without_suggestions(talk: Conversation, turns: slice) -> Conversation:
    """A conversation in which some suggestions were not logged."""
    acted, last = list(talk.turns[:-1]), talk.turns[-1]
    acted[turns] = [replace(turn, suggestion=MISSING) for turn in acted[turns]]
    return replace(talk, turns=(*acted, last))


# --- formulas --------------------------------------------------------------------------------------------------------


def some_turns(seed: int, size: int) -> tuple[Turns, np.ndarray, np.ndarray]:
    """Random conversations in batches of `size`, some turns (and one conversation) unlogged; l_t and outcomes."""
    rng = np.random.default_rng(seed)
    last = np.concatenate([np.append(np.zeros(rng.integers(0, 5), bool), True) for _ in range(7)])
    lengths = np.where(last | (rng.random(len(last)) < 0.2), 0, rng.integers(1, 6, len(last)))
    conversation = np.cumsum(last) - last
    lengths[conversation == 3] = 0
    turns = Turns(np.append(0, np.cumsum(lengths)), conversation, conversation // size)
    return turns, rng.normal(size=lengths.sum()) * 3, rng.uniform(-1, 2, 7)


@pytest.mark.parametrize("seed", range(8))
def test_turn_rewards_are_the_formulas_written_out(seed: int) -> None:
    size, beta, temperature = 1 + seed % 4, 0.3, 0.4
    turns, log_ratio, outcome = some_turns(seed, size)
    rows = [log_ratio[a:b] for a, b in zip(turns.first[:-1], turns.first[1:], strict=True)]
    summed, normed = np.zeros(len(rows)), np.zeros(len(rows))
    for batch in range(7 // size + 1):
        mine = [np.flatnonzero(turns.conversation == c) for c in range(batch * size, min(7, (batch + 1) * size))]
        most, lengths = 0.0, []
        for part in mine:
            tokens = [beta * x for k in part for x in rows[k]]
            most = max([most, *(abs(sum(tokens[t:])) for t in range(len(tokens)))])
            lengths += [len(rows[k]) for k in part if len(rows[k])]
        for part in mine:
            spoken = [k for k in part if len(rows[k])]
            for k in spoken:
                summed[k] = sum(beta * x for x in rows[k]) / (most + 1e-6)
            sign = {k: -1.0 if outcome[turns.conversation[k]] < 0 else 1.0 for k in spoken}
            mean = {k: sign[k] * summed[k] / len(rows[k]) * np.mean(lengths) / temperature for k in spoken}
            for k in spoken:
                normed[k] = outcome[turns.conversation[k]] * np.exp(mean[k]) / sum(np.exp(x) for x in mean.values())
    config = config_of("itpo").credit.model_copy(update={"beta": beta, "temperature": temperature})
    assert np.allclose(turn_rewards(log_ratio, turns, outcome, config), summed, rtol=1e-12, atol=1e-14)
    config = config.model_copy(update={"assigner": "norm_itpo"})
    assert np.allclose(turn_rewards(log_ratio, turns, outcome, config), normed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_normalised_turn_rewards_sum_to_the_outcome(scale: float) -> None:
    for seed in range(20):
        turns, log_ratio, outcome = some_turns(seed, 3)
        rewards = token_rewards(scale * log_ratio, turns, 0.5)
        found = turns.totals(norm_itpo(rewards, turns, outcome, 0.4))
        assert np.abs(found - outcome * turns.scored).max() < 1e-9
        ahead = discounted_returns(turns.sums(rewards), np.append(np.diff(turns.conversation) > 0, True), 1 - 1e-12)
        assert np.abs(ahead).max() <= 1.0 + 1e-9


def test_what_cannot_be_told_of_credit_is_left_out_and_kept_from_no_file(
    tiny_policy: LanguagePolicy, played: Round, tmp_path: Path
) -> None:
    """Conversations held out that all end alike have no rank correlation."""
    config, held = config_of("itpo"), ~played.fit
    alike = replace(played, reward=np.where(held, 0.0, played.reward))
    job = Crediting(config, tmp_path, alike, ())
    found = credited(tiny_policy, alike, (), config)
    assert np.isnan(found.report["credit_kendall_tau"])
    job.save(found, tmp_path)
    assert "credit_kendall_tau" not in job.load(tmp_path).report and "credit_loss" in job.load(tmp_path).report


def test_of_a_loss_those_turns_bear_the_most_that_helped_least() -> None:
    turns = Turns(np.array([0, 3, 6]), np.zeros(2, int), np.zeros(2, int))
    rewards = np.array([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    won, lost = (norm_itpo(rewards, turns, np.array([outcome]), 1.0) for outcome in (1.0, -1.0))
    assert won.sum() == pytest.approx(1.0) and lost.sum() == pytest.approx(-1.0)
    assert won[0] > won[1] and lost[0] > lost[1]


def test_rank_stability_is_of_ranks_within_a_conversation() -> None:
    group = np.array([0, 0, 0, 1, 1, 2, 2])
    aim = np.array([1.0, 2.0, 3.0, 20.0, 10.0, 5.0, 5.0])
    steady, turned = 7 * aim - 3, np.where(group == 1, -aim, aim)
    assert rank_stability(np.array([steady, aim, aim, aim]), group) == pytest.approx(1.0)
    assert rank_stability(np.array([turned, aim, aim, aim]), group) == pytest.approx(0.0), "1 and -1; the third is flat"
    assert kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0])) == pytest.approx(2 / np.sqrt(6))
    assert np.isnan(kendall_tau(np.array([1.0, 2.0]), np.ones(2)))


# --- the process reward model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> Round:
    """The first suggestion of the first conversation, and all of the second, were not logged."""
    talks = [without_suggestions(scripted[0], slice(1)), without_suggestions(scripted[1], slice(None)), *scripted[2:32]]
    return a_round(tiny_policy, talks, config_of())


def apart(data: Round) -> Round:
    """The same round, a sequence a turn, as where prefixes are not shared."""
    spans = [(s.tokens, x) for s in data.encoded.sequences for x in s.spans]
    turns = [single(x.row, tokens[: x.start], tokens[x.start : x.end], x.trains) for tokens, x in spans]
    return replace(data, encoded=EncodedTable(turns, data.encoded.rows))


def test_an_update_is_the_gradient_of_the_cross_entropy(tiny_policy: LanguagePolicy, played: Round) -> None:
    """One step by hand, from the loss itself; the step of `fit`, in one piece and a turn a sequence."""
    config = config_of(**{"credit.learning_rate": 0.002}).credit
    members = np.arange(8)
    aim = totals(played, played.reward)
    by_hand = tiny_policy.trainable_copy()
    for p in by_hand.model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    starts = [by_hand.trainable_copy() for _ in range(2)]
    batch = collate([s for s in played.encoded.sequences if conversation_of(played)[s.spans[0].row] < 8], by_hand.pad)
    spans = np.flatnonzero(batch.trains)
    with torch.no_grad():
        reference = tiny_policy.response_log_probs(batch, spans)
    ratio = by_hand.response_log_probs(batch, spans) - reference
    owner = torch.from_numpy(conversation_of(played)[batch.row[spans]])
    logit = torch.zeros(8).index_add(0, owner, config.beta * ratio)
    loss = F.binary_cross_entropy_with_logits(logit, torch.from_numpy(aim[:8]).float())
    take_step(loss, *optimizer_for(by_hand.model, config.learning_rate, 1))
    for phi, data in zip(starts, (played, apart(played)), strict=True):
        scored = Scored.of(tiny_policy, data, 8)
        assert fit(phi, scored, [members], aim, config) == [pytest.approx(loss.item(), abs=1e-5)]
        assert all(torch.allclose(p, q, atol=2e-5) for p, q in zip(parameters(phi), parameters(by_hand), strict=True))


def test_tokens_that_the_policy_never_says_tell_nothing(untrained_policy: LanguagePolicy) -> None:
    """A word that the tokenizer does not know has probability 0; the scores and the update stay finite."""
    talks = q_credit.conversations(12, 0)
    data = a_round(untrained_policy, talks, config_of())
    scored = Scored.of(untrained_policy, data, 4)
    assert not scored.said.all() and scored.said.any()
    phi = untrained_policy.trainable_copy()
    fit(phi, scored, [np.arange(6)], totals(data, data.reward), config_of().credit)
    assert not scored.log_ratio(phi)[~scored.said].any() and scored.log_ratio(phi)[scored.said].any()


@pytest.mark.parametrize("assigner", ["itpo", "norm_itpo"])
def test_a_round_gets_turn_rewards_and_the_reference_stays(
    tiny_policy: LanguagePolicy, played: Round, assigner: str
) -> None:
    config, before = config_of(assigner), parameters(tiny_policy)
    credit = credited(tiny_policy, played, [played, replace(played, own=True)], config)
    assert all(torch.equal(p, q) for p, q in zip(before, parameters(tiny_policy), strict=True))
    now, outcome = credit.current, totals(played, played.reward)
    assert now.assigner == assigner and np.allclose(now.returns, discounted_returns(now.reward, now.last, config.gamma))
    scored = Turns.of(played.encoded, played.last, 32)
    assert not scored.scored[1] and totals(now, now.reward)[1] == outcome[1], "without a suggestion the outcome stays"
    assert not now.reward[(scored.lengths == 0) & (scored.conversation != 1)].any()
    sums = totals(now, now.reward)
    if assigner == "norm_itpo":
        assert np.abs(sums - outcome).max() < 1e-6
        assert (now.reward > 0).sum() > (outcome > 0).sum(), "shared among turns"
        assert len(credit.replay) == 1 and credit.replay[0].own, "its own earlier round serves, another's does not"
        assert credit.report["credit_conversations_of_others_left_out"] == 32
    else:
        assert now.reward.min() < 0 and len(credit.replay) == 2
    assert all(np.array_equal(r.reward, now.reward) for r in credit.replay)
    assert credit.report["objective_is_credited"] == 1.0 and abs(credit.report["credit_kendall_tau"]) <= 1.0
    assert credit.report["credit_conversations_without_suggestion"] == 1.0


def test_adapters_make_a_reward_model_of_the_policy_that_stays_as_it_was(
    tiny_policy: LanguagePolicy, played: Round, tmp_path: Path
) -> None:
    """Policy and reward model share one copy of the weights: what is learnt must not leak into the reference."""
    tiny_policy.save(tmp_path)
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, target_modules=None)
    adapted = LanguagePolicy.load(tmp_path, lora=lora)
    credit = credited(adapted, played, [], config_of(**{"credit.learning_rate": 0.01}))
    assert np.array_equal(adapted.score(played.encoded), tiny_policy.score(played.encoded), equal_nan=True)
    assert np.abs(totals(credit.current, credit.current.reward) - totals(played, played.reward)).max() < 1e-6
    spoken = credit.current.reward[credit.current.reward > 0]
    assert len(np.unique(spoken.round(4))) > len(spoken) / 2, "turns of a conversation are paid differently"


def test_held_out_outcomes_never_enter(tiny_policy: LanguagePolicy, played: Round) -> None:
    config = config_of("itpo")
    held = ~played.fit & np.append(played.last[1:], False)
    forged = replace(played, reward=np.where(held, 1 - played.reward, played.reward))
    changed = replace(played, reward=np.where(held, played.reward, np.append(played.last[1:], False) - played.reward))
    first, same, other = (credited(tiny_policy, r, [], config).current.reward for r in (played, forged, changed))
    kept = first != played.reward
    assert np.array_equal(first[kept], same[kept]) and not np.allclose(first[kept], other[kept])


@pytest.mark.parametrize("at", [2, 7, 12])
def test_killed_while_it_learns_it_ends_with_the_same_turn_rewards(
    tiny_policy: LanguagePolicy, played: Round, tmp_path: Path, at: int
) -> None:
    """And with the same figures; killed before there is a checkpoint, between two, and after the last update."""
    config = config_of(**{"credit.epochs": 4.0, "credit.batch_size": 8})
    whole, told = credited(tiny_policy, played, [], config), list[int]()

    def killed(done: int, total: int) -> None:
        told.append(done)
        if done == at:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "crediting", "key", every=3)
    with pytest.raises(KeyboardInterrupt):
        credited(tiny_policy, played, [], config, killed, checkpoint)
    assert told == list(range(1, at + 1))
    told.clear()
    again = credited(tiny_policy, played, [], config, lambda done, total: told.append(done), checkpoint)
    assert told == list(range(3 * (at // 3) + 1, 13)), "what was done is not done again"
    assert np.array_equal(again.current.reward, whole.current.reward)
    assert again.report == whole.report and "credit_turn_rank_stability" in whole.report


def test_stability_is_measured_while_it_learns(tiny_policy: LanguagePolicy, played: Round) -> None:
    report = credited(tiny_policy, played, [], config_of(**{"credit.epochs": 3.0, "credit.batch_size": 8})).report
    assert all(-1 <= report[f"credit_{k}_rank_stability"] <= 1 for k in ("turn", "token"))
    watch = Watch(tiny_policy, Scored.of(tiny_policy, played, 8), np.array([0, 2]), 2)
    watch.look([{}])
    assert watch.figures() == {}, "too few looks"


# --- the decisive turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(5), marks=pytest.mark.slow)])
def test_the_decisive_turn_ranks_first_on_held_out_conversations(seeds: range) -> None:
    found = [q_credit.decisive_turn("norm_itpo", seed) for seed in seeds]
    assert np.mean([f["sold"] for f in found]) >= 0.9
    assert max(f["sum_error"] for f in found) < 1e-6


def test_the_first_turn_is_the_greatest_or_where_lost_the_least() -> None:
    reward, conversation = np.array([0.1, 0.9, 9.0, -0.5, 0.2, -9.0]), np.array([0, 0, 0, 1, 1, 1])
    turns = np.array([True, True, False, True, True, False])
    assert q_credit.first(reward, conversation, turns, np.array([True, False])).tolist() == [1, 3]


class Speaker:
    """Says one thing when asked, another elsewhere."""

    def __init__(self, asked: str, elsewhere: str) -> None:
        self.asked, self.elsewhere = asked, elsewhere

    def sample(self, states: list[State], seed: int) -> list[Suggestion]:
        said = [self.asked if s.customer_message == q_credit.QUESTION else self.elsewhere for s in states]
        return [Suggestion(text, "suggested", -1.0) for text in said]


def test_live_conversations_are_those_that_are_learnt_from() -> None:
    """One question each, among three to six turns; what is said there alone decides."""
    seller, other = q_credit.ANSWERS[:2]
    sold, lost = (
        collect(Speaker(*said), q_credit_learning.Talks(), 60, 1, "x") for said in ((seller, other), (other, seller))
    )
    assert all(q_credit_learning._sold(talk) for talk in sold) and not any(map(q_credit_learning._sold, lost))
    assert {len(talk.turns) - 1 for talk in sold} == {3, 4, 5, 6}
    assert all([t.customer_message for t in talk.turns].count(q_credit.QUESTION) == 1 for talk in sold)
    assert turn_table.to_frame(sold, OUTCOMES, 0.3)["outcome"].sum() == 60


def test_learning_curves_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[tuple[str, Path]] = []
    (tmp_path / "pi_0").mkdir()
    write_json(tmp_path / "pi_0" / "result.json", {"success": 0.25})

    class Saved:
        def save(self, path: Path) -> None:
            path.mkdir()

    def improved(config: Config, model: Path, seed: int) -> tuple[Saved, dict[str, float]]:
        rounds.append((config.credit.assigner, model.parent))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return Saved(), {}

    monkeypatch.setattr(q_credit_learning, "WORK", tmp_path)
    monkeypatch.setattr(q_credit_learning, "first_policy", lambda seed: tmp_path / "pi_0")
    monkeypatch.setattr(q_credit_learning, "success", lambda policy, seed: {"success": 0.1 * seed})
    monkeypatch.setattr(q_credit_learning, "improved", improved)
    with pytest.raises(KeyboardInterrupt):
        q_credit_learning.curve("itpo", "rloo", 0)
    found = q_credit_learning.curve("itpo", "rloo", 0)
    assert [one["success"] for one in found] == pytest.approx([0.25, 0.1, 0.2, 0.3])
    assert len(rounds) == 4 and rounds[2] == rounds[3] == ("itpo", rounds[3][1]) and rounds[3][1].name == "2"
    rows = {row["figure"]: row for row in q_credit_learning.credit_learning([0])}
    assert rows["one decisive turn, itpo, rloo, success after round 2"]["value"] == 0.2
    assert rows["one decisive turn, norm_itpo less Monte Carlo, ppo, round 3"]["value"] == 0.0
    assert len(rounds) == 4 + 3 * 8, "each round of each of the others once"


# --- a round on turn rewards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assigner", ["itpo", "norm_itpo"])
def test_a_round_lives_on_turn_rewards(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], assigner: str
) -> None:
    config = config_of(assigner, **{"improve.logged.epochs": 0.5, "q.corpus_epochs": 0.5})
    outcome = a_round(tiny_policy, scripted[:30], config)
    start = corpus_q(tiny_policy, outcome, config)
    current = credited(tiny_policy, outcome, [], config).current
    q = evaluate_policy(tiny_policy, current, [], config, start)
    again = evaluate_policy(tiny_policy, outcome, [], config, start)
    assert np.allclose(*(x.evaluate(current.encoded).q for x in (q, again)), equal_nan=True), "it credits by itself"
    assert again.report["objective_is_credited"] == 1.0
    assert list(q.settings.outcomes) == ["credit"] and q.settings.low == (-2.0 if assigner == "itpo" else 0.0)
    prompts, behaviour = (
        prompts_of(current.encoded.sequences, np.flatnonzero(current.fit)),
        tiny_policy.score(current.encoded),
    )
    made = improve_policy(tiny_policy, current, behaviour, q, prompts, config, 0)
    assert set(made.curves) == {"logged", "ppo"}
    assert not all(torch.equal(p, q) for p, q in zip(parameters(made.policy), parameters(tiny_policy), strict=True))
    with pytest.raises(TrainingError, match=f"rewards of outcome, Q was fitted to those of credit.assigner {assigner}"):
        improve_policy(tiny_policy, outcome, behaviour, q, prompts, config, 0)


def test_the_range_of_q_is_that_of_credited_returns() -> None:
    several: dict[str, Any] = {"outcomes": {"purchase": 2.0, "complaint": -0.5}}
    expected = {"outcome": (0.0, 1.0), "norm_itpo": (-0.5, 2.0), "itpo": (-2.0, 2.0)}
    for assigner, ends in expected.items():
        settings = QSettings.of(config_of(assigner, **several))
        assert (settings.low, settings.high) == ends
        assert len(settings.outcomes) == (2 if assigner == "outcome" else 1)


def test_discounted_itpo_returns_may_be_beyond_1_and_are_never_beyond_the_range() -> None:
    """The worst case: what is to come is 1, then -1, then 0."""
    ahead, last = np.array([1.0, -1.0, 0.0, 0.0]), np.array([False, False, False, True])
    returns = discounted_returns(ahead - np.append(ahead[1:], 0.0), last, 0.5)
    low, high = head_range(config_of("itpo"))
    assert returns[0] == pytest.approx(2 - 0.5) and low < returns.min() < 0 and 1 < returns.max() < high


def test_the_stages_say_what_the_objective_is_and_keep_the_turn_rewards(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    config = config_of(**{"data.root": tmp_path / "data", "improve.logged.epochs": 0.5, "q.replay_rounds": 0})
    tiny_policy.save(tmp_path / "policy")
    scripted = scripted[:30]
    frame = to_frame(scripted, OUTCOMES, 0.3)
    turn_table.write(frame, tmp_path / "turns" / "turns.parquet", OUTCOMES)
    policy, dataset = PolicyVersion(1, tmp_path / "policy", "script"), Dataset(0, tmp_path / "turns", "")
    stage = fit_q_stage(config, policy, dataset, tmp_path / "round")
    assert stage.metrics["objective_is_credited"] == 1.0 and "credit_kendall_tau" in stage.metrics
    assert "norm_itpo, not to the outcome" in read_json(stage.path / "credit.json")["objective"]
    plain = a_round(tiny_policy, scripted, config)
    kept = stored_credit(plain, stage.path, config)
    assert np.abs(totals(kept, kept.reward) - totals(plain, plain.reward)).max() < 1e-6
    assert (kept.reward > 0).sum() > (plain.reward > 0).sum()
    prompts = prompts_of(plain.encoded.sequences, np.flatnonzero(plain.fit))
    (tmp_path / "prompts").mkdir()
    write_prompts(tmp_path / "prompts" / "prompts.parquet", prompts)
    place = Prompts(tmp_path / "prompts", dataset)
    assert "logged_loss" in improve_stage(config, policy, place, stage.path / "model", tmp_path / "round").metrics
    with pytest.raises(StoreError, match="turn rewards for"):
        stored_credit(a_round(tiny_policy, scripted[:5], config), stage.path, config)


# --- what cannot be credited -----------------------------------------------------------------------------------------


def test_what_cannot_be_credited_is_named(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    config = config_of()
    data = a_round(tiny_policy, scripted, config)
    lost = replace(data, reward=np.zeros(len(data.reward)))
    with pytest.raises(TrainingError, match=r"all \d+ outcomes of the fit part are 0: .* collect more"):
        evaluate_policy(tiny_policy, lost, [], config)
    silent = a_round(tiny_policy, [without_suggestions(talk, slice(None)) for talk in scripted[:9]], config)
    with pytest.raises(
        TrainingError, match=r"none of the \d+ rows of the fit part holds a logged suggestion.*log what"
    ):
        evaluate_policy(tiny_policy, silent, [], config)
    with pytest.raises(TrainingError, match=r"from 0 to 3, expected 0 to 1: set data.outcome_low"):
        evaluate_policy(tiny_policy, replace(data, reward=3 * data.reward), [], config)
    wild = config_of(**{"credit.beta": 1e38})
    with pytest.raises(TrainingError, match=r"diverged.*; lower credit\.learning_rate"):
        credited(tiny_policy, data, [], wild)
    with pytest.raises(ConfigError, match=r"credit.assigner itpo .* improve.reward acceptance .* set credit.assigner"):
        config_of("itpo", **{"improve.reward": "acceptance"})
    for name in ("improve.policy_iterations", "rounds.last_policy_iterations"):
        with pytest.raises(ConfigError, match=rf"{name} 2 .* norm_itpo pays a turn by how .*; set {name} to 1"):
            config_of("norm_itpo", **{name: 2})
        config_of("itpo", **{name: 2})
