"""`make bench-ppo`: our PPO against TRL 1.12.0's PPOTrainer on the same model, prompts, reward and numbers.

Both start from the same saved policy (a Llama of 1.14 million parameters, 28 % of them in its vocabulary) and are paid
by the same saved Q, read at the response's last token. The same: distinct prompts, response length, episodes an update,
minibatches, epochs, updates, rate and its fall, clip, KL coefficient, GAE, penalty for a missing end, seeds; float32,
one thread, no gradient checkpointing. TRL has a virtual environment of its own (benchmarks/trl-1.12-requirements.txt).

Two settings. `equal`: prompts of 96 tokens and responses of 24, so that there is no padding to save. `varied`: prompts
of 24 to 96 tokens and responses that end by themselves, at most 24.

The work is not the same, and that is part of the ratio. TRL trains a second network, its value model, and runs policy,
value, reference and reward model. We take the frozen Q's running value as the critic, so that one pass of Q gives
reward and values, and train the policy alone. The row `learned critic`, where there is one, trains a critic too. TRL
computes logits at every position, the prompt's too, and reports the entropy; we compute those of the response. We warm
the rate up over a twentieth of the steps and clip the gradient at norm 1, which TRL's trainer does not. TRL takes each
prompt once; we draw prompts with replacement.

CPU seconds are of the whole process while it trains; imports, loading and building the trainer are left out for both.
Peak memory is resident memory while it trains (Linux): above what there was before, and of the process in all.
Reward reached is the mean Q of fresh samples of the final policy on held-out prompts, all in this process.

A repeat is one run of everybody, one after the other; finished repeats in benchmarks/work are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import figure, write
from iterative_ppo.config import load_config
from iterative_ppo.files import fingerprint, read_json, whole_directory, write_bytes, write_json

HERE = Path(__file__).parent
WORK = HERE / "work" / "ppo"
PEER = HERE / "work" / "trl-1.12"
REQUIREMENTS = HERE / "trl-1.12-requirements.txt"
TRL, OURS, LEARNED = "TRL 1.12.0", "ours", "ours, learned critic"
PROMPT_TOKENS, RESPONSE_TOKENS, HELD_OUT = 96, 24, 512
SAME: dict[str, Any] = {
    "updates": 4,
    "batch_size": 64,
    "minibatch_size": 64,
    "epochs": 4,
    "learning_rate": 0.001,
    "clip": 0.2,
    "kl_coefficient": 0.05,
    "gae_lambda": 0.95,
    "missing_eos_penalty": 0.2,
    "response_tokens": RESPONSE_TOKENS,
}
MODEL = {
    "policy.hidden_size": 128,
    "policy.layers": 5,
    "policy.vocabulary": 2500,
    "policy.max_prompt_tokens": PROMPT_TOKENS,
    "policy.max_response_tokens": RESPONSE_TOKENS,
}
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """Lengths of prompts, and of responses in the corpus of pi_0; `ends` says whether those end or run to the limit."""

    name: str
    prompt: tuple[int, int]
    response: tuple[int, int]
    ends: bool


SETTINGS = (
    Setting("equal", (PROMPT_TOKENS, PROMPT_TOKENS), (RESPONSE_TOKENS, RESPONSE_TOKENS), False),
    Setting("varied", (24, PROMPT_TOKENS), (3, RESPONSE_TOKENS - 1), True),
)


def sides() -> dict[str, dict[str, Any]]:
    """Who trains, with the settings that only ours knows."""
    alone = {"runtime.micro_batch_tokens": 2048}
    critic = {"improve.ppo.critic": "learned", "improve.ppo.critic_learning_rate": SAME["learning_rate"]}
    return {TRL: {}, OURS: alone, LEARNED: {**alone, **critic}}


class Texts:
    """Prompts and responses, each of their own words by a power law; a response is worth its share of good words."""

    def __init__(self, setting: Setting, words: Sequence[int], eos: int, seed: int) -> None:
        self.setting, self.eos = setting, eos
        self.rng = np.random.default_rng(seed)
        self.good, self.poor, self.asked = (np.array(words[k::3]) for k in range(3))

    def prompt(self) -> Tokens:
        return tuple(self._words(self.asked, self._length(self.setting.prompt)).tolist())

    def response(self, good: float) -> Tokens:
        """Each word is a good one with that probability."""
        length = self._length(self.setting.response)
        chosen = self.rng.random(length) < good
        words = np.where(chosen, self._words(self.good, length), self._words(self.poor, length))
        return (*words.tolist(), self.eos) if self.setting.ends else tuple(words.tolist())

    def worth(self, response: Tokens) -> float:
        return float(np.isin(response, self.good).sum() / (len(response) - self.setting.ends))

    def _length(self, bounds: tuple[int, int]) -> int:
        return int(self.rng.integers(bounds[0], bounds[1] + 1))

    def _words(self, kind: np.ndarray, count: int) -> np.ndarray:
        weights = np.arange(1, len(kind) + 1) ** -1.5
        return self.rng.choice(kind, size=count, p=weights / weights.sum())


def prepared(setting: Setting) -> Path:
    """The directory with the setting's policy, Q and prompts, made once: pi_0 and Q each see 1,024 texts."""
    place = WORK / f"{setting.name}-{fingerprint(asdict(setting), MODEL, HELD_OUT)}"
    if place.exists():
        return place
    from iterative_ppo.learning.language_model import LanguagePolicy, PolicySettings
    from iterative_ppo.learning.tiny import build_model, train_tokenizer

    config = load_config(None, MODEL)
    vocabulary = " ".join(f"w{i}" for i in range(config.policy.vocabulary))
    tokenizer = train_tokenizer([vocabulary], config.policy)
    policy = LanguagePolicy(build_model(tokenizer, config.policy, 0), tokenizer, PolicySettings.of(config.policy))
    words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    texts = Texts(setting, words, tokenizer.eos_token_id, seed=0)
    _teach(policy, [(texts.prompt(), texts.response(0.5)) for _ in range(1024)])
    with whole_directory(place) as draft:
        policy.save(draft / "policy")
        _fitted_q(policy, texts).save(draft / "q")
        count = SAME["updates"] * SAME["batch_size"]
        prompts = {
            "train": [texts.prompt() for _ in range(count)],
            "held_out": [texts.prompt() for _ in range(HELD_OUT)],
        }
        write_json(draft / "prompts.json", prompts)
    return place


def _teach(policy: Any, examples: Sequence[tuple[Tokens, Tokens]]) -> None:
    from iterative_ppo.learning.batching import training_batches
    from iterative_ppo.learning.optimization import optimizer_for, take_step
    from iterative_ppo.mdp.rendering import single

    sequences = [single(k, *example, True) for k, example in enumerate(examples)]
    optimizer, schedule = optimizer_for(policy.model, 0.003, len(sequences) // 16)
    for batch in training_batches(sequences, 16, 1, policy.pad, np.random.default_rng(0)):
        log_p, _ = policy.token_log_probs(batch, np.arange(len(batch.row)))
        take_step(-log_p.mean(), optimizer, schedule)


def _fitted_q(policy: Any, texts: Texts) -> Any:
    """One head whose output is the value itself, which is how TRL reads a reward model."""
    from iterative_ppo.learning.batching import EncodedTable
    from iterative_ppo.learning.q_model import QModel, QSettings
    from iterative_ppo.learning.regression import Regression, regress
    from iterative_ppo.mdp.rendering import single

    responses = [texts.response(texts.rng.random()) for _ in range(1024)]
    sequences = [single(k, texts.prompt(), response, True) for k, response in enumerate(responses)]
    q = QModel.from_policy(policy, QSettings("mse", 0.0, 1.0, gamma=1.0), 0)
    targets = np.array([texts.worth(response) for response in responses])
    regress(q, EncodedTable(sequences, len(sequences)), targets, Regression(1.0, 0.002, 16, 0.5), 0)
    return q


def peer_python() -> Path:
    """The interpreter of TRL's virtual environment, made and filled by pip where the requirements are new."""
    stamp, wanted = PEER / ".installed", REQUIREMENTS.read_bytes()
    if not stamp.exists() or stamp.read_bytes() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEER)], check=True)
        subprocess.run([PEER / "bin" / "pip", "install", "--quiet", "-r", str(REQUIREMENTS)], check=True)
        write_bytes(stamp, wanted)
    return PEER / "bin" / "python"


def job_of(side: str, seed: int, place: Path, output: Path) -> dict[str, Any]:
    """What one process is told: shared paths, shared numbers, and where to put its policy and its cost."""
    paths = {"policy": place / "policy", "q": place / "q", "prompts": place / "prompts.json", "output": output}
    return {**SAME, **{name: str(path) for name, path in paths.items()}, "seed": seed, "overrides": sides()[side]}


def train(side: str, seed: int, place: Path, output: Path) -> dict[str, float]:
    """One run in a process of its own. Returns its cost; a failure ends the benchmark with the end of its log."""
    output.mkdir()
    write_json(output / "job.json", job_of(side, seed, place, output))
    module, python = ("trl_ppo", peer_python()) if side == TRL else ("our_ppo", Path(sys.executable))
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with (output / "log.txt").open("w", encoding="utf-8") as log:
        command = [python, "-m", f"benchmarks.peers.{module}", output / "job.json"]
        done = subprocess.run(
            command, cwd=HERE.parent, env={**os.environ, **alone}, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        end = (output / "log.txt").read_text(encoding="utf-8")[-2000:]
        sys.exit(f"{end}\n{side} failed with exit code {done.returncode}; run again to resume")
    cost: dict[str, float] = read_json(output / "cost.json")
    return cost


def reached(model: Path, place: Path) -> dict[str, float]:
    """Mean Q, mean tokens and share of ended responses of fresh samples of a saved policy on held-out prompts."""
    from iterative_ppo.learning.language_model import LanguagePolicy, PolicySettings
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.mdp.rendering import single

    policy = LanguagePolicy.load(model, PolicySettings.of(load_config(None, MODEL).policy))
    prompts = [tuple(p) for p in json.loads((place / "prompts.json").read_text(encoding="utf-8"))["held_out"]]
    responses = policy.respond(prompts, seed=1)
    sequences = [single(k, p, r, True) for k, (p, r) in enumerate(zip(prompts, responses.tokens, strict=True))]
    q = [values[-1] for values in QModel.load(place / "q").running_values(sequences)]
    tokens = float(np.mean([len(r) for r in responses.tokens]))
    return {"reward": float(np.mean(q)), "tokens": tokens, "ended": float(responses.finished.mean())}


def repeat(setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    """One run of everybody, in turn, or what is stored of it: per side its cost and what its policy reaches."""
    place = prepared(setting)
    stored = place / f"repeat-{seed}-{fingerprint(SAME, sides())}"
    if not stored.exists():
        with whole_directory(stored) as draft:
            found = {"pi_0": reached(place / "policy", place)}
            for k, side in enumerate(sides()):
                output = draft / str(k)
                found[side] = train(side, seed, place, output) | reached(output / "model", place)
                print(f"{setting.name}, repeat {seed}, {side}: {found[side]}", flush=True)
            write_json(draft / "result.json", found)
    result: dict[str, dict[str, float]] = read_json(stored / "result.json")
    return result


def figures(setting: str, repeats: Sequence[dict[str, dict[str, float]]], episodes: int) -> list[dict[str, Any]]:
    """Rows of the results file: ratios within a repeat first, then what each side did; medians and ranges."""
    seeds = list(range(len(repeats)))
    names = [side for side in repeats[0] if side != "pi_0"]

    def of(side: str, what: str) -> np.ndarray:
        return np.array([result[side][what] for result in repeats])

    def row(name: str, values: np.ndarray, target: str | None = None, holds: bool | None = None) -> dict[str, Any]:
        spread = (float(values.min()), float(values.max()))
        return figure(f"{setting}: {name}", float(np.median(values)), spread, target, holds, seeds)

    rows = []
    for side in (name for name in names if name != TRL):
        speed = of(TRL, "cpu_seconds") / of(side, "cpu_seconds")
        above = (of(side, "peak_mib") - of(side, "before_mib")) / (of(TRL, "peak_mib") - of(TRL, "before_mib"))
        total = of(side, "peak_mib") / of(TRL, "peak_mib")
        more = of(side, "reward") - of(TRL, "reward")
        rows += [
            row(f"{side} / TRL, episodes per CPU-second", speed, ">= 3", bool(np.median(speed) >= 3)),
            row(f"{side} / TRL, peak memory above that before", above, "<= .5", bool(np.median(above) <= 0.5)),
            row(f"{side} / TRL, peak memory of the process", total, "<= .5", bool(np.median(total) <= 0.5)),
            row(f"{side} - TRL, reward reached", more, ">= 0", bool(np.median(more) >= 0)),
        ]
    for side in names:
        rows += [
            row(f"{side}, episodes per CPU-second", episodes / of(side, "cpu_seconds")),
            row(f"{side}, peak memory above that before, MiB", of(side, "peak_mib") - of(side, "before_mib")),
            row(f"{side}, peak memory of the process, MiB", of(side, "peak_mib")),
            row(f"{side}, reward reached", of(side, "reward")),
        ]
    return [*rows, row("pi_0, reward", of("pi_0", "reward"))]


def main() -> None:
    """Run the repeats that are not there yet, then print and write the table: medians, and ranges as intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    count = parser.parse_args().repeats
    peer_python()
    results = [[repeat(setting, seed) for setting in SETTINGS] for seed in range(count)]
    rows = []
    for setting, repeats in zip(SETTINGS, zip(*results, strict=True), strict=True):
        rows += figures(setting.name, repeats, SAME["updates"] * SAME["batch_size"])
    write("bench-ppo", rows)


if __name__ == "__main__":
    main()
