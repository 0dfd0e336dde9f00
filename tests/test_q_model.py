"""Q and V: read where they belong, fitted to what was asked and to nothing that was held out, saved and found again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.chain import ACTIONS, Chain
from iterative_ppo.errors import ConfigError, ModelError, StoreError, TrainingError
from iterative_ppo.learning.batching import (
    EncodedTable,
    encode_table,
    inference_batches,
    shuffled_batches,
    training_batches,
)
from iterative_ppo.learning.estimators.network import joined
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.policy_evaluation import Round, bootstrap_weights, fit_q
from iterative_ppo.learning.q_model import SETTINGS, QModel, QSettings
from iterative_ppo.learning.regression import Regression, Targets, regress
from iterative_ppo.learning.rounds import corpus_q, evaluate_policy, round_of
from iterative_ppo.learning.supervised import LikeLengths
from iterative_ppo.learning.tiny import build_policy
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import ABSTAIN, MISSING, Conversation, Turn
from iterative_ppo.mdp.rendering import Encoded, Span, single
from iterative_ppo.mdp.returns import acceptance_rewards, monte_carlo, one_step_targets
from iterative_ppo.mdp.turn_table import actions, last_rows, to_frame
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, fit_q_stage, initial_policy_stage

torch.set_num_threads(1)

OUTCOMES = {"purchase": 1.0}
UNIT = QSettings("bce", 0.0, 1.0, 0.95)
WIDE = replace(UNIT, low=-2.0, high=6.0)


def new_q(policy: LanguagePolicy, settings: QSettings = UNIT, seed: int = 0) -> QModel:
    return QModel.from_policy(policy, settings, seed)


def a_round(policy: LanguagePolicy, talks: list[Conversation], evidence_share: float = 0.3) -> Round:
    frame = to_frame(talks, OUTCOMES, evidence_share)
    return round_of(policy, frame, load_config())


def weights(q: QModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in q.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def split_up(policy: LanguagePolicy, encoded: EncodedTable) -> EncodedTable:
    """The same turns, each as a sequence of its own."""
    rows = [
        single(x.row, s.tokens[: x.start], s.tokens[x.start : x.end], x.trains)
        for s in encoded.sequences
        for x in s.spans
    ]
    return EncodedTable(rows, encoded.rows)


# --- where values are read -------------------------------------------------------------------------------------------


def test_one_pass_a_conversation_gives_the_values_of_one_row_a_turn(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    q, encoded = new_q(tiny_policy), a_round(tiny_policy, scripted[:15]).encoded
    assert len(encoded.sequences) == 15 and encoded.unshared == 0
    apart = split_up(tiny_policy, encoded)
    together, alone = q.evaluate(encoded), q.evaluate(apart)
    assert np.allclose(together.v, alone.v, atol=1e-5, equal_nan=True)
    assert np.allclose(together.q, alone.q, atol=1e-5, equal_nan=True)
    assert np.allclose(tiny_policy.score(encoded), tiny_policy.score(apart), atol=1e-4, equal_nan=True)


def test_v_is_read_at_the_prompts_end_and_q_at_the_responses(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    q, frame = new_q(tiny_policy), to_frame(scripted[:4], OUTCOMES, 0.3)
    values = q.evaluate(encode_table(frame, tiny_policy.renderer))
    row = 0
    for talk in scripted[:4]:
        for i, turn in enumerate(talk.turns):
            if turn.suggestion is None:
                assert math.isnan(values.v[row]) and math.isnan(values.q[row]), "nothing to say at the end"
            else:
                prompt = tiny_policy.renderer.prompt(talk.state(i)).tokens
                for tokens, value in (
                    (prompt, values.v),
                    (prompt + tiny_policy.renderer.response(turn.suggestion), values.q),
                ):
                    with torch.no_grad():
                        logit = q.head(last_hidden(q.model, torch.tensor([tokens])))[0, -1]
                    assert value[row] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)
            row += 1


def test_a_state_whose_action_was_not_logged_has_a_v_and_no_q(tiny_policy: LanguagePolicy) -> None:
    turns = (Turn("Hi.", (0.0,), MISSING, "OK."), Turn("So?", (0.0,), ABSTAIN, "OK."), Turn(None, (0.0,)))
    frame = to_frame([Conversation("c", turns, "u")], OUTCOMES, 0.3)
    values = new_q(tiny_policy).evaluate(encode_table(frame, tiny_policy.renderer))
    assert np.isnan(values.v).tolist() == [False, False, True]
    assert np.isnan(values.q).tolist() == [True, False, True]


def test_running_values_start_at_v_and_end_at_q(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    q = new_q(tiny_policy)
    apart = split_up(tiny_policy, a_round(tiny_policy, scripted[:6]).encoded)
    sequences = [replace(s, spans=(replace(s.spans[0], row=k),)) for k, s in enumerate(apart.sequences)]
    running, values = q.running_values(sequences), q.evaluate(EncodedTable(sequences, len(sequences)))
    lengths = [s.spans[0].end - s.spans[0].start for s in sequences]
    assert [len(value) for value in running] == [1 + length for length in lengths]
    assert np.allclose([value[0] for value in running], values.v, atol=1e-6)
    assert np.allclose([value[-1] for value in running], values.q, atol=1e-6)


@pytest.mark.parametrize(("loss", "low", "high"), [("bce", 0, 1), ("bce", -2, 6), ("mse", 0, 1), ("mse", -2, 6)])
def test_values_and_losses_are_in_the_outcomes_units(loss: str, low: float, high: float) -> None:
    scale = QSettings(loss, low, high, 0.9).scale
    logits, target = torch.tensor([-3.0, 0.0, 40.0]), torch.tensor([low, (low + high) / 2, high])
    p = torch.sigmoid(logits.double())
    if loss == "mse":
        assert scale.value(logits[:, None]).tolist() == (low + (high - low) * logits).tolist()
        expected = (logits - torch.tensor([0.0, 0.5, 1.0])) ** 2
    else:
        value = scale.value(logits[:, None])
        assert value.tolist() == pytest.approx((low + (high - low) * p).tolist(), abs=1e-6)
        unit = torch.tensor([0.0, 0.5, 1.0])
        expected = -(unit * p.log() + (1 - unit) * torch.log1p(-p).clamp_min(-40)).float()
    assert scale.loss(logits[:, None], target).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 6.0)])
@pytest.mark.parametrize("loss", ["bce", "mse", "hl_gauss"])
def test_the_least_loss_is_at_the_mean_of_the_targets_also_of_some_outside_the_range(
    loss: str, low: float, high: float
) -> None:
    """Bootstrapped targets leave the range; a loss that cut them there would learn something else than their mean."""
    width = high - low
    scale = QSettings(loss, low, high, 0.9, bins=51 if loss == "hl_gauss" else 1).scale
    spread = (-0.4, 0.1, 0.9) if loss != "hl_gauss" else (0.0, 0.3, 1.0)
    targets = torch.tensor([low + width * x for x in spread])
    outputs = torch.zeros(1, scale.bins, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = scale.loss(outputs.expand(3, -1), targets).mean()
        total.backward()
        return total

    optimizer.step(closure)
    assert float(scale.value(outputs.detach())[0]) == pytest.approx(float(targets.mean()), abs=0.01 * width)


@pytest.mark.parametrize("loss", ["bce", "mse", "hl_gauss"])
def test_values_are_float32_under_autocast_too(loss: str) -> None:
    scale = QSettings(loss, 0.0, 3.0, 0.9, bins=51 if loss == "hl_gauss" else 1).scale
    outputs = torch.randn(20, scale.bins)
    exact = scale.value(outputs)
    with torch.autocast("cpu", torch.bfloat16):
        value = scale.value(outputs)
    assert value.dtype == torch.float32
    assert torch.allclose(value, exact, atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "mse", "hl_gauss"])
def test_each_outcome_has_its_own_range_in_each_member(loss: str) -> None:
    """The heads of two outcomes and two members say, and lose, what each would alone."""
    settings = QSettings(loss, 0.0, 1.0, 0.9, {"revenue": 1.0, "contact": 5.0}, members=2)
    settings = replace(settings, ranges={"revenue": (-50, 500)}, bins=51 if loss == "hl_gauss" else 1)
    alone = [replace(settings, low=low, high=high, ranges={}, members=1).scale for low, high in ((-50, 500), (0, 1))]
    alone = [replace(one, low=one.low[:1], high=one.high[:1]) for one in alone]
    outputs = torch.randn(6, settings.heads, settings.bins, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([120.0, 0.25, 400.0, 1.0]).expand(6, -1)
    value, loss_of = settings.scale.value(outputs), settings.scale.loss(outputs, target)
    for head in range(settings.heads):
        one, column = alone[head % 2], slice(head, head + 1)
        assert torch.allclose(value[:, column], one.value(outputs[:, column]), atol=1e-4)
        assert torch.allclose(loss_of[:, column], one.loss(outputs[:, column], target[:, column]), atol=1e-5)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_training_batches_hold_every_sequence_once_an_epoch(
    scripted: list[Conversation], tiny_policy: LanguagePolicy
) -> None:
    sequences = a_round(tiny_policy, scripted).encoded.sequences
    batches = list(training_batches(sequences, 8, 2.0, tiny_policy.pad, np.random.default_rng(0)))
    assert len(batches) == 2 * math.ceil(len(sequences) / 8)
    rows = sorted(span.row for s in sequences for span in s.spans)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        assert sorted(np.concatenate([batch.row for batch in epoch]).tolist()) == rows
    assert len(list(training_batches(sequences, 8, 0.5, 0, np.random.default_rng(0)))) == 4
    assert list(training_batches([], 8, 3.0, 0, np.random.default_rng(0))) == []


def test_batches_of_like_length_come_in_any_order() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 4003)
    batches = shuffled_batches(lengths, 16, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(4003))
    assert sorted(len(batch) for batch in batches) == [3] + [16] * 250
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2, "no order by length"
    assert np.mean([lengths[batch].std() for batch in batches]) < 0.2 * lengths.std()


def test_an_incomplete_batch_does_not_tear_those_after_it_apart() -> None:
    lengths, orders = np.arange(40) * 10, set()
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = list(LikeLengths(lengths, 16))
        assert sorted(drawn) == list(range(40))
        assert all(np.ptp(lengths[drawn[i : i + 16]]) == 150 for i in (0, 16))
        orders.add(tuple(drawn))
    assert len(orders) == 2


def test_inference_batches_hold_every_sequence_once_within_their_size(
    scripted: list[Conversation], tiny_policy: LanguagePolicy
) -> None:
    sequences = a_round(tiny_policy, scripted).encoded.sequences
    batches = list(inference_batches(sequences, 500, tiny_policy.pad))
    assert all(batch.tokens.numel() <= 500 for batch in batches)
    seen = [
        tuple(row[: row.index(tiny_policy.pad)] if tiny_policy.pad in row else row)
        for b in batches
        for row in b.tokens.tolist()
    ]
    assert sorted(seen) == sorted(s.tokens for s in sequences)


def test_joined_tables_keep_their_rows_apart(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    one, two = a_round(tiny_policy, scripted[:3]).encoded, a_round(tiny_policy, scripted[3:9]).encoded
    both = joined([one, two])
    assert both.rows == one.rows + two.rows
    q = new_q(tiny_policy)
    apart = np.concatenate([q.evaluate(one).q, q.evaluate(two).q])
    assert np.allclose(q.evaluate(both).q, apart, atol=1e-5, equal_nan=True)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_one_step_targets_longhand() -> None:
    """Two conversations: three actions and a purchase, then one action and silence."""
    nan = math.nan
    reward, last = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), np.array([0, 0, 0, 1, 0, 1], bool)
    v = np.array([0.2, 0.4, 0.7, nan, 0.5, nan])
    y = one_step_targets(reward, last, v, gamma=0.9)
    assert y.tolist() == pytest.approx([0.9 * 0.4, 0.9 * 0.7, 1.0, 0.0, 0.0, 0.0])


def test_one_step_targets_do_not_look_at_v_of_the_turn_itself() -> None:
    reward, last = np.array([0.0, 1.0, 0.0]), np.array([False, False, True])
    one = one_step_targets(reward, last, np.array([0.1, 0.3, math.nan]), 0.5)
    assert np.array_equal(one, one_step_targets(reward, last, np.array([9.0, 0.3, math.nan]), 0.5))
    assert one.tolist() == pytest.approx([0.15, 1.0, 0.0])


# --- regression ------------------------------------------------------------------------------------------------------


def how(epochs: float = 1.0, learning_rate: float = 0.003, running_weight: float = 0.5) -> Regression:
    return Regression(epochs, learning_rate, 4, running_weight)


@pytest.mark.parametrize("settings", [UNIT, WIDE, replace(WIDE, loss="mse")], ids=["bce", "bce wide", "mse wide"])
def test_regression_learns_a_small_set_by_heart(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], settings: QSettings
) -> None:
    data = a_round(tiny_policy, scripted[:8])
    logged = np.isfinite(data.returns) & ~data.last
    luck = np.random.default_rng(0).integers(2, size=len(data.last))
    target = np.where(logged, settings.low + (settings.high - settings.low) * luck, math.nan)
    q = new_q(tiny_policy, settings)
    before = np.abs(q.evaluate(data.encoded).q - target)[logged].mean() / (settings.high - settings.low)
    last_loss = regress(q, data.encoded, target, how(60.0, 0.01, 0.0), seed=0)
    after = np.abs(q.evaluate(data.encoded).q - target)[logged].mean() / (settings.high - settings.low)
    assert before > 0.3 and after < 0.1, (before, after)
    assert last_loss < {"bce": 0.6, "mse": 6.0}[settings.loss]


def test_v_is_the_mean_and_q_the_outcome_of_the_action(tiny_policy: LanguagePolicy) -> None:
    """One state, one action that always pays and one that never does, seen 3 : 1."""
    yes, no = ((40, 41, 1), 1.0), ((42, 43, 1), 0.0)
    said = [yes, yes, yes, no] * 4
    table = EncodedTable([single(k, (4, 50, 6), r, True) for k, (r, _) in enumerate(said)], len(said))
    q = new_q(tiny_policy)
    regress(q, table, np.array([g for _, g in said]), how(30.0, 0.01), seed=0)
    values = q.evaluate(table)
    assert np.allclose(values.v, 0.75, atol=0.12)
    assert np.allclose(values.q, [g for _, g in said], atol=0.1)
    running = q.running_values([single(0, (4, 50, 6), yes[0], True)])[0]
    assert running[1] > 0.8, "the running value knows after the first token which action it is"


def test_v_hears_as_much_of_conversations_that_go_on_as_of_those_that_end(tiny_policy: LanguagePolicy) -> None:
    """One opening: half of the conversations end there and fail, half go on for four turns and succeed."""
    response, prompt = (40, 41, 1), (4, 50, 6)
    short = single(0, prompt, response, True)
    spans, tokens = [Span(1, 3, 6, True)], prompt + response
    for row in range(2, 6):
        tokens += prompt + response
        spans.append(Span(row, len(tokens) - 3, len(tokens), True))
    sequences = [short, Encoded(tokens, tuple(spans))] * 16
    q = new_q(tiny_policy)
    regress(q, EncodedTable(sequences, 6), np.array([0.0, *[1.0] * 5]), how(20.0, 0.003), seed=0)
    values = q.evaluate(EncodedTable(sequences[:2], 6))
    assert values.v[0] == values.v[1] == pytest.approx(0.5, abs=0.15)
    assert values.q[0] == values.q[1] == pytest.approx(0.5, abs=0.15)


def test_a_value_head_of_its_own_learns_targets_of_its_own(tiny_policy: LanguagePolicy) -> None:
    q = new_q(tiny_policy, replace(UNIT, value_head=True))
    table = EncodedTable([single(k, (4, 50, 6), (40, 41, 1), True) for k in range(4)], 4)
    regress(q, table, Targets.of(np.ones(4), 1, v=np.zeros(4)), replace(how(40.0, 0.01, 0.0), batch_size=4), seed=0)
    values, running = q.evaluate(table), q.running_values([table.sequences[0]])[0]
    assert values.v.max() < 0.1 and values.q.min() > 0.9
    assert running[0] == pytest.approx(values.v[0]) and running[-1] == pytest.approx(values.q[0])


def test_members_have_targets_and_weights_of_their_own(tiny_policy: LanguagePolicy) -> None:
    """Two members, two outcomes: a row counts for a member as often as its bootstrap drew it."""
    outcomes = {"purchase": 2.0, "contact": -1.0}
    q = new_q(tiny_policy, replace(UNIT, outcomes=outcomes, members=2))
    table = EncodedTable([single(k, (4, 50, 6), (40, 41, 1), True) for k in range(2)], 2)
    target = np.array([[1.0, 0.0], [0.0, 1.0]])
    drawn = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    regress(q, table, Targets.of(target, 4, weight=drawn), replace(how(60.0, 0.01, 0.0), batch_size=2), seed=0)
    heads = q.head_values(table)
    assert np.allclose(heads.q, [[1, 0, 0, 1]] * 2, atol=0.15), "the first member saw one row, the second the other"
    assert np.allclose(q.evaluate(table).q, (heads.q @ [2, -1, 0, 0] + heads.q @ [0, 0, 2, -1]) / 2, atol=1e-6)


def test_every_turn_weighs_the_same_whatever_the_length_of_its_conversation(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in length share a batch; still an epoch's mean gradient is that of the mean over all turns."""
    data = a_round(tiny_policy, scripted)
    gradients: list[torch.Tensor] = []

    def record(batch: Any, objective: Any, optimizer: torch.optim.Optimizer, *_: Any) -> dict[str, float]:
        loss = objective(batch)[0]
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, optimizer.param_groups[0]["params"])])
        )
        return {"loss": 0.0}

    monkeypatch.setattr("iterative_ppo.learning.training.descend", record)
    regress(new_q(tiny_policy), data.encoded, data.returns, replace(how(), batch_size=10), seed=0)
    apart = torch.stack(gradients)
    regress(new_q(tiny_policy), data.encoded, data.returns, replace(how(), batch_size=len(scripted)), seed=0)
    assert len(apart) == 6 and torch.allclose(apart.mean(0), gradients[-1], atol=1e-5)


def test_rows_without_a_target_are_left_out(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    """NaN targets give the very weights that removing those turns would give."""
    data = a_round(tiny_policy, scripted[:10])
    dropped = np.arange(len(data.last)) % 3 == 0
    one, other = new_q(tiny_policy), new_q(tiny_policy)
    regress(one, data.encoded, np.where(dropped, math.nan, data.returns), how(), seed=0)
    kept = [
        replace(s, spans=tuple(replace(x, trains=x.trains and not dropped[x.row]) for x in s.spans))
        for s in data.encoded.sequences
    ]
    regress(other, EncodedTable(kept, data.encoded.rows), data.returns, how(), seed=0)
    assert equal(weights(one), weights(other))
    third = new_q(tiny_policy)
    regress(third, data.encoded, data.returns, how(), seed=0)
    assert not equal(weights(one), weights(third))


def test_actions_that_were_not_logged_train_nothing(tiny_policy: LanguagePolicy) -> None:
    turns = (Turn("Hi.", (0.0,), MISSING, "OK."), Turn("So?", (0.0,), ABSTAIN, "OK."), Turn(None, (0.0,)))
    table = encode_table(to_frame([Conversation("c", turns, "u")], OUTCOMES, 0.3), tiny_policy.renderer)
    results = []
    for unlogged in (0.0, 1.0):
        q = new_q(tiny_policy)
        regress(q, table, np.array([unlogged, 1.0, math.nan]), how(), seed=0)
        results.append(weights(q))
    assert equal(*results)


def test_regression_is_the_same_for_the_same_seed(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data, results = a_round(tiny_policy, scripted[:12]), []
    for seed in (0, 0, 1):
        q = new_q(tiny_policy)
        torch.manual_seed(len(results))
        regress(q, data.encoded, data.returns, how(), seed)
        results.append(weights(q))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_nothing_to_fit_is_an_error(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data = a_round(tiny_policy, scripted[:3])
    with pytest.raises(TrainingError, match="nothing to fit Q to"):
        regress(new_q(tiny_policy), data.encoded, np.full(len(data.last), math.nan), how(), 0)
    with pytest.raises(TrainingError, match="nothing to fit Q to"):
        regress(new_q(tiny_policy), EncodedTable([], 0), np.zeros(0), how(), 0)


def test_a_loss_that_is_not_finite_is_an_error(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data, q = a_round(tiny_policy, scripted[:3]), new_q(tiny_policy)
    with torch.no_grad():
        next(q.model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"gradient is nan .*; lower q\.learning_rate"):
        regress(q, data.encoded, data.returns, how(), 0)


def test_progress_ends_at_the_number_of_steps(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    told: list[tuple[int, int]] = []
    data = a_round(tiny_policy, scripted[:10])
    regress(new_q(tiny_policy), data.encoded, data.returns, how(2.0), 0, lambda *step: told.append(step))
    assert told == [(k, 6) for k in range(1, 7)]


# --- a round's Q -----------------------------------------------------------------------------------------------------


def config_with(**changes: Any) -> Config:
    return load_config(overrides={"q.epochs": 0.5, "q.value_epochs": 0.5} | changes)


def test_a_new_q_starts_from_the_policys_backbone_and_a_warm_one_from_the_last_q(tiny_policy: LanguagePolicy) -> None:
    backbone = tiny_policy.model.base_model.state_dict()
    q = new_q(tiny_policy)
    assert equal(dict(q.model.base_model.state_dict()), dict(backbone))
    assert equal(weights(new_q(tiny_policy)), weights(q)) and not equal(weights(new_q(tiny_policy, seed=1)), weights(q))
    with torch.no_grad():
        next(q.model.parameters()).add_(1.0)
    assert not torch.equal(next(q.model.parameters()), next(tiny_policy.model.parameters())), "a copy, not the policy's"


def test_a_warm_start_continues_a_copy(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data, start = a_round(tiny_policy, scripted[:12]), new_q(tiny_policy, seed=5)
    before = weights(start)
    for target in ("monte_carlo", "one_step"):
        config = config_with(**{"q.target": target, "q.learning_rate": 1e-6})
        warm, cold = (fit_q(tiny_policy, data, [], config, s) for s in (start, None))
        assert equal(weights(start), before), "the last round's Q stays as it is"

        def apart(q: QModel) -> float:
            return max(float((value - before[name]).abs().max()) for name, value in q.model.state_dict().items())

        assert apart(warm) < 1e-3 < apart(cold)


@pytest.mark.parametrize("target", ["monte_carlo", "one_step"])
def test_held_out_outcomes_never_enter_the_fit(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], target: str
) -> None:
    data, config = a_round(tiny_policy, scripted), config_with(**{"q.target": target})
    assert 0.1 < data.fit.mean() < 0.9
    forged = replace(
        data,
        reward=np.where(data.fit, data.reward, 1 - data.reward),
        returns=np.where(data.fit, data.returns, 1 - data.returns),
    )
    q = weights(fit_q(tiny_policy, data, [], config))
    assert equal(weights(fit_q(tiny_policy, forged, [], config)), q)
    changed = replace(data, reward=1 - data.reward, returns=1 - data.returns)
    assert not equal(weights(fit_q(tiny_policy, changed, [], config)), q)


def test_earlier_rounds_enter_one_step_fits_alone(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data, earlier = a_round(tiny_policy, scripted[:30]), a_round(tiny_policy, scripted[30:])
    for target, enters in (("monte_carlo", False), ("one_step", True)):
        config = config_with(**{"q.target": target})
        with_them, without = (weights(fit_q(tiny_policy, data, replay, config)) for replay in ([earlier], []))
        assert equal(with_them, without) != enters
    forged = replace(earlier, reward=np.where(earlier.fit, earlier.reward, 1 - earlier.reward))
    assert equal(weights(fit_q(tiny_policy, data, [forged], config)), with_them), "their held-out part stays out"
    later = replace(earlier, returns=1 - earlier.returns)
    assert equal(weights(fit_q(tiny_policy, data, [later], config)), with_them), "V is this policy's alone"


@pytest.mark.parametrize("target", ["monte_carlo", "one_step"])
def test_earlier_conversations_of_the_policy_itself_tell_of_its_returns(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], target: str
) -> None:
    data, config = a_round(tiny_policy, scripted[:30]), config_with(**{"q.target": target})
    earlier = replace(a_round(tiny_policy, scripted[30:]), own=True)
    later = replace(earlier, returns=1 - earlier.returns)
    one, other = (weights(fit_q(tiny_policy, data, [replay], config)) for replay in (earlier, later))
    assert not equal(one, other)


def test_what_the_champion_said_before_its_challenger_was_rejected_is_not_lost(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    """Round 0 is all its own, round 1 an A/B test that it won."""
    tiny_policy.save(tmp_path / "policy")
    talks = [replace(talk, policy_version="2" if k % 4 == 3 else "1") for k, talk in enumerate(scripted[:40])]
    turns = []
    for number, part in enumerate((talks[:20], talks[20:])):
        kept = [talk for talk in part if number or talk.policy_version == "1"]
        frame = to_frame(kept, OUTCOMES, 0.3)
        turn_table.write(frame, tmp_path / "turns" / f"round={number:04d}" / "turns.parquet", OUTCOMES)
        turns.append(int((actions(frame) & (frame["part"] == "fit")).sum()))
    policy, dataset = PolicyVersion(1, tmp_path / "policy"), Dataset(1, tmp_path / "turns" / "round=0001", "md5")
    for rounds, expected in ((0, turns[1]), (1, sum(turns))):
        changes: dict[str, Any] = {
            "data.root": tmp_path,
            "q.replay_rounds": rounds,
            "q.epochs": 0.5,
            "q.value_epochs": 0.5,
        }
        stage = fit_q_stage(config_with(**changes), policy, dataset, tmp_path / f"with-{rounds}")
        assert stage.metrics["fit_turns"] == expected


def test_the_myopic_reward_looks_no_further_than_its_turn(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    frame = to_frame(scripted[:20], OUTCOMES, 0.3)
    config = config_with(**{"improve.reward": "acceptance"})
    data = round_of(tiny_policy, frame, config)
    assert np.array_equal(data.returns, acceptance_rewards(frame)) and data.returns.max() == 1.0
    plain = config_with(**{"q.target": "monte_carlo"})
    one, other = evaluate_policy(tiny_policy, data, [data], config), evaluate_policy(tiny_policy, data, [], plain)
    assert equal(weights(one), weights(other)), "Monte Carlo of the turn's own reward, without replay"


def test_acceptance_has_its_own_range_whatever_that_of_outcomes() -> None:
    ends: dict[str, Any] = {"data.outcome_low": -100.0, "data.outcome_high": 100.0}
    found = [QSettings.of(config_with(**ends, **{"improve.reward": name})) for name in ("acceptance", "outcome")]
    assert [(one.low, one.high) for one in found] == [(0.0, 1.0), (-100.0, 100.0)]


def test_a_round_holds_outcome_returns_and_parts(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    frame = to_frame(scripted, OUTCOMES, 0.3)
    data = round_of(tiny_policy, frame, load_config())
    assert np.allclose(data.returns, monte_carlo(frame, 0.95)) and 0 < data.returns.max() <= 1.0
    assert np.array_equal(data.fit, frame["part"] == "fit")
    assert np.array_equal(data.last, last_rows(frame))
    rows = sorted(x.row for s in data.encoded.sequences for x in s.spans if x.trains)
    assert rows == np.flatnonzero(actions(frame)).tolist()


def test_the_corpus_q_is_fitted_on_the_fit_part(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    data, config = a_round(tiny_policy, scripted), config_with(**{"q.corpus_epochs": 0.5})
    forged = replace(data, returns=np.where(data.fit, data.returns, 1 - data.returns))
    one, other = corpus_q(tiny_policy, data, config), corpus_q(tiny_policy, forged, config)
    assert one is not None and other is not None
    assert equal(weights(one), weights(other))
    assert not equal(weights(one), weights(new_q(tiny_policy)))


@pytest.mark.parametrize("assigner", ["outcome", "norm_itpo"])
def test_a_corpus_whose_outcomes_are_all_equal_gives_no_q_and_stops_nothing(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], caplog: pytest.LogCaptureFixture, assigner: str
) -> None:
    data = a_round(tiny_policy, scripted)
    lost = replace(data, reward=0 * data.reward, returns=0 * data.returns)
    assert corpus_q(tiny_policy, lost, config_with(**{"credit.assigner": assigner})) is None
    conversations = int((data.fit & data.last).sum())
    assert (
        f"no Q to start from, round 0's starts anew: all {conversations} conversations' outcomes are 0" in caplog.text
    )


def test_a_first_policy_is_made_anew_of_another_corpus_of_the_same_size(
    tiny_config: Config, scripted: list[Conversation], tmp_path: Path
) -> None:
    parts: dict[str, dict[str, Any]] = {"data": {"root": tmp_path}, "supervised": {"epochs": 0.1}}
    quick = {name: getattr(tiny_config, name).model_copy(update=part) for name, part in parts.items()}
    config = tiny_config.model_copy(update=quick | {"q": tiny_config.q.model_copy(update={"corpus_epochs": 0.0})})
    one, other = scripted[:4], scripted[4:8]
    made = [initial_policy_stage(config, corpus, "talks") for corpus in (one, one, other)]
    assert [stage.done_before for stage in made] == [False, True, False]


@pytest.mark.parametrize("target", ["monte_carlo", "one_step"])
def test_q_of_the_chain_is_near_the_exact_one(tiny_config: Config, target: str) -> None:
    chain = Chain.default()
    uniform = chain.uniform()
    exact = chain.q_pi(uniform, 0.95)
    talks = chain.sample(uniform, 700, seed=0)
    policy = build_policy(talks, tiny_config.policy, seed=0)
    frame = to_frame(talks, OUTCOMES, 0.3)
    config = config_with(
        **{"q.target": target, "q.epochs": 6.0, "q.value_epochs": 4.0, "q.learning_rate": 0.005}
        | {"q.value_learning_rate": 0.005}
    )
    data = round_of(policy, frame, config)
    values = fit_q(policy, data, [], config).evaluate(data.encoded)
    held = ~data.fit & np.isfinite(values.q)
    state = [chain.state_of(message) for message in frame["customer_message"][held]]
    action = [ACTIONS.index(text) for text in frame["suggestion"][held]]
    assert np.corrcoef(values.q[held], exact[state, action])[0, 1] > 0.7
    assert np.corrcoef(values.v[held], chain.v_pi(uniform, 0.95)[state])[0, 1] > 0.7
    assert abs(values.q[held].mean() - exact[state, action].mean()) < 0.06


# --- outcomes, members and judges ------------------------------------------------------------------------------------

THREE = {"purchase": 1.0, "contact": 0.5, "complaint": -2.0}


def three_outcomes(scripted: list[Conversation]) -> pd.DataFrame:
    """The scripted conversations with two more outcomes at their ends."""
    rng = np.random.default_rng(0)
    talks = []
    for talk in scripted:
        *acted, last = talk.turns
        bought, luck = last.outcomes[0], rng.random(2)
        turns = [replace(turn, outcomes=(0.0, 0.0, 0.0)) for turn in acted]
        ending = replace(last, outcomes=(bought, float(luck[0] < 0.5), float(luck[1] < 0.2)))
        talks.append(replace(talk, turns=(*turns, ending)))
    return to_frame(talks, THREE, 0.3)


def test_a_head_for_each_outcome_and_new_weights_without_a_fit(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    frame, config = three_outcomes(scripted[:30]), config_with(outcomes=THREE)
    data = round_of(tiny_policy, frame, config)
    assert data.head_returns.shape == (len(frame), 3)
    assert np.allclose(data.head_returns @ list(THREE.values()), data.returns)
    q = fit_q(tiny_policy, data, [], config)
    assert list(q.settings.outcomes) == list(THREE)
    heads, values = q.head_values(data.encoded), q.evaluate(data.encoded)
    assert heads.q.shape == (len(frame), 3)
    assert np.allclose(values.q, heads.q @ list(THREE.values()), atol=1e-6, equal_nan=True)
    other = q.reweighted({"complaint": -1.0, "purchase": 0.0, "contact": 3.0})
    assert np.allclose(other.evaluate(data.encoded).v, heads.v @ [0.0, 3.0, -1.0], atol=1e-6, equal_nan=True)
    assert np.allclose(q.evaluate(data.encoded).v, values.v, equal_nan=True), "the first stays as it was"


@pytest.mark.parametrize("changes", [{}, {"q.members": 2, "q.judges": 1, "q.target": "archer", "q.loss": "hl_gauss"}])
def test_weights_in_another_order_bring_their_heads_with_them(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], changes: dict[str, Any]
) -> None:
    config = config_with(outcomes=THREE, **changes)
    q = QModel.from_policy(tiny_policy, QSettings.of(config), 0)
    names = ["complaint", "purchase", "contact"]
    turned = q.reweighted({name: THREE[name] for name in names})
    assert list(turned.settings.outcomes) == names
    encoded = round_of(tiny_policy, three_outcomes(scripted[:6]), config).encoded
    places = [list(THREE).index(name) for name in names]
    mine, theirs = q.outcome_values(encoded), turned.outcome_values(encoded)
    assert np.allclose(theirs.q, mine.q[:, places], equal_nan=True) and not np.allclose(
        mine.q, theirs.q, equal_nan=True
    )
    assert np.allclose(theirs.v, mine.v[:, places], equal_nan=True)
    assert np.allclose(turned.evaluate(encoded).q, q.evaluate(encoded).q, atol=1e-6, equal_nan=True)
    again = turned.reweighted(THREE)
    assert equal(weights(again), weights(q)), "turned back, it is the first"


def test_a_warm_start_finds_its_heads_in_another_order(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    names = ["contact", "complaint", "purchase"]
    config = config_with(outcomes={name: THREE[name] for name in names}, **{"q.learning_rate": 1e-9, "q.epochs": 0.1})
    start = QModel.from_policy(tiny_policy, QSettings.of(config_with(outcomes=THREE)), 0)
    data = round_of(tiny_policy, three_outcomes(scripted[:20]), config)
    found = fit_q(tiny_policy, data, [], config, start).outcome_values(data.encoded)
    expected = start.outcome_values(data.encoded).q[:, [list(THREE).index(name) for name in names]]
    assert np.allclose(found.q, expected, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("names", [{"purchase": 1.0}, {**THREE, "visit": 1.0}, {}])
def test_weights_of_other_outcomes_are_refused(untrained_policy: LanguagePolicy, names: dict[str, float]) -> None:
    q = new_q(untrained_policy, replace(UNIT, outcomes=THREE))
    with pytest.raises(ConfigError, match="heads for purchase, contact, complaint"):
        q.reweighted(names)


@pytest.mark.parametrize(
    "how_fitted", [{}, {"q.loss": "hl_gauss"}, {"q.loss": "mse"}, {"q.loss": "mse", "q.target": "lstd_q"}], ids=str
)
def test_an_outcome_in_cents_beside_others_is_learnt_as_in_units(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, how_fitted: dict[str, Any]
) -> None:
    """With a range of its own a sale's worth takes nothing from what a contact's head can tell apart."""
    talks = turn_table.conversations(three_outcomes(scripted[:30]))
    dear = [
        replace(t, turns=tuple(replace(x, outcomes=(100.0 * x.outcomes[0], *x.outcomes[1:])) for x in t.turns))
        for t in talks
    ]
    cents: dict[str, Any] = {"outcomes": THREE | {"purchase": THREE["purchase"] / 100}}
    cents |= {"data.outcome_ranges": {"purchase": [0.0, 100.0]}} | how_fitted
    plain, own = config_with(outcomes=THREE, **how_fitted), config_with(**cents)
    one = round_of(tiny_policy, three_outcomes(scripted[:30]), plain)
    other = round_of(tiny_policy, to_frame(dear, THREE, 0.3), own)
    fitted, again = fit_q(tiny_policy, one, [], plain), fit_q(tiny_policy, other, [], own)
    values, theirs = fitted.outcome_values(one.encoded).q, again.outcome_values(one.encoded).q
    assert np.nanmax(np.abs(values)) > 0.01
    assert np.allclose(values, theirs / [100.0, 1.0, 1.0], atol=2e-4, equal_nan=True)
    assert not again.settings.same_network(fitted.settings)
    again.save(tmp_path)
    assert QModel.load(tmp_path).settings == again.settings


def test_one_head_may_learn_the_weighted_sum(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    config = config_with(outcomes=THREE, **{"q.outcome_heads": False})
    data = round_of(tiny_policy, three_outcomes(scripted[:20]), config)
    assert np.array_equal(data.head_returns[:, 0], data.returns)
    settings = fit_q(tiny_policy, data, [], config).settings
    assert settings.outcomes == {"outcome": 1.0}
    assert (settings.low, settings.high) == (-2.0, 1.5), "all that the sum may come to"


def test_a_weight_other_than_one_scales_what_its_head_says(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    frame = to_frame(scripted[:10], {"purchase": 1.0}, 0.3)
    priced = frame.assign(outcome=250 * frame["outcome"])
    plain, rich = config_with(), config_with(outcomes={"purchase": 250.0})
    one = fit_q(tiny_policy, round_of(tiny_policy, frame, plain), [], plain)
    other = fit_q(tiny_policy, round_of(tiny_policy, priced, rich), [], rich)
    assert equal(weights(one), weights(other))
    table = round_of(tiny_policy, frame, plain).encoded
    assert np.allclose(250 * one.evaluate(table).q, other.evaluate(table).q, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("pessimism", [0.0, 1.5, "min"])
def test_improvement_sees_the_members_and_never_the_judges(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], pessimism: float | str
) -> None:
    q = new_q(tiny_policy, replace(UNIT, members=3, judges=2, pessimism=pessimism))
    sequences = [replace(s, spans=(replace(s.spans[0], row=k),)) for k, s in enumerate(singles(tiny_policy, scripted))]
    members = q.member_values(sequences)
    assert [m.shape for m in members] == [(3, 1 + s.spans[0].end - s.spans[0].start) for s in sequences]
    for seen, each in zip(q.running_values(sequences), members, strict=True):
        spread = {"min": each.min(axis=0)}.get(str(pessimism))
        expected = each.mean(0) - float(pessimism) * each.std(0, ddof=1) if spread is None else spread
        assert np.allclose(seen, expected, atol=1e-6)
    judged = q.judge_values(sequences)
    with torch.no_grad():
        q.head.weight[3:] += 1.0
    assert all(np.allclose(a, b) for a, b in zip(q.member_values(sequences), members, strict=True))
    assert not any(np.allclose(a, b) for a, b in zip(q.judge_values(sequences), judged, strict=True))
    values = q.evaluate(EncodedTable(sequences, len(sequences)))
    assert np.allclose([x[-1] for x in q.running_values(sequences)], values.q, atol=1e-6)


def singles(policy: LanguagePolicy, talks: list[Conversation]) -> list[Encoded]:
    return split_up(policy, a_round(policy, talks[:4]).encoded).sequences


def test_a_q_without_judges_says_so(untrained_policy: LanguagePolicy) -> None:
    with pytest.raises(ConfigError, match=r"no judges; set q\.judges"):
        new_q(untrained_policy).judge_values([])


def test_pessimism_needs_members() -> None:
    with pytest.raises(ConfigError, match=r"set q\.members to 2 or more"):
        load_config(overrides={"q.pessimism": 1.0})


def test_members_are_fitted_to_bootstraps_of_conversations(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    settings = replace(UNIT, outcomes=THREE, members=2, judges=1)
    last = np.tile([False, False, True], 400)
    drawn = bootstrap_weights(last, settings, seed=0)
    assert drawn is not None and drawn.shape == (1200, 9)
    by_talk = drawn.reshape(400, 3, 3, 3)
    assert (by_talk == by_talk[:, :1, :, :1]).all(), "a conversation's rows and a member's outcomes are drawn together"
    counts = by_talk[:, 0, :, 0]
    assert counts.mean() == pytest.approx(1.0, abs=0.1) and counts.var() == pytest.approx(1.0, abs=0.15)
    assert abs(np.corrcoef(counts.T)[np.triu_indices(3, 1)]).max() < 0.2
    assert bootstrap_weights(last, UNIT, seed=0) is None
    judged = bootstrap_weights(last, replace(UNIT, judges=2), seed=0)
    assert judged is not None and (judged[:, 0] == 1.0).all() and (judged[:, 1:] == 0.0).any(), "judges cost nothing"
    config = config_with(**{"q.members": 2, "q.judges": 1})
    data = a_round(tiny_policy, scripted[:30])
    q = fit_q(tiny_policy, data, [], config)
    heads = q.head_values(data.encoded).q[np.isfinite(q.evaluate(data.encoded).q)]
    assert heads.shape[1] == 3 and heads.std(axis=1).min() > 0


def test_a_q_with_other_heads_lends_its_trunk(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    start = new_q(tiny_policy)
    with torch.no_grad():
        next(start.model.base_model.parameters()).add_(1.0)
    slow = {"q.learning_rate": 1e-6, "q.value_learning_rate": 1e-6, "q.members": 2}
    q = fit_q(tiny_policy, a_round(tiny_policy, scripted[:6]), [], config_with(**slow), start)
    mine, its = q.backbone_state(), start.backbone_state()
    assert max(float((mine[name] - its[name]).abs().max()) for name in its) < 1e-3 and q.head.out_features == 2


# --- files and families ----------------------------------------------------------------------------------------------


def test_a_saved_q_is_the_same_q(tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path) -> None:
    q, data = new_q(tiny_policy, WIDE, seed=3), a_round(tiny_policy, scripted[:5])
    q.save(tmp_path)
    again = QModel.load(tmp_path)
    assert (again.settings, again.pad) == (q.settings, q.pad)
    assert equal(weights(again), weights(q))
    assert np.array_equal(again.evaluate(data.encoded).q, q.evaluate(data.encoded).q, equal_nan=True)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "gemma3_text", "opt", "granite", "olmo2"])
def test_every_causal_lm_has_a_q(tiny_policy: LanguagePolicy, tmp_path: Path, family: str) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
    }
    known = AutoConfig.for_model(family).to_dict()
    tokenizer = tiny_policy.tokenizer
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {key: value for key, value in small.items() if key in known}
    if family in ("gemma2", "gemma3_text"):
        sizes |= {"query_pre_attn_scalar": 8, "layer_types": None}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, **ids)
    torch.manual_seed(0)
    policy = LanguagePolicy(AutoModelForCausalLM.from_config(config), tokenizer, tiny_policy.settings)
    q = new_q(policy)
    table = EncodedTable([single(0, (4, 50, 6), (40, 1), True), single(1, (4, 6), (40, 42, 1), True)], 2)
    regress(q, table, np.array([1.0, 0.0]), how(20.0, 0.01), seed=0)
    values = q.evaluate(table)
    assert values.q[0] > values.q[1]
    q.save(tmp_path)
    assert np.allclose(QModel.load(tmp_path).evaluate(table).q, values.q, atol=1e-6)


def test_a_q_of_the_former_format_is_read(tiny_policy: LanguagePolicy, tmp_path: Path) -> None:
    q = new_q(tiny_policy, WIDE)
    q.save(tmp_path)
    former = {"loss": "bce", "low": -2.0, "high": 6.0, "gamma": 0.95, "format": 1, "pad": q.pad}
    (tmp_path / SETTINGS).write_text(json.dumps(former))
    assert QModel.load(tmp_path).settings == q.settings


def test_heads_and_members_are_saved(tiny_policy: LanguagePolicy, tmp_path: Path) -> None:
    settings = replace(UNIT, outcomes=THREE, members=2, judges=1, pessimism="min", value_head=True)
    q, table = new_q(tiny_policy, settings), EncodedTable([single(0, (4, 50, 6), (40, 41, 1), True)], 1)
    q.save(tmp_path)
    again = QModel.load(tmp_path)
    assert again.settings == settings and again.evaluate(table).q == q.evaluate(table).q


def settings_are(text: str) -> Callable[[Path], object]:
    return lambda path: (path / SETTINGS).write_text(text)


def without_pad(path: Path) -> None:
    values = json.loads((path / SETTINGS).read_text())
    del values["pad"]
    (path / SETTINGS).write_text(json.dumps(values))


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        pytest.param(shutil.rmtree, StoreError, id="is not there"),
        pytest.param(lambda path: (path / "model.safetensors").unlink(), ModelError, id="no weights"),
        pytest.param(cut_weights, ModelError, id="weights cut short"),
        pytest.param(lambda path: (path / SETTINGS).unlink(), StoreError, id="no settings"),
        pytest.param(settings_are('{"format": 4}'), StoreError, id="newer settings"),
        pytest.param(settings_are('{"format": "2"}'), StoreError, id="format is no number"),
        pytest.param(settings_are("[]"), StoreError, id="settings are a list"),
        pytest.param(settings_are("{"), StoreError, id="settings are no JSON"),
        pytest.param(without_pad, StoreError, id="a setting is missing"),
    ],
)
def test_what_is_no_q_is_refused_by_name(
    untrained_policy: LanguagePolicy, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception]
) -> None:
    path = tmp_path / "q"
    new_q(untrained_policy).save(path)
    damage(path)
    with pytest.raises(error, match=str(path)):
        QModel.load(path)
