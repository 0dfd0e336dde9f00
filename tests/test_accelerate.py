"""Several processes: each does its share, and the loss curve is that of one process with the same global batch."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from shared_jobs import Cloning, Dying

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning import distributed
from iterative_ppo.learning.batching import EncodedTable, collate
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve.critic import LearnedCritic
from iterative_ppo.learning.improve.episodes import prompts_of
from iterative_ppo.learning.jobs import Crediting, Evaluation, Improving, Job
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import pieces
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.rounds import round_of
from iterative_ppo.learning.sequences import SequenceFile
from iterative_ppo.learning.worker import DIE_WITH_PARENT, _error, do
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import single
from iterative_ppo.mdp.turn_table import to_frame

torch.set_num_threads(1)
ACCELERATE = Path(__file__).parents[1] / "configs" / "accelerate"
QUICK = {
    "improve.ppo.episodes": 96,
    "improve.ppo.minibatch_size": 14,
    "improve.ppo.rollout": 48,
    "improve.logged.epochs": 1.0,
    "improve.logged.batch_size": 9,
    "improve.best_of_n.epochs": 1.0,
    "improve.best_of_n.samples": 4,
    "improve.best_of_n.learning_rate": 0.0003,  # a policy that moves far turns what is rounded into other words
    "improve.logged.learning_rate": 0.0003,
    "improve.policy_iterations": 2,
    "improve.q_iterations": 1,
    "q.samples": 1,
    "q.effective_size_floor": 1.0,
    "q.epochs": 1.0,
    "q.batch_size": 7,
    "q.value_epochs": 1.0,
    "q.value_batch_size": 9,
    "runtime.micro_batch_tokens": 500,
}


def config_of(**changes: Any) -> Config:
    return load_config(overrides=QUICK | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def saved(tiny_policy: LanguagePolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("policy") / "model"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def played(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> Round:
    config = config_of()
    frame = to_frame(scripted, config.outcomes, config.data.evidence_share, config.data.split_by)
    return round_of(tiny_policy, frame, config)


def finished(job: Job[Any], folder: Path) -> Any:
    folder.mkdir()
    return do(job, folder)


def q_of(policy: LanguagePolicy) -> QModel:
    """One that tells responses apart, though nothing taught it."""
    q = QModel.from_policy(policy, QSettings("mse", 0.0, 1.0, 0.95), 0)
    torch.nn.init.normal_(q.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return q


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_make_up_the_batch_and_its_gradient(
    tiny_policy: LanguagePolicy, played: Round, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Also where there are more processes than sequences: those left over meet the others with nothing."""
    batch = collate(played.encoded.sequences[:5], tiny_policy.pad)
    student = tiny_policy.trainable_copy()

    def gradient(parts: list[Any]) -> torch.Tensor:
        student.model.zero_grad()
        for part in parts:
            student.response_log_probs(part, np.flatnonzero(part.trains)).sum().backward()
        return torch.cat([p.grad.flatten() for p in student.trainable_parameters() if p.grad is not None])

    whole = gradient([batch])
    monkeypatch.setattr(distributed, "size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(pieces(batch, 400))
    assert sorted(row for share in shares for piece in share for row in piece.row) == sorted(batch.row)
    assert all(share for share in shares)
    assert torch.allclose(gradient([piece for share in shares for piece in share]), whole, atol=1e-4)


def test_a_critic_without_a_share_waits_for_the_others(
    tiny_policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last minibatch may hold fewer episodes than there are processes."""
    critic = LearnedCritic(q_of(tiny_policy), 0.01, steps=2, scale=1.0)
    batch = collate([single(0, (5, 6, 7), (8, 9), True)], tiny_policy.pad)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for meeting in ("summed", "sum_gradients"):
        monkeypatch.setattr(distributed, meeting, lambda value: value)
    assert critic.learn(batch, [np.ones(2)], usual=2.0) == 0.0


@pytest.mark.parametrize("count", [1, 5, 12])
def test_every_process_asks_for_a_share_and_knows_all(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Neighbours stay together, also where some process has nothing to ask."""
    asked: list[list[int]] = []

    def of(items: Any) -> list[int]:
        asked.append(list(items))
        return [-item for item in items]

    monkeypatch.setattr(distributed, "size", lambda: 4)
    found: dict[int, int] = {}
    monkeypatch.setattr(distributed, "gathered", lambda mine: found.update(mine) or found)
    for rank in (3, 2, 1, 0):  # the first is asked last, and knows all by then
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with suppress(KeyError):
            told = distributed.by_shares(range(count), of, together=2)
    assert told == [-k for k in range(count)]
    assert sorted(chain.from_iterable(asked)) == list(range(count)) and all(share[0] % 2 == 0 for share in asked)


def test_one_process_needs_no_other() -> None:
    assert distributed.by_shares([3, 4], lambda items: [2 * k for k in items]) == [6, 8]
    assert np.array_equal(distributed.filled(np.array([1.0, np.nan])), [1.0, np.nan], equal_nan=True)
    with distributed.unseen():
        assert distributed.size() == 1
    assert (distributed.size(), distributed.rank()) == (1, 0)
    assert list(distributed.share([3, 4, 5])) == [3, 4, 5]
    assert distributed.gathered({1: "a"}) == {1: "a"}
    assert distributed.largest(3) == 3


def test_accelerates_configurations_say_what_the_runtime_decides() -> None:
    """Mixed precision is ours: accelerate's own would come on top."""
    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp", "FSDP")):
        values = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
        assert values["distributed_type"] == kind
        assert values["mixed_precision"] == values["dynamo_backend"] == "no"
    assert values["fsdp_config"]["fsdp_version"] == 2


def test_what_a_lost_process_said_is_its_error_and_no_line_of_code(tmp_path: Path) -> None:
    said = (
        "[rank1]: Traceback (most recent call last):\n"
        '[rank1]:   File "loader.py", line 3, in load\n'
        "[rank1]:     raise ValueError(\n"
        "[rank1]: ValueError: a shard is missing\n"
        "[rank0]: RuntimeError: Connection closed by peer\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )
    assert str(_error(tmp_path, 1, said)).endswith("exit code 1: [rank1]: ValueError: a shard is missing")


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [None, "ddp.yaml", "fsdp.yaml"])
def test_two_processes_fit_the_q_of_one(saved: Path, played: Round, tmp_path: Path, accelerate: str | None) -> None:
    parallel = {"runtime__processes": 2, "runtime__accelerate": str(ACCELERATE / accelerate) if accelerate else None}
    filed = SequenceFile.write(tmp_path / "tokens", played.encoded.sequences)
    on_disk = replace(played, encoded=replace(played.encoded, sequences=filed))
    kept = Checkpoint(tmp_path / "fitting" / "q", "key", 3)
    shared = Evaluation(config_of(**parallel), saved, None, on_disk, (), kept)
    alone = finished(Evaluation(config_of(), saved, None, played, ()), tmp_path / "alone")
    together, again = (finished(shared, tmp_path / name) for name in ("together", "again"))
    assert kept.newest() == 1 and torch.equal(weights(together.model), weights(again.model)), "from what it kept"
    assert together.report == pytest.approx(alone.report, rel=1e-5)
    assert torch.allclose(weights(alone.model), weights(together.model), atol=1e-4)
    assert np.allclose(alone.evaluate(played.encoded).q, together.evaluate(played.encoded).q, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("accelerate", "rank"), [(None, 0), ("fsdp.yaml", 0), (None, 4)], ids=["ddp", "fsdp", "lora"])
def test_two_processes_credit_as_one_does(
    saved: Path, played: Round, tmp_path: Path, accelerate: str | None, rank: int
) -> None:
    """Turn rewards and every figure of them, also of a sharded reward model and of one that is adapters."""
    quick = {
        "credit__assigner": "norm_itpo",
        "improve__policy_iterations": 1,
        "credit__batch_size": 7,
        "credit__epochs": 2.0,
        "policy__lora__rank": rank,
    }
    parallel = {"runtime__processes": 2, "runtime__accelerate": str(ACCELERATE / accelerate) if accelerate else None}
    alone, together = (
        finished(Crediting(config_of(**quick, **changes), saved, played, ()), tmp_path / str(len(changes)))
        for changes in ({}, parallel)
    )
    assert together.report == pytest.approx(alone.report, rel=1e-3, nan_ok=True)
    assert np.allclose(alone.current.reward, together.current.reward, atol=1e-5)
    assert not np.allclose(alone.current.reward, played.reward, atol=0.01)


@pytest.mark.parametrize(
    ("accelerate", "critic"),
    [(None, "q"), *(pytest.param("fsdp.yaml", critic, marks=pytest.mark.slow) for critic in ("q", "learned"))],
)
def test_two_processes_improve_as_one_does(
    saved: Path, tiny_policy: LanguagePolicy, played: Round, tmp_path: Path, accelerate: str | None, critic: str
) -> None:
    """Every figure of every update and rollout, to rounding; sampled responses are the same ones."""
    finished(Evaluation(config_of(), saved, None, played, ()), tmp_path / "q")
    prompts = prompts_of(played.encoded.sequences, np.flatnonzero(played.fit))
    behaviour, q = tiny_policy.score(played.encoded), tmp_path / "q" / "model"
    parallel = {"runtime__processes": 2, "runtime__accelerate": str(ACCELERATE / accelerate) if accelerate else None}
    alone, together = (
        finished(
            Improving(config_of(improve__ppo__critic=critic, **changes), saved, q, played, behaviour, prompts),
            tmp_path / f"{bool(changes)}",
        )
        for changes in ({}, parallel)
    )
    for name in ("logged", "ppo"):
        curves = alone.curves[name], together.curves[name]
        assert len(curves[0]) == len(curves[1]) >= 2
        for one, other in zip(*curves, strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert alone.report["policy_iterations"] == 2.0
    assert together.report == pytest.approx(alone.report, rel=1e-3)
    assert torch.allclose(weights(alone.policy.model), weights(together.policy.model), atol=1e-3)
    start = weights(tiny_policy.model)
    assert (weights(alone.policy.model) - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("grpo", {}),
        pytest.param("rloo", {}, marks=pytest.mark.slow),
        pytest.param(
            "grpo",
            {"policy__lora__rank": 2, "runtime__accelerate": str(ACCELERATE / "fsdp.yaml")},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["grpo", "rloo", "adapters beside a configuration that shards"],
)
def test_two_processes_improve_by_groups_as_one_does(
    saved: Path, tiny_policy: LanguagePolicy, played: Round, tmp_path: Path, algorithm: str, changes: dict[str, Any]
) -> None:
    """TRL's trainers, whose loop each process has whole: curves, weights, and that accelerate is as it was."""
    q_of(tiny_policy).save(tmp_path / "q")
    prompts = prompts_of(played.encoded.sequences, np.flatnonzero(played.fit))
    quick = {"improve__best_of_n__epochs": 0.0, "improve__logged__epochs": 0.0, "improve__policy_iterations": 1}
    quick |= {"improve__ppo__minibatch_size": 16, "improve__algorithm": algorithm, "improve__ppo__rollout": 48}
    quick |= {"runtime__micro_batch_tokens": 400}
    behaviour = np.full(len(played.last), np.nan)
    alone, together = (
        finished(
            Improving(config_of(**quick, **changes, **more), saved, tmp_path / "q", played, behaviour, prompts),
            tmp_path / f"{bool(more)}",
        )
        for more in ({}, {"runtime__processes": 2})
    )
    curves = alone.curves[algorithm], together.curves[algorithm]
    assert len(curves[0]) == len(curves[1]) == 2
    for one, other in zip(*curves, strict=True):
        clipped = one.pop("clip_fraction"), other.pop("clip_fraction")  # TRL's: a mean of the pieces' means
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
        assert clipped[0] == pytest.approx(clipped[1], abs=0.002)
    before, scores = (policy.score(played.encoded) for policy in (tiny_policy, alone.policy))
    assert np.allclose(scores, together.policy.score(played.encoded), atol=1e-3, equal_nan=True)
    assert not np.allclose(scores, before, atol=0.05, equal_nan=True)


@pytest.mark.slow
def test_a_sharded_student_learns_and_says_the_same(
    saved: Path, played: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 on two processes, sampling in between, tied embeddings, a last batch that one process has no share of."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    rows = np.flatnonzero(played.fit)
    table = EncodedTable([s for s in played.encoded.sequences if s.spans][:15], played.encoded.rows)
    prompts = prompts_of(played.encoded.sequences, rows)[:11]
    parallel = config_of(runtime__processes=2, runtime__accelerate=str(ACCELERATE / "fsdp.yaml"))
    alone = finished(Cloning(config_of(), saved, table, prompts), tmp_path / "1")
    together = finished(Cloning(parallel, saved, table, prompts), tmp_path / "2")
    assert len(alone[1]) == 6
    for one, other in zip(alone[1], together[1], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    assert alone[1][-1]["loss"] < alone[1][0]["loss"]
    assert torch.allclose(weights(alone[0].model), weights(together[0].model), atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a process that its parent died")
def test_a_killed_run_leaves_nobody_that_trains_on(tmp_path: Path) -> None:
    """Neither the launcher nor its workers: they would write beside the run that is started next."""
    worker = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DIE_WITH_PARENT + '; ' + worker!r}])"
    run = (
        "import subprocess, sys; from iterative_ppo.learning.worker import BOUND; "
        f"subprocess.run([sys.executable, *BOUND, sys.executable, '-c', {launcher!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        assert Path(f"/proc/{number}").exists()
        process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and _alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{number}").exists() or not _alive(number)


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_what_one_process_refuses_is_said_as_if_it_were_done_here(
    saved: Path, played: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    flat = replace(played, reward=np.zeros_like(played.reward))
    with pytest.raises(TrainingError, match="outcomes are 0: no outcome differs"):
        finished(Evaluation(config_of(runtime__processes=2), saved, None, flat, ()), tmp_path / "flat")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(TrainingError, match="a training process ended with exit code"):
        finished(Dying(config_of(runtime__processes=2)), tmp_path / "dying")
    assert not any(tmp_path.glob("**/.job-*"))
