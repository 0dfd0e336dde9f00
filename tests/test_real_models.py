"""Users' own models: families, chat templates, adapters, precision, memory, and what is refused before any training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from real_models import ADD_FIRST, ENDS, FAMILIES, SETTINGS, SIZES, build_tokenizer, save_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from iterative_ppo.config import LoRAConfig, RuntimeConfig, load_config
from iterative_ppo.errors import ConfigError, ModelError, StoreError, TrainingError
from iterative_ppo.learning import adapters, optimization, q_model
from iterative_ppo.learning.batching import EncodedTable, collate
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.improve.logged import LoggedData, improve_on_log
from iterative_ppo.learning.improve.ppo import improve
from iterative_ppo.learning.language_model import LanguagePolicy, PolicySettings
from iterative_ppo.learning.loading import base_weights, save_tokenizer
from iterative_ppo.learning.optimization import descend, optimizer_for, pieces
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.runtime import computing
from iterative_ppo.learning.supervised import fine_tune
from iterative_ppo.learning.tiny import messages
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, Suggestion
from iterative_ppo.mdp.rendering import Encoded, single

torch.set_num_threads(1)
LORA = LoRAConfig(rank=2, alpha=4, dropout=0.0, target_modules=None)
KINDS = [(family, chat) for family in FAMILIES for chat in (False, True)]


@pytest.fixture(scope="module")
def talks(scripted: list[Conversation]) -> list[Conversation]:
    return scripted[:4]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'chat' if kind[1] else 'plain'}")
def saved(
    request: pytest.FixtureRequest, talks: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, bool]:
    family, chat = request.param
    return save_model(tmp_path_factory.mktemp("model"), family, messages(talks), chat), family, chat


@pytest.fixture(scope="module")
def plain_llama(talks: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama", messages(talks))


def prompts_of(policy: LanguagePolicy, talks: list[Conversation]) -> list[tuple[int, ...]]:
    return [policy.renderer.prompt(t.state(i)).tokens for t in talks for i in range(len(t.turns) - 1)]


def table_of(prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> EncodedTable:
    pairs = enumerate(zip(prompts, responses, strict=True))
    return EncodedTable([single(k, prompt, response, True) for k, (prompt, response) in pairs], len(prompts))


def encoded(policy: LanguagePolicy, talks: list[Conversation]) -> EncodedTable:
    sequences, row = list[Encoded](), 0
    for talk in talks:
        sequences += policy.renderer.encode(talk, row)[0]
        row += len(talk.turns)
    return EncodedTable(sequences, row)


def made(path: Path, kind: str, talks: list[Conversation], **sizes: Any) -> Path:
    """A fresh model of any kind with a plain tokenizer."""
    tokenizer = build_tokenizer("qwen2", messages(talks), chat=False)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def q_of(policy: LanguagePolicy) -> QModel:
    return QModel.from_policy(policy, QSettings.of(load_config()), seed=0)


def runtime(**changes: Any) -> RuntimeConfig:
    return load_config().runtime.model_copy(update=changes)


def weights(policy: LanguagePolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


# --- families --------------------------------------------------------------------------------------------------------


def test_what_a_users_model_samples_scores_the_same(saved: tuple[Path, str, bool], talks: list[Conversation]) -> None:
    policy = LanguagePolicy.load(saved[0], SETTINGS)
    assert policy.abilities.cache and policy.abilities.plain_head
    prompts = prompts_of(policy, talks)
    responses = policy.respond(prompts, seed=1)
    assert np.allclose(policy.score(table_of(prompts, responses.tokens)), responses.logprobs, atol=2e-4)
    said = {token for tokens in responses.tokens for token in tokens}
    vocabulary = policy.tokenizer.get_vocab()
    assert len(said) > 40
    assert said <= set(vocabulary.values()), "rows of the vocabulary head that are no token are never said"
    assert {t for t in said if policy.tokenizer.decode([t]) in policy.tokenizer.all_special_tokens} <= {
        policy.renderer.eos
    }
    assert not any(
        token.special and i in said - {policy.renderer.eos}
        for i, token in policy.tokenizer.added_tokens_decoder.items()
    )


def test_a_saved_policy_is_sampled_alike_by_generate(
    saved: tuple[Path, str, bool], talks: list[Conversation], tmp_path: Path
) -> None:
    """Other programs follow the generation_config.json beside the weights, so the base's own must not stay there."""
    base = shutil.copytree(saved[0], tmp_path / "base")
    theirs = {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "repetition_penalty": 2.0}
    (base / "generation_config.json").write_text(json.dumps(theirs), encoding="utf-8")
    policy = LanguagePolicy.load(base, replace(SETTINGS, temperature=0.7))
    policy.save(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for prompt in prompts_of(policy, talks)[:3]:
        torch.manual_seed(1)
        asked = torch.tensor([prompt])
        done = model.generate(
            asked, attention_mask=torch.ones_like(asked), output_scores=True, return_dict_in_generate=True
        )
        response = tuple(done.sequences[0, len(prompt) :].tolist())
        assert response[-1] == policy.renderer.eos or len(response) == SETTINGS.max_response_tokens
        log_p, _ = policy.token_log_probs(collate([single(0, prompt, response, True)], policy.pad), np.array([0]))
        scores = torch.cat(done.scores).log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(scores, log_p, atol=1e-4)


def test_prompts_begin_and_responses_end_as_the_model_was_taught(
    saved: tuple[Path, str, bool], talks: list[Conversation]
) -> None:
    path, family, chat = saved
    policy = LanguagePolicy.load(path, SETTINGS)
    first, tokenizer = prompts_of(policy, talks)[0], policy.tokenizer
    assert (first[0] == tokenizer.bos_token_id) == (family in ADD_FIRST)
    assert tokenizer.bos_token_id is None or tokenizer.bos_token_id not in first[1:]
    end = "<end_of_turn>" if chat and family == "gemma2" else ENDS[family]
    assert tokenizer.convert_ids_to_tokens(policy.renderer.eos) == end
    pieces = [policy.renderer.encode(talk)[0] for talk in talks]
    assert all(len(some) == 1 for some in pieces), "a conversation is one sequence"
    short = replace(SETTINGS, max_prompt_tokens=30)
    cut = LanguagePolicy(policy.model, tokenizer, short).renderer.prompt(talks[0].state(1)).tokens
    assert len(cut) <= 30 and (cut[0] == tokenizer.bos_token_id) == (family in ADD_FIRST)


def test_q_reads_what_the_policy_reads(saved: tuple[Path, str, bool], talks: list[Conversation]) -> None:
    policy = LanguagePolicy.load(saved[0], SETTINGS)
    table, q = encoded(policy, talks), q_of(policy)
    tokens = collate(table.sequences, policy.pad).tokens
    with torch.no_grad():
        assert torch.allclose(last_hidden(q.model, tokens), last_hidden(policy.model, tokens), atol=1e-5)
    values = q.evaluate(table)
    assert np.isfinite(values.v).sum() == sum(len(talk.turns) - 1 for talk in talks)


def test_a_prompt_that_several_responses_share_is_read_once(
    saved: tuple[Path, str, bool], talks: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts and short ones, one to four responses each, of any length: the values are those of each alone."""
    policy = LanguagePolicy.load(saved[0], SETTINGS)
    prompts, q = prompts_of(policy, talks)[:6], q_of(policy)
    said = policy.respond(prompts, seed=2, samples=4).tokens
    kept = [(k // 4, said[k]) for k in range(24) if k % 4 <= k // 4]
    sequences = [single(k, prompts[which], response, True) for k, (which, response) in enumerate(kept)]
    aim = [q.running_values([replace(s, spans=(replace(s.spans[0], row=0),))])[0] for s in sequences]
    assert q._branches
    for tokens in (32_768, 300):
        monkeypatch.setattr(q_model, "INFERENCE_TOKENS", tokens)
        found = q.running_values(sequences)
        assert [len(values) for values in found] == [1 + len(response) for _, response in kept]
        assert all(np.allclose(a, b, atol=2e-4) for a, b in zip(found, aim, strict=True))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_both_passes_improve_a_users_model_and_leave_it_alone(
    saved: tuple[Path, str, bool], talks: list[Conversation], lora: LoRAConfig | None, tmp_path: Path
) -> None:
    """The logged pass and PPO change a copy, never the policy they start from; what is saved is what was made."""
    policy = LanguagePolicy.load(saved[0], SETTINGS, lora=lora)
    config, table, prompts = load_config().improve, encoded(policy, talks), prompts_of(policy, talks)[:16]
    before, score = weights(policy), policy.score(table)
    luck = np.random.default_rng(0).standard_normal(table.rows)
    logged, _ = improve_on_log(
        policy, LoggedData(table, luck, score), config.logged.model_copy(update={"epochs": 1.0}), 0
    )
    ppo = config.ppo.model_copy(update={"episodes": 16, "minibatch_size": 8, "epochs": 1})
    student, _ = improve(logged, q_of(policy), prompts, ppo, seed=0, reference=policy)
    scores = [p.score(table) for p in (policy, logged, student)]
    assert np.array_equal(scores[0], score, equal_nan=True)
    assert all(torch.equal(before[name], value) for name, value in weights(policy).items() if name in before)
    assert np.nanmax(np.abs(scores[1] - scores[0])) > 1e-3 < np.nanmax(np.abs(scores[2] - scores[1]))
    assert (student.model is policy.model) == (lora is not None), "adapters share one copy of the weights"
    student.save(tmp_path)
    again = LanguagePolicy.load(tmp_path)
    assert not adapters.has_adapters(again.model)
    assert np.allclose(again.score(table), scores[2], atol=1e-4, equal_nan=True)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (policy.model, again.model)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize(
    ("family", "cache", "sizes"),
    [
        ("mamba", False, {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2}),
        (
            "llama4_text",
            True,
            SIZES | {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 16},
        ),
    ],
)
def test_a_cache_is_used_where_it_serves(
    family: str, cache: bool, sizes: dict[str, Any], talks: list[Conversation], tmp_path: Path
) -> None:
    """A state-space model has no cache of keys and values; one that calls its backbone otherwise has."""
    tokenizer = build_tokenizer("qwen2", messages(talks), chat=False)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = LanguagePolicy.load(tmp_path, SETTINGS)
    assert policy.abilities.cache == cache
    few = {policy.renderer.eos, *policy.renderer.ids("kitchen")}
    policy.banned = torch.tensor([i for i in range(len(tokenizer)) if i not in few])
    prompts = prompts_of(policy, talks[:2])
    responses = policy.respond(prompts, seed=0)
    assert len({len(tokens) for tokens in responses.tokens}) > 2, "rows leave the batch one after the other"
    assert np.allclose(policy.score(table_of(prompts, responses.tokens)), responses.logprobs, atol=2e-4)
    q, table = q_of(policy), table_of([prompts[0]] * 3, responses.tokens[:3])
    assert q._branches == cache, "without one, Q reads each response from the prompt's beginning"
    ends = [values[-1] for values in q.running_values(table.sequences)]
    assert np.allclose(ends, q.evaluate(table).q, atol=1e-5)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def base(plain_llama: Path) -> LanguagePolicy:
    return LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA)


def nudged(policy: LanguagePolicy, seed: int) -> LanguagePolicy:
    """A trained copy, without the training."""
    student = policy.trainable_copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


def test_policies_on_one_base_keep_apart(base: LanguagePolicy, talks: list[Conversation]) -> None:
    """The base, a student, and the student's student: whoever spoke last, each says what it says."""
    table, prompts = encoded(base, talks), prompts_of(base, talks)[:6]
    policies = [base]
    for k in range(2):
        copied = policies[-1].trainable_copy()
        assert np.array_equal(copied.score(table), policies[-1].score(table), equal_nan=True), "starts as its parent"
        policies.append(nudged(policies[-1], k))
    alone = [(p.score(table), p.respond(prompts, 0).tokens) for p in policies]
    for order in ([2, 0, 1], [1, 2, 0]):
        for k in order:
            assert np.array_equal(policies[k].score(table), alone[k][0], equal_nan=True)
            assert policies[k].respond(prompts, 0).tokens == alone[k][1]
    assert np.nanmax(np.abs(alone[1][0] - alone[0][0])) > 0.1 < np.nanmax(np.abs(alone[2][0] - alone[1][0]))


def test_a_reference_in_between_leaves_the_student_its_gradient(
    base: LanguagePolicy, talks: list[Conversation]
) -> None:
    student = nudged(base, 0)
    table = encoded(base, talks[:1])
    batch = collate(table.sequences, base.pad)
    spans = np.flatnonzero(batch.trains)

    def gradient(interrupted: bool) -> list[torch.Tensor]:
        loss = student.response_log_probs(batch, spans).sum()
        if interrupted:
            base.score(table)
        return list(torch.autograd.grad(loss, student.trainable_parameters()))

    with computing(runtime(gradient_checkpointing=True)):
        undisturbed, disturbed = gradient(False), gradient(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(undisturbed, disturbed, strict=True))
    assert sum(float(g.abs().sum()) for g in disturbed) > 0
    trained = {id(p) for p in student.trainable_parameters()}
    assert {id(p) for p in student.model.parameters() if p.requires_grad} == trained


def test_adapters_and_merged_weights_are_the_same_policy(
    base: LanguagePolicy, talks: list[Conversation], tmp_path: Path, plain_llama: Path
) -> None:
    table, student = encoded(base, talks), nudged(base, 0)
    score = student.score(table)
    student.save(tmp_path / "adapters", "adapters")
    student.save(tmp_path / "merged")
    sizes = {
        kind: sum(f.stat().st_size for f in (tmp_path / kind).glob("*.safetensors")) for kind in ("adapters", "merged")
    }
    assert sizes["adapters"] < 0.5 * sizes["merged"]
    for kind in sizes:
        again = LanguagePolicy.load(tmp_path / kind, lora=LORA)
        assert np.allclose(again.score(table), score, atol=1e-4, equal_nan=True)
        grandchild = nudged(again, 1)
        grandchild.save(tmp_path / f"{kind}-next", "adapters")
        last = LanguagePolicy.load(tmp_path / f"{kind}-next")
        assert np.allclose(last.score(table), grandchild.score(table), atol=1e-4, equal_nan=True)
    root = json.loads((tmp_path / "adapters-next" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(root) == plain_llama.resolve(), "however many rounds, one base"


def test_a_small_step_of_adapters_outlives_bfloat16(
    plain_llama: Path, talks: list[Conversation], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Merged, most of it is less than half a step of the weights' grid; apart, it is all there."""

    def below(path: Path) -> dict[str, torch.Tensor]:
        state = LanguagePolicy.load(path, SETTINGS, lora=LORA).model.state_dict()
        return {name: value for name, value in state.items() if name.endswith("proj.weight")}

    with computing(runtime(precision="bfloat16")):
        base = LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA)
        student, table = nudged(base, 0), encoded(base, talks)
        with torch.no_grad():
            for parameter in student.trainable_parameters():
                parameter.mul_(0.01)
        student.save(tmp_path / "auto", "auto")
        assert not caplog.text
        again = LanguagePolicy.load(tmp_path / "auto", lora=LORA)
        assert np.array_equal(again.score(table), student.score(table), equal_nan=True)
        student.save(tmp_path / "merged", "merged")
        assert "policy.save adapters keeps them apart" in caplog.text
        LanguagePolicy.load(tmp_path / "merged", lora=LORA).save(tmp_path / "next", "auto")
        assert not (tmp_path / "next" / "adapter_config.json").exists(), "a version of ours may be gone one day"
        nudged(again, 1).save(tmp_path / "later", "auto")
        assert (tmp_path / "later" / "adapter_config.json").exists(), "over the same base as its parent"
        before, after = below(plain_llama), below(tmp_path / "merged")
    kept = float(np.mean([(before[name] != after[name]).float().mean() for name in before]))
    assert before and kept < 0.5, kept
    student.save(tmp_path / "float32", "auto")
    assert (tmp_path / "float32" / "model.safetensors").exists(), "float32 has room for it in the weights"


def peft_directory(path: Path, base: Path, targets: Sequence[str] = ("q_proj", "v_proj"), **how: Any) -> Path:
    """Adapters as peft itself saves them, trained a little, with the base's tokenizer."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **how))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("owner", ["peft", "ours"])
def test_loaded_adapters_saved_merged_load_again(
    plain_llama: Path, talks: list[Conversation], lora: LoRAConfig | None, owner: str, tmp_path: Path
) -> None:
    """As they are and trained on: the weights have their own names, not those that the adapters' file had."""
    if owner == "ours":
        nudged(LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA), 0).save(tmp_path / "adapters", "adapters")
    else:
        peft_directory(tmp_path / "adapters", plain_llama)
    policy = LanguagePolicy.load(tmp_path / "adapters", SETTINGS, lora=lora)
    for k, some in enumerate((policy, policy.trainable_copy(), nudged(policy, 1))):
        some.save(tmp_path / str(k))
        again, table = LanguagePolicy.load(tmp_path / str(k)), encoded(policy, talks)
        assert not adapters.has_adapters(again.model)
        assert np.allclose(again.score(table), some.score(table), atol=1e-4, equal_nan=True)


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": SIZES | MOE | {"num_experts": 4},
    "mixtral": SIZES | {"num_local_experts": 4},
    "deepseek_v3": {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    | MOE
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
    | {"q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_carry_adapters(family: str, talks: list[Conversation], tmp_path: Path) -> None:
    """Several weights of one module have adapters there, one around the other."""
    base = LanguagePolicy.load(made(tmp_path / "base", family, talks, **EXPERTS[family]), SETTINGS, lora=LORA)
    student = nudged(base, 0)
    table, grandchild = encoded(base, talks[:2]), nudged(student, 1)
    scores = [p.score(table) for p in (base, student, grandchild)]
    assert np.nanmax(np.abs(scores[1] - scores[0])) > 0.1 < np.nanmax(np.abs(scores[2] - scores[1]))
    assert np.array_equal(student.trainable_copy().score(table), scores[1], equal_nan=True), "starts as its parent"
    assert np.isfinite(q_of(student).evaluate(table).q).any()
    for k, policy in enumerate((base, student, grandchild)):
        assert np.array_equal(policy.score(table), scores[k], equal_nan=True)
        for kind in ("merged", "adapters"):
            policy.save(tmp_path / kind, kind)  # type: ignore[arg-type]
            again = LanguagePolicy.load(tmp_path / kind, lora=LORA)
            for same in (again, again.trainable_copy()):
                assert np.allclose(same.score(table), scores[k], atol=1e-3, equal_nan=True)
            shutil.rmtree(tmp_path / kind)


def test_adapters_that_replace_whole_layers_are_refused(plain_llama: Path, tmp_path: Path) -> None:
    path = peft_directory(tmp_path, plain_llama, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=rf"{path}: its adapters replace lm_head too .* merge them by peft"):
        LanguagePolicy.load(path, SETTINGS)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"init_lora_weights": "pissa"}, "were made by pissa, which changes the weights below them"),
        ({"init_lora_weights": "olora"}, "were made by olora, which changes the weights below them"),
        ({"lora_bias": True}, r"add a bias \(lora_bias\) to layers that have none"),
    ],
)
def test_adapters_that_a_copy_would_not_be_are_refused(
    plain_llama: Path, tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    path = peft_directory(tmp_path, plain_llama, **how)
    with pytest.raises(ModelError, match=rf"{path}: its adapters {said}.*merge them by peft"):
        LanguagePolicy.load(path, SETTINGS)


def test_adapters_of_another_kind_are_refused(plain_llama: Path, tmp_path: Path) -> None:
    how = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(plain_llama), how).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its adapters are IA3, and only LoRA's can be trained on; merge them"):
        LanguagePolicy.load(tmp_path, SETTINGS, lora=LORA)


def test_adapters_without_a_tokenizer_have_their_bases(plain_llama: Path, tmp_path: Path) -> None:
    path = peft_directory(tmp_path, plain_llama)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()
    policy = LanguagePolicy.load(path, SETTINGS)
    assert policy.renderer.ids("which room") == LanguagePolicy.load(plain_llama, SETTINGS).renderer.ids("which room")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_tokenizer_is_told_what_is_missing(
    family: str, talks: list[Conversation], tmp_path: Path
) -> None:
    """Of some families transformers makes an empty one."""
    path = save_model(tmp_path / "model", family, messages(talks), chat=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / file).unlink()
    with pytest.raises(ModelError, match=rf"^{path}: .*tokenizer.*such as tokenizer\.json") as error:
        LanguagePolicy.load(path, SETTINGS)
    assert "\n" not in str(error.value)


def test_a_saved_tokenizer_reads_as_the_one_that_it_was(talks: list[Conversation], tmp_path: Path) -> None:
    """Llama's first tokenizers put a space before every piece of text; what transformers saves forgets that."""
    path = save_model(tmp_path / "llama", "llama", messages(talks))
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    tokens.train_from_iterator(messages(talks), trainers.BpeTrainer(special_tokens=special, show_progress=False))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **named).save_pretrained(path)
    told = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps(told | {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    )
    before = AutoTokenizer.from_pretrained(path)
    save_tokenizer(before, tmp_path / "saved")
    after, text = AutoTokenizer.from_pretrained(tmp_path / "saved"), "which room</s>which room"
    assert before.legacy and before.encode(text) == after.encode(text)
    before.save_pretrained(tmp_path / "theirs")
    assert before.encode(text) != AutoTokenizer.from_pretrained(tmp_path / "theirs").encode(text), "or this is in vain"


def test_a_base_saved_as_adapters_changes_nothing(
    base: LanguagePolicy, talks: list[Conversation], tmp_path: Path
) -> None:
    base.save(tmp_path, "adapters")
    assert not (tmp_path / "model.safetensors").exists()
    table = encoded(base, talks)
    assert np.allclose(LanguagePolicy.load(tmp_path).score(table), base.score(table), atol=1e-5, equal_nan=True)


def test_registered_adapters_load(base: LanguagePolicy, tmp_path: Path) -> None:
    from tasks.model_versions import POLICY, check_loads

    nudged(base, 0).save(tmp_path, "adapters")
    check_loads(POLICY, tmp_path, "adapters")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="adapters does not load"):
        check_loads(POLICY, tmp_path, "adapters")


def test_pickled_adapters_are_not_read(plain_llama: Path, tmp_path: Path) -> None:
    path = peft_directory(tmp_path, plain_llama)
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights are pickles, .* save them as safetensors"):
        LanguagePolicy.load(path, SETTINGS)


def test_adapters_without_their_base_say_which_it_was(talks: list[Conversation], tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", "llama", messages(talks))
    nudged(LanguagePolicy.load(path, SETTINGS, lora=LORA), 0).save(tmp_path / "policy", "adapters")
    shutil.rmtree(path)
    with pytest.raises(ModelError, match=f"{tmp_path / 'policy'}: adapters of {path.resolve()}, which is not there"):
        LanguagePolicy.load(tmp_path / "policy")


def test_adapters_know_the_weights_of_their_base(talks: list[Conversation], tmp_path: Path) -> None:
    """Others under the same path are refused; the same ones, written anew, are not."""
    path, saved = save_model(tmp_path / "base", "llama", messages(talks)), tmp_path / "policy"
    nudged(LanguagePolicy.load(path, SETTINGS, lora=LORA), 0).save(saved, "adapters")
    nudged(LanguagePolicy.load(saved, lora=LORA), 1).save(tmp_path / "next", "adapters")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path)
    assert LanguagePolicy.load(saved).settings == LanguagePolicy.load(tmp_path / "next").settings == SETTINGS
    with torch.no_grad():
        next(model.parameters())[0, 0] += 0.1
    model.save_pretrained(path)
    for version in (saved, tmp_path / "next"):
        with pytest.raises(
            ModelError, match=f"{version}: adapters of {path}, whose weights or config.json are not those"
        ):
            LanguagePolicy.load(version)
    shutil.copytree(saved, tmp_path / "old")
    settings = json.loads((saved / "policy.json").read_text())
    settings.pop("base_weights")
    (tmp_path / "old" / "policy.json").write_text(json.dumps(settings))
    LanguagePolicy.load(tmp_path / "old")


def test_adapters_know_the_configuration_of_their_base(talks: list[Conversation], tmp_path: Path) -> None:
    """Other frequencies of its positions make another policy of the same weights. Older versions know these alone."""
    path, saved = save_model(tmp_path / "base", "llama", messages(talks)), tmp_path / "policy"
    nudged(LanguagePolicy.load(path, SETTINGS, lora=LORA), 0).save(saved, "adapters")
    old = shutil.copytree(saved, tmp_path / "old")
    settings = json.loads((old / "policy.json").read_text())
    (old / "policy.json").write_text(json.dumps(settings | {"base_weights": base_weights(old)}))
    with_config(transformers_version="5.0.0")(path)
    LanguagePolicy.load(saved)
    with_config(rope_parameters={"rope_type": "default", "rope_theta": 20.0})(path)
    with pytest.raises(ModelError, match=rf"{saved}: adapters of {path}, whose weights or config\.json are not those"):
        LanguagePolicy.load(saved)
    LanguagePolicy.load(old)


@pytest.mark.parametrize(("name", "kept"), [("rank", 2), ("alpha", 4)])
def test_another_rank_or_scale_than_the_saved_one_is_refused(
    base: LanguagePolicy, name: str, kept: int, tmp_path: Path
) -> None:
    nudged(base, 0).save(tmp_path, "adapters")
    with pytest.raises(ModelError, match=rf"adapters of {name} {kept}, policy\.lora\.{name} is 8; set it to {kept}"):
        LanguagePolicy.load(tmp_path, lora=LORA.model_copy(update={name: 8}))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nothing"], "no layer named nothing; it has .*q_proj"),
        (["vproj"], r"no layer named vproj \(did you mean 'v_proj'\?\); it has"),
        (".*nothing.*", r"no layer named \.\*nothing\.\*; it has"),
    ],
)
def test_layers_that_are_not_there_are_named(plain_llama: Path, targets: list[str] | str, said: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ModelError, match=rf"policy\.lora\.target_modules: {plain_llama} has {said}"):
        LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA.model_copy(update={"target_modules": targets}))


def test_a_name_of_no_layer_beside_others_is_told(plain_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list of names that fits several families is usual."""
    LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA.model_copy(update={"target_modules": ["q_proj", "c_attn"]}))
    assert "has no layer named c_attn" in caplog.text and "the other names carry adapters" in caplog.text


def test_layers_may_be_named_as_peft_reads_them(plain_llama: Path) -> None:
    def layers(targets: list[str] | str | None) -> int:
        lora = LORA.model_copy(update={"target_modules": targets})
        policy = LanguagePolicy.load(plain_llama, SETTINGS, lora=lora).trainable_copy()
        return len(policy.trainable_parameters()) // 2

    assert layers("all-linear") == layers(None) == 14
    assert layers(r".*\.layers\.0\..*_proj") == 7
    assert layers(["q_proj", "lm_head"]) == 3
    with pytest.raises(ConfigError, match="is no regular expression"):
        load_config(overrides={"policy.lora.target_modules": "*proj"})


def test_adapters_of_layers_that_cannot_carry_them_are_refused_at_load(
    talks: list[Conversation], tmp_path: Path
) -> None:
    """peft refuses some layers, and an adapter of a tied one would change two when it is merged."""
    path = made(tmp_path / "mamba", "mamba", talks, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelError, match=f"{path} cannot carry it .*'out_proj' is incompatible with Mamba"):
        LanguagePolicy.load(path, SETTINGS, lora=LORA)
    biased = save_model(tmp_path / "biased", "gpt2", messages(talks))
    saved = peft_directory(tmp_path / "biases", biased, targets=["c_attn"], bias="all")
    with pytest.raises(ModelError, match=r"cannot carry it .*only 1 adapter with bias"):
        LanguagePolicy.load(saved, SETTINGS, lora=LORA)
    tied = save_model(tmp_path / "tied", "qwen2", messages(talks))
    for layer in ("lm_head", "embed_tokens"):
        with pytest.raises(ModelError, match=f"{tied}: an adapter of {layer} cannot be merged, since .* shares"):
            LanguagePolicy.load(tied, SETTINGS, lora=LORA.model_copy(update={"target_modules": [layer, "q_proj"]}))
    untied = LanguagePolicy.load(peft_directory(tmp_path / "saved", tied, targets=["lm_head"]), SETTINGS)
    untied.save(tmp_path / "merged")  # peft kept the head's own weights, so nothing is shared
    table, again = encoded(untied, talks), LanguagePolicy.load(tmp_path / "merged")
    assert np.allclose(again.score(table), untied.score(table), atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_training_state_goes_on_where_it_was(
    plain_llama: Path, talks: list[Conversation], lora: LoRAConfig | None
) -> None:
    """In another process the copies are made in the same order; what is not the same kind of copy is refused."""
    policies = [LanguagePolicy.load(plain_llama, SETTINGS, lora=lora) for _ in range(2)]
    trained, fresh = nudged(policies[0], 3), policies[1].trainable_copy()
    fresh.load_training_state(trained.training_state())
    table = encoded(trained, talks)
    assert np.array_equal(fresh.score(table), trained.score(table), equal_nan=True)
    assert not np.allclose(policies[1].score(table), trained.score(table), atol=1e-3, equal_nan=True)
    with pytest.raises(StoreError, match="another model or adapter"):
        fresh.load_training_state({name: value[:1] for name, value in trained.training_state().items()})


# --- precision and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_bfloat16_stays_near_float32_and_log_probs_are_float32(
    plain_llama: Path, talks: list[Conversation], lora: LoRAConfig | None
) -> None:
    exact = LanguagePolicy.load(plain_llama, SETTINGS)
    table, prompts = encoded(exact, talks), prompts_of(exact, talks)[:8]
    expected = exact.score(table)
    with computing(runtime(precision="bfloat16")) as chosen:
        assert chosen.bfloat16
        policy = LanguagePolicy.load(plain_llama, SETTINGS, lora=lora)
        score = policy.score(table)
        assert np.nanmax(np.abs(score - expected)) > 1e-6, "really in bfloat16"
        assert np.nanmean(np.abs(score - expected)) < 0.02 * np.nanmean(np.abs(expected))
        batch = collate(table.sequences, policy.pad)
        log_p, _ = policy.token_log_probs(batch, np.flatnonzero(batch.trains))
        assert log_p.dtype == torch.float32
        responses = policy.respond(prompts, 0)
        assert np.allclose(policy.score(table_of(prompts, responses.tokens)), responses.logprobs, atol=0.2)
        student = policy.trainable_copy()
        assert {p.dtype for p in student.trainable_parameters()} == {torch.float32}
        frozen = {p.dtype for p in student.model.parameters() if not p.requires_grad}
        assert frozen == ({torch.bfloat16, torch.float32} if lora else set()), "the head of the vocabulary is float32"
        optimizer, schedule = optimizer_for(student.model, 0.01, 4)
        before = [p.detach().clone() for p in student.trainable_parameters()]
        for _ in range(2):
            optimization.take_step(-student.response_log_probs(batch, np.arange(2)).sum(), optimizer, schedule)
        assert any(not torch.equal(p, q) for p, q in zip(before, student.trainable_parameters(), strict=True))
        after = student.score(table)
        assert not np.array_equal(after, score, equal_nan=True), "a changed weight is not read from a stale cast"


def test_a_q_of_frozen_bfloat16_weights_is_trained_in_float32(plain_llama: Path) -> None:
    with computing(runtime(precision="bfloat16")):
        policy = LanguagePolicy.load(plain_llama, SETTINGS, lora=LORA)
        q = QModel.from_policy(policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    assert {p.dtype for p in q.model.parameters()} == {torch.float32}


def test_frozen_bfloat16_weights_serve_beside_layer_norms_and_a_tied_head(
    talks: list[Conversation], tmp_path: Path
) -> None:
    path = save_model(tmp_path / "base", "gpt2", messages(talks))
    exact = LanguagePolicy.load(path, SETTINGS)
    table = encoded(exact, talks)
    expected = exact.score(table)
    with computing(runtime(precision="bfloat16")):
        student = LanguagePolicy.load(path, SETTINGS, lora=LORA).trainable_copy()
        score = student.score(table)
    assert np.nanmean(np.abs(score - expected)) < 0.02 * np.nanmean(np.abs(expected))
    assert torch.bfloat16 in {p.dtype for p in student.model.parameters()}


def test_a_precision_or_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"runtime\.device: 'cuda:7'"), computing(runtime(device="cuda:7")):
        pass
    with pytest.raises(ModelError, match=r"runtime\.device: 'gpu'"), computing(runtime(device="gpu")):
        pass
    with computing(runtime(precision="auto")) as chosen:
        assert not chosen.bfloat16, "float32 on the CPU"


def opt(path: Path, talks: list[Conversation], **changes: Any) -> LanguagePolicy:
    """OPT drops out inside its layers, not in modules of their own."""
    tokenizer = build_tokenizer("qwen2", messages(talks), chat=False)
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    } | changes
    config = AutoConfig.for_model("opt", vocab_size=len(tokenizer), max_position_embeddings=640, init_std=0.2, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return LanguagePolicy.load(path, SETTINGS)


def test_q_has_the_width_that_the_backbone_returns(talks: list[Conversation], tmp_path: Path) -> None:
    """OPT-350m's is half its hidden size."""
    policy = opt(tmp_path / "model", talks, word_embed_proj_dim=8, do_layer_norm_before=False)
    q, table = q_of(policy), encoded(policy, talks)
    assert q.head.weight.shape == (1, 8)
    q.save(tmp_path / "q")
    assert np.array_equal(QModel.load(tmp_path / "q").evaluate(table).q, q.evaluate(table).q, equal_nan=True)
    assert np.isfinite(q.evaluate(table).q).any()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt"])
def test_gradient_checkpointing_changes_memory_alone(kind: str, talks: list[Conversation], tmp_path: Path) -> None:
    """Same gradients, with no dropout, and sampling keeps its cache."""
    policy = (
        opt(tmp_path, talks)
        if kind == "opt"
        else LanguagePolicy.load(save_model(tmp_path, kind, messages(talks)), SETTINGS)
    )
    batch = collate(encoded(policy, talks[:2]).sequences, policy.pad)
    spans, prompts = np.flatnonzero(batch.trains), prompts_of(policy, talks[:1])

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = policy.response_log_probs(batch, spans).sum()
        return list(torch.autograd.grad(loss, policy.trainable_parameters())), sum(kept)

    plain, stored = gradients()
    said = policy.respond(prompts, 0)
    with computing(runtime(gradient_checkpointing=True)):
        again, less = gradients()
        assert policy.respond(prompts, 0).tokens == said.tokens
        assert np.array_equal(policy.respond(prompts, 0).logprobs, said.logprobs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, again, strict=True))
    assert less < 0.7 * stored


@pytest.mark.parametrize("stage", ["initial", "improved"])
def test_a_family_without_gradient_checkpointing_is_refused_before_it_trains(
    stage: str, talks: list[Conversation], tmp_path: Path
) -> None:
    from tasks.learning import PolicyVersion, _rounds, initial_policy_stage

    path = made(tmp_path / "model", "openai-gpt", talks, n_embd=16, n_layer=2, n_head=2, n_positions=640)
    changes = {"policy.base_model": str(path), "data.root": str(tmp_path), "runtime.gradient_checkpointing": True}
    config = load_config(overrides=changes | {"policy.max_prompt_tokens": 600, "policy.max_response_tokens": 8})
    LanguagePolicy.load(path, SETTINGS).save(tmp_path / "policy")
    with (
        pytest.raises(ModelError, match=r"openai-gpt: has no gradient .*set runtime\.gradient_checkpointing=false"),
        computing(config.runtime),
    ):
        LanguagePolicy.load(tmp_path / "policy")  # which serves all the same
        if stage == "initial":
            initial_policy_stage(config, talks, "talks")
        else:
            _rounds(config, PolicyVersion(1, tmp_path / "policy"), None, (), tmp_path)  # type: ignore[arg-type]


def test_micro_batches_give_the_gradient_of_the_whole_batch(plain_llama: Path, talks: list[Conversation]) -> None:
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    table = encoded(policy, talks)
    batch = collate(table.sequences, policy.pad)
    count, widest = int(batch.trains.sum()), max(len(s.tokens) for s in table.sequences)
    seen: list[int] = []

    def step(tokens: int | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        student = policy.trainable_copy()
        optimizer, schedule = optimizer_for(student.model, 0.01, 10)

        def objective(piece: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            seen.append(piece.tokens.numel())
            log_p = student.response_log_probs(piece, np.flatnonzero(piece.trains))
            return -log_p.sum() / count, {"share": (log_p < -6.0).float().sum() / count}

        with computing(runtime(micro_batch_tokens=tokens)):
            figures = descend(batch, objective, optimizer, schedule)
        return {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}, figures

    (whole, figures), (parts, in_parts) = step(None), step(2 * widest)
    assert len(seen) >= 3 and max(seen[1:]) <= 2 * widest < seen[0]
    assert in_parts == pytest.approx(figures, rel=1e-5) and figures["share"] > 0.0
    assert whole.keys() == parts.keys() == dict(policy.model.named_parameters()).keys()
    assert all(torch.allclose(whole[name], value, atol=1e-6) for name, value in parts.items())


def test_pieces_hold_every_turn_once(plain_llama: Path, talks: list[Conversation]) -> None:
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    batch = collate(encoded(policy, talks).sequences, policy.pad)
    for tokens in (None, 1, 300, 10_000):
        found = list(pieces(batch, tokens))
        assert sorted(row for piece in found for row in piece.row) == sorted(batch.row)
        for piece in found:
            assert tokens is None or piece.tokens.numel() <= max(tokens, piece.tokens.shape[1])
            for k, row in enumerate(piece.row):
                j = int(np.flatnonzero(batch.row == row)[0])
                assert torch.equal(
                    piece.tokens[piece.sequence[k], : piece.end[k]], batch.tokens[batch.sequence[j], : batch.end[j]]
                )


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["INFERENCE_TOKENS", "LOGITS"])
def test_a_response_does_not_depend_on_its_batch(
    plain_llama: Path, talks: list[Conversation], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A prompt's place and the seed decide, so that any split of the work samples the same."""
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    prompts = prompts_of(policy, talks)
    together = policy.respond(prompts, 5)
    monkeypatch.setattr(f"iterative_ppo.learning.language_model.{limit}", 1)
    alone = policy.respond(prompts, 5)
    assert alone.tokens == together.tokens
    assert np.allclose(alone.logprobs, together.logprobs, atol=1e-4)
    assert policy.respond([prompts[0]] * 30, 5).tokens[:1] == together.tokens[:1]
    assert len(set(policy.respond([prompts[0]] * 30, 5).tokens)) > 25, "places are independent"


@pytest.mark.parametrize("plain_head", [True, False])
def test_a_large_vocabulary_meets_some_positions_at_a_time(
    plain_llama: Path, talks: list[Conversation], monkeypatch: pytest.MonkeyPatch, plain_head: bool
) -> None:
    """Logits of all of a rollout's tokens would be tens of GiB under a vocabulary of 150,000."""
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    policy.__dict__["abilities"] = replace(policy.abilities, plain_head=plain_head)
    table, rows = encoded(policy, talks), len(policy.model.get_output_embeddings().weight)
    expected, seen = policy.score(table), list[int]()
    assert np.isfinite(expected).sum() > 5

    def watched(logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return LanguagePolicy.log_distribution(policy, logits)

    monkeypatch.setattr(policy, "log_distribution", watched)
    monkeypatch.setattr("iterative_ppo.learning.language_model.LOGITS", 7 * rows)
    assert np.allclose(policy.score(table), expected, atol=1e-4, equal_nan=True)
    assert max(seen) == 7 and len(seen) > 5
    seen.clear()
    policy.respond(prompts_of(policy, talks), 0, samples=3)
    assert max(seen) <= 7


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_what_trl_trained_samples_as_it_does_when_loaded(
    saved: tuple[Path, str, bool], talks: list[Conversation], lora: LoRAConfig | None, tmp_path: Path
) -> None:
    path, family, chat = saved
    if chat or family == "qwen2":
        pytest.skip("two families with a vocabulary head of their own kind tell")
    policy = LanguagePolicy.load(path, SETTINGS, lora=lora)
    sequences, prompts = encoded(policy, talks).sequences, prompts_of(policy, talks)[:8]
    before, pad = policy.respond(prompts, 0), policy.tokenizer.pad_token
    config = load_config().supervised.model_copy(update={"epochs": 4.0, "batch_size": 2, "learning_rate": 0.02})
    tuned, metrics = fine_tune(policy, sequences, config, seed=0)
    tuned.save(tmp_path)
    after = tuned.respond(prompts, 0)
    assert LanguagePolicy.load(tmp_path).respond(prompts, 0).tokens == after.tokens
    assert before.tokens == policy.respond(prompts, 0).tokens != after.tokens
    assert policy.tokenizer.pad_token == pad
    table = encoded(policy, talks)
    assert np.nanmean(tuned.score(table)) > np.nanmean(policy.score(table)) + 1.0 and metrics["loss"] > 0


class Killed(TrainerCallback):
    """Ends a training after so many updates, once that one is kept."""

    def __init__(self, after: int) -> None:
        self.after, self.made = after, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.after:
            raise KeyboardInterrupt
        self.made += 1


@pytest.mark.parametrize(
    ("family", "epochs", "micro", "lora"),
    [
        ("gpt2", 3.0, None, None),  # which drops out a tenth of its activations
        ("gpt2", 1.5, 1, None),
        ("llama", 3.0, 2, LORA.model_copy(update={"dropout": 0.1})),
    ],
)
def test_killed_fine_tuning_ends_with_the_same_weights(
    family: str, epochs: float, micro: int | None, lora: LoRAConfig | None, talks: list[Conversation], tmp_path: Path
) -> None:
    path = save_model(tmp_path / "base", family, messages(talks))

    def tuned(*callbacks: TrainerCallback, kept: Checkpoint | None = None) -> tuple[LanguagePolicy, dict[str, float]]:
        policy = LanguagePolicy.load(path, SETTINGS, lora=lora)
        sequences = encoded(policy, talks).sequences * 3
        return fine_tune(policy, sequences, config, seed=0, callbacks=callbacks, checkpoint=kept)

    config = load_config().supervised.model_copy(
        update={"epochs": epochs, "batch_size": 2, "learning_rate": 0.01, "micro_batch_size": micro}
    )
    a_pass = 3 * len(talks) // config.batch_size
    steps = int(epochs * a_pass)
    whole, told = tuned()
    for after, every in ((1, 1), (3, 2), (a_pass, 1), (steps - 1, 1), (steps, 1)):
        kept, killed, rest = Checkpoint(tmp_path / f"kept-{after}", "key", every), Killed(after), Killed(steps)
        with suppress(KeyboardInterrupt):
            tuned(killed, kept=kept)
        torch.manual_seed(1)
        resumed, figures = tuned(rest, kept=kept)
        assert (killed.made, rest.made) == (after, steps - (after - after % every))
        assert figures == told
        state = weights(resumed)
        assert all(torch.equal(state[name], value) for name, value in weights(whole).items())


@pytest.mark.parametrize("damage", [{"loss": None}, {"updates": "two"}, {"of": [3]}])
def test_a_checkpoint_of_fine_tuning_that_was_written_into_is_an_error(
    plain_llama: Path, talks: list[Conversation], tmp_path: Path, damage: dict[str, Any]
) -> None:
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    given = policy, encoded(policy, talks).sequences, load_config().supervised.model_copy(update={"batch_size": 2})
    checkpoint = Checkpoint(tmp_path / "kept", "key")
    with suppress(KeyboardInterrupt):
        fine_tune(*given, seed=0, callbacks=[Killed(2)], checkpoint=checkpoint)
    state = tmp_path / "kept" / "state.json"
    kept = json.loads(state.read_text()) | damage
    state.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    with pytest.raises(StoreError, match=r"a damaged checkpoint .*remove it to begin anew"):
        fine_tune(*given, seed=0, checkpoint=checkpoint)


@pytest.mark.parametrize("kept", [False, True])
def test_fine_tuning_that_diverges_says_so(
    plain_llama: Path, talks: list[Conversation], tmp_path: Path, kept: bool
) -> None:
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    with torch.no_grad():
        next(policy.model.parameters()).fill_(torch.nan)
    checkpoint = Checkpoint(tmp_path / "kept", "key") if kept else None
    with pytest.raises(TrainingError, match=r"diverged .loss nan.; lower supervised.learning_rate"):
        fine_tune(policy, encoded(policy, talks).sequences, load_config().supervised, seed=0, checkpoint=checkpoint)
    assert not (tmp_path / "kept").exists()


def test_fine_tuning_in_micro_batches_ends_at_the_same_weights(plain_llama: Path, talks: list[Conversation]) -> None:
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    sequences = encoded(policy, talks).sequences[:4]
    config = load_config().supervised.model_copy(update={"epochs": 1.0, "batch_size": 4, "learning_rate": 0.01})
    made = [
        weights(fine_tune(policy, sequences, config.model_copy(update={"micro_batch_size": size}), seed=0)[0])
        for size in (None, 1)
    ]
    assert all(torch.allclose(made[0][name], value, atol=1e-5) for name, value in made[1].items())
    with pytest.raises(ConfigError, match="micro_batch_size 3 must divide batch_size 16"):
        load_config(overrides={"supervised.micro_batch_size": 3})


def test_pi_0_is_the_base_model_or_a_tuned_one(plain_llama: Path, talks: list[Conversation], tmp_path: Path) -> None:
    from tasks.learning import initial_policy_stage

    def stage(**changes: Any) -> tuple[LanguagePolicy, Path]:
        quick = {
            "q.corpus_epochs": 0.0,
            "supervised.batch_size": 2,
            "supervised.learning_rate": 0.02,
            "data.root": str(tmp_path / str(len(changes))),
        }
        base = {"policy.base_model": str(plain_llama), "policy.max_prompt_tokens": 600, "policy.max_response_tokens": 8}
        config = load_config(overrides=quick | base | changes)
        made = initial_policy_stage(config, talks, "talks")
        return LanguagePolicy.load(made.path / "model"), made.path / "model"

    original = LanguagePolicy.load(plain_llama, SETTINGS)
    table = encoded(original, talks)
    expected = replace(original.settings, temperature=1.0)
    prompted, _ = stage(**{"policy.init": "prompt"})
    assert prompted.settings == expected
    original = LanguagePolicy(original.model, original.tokenizer, expected)
    assert np.allclose(prompted.score(table), original.score(table), equal_nan=True)
    adapted, path = stage(**{"policy.init": "sft", "policy.lora.rank": 2, "policy.save": "adapters"})
    assert (path / "adapter_config.json").exists()
    assert np.nanmean(adapted.score(table)) > np.nanmean(original.score(table)) + 1.0
    with pytest.raises(ConfigError, match="init: prompt needs a base_model"):
        load_config(overrides={"policy.init": "prompt"})


def test_rates_of_tiny_models_are_told_of_where_the_base_model_is_none(
    plain_llama: Path, talks: list[Conversation], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    from tasks import learning, suitability

    def told(path: Path | None, name: str, **changes: Any) -> str:
        limits = {"policy.max_prompt_tokens": 600, "policy.max_response_tokens": 40, "q.corpus_epochs": 0.0}
        place = {"data.root": str(tmp_path / name), "policy.base_model": str(plain_llama), "policy.init": "prompt"}
        caplog.clear()
        learning.initial_policy_stage(load_config(path, limits | place | changes), talks, "talks")
        return caplog.text

    assert "learning rates" not in told(None, "tiny")
    monkeypatch.setattr(suitability, "TINY_WEIGHTS", 100)
    found = told(None, "large")
    assert "q.learning_rate = 0.002" in found and "improve.ppo.learning_rate = 0.0005" in found
    assert "supervised" not in found, "nothing is fine-tuned"
    shipped = Path(learning.__file__).parents[1] / "configs" / "pretrained.yaml"
    assert "learning rates" not in told(shipped, "shipped")


def test_a_limit_that_cuts_what_the_log_says_is_told_of(
    plain_llama: Path, talks: list[Conversation], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What to set is said, and set so it is told of no more."""
    from tasks.learning import initial_policy_stage

    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    spoken = [turn.suggestion for talk in talks for turn in talk.turns if turn.suggestion]
    lengths = np.array([len(policy.renderer.response(action)) for action in spoken if action.status != "missing"])

    def share(limit: int, prompt: int = 600) -> float:
        base = {"policy.base_model": str(plain_llama), "policy.init": "prompt", "policy.max_prompt_tokens": prompt}
        place = {"data.root": str(tmp_path / f"{limit}-{prompt}"), "q.corpus_epochs": 0.0}
        config = load_config(overrides=base | place | {"policy.max_response_tokens": limit})
        caplog.clear()
        return initial_policy_stage(config, talks, "talks").metrics["longer_suggestions"]

    limit = int(np.median(lengths)) - 1
    assert share(limit) == pytest.approx((lengths > limit).mean())
    found = re.search(r"policy.max_response_tokens = (\d+), .* at most (\d+) tokens", caplog.text)
    assert found
    assert int(found[1]) == limit
    assert share(int(found[2])) <= 0.01
    assert not caplog.text
    share(int(found[2]), prompt=20)
    assert re.search(r"conversations are longer than policy.max_prompt_tokens = 20", caplog.text)


def test_a_suggestion_longer_than_the_context_is_left_out_of_what_trains(
    talks: list[Conversation], tmp_path: Path
) -> None:
    path = save_model(tmp_path / "model", "gpt2", messages(talks), n_positions=64)
    policy = LanguagePolicy.load(path, PolicySettings(0.9, 48, 16, "<|abstain|>"))
    said = Suggestion(" ".join(["yes, of course we can"] * 40), "suggested")
    turns = list(talks[0].turns)
    turns[0] = replace(turns[0], suggestion=said)
    sequences, _ = policy.renderer.encode(replace(talks[0], turns=tuple(turns)))
    assert max(len(s.tokens) for s in sequences) <= 64
    assert not sequences[0].spans[0].trains and any(s.spans[0].trains for s in sequences[1:])
    score = policy.score(EncodedTable(sequences, len(turns)))
    assert np.isnan(score[0]) and np.isfinite(score[1:]).any()
    fine_tune(policy, sequences, load_config().supervised.model_copy(update={"epochs": 1.0}), seed=0)


def test_a_reserved_token_of_the_model_is_the_abstain_action_in_one_token(
    talks: list[Conversation], tmp_path: Path
) -> None:
    """It may then be said, though other special tokens may not; any other text abstains too, in more tokens."""
    path = save_model(tmp_path / "model", "llama", messages(talks), chat=True)
    reserved, spelled = (LanguagePolicy.load(path, replace(SETTINGS, abstain=w)) for w in ("<|reserved|>", "[none]"))
    token, *end = reserved.renderer.response(ABSTAIN)
    assert end == [reserved.renderer.eos] and token == reserved.tokenizer.convert_tokens_to_ids("<|reserved|>")
    assert token not in reserved.banned and token in spelled.banned
    assert len(spelled.renderer.response(ABSTAIN)) > 2
    for policy in (reserved, spelled):
        said = policy.suggestion(policy.renderer.response(ABSTAIN), -2.0)
        assert said == Suggestion("", "abstained", -2.0)
        prompts = prompts_of(policy, talks[:1])
        assert np.isfinite(policy.score(table_of(prompts[:1], [policy.renderer.response(ABSTAIN)]))).all()


@pytest.mark.parametrize(
    ("abstain", "said"), [("...", "One moment... I check it"), ("PASS", "Bring your PASSPORT"), ("no", "no, I know")]
)
def test_a_spelled_word_for_abstaining_is_the_whole_response(plain_llama: Path, abstain: str, said: str) -> None:
    """Within a suggestion it is a word like any other."""
    policy = LanguagePolicy.load(plain_llama, replace(SETTINGS, abstain=abstain))
    for action in (Suggestion(said, "suggested", -1.0), replace(ABSTAIN, logprob=-1.0)):
        assert policy.suggestion(policy.renderer.response(action), -1.0) == action
    spaced = policy.suggestion((*policy.renderer.ids(f" {abstain}\n"), policy.renderer.eos), -1.0)
    assert spaced == ABSTAIN, "white space says nothing, and other tokens have another log-prob"


def test_a_mark_for_abstaining_shows_in_no_suggestion(plain_llama: Path) -> None:
    """Spelled in ordinary tokens, as with most tokenizers: nobody is to be shown it."""
    policy = LanguagePolicy.load(plain_llama, SETTINGS)
    assert SETTINGS.abstain == "<|abstain|>" and len(policy.renderer.ids(SETTINGS.abstain)) > 1
    mixed = policy.suggestion((*policy.renderer.ids("<|abstain|> We have red"), policy.renderer.eos), -1.0)
    assert (mixed.status, mixed.text, mixed.logprob) == ("abstained", "", None)


@pytest.mark.parametrize("chat", [False, True])
def test_a_token_that_is_never_written_needs_no_row(talks: list[Conversation], chat: bool, tmp_path: Path) -> None:
    """As Gemma 3's token for images; one that texts or the chat template hold needs one."""
    path = save_model(tmp_path / "model", "gemma2", messages(talks), chat=chat)
    rows = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight.shape[0]

    def add(*tokens: str, special: bool) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        tokenizer.save_pretrained(path)

    add(*(f"<|{k}|>" for k in range(rows - len(AutoTokenizer.from_pretrained(path)))), special=True)
    add("<image_soft_token>", special=True)
    policy = LanguagePolicy.load(path, SETTINGS)
    assert max(policy.tokenizer.get_vocab().values()) == rows
    asking = replace(talks[0].turns[0], customer_message="<image_soft_token> what is this?")
    prompts = prompts_of(policy, [replace(talks[0], turns=(asking, *talks[0].turns[1:])), *talks])
    responses = policy.respond(prompts, seed=0)
    assert np.allclose(policy.score(table_of(prompts, responses.tokens)), responses.logprobs, atol=2e-4)
    refused = [replace(SETTINGS, abstain="<image_soft_token>")]
    if chat:
        with_template("<image_soft_token>{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")(path)
        refused.append(SETTINGS)
    for settings in refused:
        with pytest.raises(ModelError, match=f"texts hold token ids up to {rows}, the model embeds {rows}"):
            LanguagePolicy.load(path, settings)
    with_template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")(path)
    add("worded", special=False)
    with pytest.raises(ModelError, match=f"texts hold token ids up to {rows + 1}, the model embeds {rows}"):
        LanguagePolicy.load(path, SETTINGS)


def test_texts_that_would_depend_on_their_batch_are_refused(talks: list[Conversation], tmp_path: Path) -> None:
    """LongRoPE's frequencies are those of the longest text."""
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 64, "factor": 10.0}
    path = made(tmp_path, "phi3", talks, **sizes, rope_parameters=rope)
    with pytest.raises(ModelError, match=r"beyond 64 tokens .*max_prompt_tokens \+ .* is 65; lower them"):
        LanguagePolicy.load(path, replace(SETTINGS, max_prompt_tokens=57))
    policy = LanguagePolicy.load(path, replace(SETTINGS, max_prompt_tokens=56))
    prompts = prompts_of(policy, talks)
    responses = policy.respond(prompts, seed=1)
    alone = [policy.score(table_of([p], [r]))[0] for p, r in zip(prompts, responses.tokens, strict=True)]
    assert np.allclose(alone, responses.logprobs, atol=2e-4)


def quantized(path: Path, method: str = "fp8") -> Path:
    """The projections of a saved model in float8 by blocks of 16, as DeepSeek and Qwen publish theirs."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        found[name] = weight
        if "proj" in name:
            rows, columns = (size // 16 for size in weight.shape)
            blocks = weight.reshape(rows, 16, columns, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            found[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": method, "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
    with_config(quantization_config=how)(path)
    return path


EVEN = {"num_key_value_heads": 2}  # so that all sizes are of whole blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there transformers leaves such weights quantized")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_quantized_weights_that_are_read_as_plain_ones_are_saved_so(
    family: str, talks: list[Conversation], tmp_path: Path
) -> None:
    """What is saved is the policy that was measured, and so is its student."""
    base = made(tmp_path / "base", family, talks, **EXPERTS.get(family, SIZES) | EVEN)
    plain = LanguagePolicy.load(base, SETTINGS)
    table = encoded(plain, talks)
    policy = LanguagePolicy.load(quantized(base), SETTINGS)
    score = policy.score(table)
    assert np.nanmean(np.abs(score - plain.score(table))) < 0.1 * np.nanmean(np.abs(score)), "near what it was"
    for k, some in enumerate((policy, policy.trainable_copy())):
        some.save(tmp_path / str(k))
        assert {weight.dtype for weight in load_file(tmp_path / str(k) / "model.safetensors").values()} == {
            torch.float32
        }
        assert np.allclose(LanguagePolicy.load(tmp_path / str(k)).score(table), score, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_model_whose_layout_is_converted_as_it_loads_is_saved_as_it_is(
    family: str, talks: list[Conversation], tmp_path: Path
) -> None:
    """Experts lie one by one in a file and together in memory."""
    policy = LanguagePolicy.load(made(tmp_path / "base", family, talks, **EXPERTS[family]), SETTINGS)
    policy.save(tmp_path / "saved")
    names = [sorted(load_file(tmp_path / place / "model.safetensors")) for place in ("base", "saved")]
    assert names[0] == names[1]
    table = encoded(policy, talks)
    again = LanguagePolicy.load(tmp_path / "saved").score(table)
    assert np.allclose(again, policy.score(table), atol=1e-5, equal_nan=True)


def test_weights_that_the_model_has_no_place_for_are_told(
    plain_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A value head, as TRL leaves it, does no harm; the second of two layers says that this is another model."""
    LanguagePolicy.load(plain_llama, SETTINGS)
    assert not caplog.text
    path = shutil.copytree(plain_llama, tmp_path / "model")
    with_config(num_hidden_layers=1)(path)
    LanguagePolicy.load(path, SETTINGS)
    assert f"{path}: its file holds model.layers.1." in caplog.text
    assert "8 more that LlamaForCausalLM has no place for" in caplog.text


def test_a_context_is_known_by_any_name(talks: list[Conversation], tmp_path: Path) -> None:
    mpt = {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 607}
    with pytest.raises(ModelError, match=r"context is 607 tokens, but .* is 608; lower them"):
        LanguagePolicy.load(made(tmp_path / "mpt", "mpt", talks, **mpt), SETTINGS)
    xlnet = {"d_model": 16, "n_head": 2, "n_layer": 2, "d_inner": 32}
    with pytest.raises(ModelError, match="depends on what follows"):  # which is what is wrong with it
        LanguagePolicy.load(made(tmp_path / "xlnet", "xlnet", talks, **xlnet), SETTINGS)


def test_an_abstain_action_that_ends_the_response_is_refused(plain_llama: Path) -> None:
    for text in ("<|end|>", "no <|end|>"):
        with pytest.raises(ModelError, match=r"policy\.abstain '.*' holds the token that ends a response"):
            LanguagePolicy.load(plain_llama, replace(SETTINGS, abstain=text))


# --- what is refused -------------------------------------------------------------------------------------------------


def without_eos(path: Path) -> None:
    values = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token"}))


def with_template(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = text
        tokenizer.save_pretrained(path)

    return change


def without_head(path: Path) -> None:
    AutoModel.from_pretrained(path).save_pretrained(path)


def with_broken_weights(layer: str) -> Callable[[Path], None]:

    def change(path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.get_submodule(layer).weight[300, 3] = torch.inf
        model.save_pretrained(path)

    return change


def with_config(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | values))

    return change


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def with_pickled_weights(content: bytes | None) -> Callable[[Path], None]:
    """Of the very model, or of anything."""

    def change(path: Path) -> None:
        weights = AutoModelForCausalLM.from_pretrained(path).state_dict()
        (path / "model.safetensors").unlink()
        if content is None:
            torch.save(weights, path / "pytorch_model.bin")
        else:
            (path / "pytorch_model.bin").write_bytes(content)

    return change


def another_model(kind: str, **sizes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = AutoConfig.for_model(kind, **{"vocab_size": 400, **sizes})
        AutoModelForCausalLM.from_config(config).save_pretrained(path)

    return change


def encoder_decoder(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "t5"}')


BART = {f"{side}_{name}": 16 if name == "ffn_dim" else 2 for side in ("encoder", "decoder")
        for name in ("layers", "ffn_dim", "attention_heads")} | {"d_model": 16}  # fmt: skip
BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(shutil.rmtree, "no such directory", id="not there"),
        pytest.param(encoder_decoder, "not a causal language model", id="encoder and decoder"),
        pytest.param(another_model("bert", **BERT), "depends on what follows", id="reads both ways"),
        pytest.param(another_model("bart", **BART), "Q cannot start from its backbone", id="half of a model"),
        pytest.param(with_broken_weights("lm_head"), r"weight lm_head\.weight holds .* not finite", id="head"),
        pytest.param(with_broken_weights("model.embed_tokens"), r"weight model.embed_tokens.weight holds", id="row"),
        pytest.param(with_config(hidden_size="16"), "not a causal language model .*hidden_size", id="size in words"),
        pytest.param(with_config(num_attention_heads=3), "not a causal language model .*hidden", id="heads"),
        pytest.param(with_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
                     "not a causal language model .*GPTQ", id="quantized"),
        pytest.param(with_config(quantization_config={"quant_method": "unheard-of"}),
                     "its weights are quantized .* full precision", id="quantized otherwise"),
        pytest.param(with_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
                     "code of its own, which is not run; take a model of a family that transformers", id="own code"),
        pytest.param(with_file("generation_config.json", b"[]"), "not a causal language model", id="generation"),
        pytest.param(with_file("config.json", b"[]"), "not a causal language model", id="no configuration"),
        pytest.param(with_pickled_weights(b"garbage"), "pickles, .* save them as safetensors", id="garbage"),
        pytest.param(with_pickled_weights(None), "its weights are pickles", id="pickled"),
        pytest.param(without_head, "its weights lack lm_head", id="no vocabulary head"),
        pytest.param(without_eos, "no end-of-sequence token; set eos_token", id="no end of sequence"),
        pytest.param(another_model("llama", **SIZES | {"vocab_size": 100}), "token ids up to 329, the model embeds 100",
                     id="another tokenizer"),
        pytest.param(another_model("llama", **SIZES | {"max_position_embeddings": 607}), r"context is 607 .* is 608",
                     id="short context"),
        pytest.param(with_template("{{ raise_exception('only one turn') }}"), "chat template fails .*only one turn",
                     id="template raises"),
        pytest.param(with_template("{% for m in %}"), "chat template fails", id="template is no template"),
        pytest.param(with_template("{{ messages[0]['text'] | length }}{{ nothing.at.all }}"), "chat template fails",
                     id="template wants other fields"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_serve_is_refused_in_one_line(
    talks: list[Conversation], tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    path = save_model(tmp_path / "model", "llama", messages(talks))
    damage(path)
    with pytest.raises(ModelError, match=said) as error:
        LanguagePolicy.load(path, SETTINGS)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("lost", ["score.weight", "layers.1"])
def test_a_q_without_all_its_weights_is_refused(plain_llama: Path, tmp_path: Path, lost: str) -> None:
    """Nothing is filled at random; nor is a Q read whose weights are no numbers."""
    q_of(LanguagePolicy.load(plain_llama, SETTINGS)).save(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")

    def written(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    written({name: weight for name, weight in kept.items() if lost not in name})
    with pytest.raises(ModelError, match=rf"{tmp_path}: its weights lack .*{lost}.* expected .* a saved Q-model"):
        QModel.load(tmp_path)
    written({name: weight * (torch.nan if lost in name else 1.0) for name, weight in kept.items()})
    with pytest.raises(ModelError, match=rf"{tmp_path}: its weight .*{lost}.* not finite"):
        QModel.load(tmp_path)
    written(kept)
    assert QModel.load(tmp_path).settings.heads == 1
