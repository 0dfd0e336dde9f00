"""A policy's log-probs are those of its model, of whatever family, and what it samples is what it scores."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import AutoConfig, AutoModelForCausalLM

from iterative_ppo.config import Config
from iterative_ppo.errors import ModelError, StoreError
from iterative_ppo.learning.batching import EncodedTable, collate
from iterative_ppo.learning.language_model import SETTINGS, LanguagePolicy, PolicySettings, Responses, threads
from iterative_ppo.learning.tiny import build_model, messages, train_tokenizer
from iterative_ppo.mdp.conversation import Conversation, Suggestion
from iterative_ppo.mdp.rendering import single

torch.set_num_threads(1)

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 800,
    "initializer_range": 0.3,
}
GEMMA = COMMON | {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 800, "initializer_range": 0.3},
    "qwen2": COMMON,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
}
WARM = PolicySettings(0.8, 780, 12, "<|abstain|>")


@pytest.fixture(scope="module", params=FAMILIES)
def policy(
    request: pytest.FixtureRequest,
    tiny_config: Config,
    scripted: list[Conversation],
    tmp_path_factory: pytest.TempPathFactory,
) -> LanguagePolicy:
    """A causal LM of a family, made from its config, saved as its owner would and loaded from there."""
    path = tmp_path_factory.mktemp(request.param)
    how = tiny_config.policy.model_copy(update={"tokenizer": "bpe", "vocabulary": 320})
    tokenizer = train_tokenizer(messages(scripted), how)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **FAMILIES[request.param], **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return LanguagePolicy.load(path, WARM)


def with_settings(policy: LanguagePolicy, **changes: Any) -> LanguagePolicy:
    return LanguagePolicy(policy.model, policy.tokenizer, replace(policy.settings, **changes))


def prompts_of(policy: LanguagePolicy, talks: list[Conversation]) -> list[tuple[int, ...]]:
    """Prompts of many lengths, in no order."""
    return [policy.renderer.prompt(t.state(i)).tokens for t in talks for i in range(len(t.turns) - 1)]


def scores(policy: LanguagePolicy, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> np.ndarray:
    pairs = enumerate(zip(prompts, responses, strict=True))
    return policy.score(EncodedTable([single(k, prompt, r, True) for k, (prompt, r) in pairs], len(prompts)))


def longhand(policy: LanguagePolicy, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Sum of log-probs, one softmax a token over what may be said, from the model's own logits."""
    said = {policy.tokenizer.eos_token_id, *policy.tokenizer.encode("<|abstain|>", add_special_tokens=False)}
    total = 0.0
    for k, token in enumerate(response):
        seen = torch.tensor([[*prompt, *response[:k]]])
        with torch.no_grad():
            logits = policy.model(seen).logits[0, -1].double() / policy.settings.temperature
        for special in set(policy.tokenizer.all_special_ids) - said:
            logits[special] = -math.inf
        total += float(logits[token] - torch.logsumexp(logits, 0))
    return total


# --- log-probs -------------------------------------------------------------------------------------------------------


def test_scores_are_the_models_own_log_probs_over_what_may_be_said(
    policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    talks = scripted[:3]
    encoded = [s for k, talk in enumerate(talks) for s in policy.renderer.encode(talk, 100 * k)[0]]
    assert len(encoded) == len(talks), "one sequence a conversation"
    score = policy.score(EncodedTable(encoded, 300))
    for k, talk in enumerate(talks):
        for i, turn in enumerate(talk.turns[:-1]):
            prompt, action = policy.renderer.prompt(talk.state(i)).tokens, turn.suggestion or Suggestion("", "missing")
            assert score[100 * k + i] == pytest.approx(
                longhand(policy, prompt, policy.renderer.response(action)), abs=1e-4
            )
    assert np.isfinite(score).sum() == sum(len(talk.turns) - 1 for talk in talks), "NaN where there is no action"


def test_what_is_sampled_scores_the_same_afterwards(policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    """Left padding, the cache, and rows that leave the batch early change nothing. Short responses among long ones."""
    prompts = prompts_of(policy, scripted[:12])
    eager = eager_to_end(policy)
    responses = eager.respond(prompts, seed=1)
    lengths = [len(tokens) for tokens in responses.tokens]
    assert len(set(map(len, prompts))) > 10
    assert len(set(lengths)) > 3 and np.mean(responses.finished) > 0.3
    assert np.allclose(scores(eager, prompts, responses.tokens), responses.logprobs, atol=2e-4)


def eager_to_end(policy: LanguagePolicy) -> LanguagePolicy:
    """May say few words, each likely, so that rows end one after the other and leave the batch."""
    student = with_settings(policy, temperature=3.0)
    vocabulary = torch.arange(len(policy.tokenizer))
    kept = torch.isin(vocabulary, torch.tensor([policy.renderer.eos, *policy.renderer.ids("home kitchen")]))
    student.banned = vocabulary[~kept]
    return student


def test_a_batch_of_one_and_a_batch_of_many_score_alike(policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    prompts = prompts_of(policy, scripted[:4])
    responses = policy.respond(prompts, seed=2).tokens
    alone = [scores(policy, [p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert np.allclose(scores(policy, prompts, responses), alone, atol=1e-4)


def test_an_action_that_was_not_logged_has_no_score(tiny_policy: LanguagePolicy) -> None:
    table = EncodedTable([single(0, (4, 5), (6, 1), False), single(2, (4, 5), (6, 1), True)], 3)
    assert np.isnan(tiny_policy.score(table)).tolist() == [True, True, False]


def test_response_log_probs_sum_the_tokens_of_their_own_span(tiny_policy: LanguagePolicy) -> None:
    batch = collate([single(0, (4, 5), (20, 21, 1), True), single(1, (4, 5, 6), (22, 1), True)], tiny_policy.pad)
    with torch.no_grad():
        tokens, index = tiny_policy.token_log_probs(batch, np.arange(2))
        whole = tiny_policy.response_log_probs(batch, np.arange(2))
        second = tiny_policy.response_log_probs(batch, np.array([1]))
    assert index.tolist() == [0, 0, 0, 1, 1]
    assert whole.tolist() == pytest.approx([float(tokens[:3].sum()), float(tokens[3:].sum())])
    assert second.tolist() == pytest.approx(whole[1:].tolist(), abs=1e-5)


def test_the_temperature_divides_the_logits(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    prompt = prompts_of(tiny_policy, scripted[:1])[0]
    response = tiny_policy.respond([prompt], seed=0).tokens[0]
    for temperature in (0.3, 1.0, 2.5):
        other = with_settings(tiny_policy, temperature=temperature)
        assert scores(other, [prompt], [response])[0] == pytest.approx(longhand(other, prompt, response), abs=1e-4)
    cold, hot = (with_settings(tiny_policy, temperature=t).respond([prompt] * 60, seed=0).tokens for t in (0.05, 3.0))
    assert len(set(cold)) <= 3 and len(set(hot)) > 50


def test_a_half_precision_checkpoint_scores_what_it_sampled(
    untrained_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    """Most published weights are bfloat16, in which a sampled and a scored log-prob differ by whole percents."""
    untrained_policy.save(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    policy = LanguagePolicy.load(tmp_path)
    prompts = prompts_of(policy, scripted[:6])
    responses = policy.respond(prompts, seed=0)
    assert np.allclose(scores(policy, prompts, responses.tokens), responses.logprobs, atol=2e-4)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    """Chi-square over whole responses of two tokens, in a batch with prompts of another length (p > .001)."""
    policy = with_settings(tiny_policy, max_response_tokens=2)
    long, short = sorted(prompts_of(policy, scripted[:4]), key=len)[-1], prompts_of(policy, scripted[:1])[0]
    count = 3000
    responses = policy.respond([short, long] * count, seed=5).tokens[::2]
    seen = Counter(responses)
    common = [response for response, _ in seen.most_common(40)]
    p = np.exp(scores(policy, [short] * len(common), common))
    expected = np.append(p, 1 - p.sum()) * count
    observed = np.append([seen[response] for response in common], count - sum(seen[r] for r in common))
    assert 0.3 < p.sum() <= 1.0
    usable = expected >= 5
    statistic = ((observed - expected) ** 2 / expected)[usable].sum()
    assert usable.sum() > 10
    assert statistic < chi2.ppf(0.999, usable.sum() - 1)


def test_tokens_that_structure_a_prompt_are_never_said(untrained_policy: LanguagePolicy) -> None:
    said = {untrained_policy.renderer.eos, *untrained_policy.renderer.ids("<|abstain|>")}
    spoken = {t for tokens in untrained_policy.respond([(5, 40, 6)] * 300, seed=0).tokens for t in tokens}
    special = set(untrained_policy.tokenizer.all_special_ids)
    assert len(spoken) > 100
    assert spoken & special == said
    log_p = untrained_policy.log_distribution(torch.zeros(len(untrained_policy.tokenizer)))
    assert {i for i, p in enumerate(log_p.tolist()) if p == -math.inf} == special - said
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def same(one: Responses, other: Responses) -> bool:
    return one.tokens == other.tokens and np.array_equal(one.logprobs, other.logprobs)


def test_a_seed_decides_what_is_said(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    prompts = prompts_of(tiny_policy, scripted[:5])
    first = tiny_policy.respond(prompts, seed=7)
    torch.manual_seed(99)
    assert same(tiny_policy.respond(prompts, seed=7), first)
    assert not same(tiny_policy.respond(prompts, seed=8), first)


def test_progress_counts_every_prompt(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    prompts, told = prompts_of(tiny_policy, scripted[:5]), list[int]()
    tiny_policy.respond(prompts, 0, told.append)
    assert sum(told) == len(prompts)
    assert tiny_policy.respond([], 0).tokens == []


def test_no_response_is_longer_than_allowed_and_only_the_last_token_ends_it(
    untrained_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    policy = with_settings(untrained_policy, max_response_tokens=5)
    responses = policy.respond(prompts_of(policy, scripted[:10]), seed=0)
    for tokens, finished in zip(responses.tokens, responses.finished, strict=True):
        assert 1 <= len(tokens) <= 5
        assert policy.renderer.eos not in tokens[:-1]
        assert (tokens[-1] == policy.renderer.eos) == finished
        assert finished or len(tokens) == 5


# --- actions ---------------------------------------------------------------------------------------------------------


def test_a_sampled_text_scores_again_as_it_was_sampled(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    states = [talk.state(i) for talk in scripted[:30] for i in range(len(talk.turns) - 1)]
    actions = tiny_policy.sample(states, seed=3)
    known = [k for k, action in enumerate(actions) if action.logprob is not None]
    assert len(known) > 0.6 * len(actions)
    prompts = [tiny_policy.renderer.prompt(states[k]).tokens for k in known]
    again = scores(tiny_policy, prompts, [tiny_policy.renderer.response(actions[k]) for k in known])
    assert np.allclose(again, [actions[k].logprob for k in known], atol=2e-4)


def test_suggestion_tells_texts_and_abstentions_and_drops_the_log_prob_of_what_cannot_be_scored(
    tiny_policy: LanguagePolicy,
) -> None:
    eos, abstain = tiny_policy.renderer.eos, tiny_policy.renderer.ids("<|abstain|>")
    home = tiny_policy.renderer.ids("home")
    assert tiny_policy.suggestion((*home, eos), -1.5) == Suggestion("home", "suggested", -1.5)
    assert tiny_policy.suggestion((*abstain, eos), -1.5) == Suggestion("", "abstained", -1.5)
    assert tiny_policy.suggestion((eos,), -1.5) == Suggestion("", "abstained", None), "said otherwise when scored"
    assert tiny_policy.suggestion(home, -1.5) == Suggestion("home", "suggested", None), "cut at the limit"
    assert tiny_policy.suggestion(abstain, -1.5) == Suggestion("", "abstained", None), "cut at the limit"


def test_the_abstain_token_is_never_shown_to_the_business(tiny_policy: LanguagePolicy) -> None:
    eos, abstain = tiny_policy.renderer.eos, tiny_policy.renderer.ids("<|abstain|>")
    home = tiny_policy.renderer.ids("home")
    for tokens in ((*home, *abstain, eos), (*abstain, *home, eos), (*abstain, *abstain, eos)):
        action = tiny_policy.suggestion(tokens, -1.5)
        assert "<|abstain|>" not in (action.text or "")
        assert action.logprob is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_policy_is_the_same_policy(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    policy = with_settings(tiny_policy, temperature=0.7)
    policy.save(tmp_path)
    again = LanguagePolicy.load(tmp_path)
    assert again.settings == policy.settings
    weights = policy.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    prompts = prompts_of(policy, scripted[:4])
    assert prompts == prompts_of(again, scripted[:4])
    assert same(policy.respond(prompts, 0), again.respond(prompts, 0))


def test_a_policy_makes_no_noise_of_its_own(untrained_policy: LanguagePolicy, tmp_path: Path) -> None:
    tokenizer = untrained_policy.tokenizer
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5, **FAMILIES["gpt2"])
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    policy = LanguagePolicy(model, tokenizer, WARM)
    first, second = (scores(policy, [(4, 30, 6)], [(40, 1)])[0] for _ in range(2))
    assert first == second


def broken(**changes: Any) -> Callable[[Path], object]:
    """Change the settings' file."""

    def change(path: Path) -> None:
        values = json.loads((path / SETTINGS).read_text()) | changes
        (path / SETTINGS).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def shrink(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"hidden_size": 16}))


def remove_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def configured_as(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        pytest.param(shutil.rmtree, ModelError, id="is not there"),
        pytest.param(configured_as('{"model_type": "t5"}'), ModelError, id="no causal LM"),
        pytest.param(configured_as('{"model_type": "zzz"}'), ModelError, id="unknown model"),
        pytest.param(configured_as("{"), ModelError, id="config is no JSON"),
        pytest.param(remove_tokenizer, ModelError, id="no tokenizer"),
        pytest.param(lambda path: (path / "model.safetensors").unlink(), ModelError, id="no weights"),
        pytest.param(cut_weights, ModelError, id="weights cut short"),
        pytest.param(shrink, ModelError, id="weights of another shape"),
        pytest.param(lambda path: (path / SETTINGS).unlink(), StoreError, id="no settings"),
        pytest.param(broken(format=2), StoreError, id="newer settings"),
        pytest.param(broken(format="2"), StoreError, id="format is no number"),
        pytest.param(broken(colour=1), StoreError, id="unknown setting"),
        pytest.param(broken(abstain=None), StoreError, id="setting is missing"),
        pytest.param(lambda path: (path / SETTINGS).write_text("[]"), StoreError, id="settings are a list"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(
    untrained_policy: LanguagePolicy, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception]
) -> None:
    path = tmp_path / "policy"
    untrained_policy.save(path)
    damage(path)
    with pytest.raises(error, match=str(path)):
        LanguagePolicy.load(path)


def test_threads_are_set_for_a_block_alone() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_fresh_tiny_models_last_attention_gives_back_what_it_looks_at(
    tiny_config: Config, tiny_policy: LanguagePolicy, architecture: str
) -> None:
    config = tiny_config.policy.model_copy(update={"architecture": architecture, "copying_start": True})
    model: Any = build_model(tiny_policy.tokenizer, config, 0)
    size = config.hidden_size
    attention = model.transformer.h[-1].attn if architecture == "gpt2" else model.model.layers[-1].self_attn
    seen = torch.randn(1, 1, size)  # a token alone looks at itself
    if architecture == "gpt2":
        told = attention(seen)[0] - attention.c_proj.bias
    else:
        angles = model.model.rotary_emb(seen, torch.zeros(1, 1, dtype=torch.long))
        told = attention(seen, position_embeddings=angles, attention_mask=None)[0]
    assert torch.allclose(told, seen, atol=1e-4)
    again: Any = build_model(tiny_policy.tokenizer, config, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
