"""GRPO (Shao et al. 2024, arXiv 2402.03300) and RLOO (Ahmadian et al. 2024, 2402.14740) against a frozen Q, by TRL.

Its trainers have the groups, their advantages, the losses and the updates. Prompts and responses never become text in
between: their prompts are our token ids, and the policy samples and scores them itself, so that training and serving
know one distribution (temperature, tokens that may not be said, positions that do not depend on the padding). Several
processes each run the whole trainer, and share the policy's work.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from iterative_ppo.config import ImproveConfig
from iterative_ppo.errors import ConfigError, NothingToLearn, TrainingError
from iterative_ppo.learning import distributed, runtime, sharding
from iterative_ppo.learning.batching import Batch, EncodedTable
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve.episodes import (
    NO_NUMBER,
    RewardModel,
    check_prompts,
    differ,
    kl_both_ways,
    nothing_differs,
    response_rewards,
    token_log_probs,
    unrewarded,
)
from iterative_ppo.learning.improve.ppo import Run, adapted, begin, guarded, spent
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.sequences import Prompts, prompt_lengths
from iterative_ppo.learning.supervised import finite, lent
from iterative_ppo.learning.training import Curve, Progress
from iterative_ppo.mdp.rendering import single

TOLD = {"loss": "loss", "clip_ratio/region_mean": "clip_fraction", "grad_norm": "gradient_norm"}
"""TRL's figures of the updates, by their names in the curve."""


def improve(
    policy: LanguagePolicy,
    q: RewardModel,
    prompts: Prompts,
    config: ImproveConfig,
    seed: int,
    reference: LanguagePolicy | None = None,
    scale: float = 1.0,
    progress: Progress | None = None,
    champion: LanguagePolicy | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[LanguagePolicy, Curve]:
    """SingleTurnOpt(Q) by `config.algorithm`, grpo or rloo: the call, budgets, checkpoints and curve of `ppo.improve`.

    GRPO's loss is TRL's usual one, in which all tokens of a rollout weigh the same. It adds an estimate of each token's
    KL, weighted by the token's ratio: without that weight its gradient on a fresh rollout would be KL(pi_ref || pi)'s,
    with it KL(pi || pi_ref)'s (DeepSeek-V3.2, arXiv 2512.02556). RLOO takes the KL of the response from its reward.

    Raises TrainingError where there is no prompt, Q is the same for all responses of every prompt in the first rollout
    or not a number, or the weights diverge; ModelError where a prompt is longer than the model's context; ConfigError
    where the processes are to shard the model.
    """
    c = config.ppo
    if not c.episodes:
        return policy, []
    check_prompts(policy, prompts)
    if sharding.wanted() and policy.lora is None:
        raise ConfigError(
            f"improve.algorithm {config.algorithm} trains a whole model in each process, and runtime.accelerate shards "
            "it; set runtime.accelerate to null, policy.lora.rank above 0, or improve.algorithm to ppo"
        )
    rollout = config.group_rollout
    rollouts = c.episodes // rollout
    looks = rollouts + guarded(c)
    run = begin(policy.trainable_copy(), q, c, [rollout] * rollouts, scale, seed)
    if checkpoint:
        run.load(checkpoint)
    drawn = np.random.default_rng(seed).integers(len(prompts), size=(looks, rollout // config.group.size))
    left = [[prompts[int(i)] for i in row] for row in drawn[len(run.curve) :]]
    if left and not spent(run.curve, c):
        groups = Groups(run, reference or policy, champion, q, config, scale, seed)
        recorder = Recorder(groups, rollouts, progress, checkpoint)
        _refuse_diverged(run.student)
        with suppress(Spent):
            if learns := left[: rollouts - len(run.curve)]:
                _train([prompt for row in learns for prompt in row], groups, recorder)
            if guarded(c):
                groups.look(left[-1])
    return run.result(), run.curve


class Spent(Exception):  # noqa: N818 (no error: it ends the updates)
    """The rollout shows a budget spent, so nothing more is learnt."""


@dataclass
class Groups:
    """What TRL asks of us while it trains: responses, their rewards, and how likely they are."""

    run: Run
    reference: LanguagePolicy
    champion: LanguagePolicy | None
    q: RewardModel
    config: ImproveConfig
    scale: float
    seed: int

    def respond(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One response a prompt; equal prompts are neighbours, in groups of the configured size."""
        student, size = self.run.student, self.config.group.size
        seed = self.seed + 7919 * (len(self.run.curve) + 1)
        torch.manual_seed(seed)  # TRL shuffles the rollout: after a kill, as it would have been
        with without_dropout(student):
            responses = student.respond([tuple(prompt) for prompt in prompts[::size]], seed, samples=size)
        return [list(tokens) for tokens in responses.tokens]

    def reward(self, prompts: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Q(s, a) / scale of each response, less its penalty. Begins the rollout's entry in the curve.

        Raises Spent where the entry shows that nothing is to be learnt from it any more.
        """
        pairs = enumerate(zip(prompts, completion_ids, strict=True))
        sequences = [single(k, tuple(prompt), tuple(tokens), True) for k, (prompt, tokens) in pairs]
        eos = self.run.student.renderer.eos
        finished = np.array([tokens[-1] == eos for tokens in completion_ids])
        values = distributed.by_shares(sequences, self.q.running_values, self.config.group.size)
        reward = response_rewards(values, finished, self.scale, self.config.ppo.missing_eos_penalty)
        if not np.isfinite(reward).all():
            raise NothingToLearn(NO_NUMBER)
        worth = np.array([value[-1] for value in values])
        spread = np.ptp(worth.reshape(-1, self.config.group.size), axis=1).max()
        if not self.run.curve and spread <= 1e-6 * np.abs(worth).max():
            size = self.config.group.size
            raise nothing_differs(differ(completion_ids[k : k + size] for k in range(0, len(completion_ids), size)))
        self.run.curve.append(self._described(EncodedTable(sequences, len(sequences)), worth, finished))
        if not self.run.look(self.config.ppo):
            raise Spent
        return [float(value) for value in reward]

    def look(self, prompts: Prompts) -> None:
        """A rollout that nothing is learnt from: what the last updates made of the student."""
        repeated = [list(prompt) for prompt in prompts for _ in range(self.config.group.size)]
        self.reward(repeated, self.respond(repeated))

    def _described(self, table: EncodedTable, worth: np.ndarray, finished: np.ndarray) -> dict[str, float]:
        """A rollout's figures, as in PPO's curve."""
        mine, anchor = token_log_probs(self.run.student, table), token_log_probs(self.reference, table)
        kl, reverse = np.mean([kl_both_ways(p, ref) for p, ref in zip(mine, anchor, strict=True)], axis=0)
        lengths = [len(log_p) for log_p in mine]
        described = {
            "q": float(worth.mean()),
            "kl_to_reference": float(kl),
            "kl_from_reference": float(reverse),
            "kl_to_champion": float(kl),
            "kl_coefficient": self.run.beta,
            "entropy": float(-np.concatenate(mine).mean()),
            "response_tokens": float(np.mean(lengths)),
            "missing_eos": float(1.0 - finished.mean()),
            "updates": 0.0,
        }
        return described | unrewarded(table, mine, self.q, self.champion)


class Recorder(TrainerCallback):
    """After each rollout: its entry in the curve, the next KL coefficient, a checkpoint, and whether to go on."""

    def __init__(self, groups: Groups, rollouts: int, progress: Progress | None, checkpoint: Checkpoint | None) -> None:
        self.groups, self.rollouts, self.progress, self.checkpoint = groups, rollouts, progress, checkpoint

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # the summary at the end of training
            return
        run, config = self.groups.run, self.groups.config.ppo
        _refuse_diverged(run.student)
        run.curve[-1] |= {ours: float(logs[theirs]) for theirs, ours in TOLD.items()}
        run.curve[-1]["updates"] = float(args.logging_steps)
        run.beta = adapted(run.beta, run.curve[-1]["kl_to_reference"], config)
        done = len(run.curve)
        if self.checkpoint and (done % self.checkpoint.every == 0 or done == self.rollouts):
            run.save(self.checkpoint)
        if self.progress:
            self.progress(done, self.rollouts)
        control.should_training_stop |= spent(run.curve, config)


class PolicyHooks:
    """Laid over one of TRL's trainers: the policy itself samples and scores, on token ids as they are."""

    def __init__(self, groups: Groups, **given: Any) -> None:
        super().__init__(**given)
        self.groups = groups
        self.ref_model = groups.reference  # TRL would read one from the path of a model that may never have had one

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
        self.beta = self.groups.run.beta
        return self.groups.respond(prompt_ids)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """(B, C) log-probs of the C last tokens; for the entropy, what was sampled stands for its mean."""
        scorer = model if isinstance(model, LanguagePolicy) else self.groups.run.student
        parts = zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        )
        with without_dropout(scorer):
            log_p = torch.cat([shared_log_probs(scorer, ids, mask, logits_to_keep) for ids, mask in parts])
        return log_p, -log_p.detach(), None

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*given, **named)  # type: ignore[misc]
        trainer: Any = self
        if trainer._step % trainer.current_gradient_accumulation_steps == 0:  # all pieces of the minibatch are in
            distributed.sum_gradients(self.groups.run.student.trainable_parameters())
        return loss


@contextmanager
def without_dropout(policy: LanguagePolicy) -> Iterator[None]:
    """TRL trains in the mode that has dropout, and switches off the modules alone: some families have it elsewhere.

    Its own flag comes back, its parts' do not: a backward pass may compute them anew, and has to meet none either.
    """
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.training = training


def shared_log_probs(policy: LanguagePolicy, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """As `padded_log_probs`, every process knows all rows and computes a share, which alone has a gradient there."""
    if distributed.size() == 1:
        return padded_log_probs(policy, ids, mask, width)
    order = torch.argsort(mask.sum(1), descending=True, stable=True).tolist()
    mine = torch.tensor(distributed.share(order), device=ids.device)
    part = padded_log_probs(policy, ids[mine], mask[mine], width)
    known = distributed.gathered(dict(zip(mine.tolist(), part.detach().cpu().numpy(), strict=True)))
    whole = np.stack([known[row] for row in range(len(ids))])
    return torch.from_numpy(whole).to(part).index_copy(0, mine, part)


def padded_log_probs(policy: LanguagePolicy, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width) log-probs of the last `width` tokens, 0 where nothing was said.

    Args:
        ids, mask: (B, T) as TRL pads them, prompts on the left and responses on the right.
    """
    real, end = mask.bool(), mask.sum(1).cpu().numpy()
    said = real[:, -width:]
    tokens = torch.nn.utils.rnn.pad_sequence(
        [row[kept] for row, kept in zip(ids, real, strict=True)], batch_first=True, padding_value=policy.pad
    )
    rows = np.arange(len(ids))
    batch = Batch(tokens, rows, end - said.sum(1).cpu().numpy(), end, rows, np.ones(len(ids), dtype=bool))
    log_p, _ = policy.token_log_probs(batch, rows)
    return log_p.new_zeros(said.shape).masked_scatter(said, log_p)


def _train(prompts: Prompts, groups: Groups, recorder: Recorder) -> None:
    """Updates on one group of responses to each of the prompts, in their order."""
    from datasets import Dataset

    run, config = groups.run, groups.config
    c, rollout = config.ppo, config.group_rollout
    trainer_class, arguments_of = _trl(config.algorithm)
    steps = c.epochs * rollout // c.minibatch_size
    longest = int(prompt_lengths(prompts).max()) + run.student.settings.max_response_tokens
    pieces = _pieces(c.minibatch_size, longest, runtime.current().micro_batch_tokens)
    with distributed.unseen(), lent(run.student.model) as model, tempfile.TemporaryDirectory() as scratch:
        arguments = arguments_of(
            output_dir=scratch,
            num_generations=config.group.size,
            generation_batch_size=rollout,
            num_iterations=c.epochs,
            per_device_train_batch_size=c.minibatch_size // pieces,
            gradient_accumulation_steps=pieces,
            max_steps=steps * (len(prompts) * config.group.size // rollout),
            max_completion_length=run.student.settings.max_response_tokens,
            learning_rate=c.learning_rate,
            epsilon=c.clip,
            beta=0.0,  # set rollout by rollout, with the reference
            router_aux_loss_coef=0.0,
            disable_dropout=True,
            shuffle_dataset=False,
            logging_strategy="steps",
            logging_steps=steps,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            bf16=False,  # the runtime's autocast holds here too
            gradient_checkpointing=runtime.current().gradient_checkpointing,
            dataloader_pin_memory=False,
            seed=groups.seed,
        )
        _ = arguments.device
        arguments._n_gpu = 1  # one process trains on one device, however many there are
        arguments.__dict__["_setup_devices"] = model.device  # and that need not be the first
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)
        trainer = trainer_class(
            groups=groups,
            model=model,
            reward_funcs=[groups.reward],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [list(prompt) for prompt in prompts]}),
            processing_class=copy.deepcopy(run.student.tokenizer),
            callbacks=[recorder],
            optimizers=(run.optimizer, run.schedule),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _pieces(responses: int, longest: int, tokens: int | None) -> int:
    """In how many parts of one size a minibatch goes through: no process has more than `tokens` at once (None: all)."""
    room = responses if tokens is None else distributed.size() * max(1, tokens // longest)
    least = distributed.size()  # a process without a response has nothing to compute
    counts = [k for k in range(1, responses + 1) if responses % k == 0 and responses // k >= least]
    return next((k for k in counts if responses // k <= room), counts[-1])


def _trl(algorithm: str) -> tuple[Any, Any]:
    """TRL's trainer with our hooks over it, and what makes its arguments."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    grpo_config = functools.partial(GRPOConfig, loss_type="dapo", use_bias_correction_kl=True)

    class GRPO(PolicyHooks, GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *given: Any) -> tuple[list[list[int]], None]:
            return super()._generate_single_turn(*given), None

    class RLOO(PolicyHooks, RLOOTrainer):  # type: ignore[misc]
        pass

    return {"grpo": (GRPO, grpo_config), "rloo": (RLOO, RLOOConfig)}[algorithm]


def _refuse_diverged(policy: LanguagePolicy) -> None:
    if not finite(policy):
        raise TrainingError("the group updates diverged; lower improve.ppo.learning_rate")
