"""GRPO and RLOO by TRL: a bandit whose optimum is known, TRL's figures longhand, and what must not be trained on."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from bandit import ByPrompt, Taste, build_bandit, distance, leans_to, likes, probability, prompt, said

from iterative_ppo.config import Config, ImproveConfig, LoRAConfig, load_config
from iterative_ppo.errors import ConfigError, ModelError, TrainingError
from iterative_ppo.learning import distributed, runtime
from iterative_ppo.learning.batching import Batch, EncodedTable
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve import group_trainers
from iterative_ppo.learning.improve.best_of_n import improve_by_best
from iterative_ppo.learning.improve.episodes import token_log_probs
from iterative_ppo.learning.improve.group_trainers import improve, padded_log_probs
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.rounds import improve_on_samples
from iterative_ppo.mdp.rendering import single

torch.set_num_threads(1)

GROUPED = ["grpo", "rloo"]
TRAINERS = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}


@pytest.fixture(scope="module")
def bandit(tiny_config: Config) -> LanguagePolicy:
    """Leave its weights alone."""
    return build_bandit(tiny_config)


def config(algorithm: str, size: int = 8, **changes: Any) -> ImproveConfig:
    quick = {"episodes": 1280, "rollout": 128, "epochs": 3, "minibatch_size": 32}
    quick |= {"learning_rate": 0.02, "kl_coefficient": 0.0}
    given = {f"improve.ppo.{name}": value for name, value in (quick | changes).items()}
    return load_config(overrides={"improve.algorithm": algorithm, "improve.group.size": size, **given}).improve


def parameters(policy: LanguagePolicy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def shaken(policy: LanguagePolicy) -> LanguagePolicy:
    """Another policy of the same family."""
    other = policy.with_model(copy.deepcopy(policy.model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return other


# --- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", GROUPED)
def test_it_finds_the_one_response_that_pays(bandit: LanguagePolicy, algorithm: str) -> None:
    before, told = parameters(bandit), []
    student, curve = improve(
        bandit, likes(bandit, "maybe"), [prompt(bandit)], config(algorithm), 0, progress=lambda *k: told.append(k)
    )
    assert probability(bandit, "maybe") < 0.1
    assert probability(student, "maybe") > 0.95
    assert same(parameters(bandit), before), "the champion keeps serving while the challenger learns"
    assert told == [(k, 10) for k in range(1, 11)] and len(curve) == 10
    assert curve[0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert curve[0]["q"] < 0.2 and curve[-1]["q"] > 0.8
    assert curve[-1]["entropy"] < curve[0]["entropy"] and curve[-1]["missing_eos"] < curve[0]["missing_eos"]
    assert {"loss", "clip_fraction", "response_tokens", "updates"} <= set(curve[0])
    assert all(math.isfinite(value) for entry in curve for value in entry.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algorithm", ["ppo", *GROUPED])
def test_every_algorithm_reaches_95_percent_of_the_optimum(bandit: LanguagePolicy, algorithm: str, seed: int) -> None:
    """No Q is below 0 and the best response's is 1, so its probability is a lower bound of E[Q]."""
    q, c = leans_to(bandit, "maybe"), config(algorithm, minibatch_size=64)
    assert probability(bandit, "maybe") < 0.1
    student, _ = improve_on_samples(bandit, q, [prompt(bandit)], c, seed)
    assert probability(student, "maybe") > 0.95


def test_rloo_with_a_penalty_finds_the_known_mixture(bandit: LanguagePolicy) -> None:
    """The best policy under the penalty is pi exp(Q / beta), normalised."""
    beta, start = 0.4, probability(bandit, "maybe")
    tilted = start * math.exp(1 / beta)
    c = config("rloo", episodes=2560, learning_rate=0.01, kl_coefficient=beta, missing_eos_penalty=0.0)
    student, _ = improve(bandit, likes(bandit, "maybe"), [prompt(bandit)], c, 0)
    assert probability(student, "maybe") == pytest.approx(tilted / (1 - start + tilted), abs=0.1)


@pytest.mark.parametrize("algorithm", GROUPED)
def test_the_penalty_looks_to_the_reference_that_is_given(bandit: LanguagePolicy, algorithm: str) -> None:
    """Pulled to another policy, far more than Q can pull, the student ends nearer to it than it began."""
    other = shaken(bandit)
    c = config(algorithm, episodes=512, kl_coefficient=20.0)
    _, curve = improve(bandit, likes(bandit, "maybe"), [prompt(bandit)], c, 0, reference=other)
    assert curve[0]["kl_to_reference"] > 0.1
    assert curve[-1]["kl_to_reference"] < 0.5 * curve[0]["kl_to_reference"]


# --- what TRL is given and what it makes of it -----------------------------------------------------------------------


class Witness:
    """What one of TRL's trainers was given and computed."""

    def __init__(self, trainer: Any, policy: LanguagePolicy, patched: pytest.MonkeyPatch) -> None:
        self.rollouts: list[tuple[list[dict[str, Any]], dict[str, torch.Tensor]]] = []
        self.losses: list[tuple[dict[str, torch.Tensor], torch.Tensor, float]] = []
        self.clip = 0.0
        score, loss = trainer._generate_and_score_completions, trainer._compute_loss

        def scored(this: Any, inputs: Any) -> Any:
            made = score(this, inputs)
            self.rollouts.append((inputs, {name: v.clone() for name, v in made.items()}))
            return made

        def computed(this: Any, model: Any, inputs: Any) -> Any:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                log_p = padded_log_probs(this.groups.run.student, ids, mask, inputs["completion_ids"].shape[1])
            value = loss(this, model, inputs)
            self.losses.append((inputs, log_p, float(value.detach())))
            return value

        patched.setattr(trainer, "_generate_and_score_completions", scored)
        patched.setattr(trainer, "_compute_loss", computed)


def graded(policy: LanguagePolicy) -> Taste:
    """A Q of many values."""
    weight = np.random.default_rng(0).normal(size=policy.model.config.vocab_size)
    return Taste(lambda tokens: float(sum(weight[t] * (k + 1) for k, t in enumerate(tokens))))


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask.bool(), strict=True)]


@pytest.mark.parametrize("algorithm", GROUPED)
def test_prompts_advantages_and_losses_longhand(
    bandit: LanguagePolicy, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """One rollout against another reference; prompts of several lengths, so that padding has to be without effect."""
    witness = Witness(TRAINERS[algorithm], bandit, monkeypatch)
    ours = [prompt(bandit), prompt(bandit, "no"), prompt(bandit, "yes", "later", "maybe")]
    other, q, beta, size, penalty = shaken(bandit), graded(bandit), 0.3, 4, 0.7
    c = config(
        algorithm, size, episodes=32, minibatch_size=16, epochs=2, kl_coefficient=beta, missing_eos_penalty=penalty
    )
    improve(bandit, q, ours, c, 0, reference=other, scale=2.0)
    assert len(witness.rollouts) == 1 and len(witness.losses) == 4
    _, made = witness.rollouts[0]
    prompts = unpadded(made["prompt_ids"], made["prompt_mask"])
    responses = unpadded(made["completion_ids"], made["completion_mask"])
    assert set(prompts) == set(ours), "exactly our token ids"
    assert all(prompts[k] == prompts[k - k % size] for k in range(len(prompts)))

    pairs = zip(prompts, responses, strict=True)
    table = EncodedTable([single(k, p, a, True) for k, (p, a) in enumerate(pairs)], len(prompts))
    mine, theirs = token_log_probs(bandit, table), token_log_probs(other, table)
    rewards = []
    for k, response in enumerate(responses):
        assert len(response) <= 3 and not set(response) & set(bandit.banned.tolist())
        reward = float(q.reward(response)) / 2.0 - (0.0 if response[-1] == bandit.renderer.eos else penalty)
        if algorithm == "rloo":
            reward -= beta * float((mine[k].astype(float) - theirs[k].astype(float)).sum())
        rewards.append(reward)
    for k, advantage in enumerate(made["advantages"].tolist()):
        group = rewards[k - k % size : k - k % size + size]
        mean = sum(group) / size
        if algorithm == "rloo":
            expected = rewards[k] - sum(r for j, r in enumerate(group) if j != k % size) / (size - 1)
        else:
            deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
            expected = (rewards[k] - mean) / (deviation + 1e-4)
        assert advantage == pytest.approx(expected, abs=2e-6, rel=2e-6)  # TRL's rewards are float32

    for inputs, log_p, value in witness.losses:
        expected = longhand_loss(inputs, log_p, c, len(witness.losses) // c.ppo.epochs)
        assert value == pytest.approx(expected, abs=2e-6, rel=1e-5)


def longhand_loss(inputs: dict[str, torch.Tensor], now: torch.Tensor, c: ImproveConfig, parts: int) -> float:
    """Clipped losses: of GRPO's tokens, all of the rollout alike, with their KL by ratio; of RLOO's responses."""
    total, clip = 0.0, c.ppo.clip
    for k, advantage in enumerate(inputs["advantages"].tolist()):
        length = int(inputs["completion_mask"][k].sum())
        log_p = [float(x) for x in now[k, :length]]
        if c.algorithm == "rloo":
            ratio = math.exp(sum(log_p) - float(inputs["old_logps"][k]))
            total -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            continue
        for t in range(length):
            ratio = math.exp(log_p[t] - float(inputs["old_per_token_logps"][k, t]))
            rho = float(inputs["ref_per_token_logps"][k, t]) - log_p[t]
            total -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            total += c.ppo.kl_coefficient * ratio * (math.exp(rho) - rho - 1)
    if c.algorithm == "rloo":
        return total / len(inputs["advantages"])
    return total * parts / float(inputs["num_items_in_batch"])


@pytest.mark.parametrize("algorithm", GROUPED)
def test_afterwards_it_samples_as_a_fresh_model_of_its_weights_does(bandit: LanguagePolicy, algorithm: str) -> None:
    student, _ = improve(bandit, likes(bandit, "no"), [prompt(bandit)], config(algorithm, episodes=128), 0)
    assert not same(parameters(student), parameters(bandit))
    fresh = bandit.with_model(copy.deepcopy(bandit.model))
    fresh.model.load_state_dict(student.model.state_dict())
    one, other = (p.respond([prompt(bandit)] * 40, seed=5) for p in (student, fresh))
    assert one.tokens == other.tokens and np.array_equal(one.logprobs, other.logprobs)
    assert "forward" not in student.model.__dict__ and not student.model.training


@pytest.mark.parametrize("algorithm", GROUPED)
def test_checkpointed_gradients_are_the_same_where_attention_has_dropout(
    bandit: LanguagePolicy, algorithm: str
) -> None:
    dropping = bandit.with_model(copy.deepcopy(bandit.model))
    for layer in dropping.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    c, found = config(algorithm, episodes=256), []
    for name in ("false", "true"):
        chosen = load_config(overrides={"runtime.gradient_checkpointing": name}).runtime
        with runtime.computing(chosen):
            found.append(improve(dropping, graded(bandit), [prompt(bandit)], c, 0)[0])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*map(parameters, found), strict=True))
    assert not all(torch.allclose(*p, atol=1e-2) for p in zip(parameters(found[0]), parameters(bandit), strict=True))


@pytest.mark.parametrize("algorithm", GROUPED)
def test_a_minibatch_goes_through_in_pieces_with_the_same_updates(
    bandit: LanguagePolicy, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts, whose padded tokens are counted wherever there is a gradient."""
    prompts, taken, seen = [prompt(bandit), prompt(bandit)[:2]], LanguagePolicy.token_log_probs, list[int]()

    def counting(policy: LanguagePolicy, batch: Batch, spans: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            seen.append(batch.tokens.numel())
        return taken(policy, batch, spans)

    monkeypatch.setattr(LanguagePolicy, "token_log_probs", counting)
    found, most = [], []
    for limit in (None, 64):
        with runtime.computing(load_config(overrides={"runtime.micro_batch_tokens": limit}).runtime):
            c = config(algorithm, episodes=256, kl_coefficient=0.1)
            found.append(improve(bandit, graded(bandit), prompts, c, 0))
        most.append(max(seen))
        seen.clear()
    assert most == [32 * 6, 8 * 6]
    (one, curve), (other, again) = found
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(parameters(one), parameters(other), strict=True))
    for entry, same_entry in zip(curve, again, strict=True):
        clipped = same_entry.pop("clip_fraction"), entry.pop("clip_fraction")  # TRL's: a mean of the pieces' means
        assert same_entry == pytest.approx(entry, rel=1e-3, abs=1e-4)
        assert clipped[0] == pytest.approx(clipped[1], abs=0.01)
    assert not same(parameters(one), parameters(bandit))


@pytest.mark.parametrize(
    ("processes", "tokens", "pieces"), [(1, None, 1), (1, 100, 32), (1, 400, 8), (3, 400, 4), (3, 100, 8), (32, 100, 1)]
)
def test_no_piece_leaves_a_process_without_a_response(
    monkeypatch: pytest.MonkeyPatch, processes: int, tokens: int | None, pieces: int
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: processes)
    assert group_trainers._pieces(32, 100, tokens) == pieces


# --- budgets, kills, adapters ----------------------------------------------------------------------------------------


def test_it_ends_at_its_budget_of_kl_to_the_champion(bandit: LanguagePolicy) -> None:
    c = config("grpo", kl_budget=0.3)
    _, curve = improve(bandit, likes(bandit, "maybe"), [prompt(bandit)], c, 0, champion=bandit)
    assert len(curve) < 10
    assert curve[-1]["kl_to_champion"] > 0.3 >= max(entry["kl_to_champion"] for entry in curve[:-1])
    assert curve[-1]["updates"] == 0.0 and all(entry["updates"] for entry in curve[:-1])


@pytest.mark.parametrize("algorithm", GROUPED)
def test_what_the_budget_gives_is_the_student_before_it_was_spent(bandit: LanguagePolicy, algorithm: str) -> None:
    """Also where its last updates alone went too far."""
    for episodes in (1280, 640):
        c = config(algorithm, kl_budget=0.3, episodes=episodes, learning_rate=0.005)
        student, curve = improve(bandit, leans_to(bandit, "maybe"), [prompt(bandit)], c, 0, champion=bandit)
        assert curve[-1]["kl_to_champion"] > 0.3 and curve[-1]["updates"] == 0.0
        assert 0.0 < distance(student, bandit) < 0.4


@pytest.mark.parametrize("algorithm", GROUPED)
def test_killed_between_rollouts_it_ends_with_the_same_weights(
    bandit: LanguagePolicy, tmp_path: Path, algorithm: str
) -> None:
    prompts = [prompt(bandit), prompt(bandit, "yes"), prompt(bandit, "no", "no")]
    given: Any = (bandit, graded(bandit), prompts, config(algorithm, episodes=512, kl_coefficient=0.1), 0)
    whole, curve = improve(*given)
    checkpoint, told = Checkpoint(tmp_path / "group", "key"), []

    def killed(done: int, total: int) -> None:
        told.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        improve(*given, progress=killed, checkpoint=checkpoint)
    told.clear()
    resumed, again = improve(*given, progress=killed, checkpoint=checkpoint)
    assert told == [3, 4], "what was done is not done again"
    assert again == curve
    assert same(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("algorithm", GROUPED)
def test_adapters_learn_on_a_base_that_stays(bandit: LanguagePolicy, algorithm: str) -> None:
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, target_modules=None)
    policy = LanguagePolicy(copy.deepcopy(bandit.model), bandit.tokenizer, bandit.settings, lora=lora)
    before = probability(policy, "maybe")
    c = config(algorithm, episodes=640, kl_coefficient=0.01)
    student, curve = improve(policy, likes(bandit, "maybe"), [prompt(bandit)], c, 0)
    assert student.model is policy.model
    assert probability(policy, "maybe") == pytest.approx(before, abs=1e-7)
    assert curve[0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-6) and curve[-1]["kl_to_reference"] > 0.1
    assert probability(student, "maybe") > 3 * before


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", GROUPED)
@pytest.mark.parametrize(("reward", "said_so"), [(0.3, "same reward"), (math.nan, "not a number")])
def test_a_useless_q_is_an_error(bandit: LanguagePolicy, algorithm: str, reward: float, said_so: str) -> None:
    with pytest.raises(TrainingError, match=said_so):
        improve(bandit, Taste(lambda _: reward), [prompt(bandit)], config(algorithm), 0)
    assert "forward" not in bandit.model.__dict__ and not bandit.model.training


def test_a_q_that_knows_prompts_but_no_responses_is_an_error(bandit: LanguagePolicy) -> None:
    with pytest.raises(TrainingError, match=r"one response alone, .* raise policy.temperature"):
        improve(bandit.at(1e-3), graded(bandit), [prompt(bandit)], config("grpo"), 0)
    with pytest.raises(TrainingError, match="all responses to a prompt the same reward"):
        improve(bandit, ByPrompt(), [prompt(bandit), prompt(bandit, "no")], config("grpo"), 0)


def test_weights_that_are_not_numbers_are_an_error(bandit: LanguagePolicy) -> None:
    broken = bandit.with_model(copy.deepcopy(bandit.model))
    with torch.no_grad():
        next(broken.model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match="diverged"):
        improve(broken, likes(bandit, "no"), [prompt(bandit)], config("rloo"), 0)


def test_no_prompt_and_a_model_to_be_sharded_are_errors(
    bandit: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="no prompt"):
        improve(bandit, likes(bandit, "no"), [], config("grpo"), 0)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"grpo trains a whole model .* set runtime\.accelerate to null"):
        improve(bandit, likes(bandit, "no"), [prompt(bandit)], config("grpo"), 0)


@pytest.mark.parametrize("how", ["ppo", *GROUPED, "best_of_n"])
def test_a_prompt_longer_than_the_context_is_refused_before_any_training(
    bandit: LanguagePolicy, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its context is 63 tokens, of which a response takes 3; the longest prompt is named by its place."""
    fitting, q = (prompt(bandit) * 20)[:60], leans_to(bandit, "no")
    c = config("ppo" if how == "best_of_n" else how, episodes=64, minibatch_size=64, epochs=1)
    quick = c.best_of_n.model_copy(update={"epochs": 1.0})

    def improved(*prompts: tuple[int, ...]) -> Any:
        if how == "best_of_n":
            return improve_by_best(bandit, q, prompts, quick, 0)
        return improve_on_samples(bandit, q, prompts, c, 0)

    assert len(improved(prompt(bandit), fitting)[1]) > 0
    monkeypatch.setattr(LanguagePolicy, "respond", None)
    monkeypatch.setattr(LanguagePolicy, "trainable_copy", None)
    said_so = r"prompt 1 has 61 tokens, .* response of 3 .* context of 63; shorten"
    with pytest.raises(ModelError, match=said_so):
        improved(prompt(bandit), (*fitting, fitting[0]))


def test_no_episodes_leave_it_out(bandit: LanguagePolicy) -> None:
    assert improve(bandit, likes(bandit, "no"), [prompt(bandit)], config("grpo", episodes=0), 0) == (bandit, [])


@pytest.mark.parametrize(
    ("changes", "said_so"),
    [
        ({"minibatch_size": 48}, "ppo.minibatch_size 48 must divide the rollout of 128"),
        ({"size": 6}, "group.size 6 must divide the rollout of 128"),
        ({"episodes": 1000}, "ppo.rollout 128 must divide ppo.episodes 1000"),
        ({"critic": "learned"}, "no critic"),
    ],
)
def test_what_does_not_divide_is_refused_before_any_training(changes: dict[str, Any], said_so: str) -> None:
    with pytest.raises(ConfigError, match=said_so):
        config("grpo", **changes)


# --- a round ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", *GROUPED])
def test_the_configuration_chooses_the_algorithm(bandit: LanguagePolicy, algorithm: str) -> None:
    c = config(algorithm, episodes=64, minibatch_size=64, epochs=1)
    student, curve = improve_on_samples(bandit, likes(bandit, "yes"), [prompt(bandit)], c, 0, champion=bandit)
    assert not same(parameters(student), parameters(bandit))
    assert ("explained_variance" in curve[0]) == (algorithm == "ppo")
    assert said(bandit, "yes")[-1] == bandit.renderer.eos
