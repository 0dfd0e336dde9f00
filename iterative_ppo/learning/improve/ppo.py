"""Token-level PPO against a frozen Q (line 7 of Algorithm 1; Schulman et al. 2017, arXiv 1707.06347).

The critic is the frozen Q's own running value, so no second network is trained, or a copy of Q that learns on. The KL
penalty is fixed or adapts to a target. A budget of KL to the champion, or judges that PPO does not see, end it early:
the result is then the policy that the last rollout within the budget showed, or the one that the judges liked best.
A killed run goes on from its last rollout and ends with the weights of an unbroken one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from iterative_ppo.config import PPOConfig
from iterative_ppo.errors import ConfigError
from iterative_ppo.learning.batching import Batch, training_batches
from iterative_ppo.learning.checkpoint import (
    Checkpoint,
    below_prefix,
    load_optimizer,
    optimizer_tensors,
    resume_schedule,
    with_prefix,
)
from iterative_ppo.learning.improve.critic import LearnedCritic
from iterative_ppo.learning.improve.episodes import (
    Episodes,
    RewardModel,
    check_prompts,
    differ,
    judge_of,
    nothing_differs,
    roll_out,
    unrewarded,
)
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import descend, optimizer_for, set_by
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.learning.sequences import Prompts
from iterative_ppo.learning.sharding import sharded
from iterative_ppo.learning.training import Curve, Progress


def surrogate(log_p: torch.Tensor, old_log_p: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """(N,) the clipped objective of each token (Eq. 7)."""
    ratio = torch.exp(log_p - old_log_p)
    return torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def clipped(log_p: torch.Tensor, old_log_p: torch.Tensor, clip: float) -> torch.Tensor:
    """(N,) whether a token's ratio left the trust region."""
    return ((torch.exp(log_p - old_log_p) - 1.0).abs() > clip).float()


def adapted(beta: float, kl: float, config: PPOConfig) -> float:
    """The next coefficient: a fifth nearer to the target at most (Ziegler et al. 2019, arXiv 1909.08593)."""
    if config.kl_target is None:
        return beta
    return beta * (1.0 + 0.2 * float(np.clip(kl / config.kl_target - 1.0, -1.0, 1.0)))


@dataclass
class Run:
    """PPO under way: everything that a checkpoint holds."""

    student: LanguagePolicy
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    critic: LearnedCritic | None
    rng: np.random.Generator
    beta: float
    curve: Curve = field(default_factory=list)
    kept: dict[str, torch.Tensor] | None = None
    """Where it is guarded, the weights of the best policy that a rollout has shown so far."""

    def look(self, config: PPOConfig) -> bool:
        """Whether to go on from the student that the last rollout showed; it is kept where it is the best so far."""
        within = config.kl_budget is None or self.curve[-1]["kl_to_champion"] <= config.kl_budget
        judged = [entry["judge"] for entry in self.curve] if config.judge_patience is not None else []
        if guarded(config):
            best = within and (not judged or judged[-1] == max(judged))
            self.curve[-1]["kept"] = float(best)
            self.kept = self.student.training_state() if best else self.kept
        return not spent(self.curve, config)

    def result(self) -> LanguagePolicy:
        """The student; of a guarded run, as it was at its best."""
        if self.kept is not None:
            self.student.load_training_state(self.kept)
        return self.student

    def save(self, checkpoint: Checkpoint) -> None:
        tensors = with_prefix("policy", self.student.training_state()) | optimizer_tensors(self.optimizer)
        tensors |= with_prefix("kept", self.kept or {})
        if self.critic:
            tensors |= self.critic.tensors()
        generator = self.rng.bit_generator.state
        checkpoint.save(tensors, {"generator": generator, "beta": self.beta, "curve": self.curve})

    def load(self, checkpoint: Checkpoint) -> None:
        found = checkpoint.load()
        if found is None:
            return
        tensors, values = found
        with checkpoint.understood():
            self.student.load_training_state(below_prefix("policy", tensors))
            self.kept = below_prefix("kept", tensors) or None
            load_optimizer(self.optimizer, tensors)
            self.rng.bit_generator.state = values["generator"]
            self.beta, self.curve = float(values["beta"]), values["curve"]
            updates = int(sum(entry["updates"] for entry in self.curve))
            resume_schedule(self.schedule, updates)
            if self.critic:
                self.critic.load(tensors, updates)


def improve(
    policy: LanguagePolicy,
    q: RewardModel,
    prompts: Prompts,
    config: PPOConfig,
    seed: int,
    reference: LanguagePolicy | None = None,
    scale: float = 1.0,
    rollout_size: int | None = None,
    progress: Progress | None = None,
    champion: LanguagePolicy | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[LanguagePolicy, Curve]:
    """SingleTurnOpt(Q) by PPO: a copy of `policy` improved on `prompts`, and its curve, one entry a rollout.

    Args:
        reference: whom the KL penalty keeps it near; None means `policy` itself.
        champion: whose KL is budgeted; None means the reference.
        scale: the reward is Q / scale, so that beta means the same whatever Q's spread.
        rollout_size: responses a rollout; None means the configured number.

    Raises TrainingError where there is no prompt, Q is not a number or, in the first rollout, tells no response from
    another, or an update is not finite; ModelError, before any training, where a prompt is longer than the model's
    context; ConfigError where judges are asked that Q does not have.
    """
    if not config.episodes:
        return policy, []
    check_prompts(policy, prompts)
    sizes = _rollouts(config.episodes, rollout_size or config.rollout)
    reference = reference or policy
    student = policy.trainable_copy()
    with sharded(student):
        run = begin(student, q, config, sizes, scale, seed)
        if checkpoint:
            run.load(checkpoint)
        looks = len(sizes) + guarded(config)  # what the last updates made of a guarded student is to be seen too
        for k in range(len(run.curve), looks):
            if spent(run.curve, config):
                break
            anchor = None if k == 0 and reference is policy else reference
            size = sizes[min(k, len(sizes) - 1)]
            advance(run, q, prompts, config, size, scale, seed, anchor, champion, learns=k < len(sizes))
            if checkpoint and ((k + 1) % checkpoint.every == 0 or k + 1 == looks):
                run.save(checkpoint)
            if progress:
                progress(k + 1, looks)
        return run.result(), run.curve


def _rollouts(episodes: int, size: int) -> list[int]:
    """Sizes of the rollouts, as near to `size` as alike ones come: what a few responses show decides nothing."""
    count = max(1, round(episodes / size))
    least, more = divmod(episodes, count)
    return [least + 1] * more + [least] * (count - more)


def begin(student: LanguagePolicy, q: RewardModel, config: PPOConfig, sizes: list[int], scale: float, seed: int) -> Run:
    """A run on rollouts of these sizes, with the updates that they ask for still before it; it changes the student.

    Raises ConfigError where judges are asked that Q does not have.
    """
    if config.judge_patience is not None and judge_of(q) is None:
        raise ConfigError(
            "improve.ppo.judge_patience asks judges, and this Q has none; set q.judges to 1 or more and fit it again"
        )
    steps = sum(config.epochs * -(-size // config.minibatch_size) for size in sizes)
    optimizer, schedule = optimizer_for(student.model, config.learning_rate, steps)
    critic = None
    if config.critic == "learned":
        assert isinstance(q, QModel), "a learned critic starts from a fitted Q"
        critic = LearnedCritic(q, config.critic_learning_rate, steps, scale)
    return Run(student, optimizer, schedule, critic, np.random.default_rng(seed), config.kl_coefficient)


def advance(
    run: Run,
    q: RewardModel,
    prompts: Prompts,
    config: PPOConfig,
    size: int,
    scale: float,
    seed: int,
    reference: LanguagePolicy | None,
    champion: LanguagePolicy | None = None,
    learns: bool = True,
) -> None:
    """The run's next rollout, of `size` responses, and all epochs on it; its curve grows by an entry.

    Args:
        reference: None means the student as it is, which holds before its first update alone.
        learns: False only looks, as a rollout does that finds a budget spent.
    """
    number = len(run.curve) + 1
    chosen = [prompts[i] for i in run.rng.integers(len(prompts), size=size)]
    episodes = roll_out(run.student, reference, q, chosen, config, scale, seed + 7919 * number, run.beta, run.critic)
    if number == 1 and min(np.ptp(episodes.q), episodes.spread) <= 1e-6 * np.abs(episodes.q).max():
        raise nothing_differs(differ([episodes.responses]))
    entry = _described(episodes, run, q, champion)
    run.curve.append(entry)
    goes_on = run.look(config) and learns
    with set_by("improve.ppo.learning_rate, or improve.ppo.critic_learning_rate where it is that"):
        entry |= _update(run, episodes, config) if goes_on else {"updates": 0.0}
    run.beta = adapted(run.beta, entry["kl_to_reference"], config)


def guarded(config: PPOConfig) -> bool:
    """Whether a run may end at less than all of its rollouts, and with an earlier student than its last."""
    return config.kl_budget is not None or config.judge_patience is not None


def spent(curve: Curve, config: PPOConfig) -> bool:
    """Whether the last rollout shows a budget spent: KL to the champion, or patience with judges that see no rise."""
    if not curve:
        return False
    if config.kl_budget is not None and curve[-1]["kl_to_champion"] > config.kl_budget:
        return True
    judged = [entry["judge"] for entry in curve if "judge" in entry]
    if config.judge_patience is None or not judged:
        return False
    return len(judged) - 1 - int(np.argmax(judged)) >= config.judge_patience


def shown(curve: Curve) -> dict[str, float]:
    """The entry of the policy that a run gives: its last, of a guarded run the last that was the best so far.

    Of several policy iterations it is the last one's.
    """
    last = [entry for entry in curve if entry.get("iteration") == curve[-1].get("iteration")]
    kept = [entry for entry in last if entry.get("kept")]
    return kept[-1] if kept else curve[-1]


def _update(run: Run, episodes: Episodes, config: PPOConfig) -> dict[str, float]:
    """All epochs on one rollout. A token weighs the same in every minibatch, whatever its neighbours' lengths."""
    advantage, steps = episodes.whitened(), -(-len(episodes.q) // config.minibatch_size)
    usual = episodes.tokens / steps
    student = run.student

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_p, _ = student.token_log_probs(batch, np.arange(len(batch.row)))
        old = _at(batch, episodes.old_log_p).to(log_p)
        loss = -surrogate(log_p, old, _at(batch, advantage).to(log_p), config.clip).sum() / usual
        outside = clipped(log_p, old, config.clip).sum() / usual
        return loss, {"clip_fraction": outside, "update_kl": (old - log_p).sum() / usual}

    figures: dict[str, list[float]] = {}
    sequences = episodes.table.sequences
    for batch in training_batches(sequences, config.minibatch_size, config.epochs, student.pad, run.rng):
        told = descend(batch, objective, run.optimizer, run.schedule)
        if run.critic:
            told["critic_loss"] = run.critic.learn(batch, episodes.returns, usual)
        for name, value in told.items():
            figures.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in figures.items()} | {"updates": float(len(figures["loss"]))}


def _at(batch: Batch, values: list[np.ndarray]) -> torch.Tensor:
    """(N,) the tokens' values of a batch's episodes."""
    parts = [values[row] for row in batch.row]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0))


def _described(episodes: Episodes, run: Run, q: RewardModel, champion: LanguagePolicy | None) -> dict[str, float]:
    """A rollout's figures. KL in nats a response; entropy in nats a token; Q without its penalties."""
    value, returns = np.concatenate(episodes.value), np.concatenate(episodes.returns)
    spread = returns.var()
    described = {
        "q": float(episodes.q.mean()),
        "kl_to_reference": float(episodes.kl.mean()),
        "kl_from_reference": float(episodes.reverse_kl.mean()),
        "kl_to_champion": float(episodes.kl.mean()),
        "kl_coefficient": run.beta,
        "entropy": float(-np.concatenate(episodes.old_log_p).mean()),
        "response_tokens": episodes.tokens / len(episodes.q),
        "missing_eos": float(1.0 - episodes.finished.mean()),
        "explained_variance": float(1.0 - (returns - value).var() / spread) if spread > 0 else 0.0,
    }
    return described | unrewarded(episodes.table, episodes.old_log_p, q, champion)
