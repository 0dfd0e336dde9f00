"""The benchmark beside TRL's PPO: what is equal, what is measured, what the table says of it. TRL itself is not run."""

from __future__ import annotations

import ast
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ppo
from benchmarks.peers import our_ppo
from benchmarks.peers.measure import resident_mib, training_cost

ROOT = Path(__file__).parents[1]


def cost(cpu: float, before: float, peak: float, reward: float) -> dict[str, float]:
    return {"cpu_seconds": cpu, "before_mib": before, "peak_mib": peak, "reward": reward}


@pytest.fixture
def repeats() -> list[dict[str, dict[str, float]]]:
    """Three repeats in which ours takes 1/4, 1/2 and 1/5 of TRL's time."""
    trl = cost(40.0, 400.0, 1400.0, 0.5)
    return [
        {"pi_0": {"reward": 0.3}, ppo.TRL: trl, ppo.OURS: cost(cpu, 500.0, 500.0 + above, reward)}
        for cpu, above, reward in ((10.0, 600.0, 0.4), (20.0, 400.0, 0.45), (8.0, 300.0, 0.6))
    ]


def test_the_table_is_of_ratios_within_a_repeat(repeats: list[dict[str, dict[str, float]]]) -> None:
    rows = {row["figure"]: row for row in ppo.figures("equal", repeats, episodes=80)}
    speed = rows["equal: ours / TRL, episodes per CPU-second"]
    assert (speed["value"], speed["interval"], speed["holds"]) == (4.0, [2.0, 5.0], True)
    above = rows["equal: ours / TRL, peak memory above that before"]
    assert (above["value"], above["interval"], above["holds"]) == (0.4, [0.3, 0.6], True)
    total = rows["equal: ours / TRL, peak memory of the process"]
    assert total["value"] == pytest.approx(900 / 1400, abs=1e-4)
    assert total["holds"] is False
    reward = rows["equal: ours - TRL, reward reached"]
    assert (reward["value"], reward["interval"], reward["holds"]) == (-0.05, [-0.1, 0.1], False)
    assert rows["equal: TRL 1.12.0, episodes per CPU-second"]["value"] == 2.0
    assert rows["equal: pi_0, reward"]["value"] == 0.3


def test_everybody_is_told_the_same_but_who_they_are(tmp_path: Path) -> None:
    jobs = [ppo.job_of(side, 3, tmp_path / "shared", tmp_path / "out") for side in ppo.sides()]
    assert len(jobs) == 3
    for job in jobs:
        assert {k: v for k, v in job.items() if k != "overrides"} == {
            k: v for k, v in jobs[0].items() if k != "overrides"
        }
    assert jobs[0]["overrides"] == {}
    assert jobs[0]["batch_size"] % jobs[0]["minibatch_size"] == 0


def test_our_settings_are_the_jobs(tmp_path: Path) -> None:
    job = ppo.job_of(ppo.LEARNED, 0, tmp_path, tmp_path)
    config = our_ppo.configuration(job | {"updates": 3, "batch_size": 32, "epochs": 7, "clip": 0.31})
    told = config.improve.ppo
    assert (told.episodes, told.rollout, told.epochs, told.clip) == (96, 32, 7, 0.31)
    assert (told.critic, told.critic_learning_rate) == ("learned", job["learning_rate"])
    assert our_ppo.configuration(ppo.job_of(ppo.OURS, 0, tmp_path, tmp_path)).improve.ppo.critic == "q"
    for name in our_ppo.SAME_NAME:
        assert getattr(told, name) == (job | {"epochs": 7, "clip": 0.31})[name]
    assert (told.kl_target, told.kl_budget, told.judge_patience) == (None, None, None)  # nothing that TRL lacks


def test_our_defaults_stay_float32_on_one_thread(tmp_path: Path) -> None:
    runtime = our_ppo.configuration(ppo.job_of(ppo.OURS, 0, tmp_path, tmp_path)).runtime
    assert (runtime.threads, runtime.device, runtime.gradient_checkpointing) == (1, "cpu", False)
    assert runtime.precision in ("auto", "float32")


@pytest.mark.parametrize("setting", ppo.SETTINGS, ids=lambda setting: setting.name)
def test_texts_have_the_lengths_and_the_worth_that_they_should(setting: ppo.Setting) -> None:
    words, eos = list(range(10, 310)), 1
    texts = ppo.Texts(setting, words, eos, seed=0)
    prompts = [texts.prompt() for _ in range(300)]
    assert {len(p) for p in prompts} <= set(range(setting.prompt[0], setting.prompt[1] + 1))
    assert max(map(len, prompts)) == ppo.PROMPT_TOKENS
    assert len(set(prompts)) == len(prompts)
    assert {token for p in prompts for token in p} <= set(words)
    good, poor = texts.response(1.0), texts.response(0.0)
    assert (texts.worth(good), texts.worth(poor)) == (1.0, 0.0)
    assert max(len(texts.response(0.5)) for _ in range(300)) == ppo.RESPONSE_TOKENS
    assert all((r[-1] == eos) == setting.ends for r in (good, poor))
    assert not set(good) & {token for p in prompts for token in p}
    assert np.mean([texts.worth(texts.response(0.25)) for _ in range(400)]) == pytest.approx(0.25, abs=0.04)


def test_a_finished_repeat_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(side: str, seed: int, place: Path, output: Path) -> dict[str, float]:
        if len(trained) == 1:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(side)
        return {"cpu_seconds": float(seed)}

    monkeypatch.setattr(ppo, "prepared", lambda setting: tmp_path)
    monkeypatch.setattr(ppo, "train", train)
    monkeypatch.setattr(ppo, "reached", lambda model, place: {"reward": 1.0})
    with pytest.raises(KeyboardInterrupt):
        ppo.repeat(ppo.SETTINGS[0], 5)
    assert not list(tmp_path.iterdir())  # half a repeat is none: its ratios would be of different hours
    first = ppo.repeat(ppo.SETTINGS[0], 5)
    assert trained == [ppo.TRL, "killed", *ppo.sides()]
    assert first[ppo.OURS] == {"cpu_seconds": 5.0, "reward": 1.0}
    assert ppo.repeat(ppo.SETTINGS[0], 5) == first
    assert len(trained) == 5
    ppo.repeat(ppo.SETTINGS[0], 6)
    assert len(trained) == 8


def test_a_failed_run_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[Any], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        stdout.write("no such model")
        stdout.flush()
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"no such model[\s\S]*exit code 3; run again"):
        ppo.train(ppo.OURS, 0, tmp_path, tmp_path / "out")


def test_trls_environment_is_filled_once_for_its_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(ppo, "PEER", tmp_path / "venv")
    monkeypatch.setattr(ppo, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append([str(part) for part in command]))
    ppo.REQUIREMENTS.write_text("trl==1.12.0\n")
    assert ppo.peer_python() == tmp_path / "venv" / "bin" / "python"
    ppo.peer_python()
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["install", "--quiet"]]
    ppo.REQUIREMENTS.write_text("trl==1.12.0\ntorch==2.13.0\n")
    ppo.peer_python()
    assert len(commands) == 4


def test_memory_and_time_of_a_block_are_its_own() -> None:
    def touch(mib: int) -> None:
        """Pages of their own: malloc may hand out resident memory that earlier tests gave back."""
        with mmap.mmap(-1, mib * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            for at in range(0, len(pages), mmap.PAGESIZE):
                pages[at] = 1

    touch(60)  # a peak before the block, gone when it begins
    with training_cost() as small:
        pass
    with training_cost() as large:
        touch(40)
    assert small["peak_mib"] - small["before_mib"] < 10.0
    assert large["peak_mib"] - large["before_mib"] == pytest.approx(40.0, abs=10.0)
    assert small["cpu_seconds"] < large["cpu_seconds"]
    assert resident_mib("VmRSS") <= large["peak_mib"] + 10.0


def test_the_peer_stands_alone() -> None:
    pins = ppo.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    assert "trl==1.12.0" in pins
    assert all("==" in pin for pin in pins if not pin.startswith("#"))
    folder = ROOT / "benchmarks" / "peers"
    for name in ("trl_ppo", "measure", "__init__"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in imported if m.split(".")[0] in ("iterative_ppo", "tasks", "flows")]
    measured = (
        "import sys, benchmarks.peers.measure; sys.exit('torch' in sys.modules or 'iterative_ppo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", measured], cwd=ROOT, check=False).returncode == 0
