"""A registered version as MLflow's pyfunc: `mlflow.pyfunc.load_model("models:/iterative-ppo-policy@champion")`.

The policy answers prompts by sampling as it does in a conversation; Q gives the value at the last of some token ids;
an outcome classifier says how probable each outcome is after what was said.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.outcome_classifier import OutcomeClassifier
    from iterative_ppo.learning.q_model import QModel


class ServedPolicy:
    """Takes a column `prompt`, the state as the policy's tokenizer spells it; returns suggestions, "" for none."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One sampled suggestion a row; `params={"seed": 1}` samples others."""
        settings, tokenizer = self.policy.settings, self.policy.tokenizer
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in frame["prompt"]]
        kept = [tuple(tokens[-settings.max_prompt_tokens :]) for tokens in prompts]
        responses = self.policy.respond(kept, seed=int((params or {}).get("seed", 0)))
        return [self.policy.suggestion(tokens).text or "" for tokens in responses.tokens]


class ServedQ:
    """Takes a column `tokens`, lists of token ids; returns V after a prompt, Q after a prompt and its response.

    Both are read from Q's heads; V of a Q with value heads of its own (q.target archer, lstd_q) is not served.
    """

    def __init__(self, q: QModel) -> None:
        self.q = q

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> list[float]:
        """One value a row."""
        from iterative_ppo.mdp.rendering import single

        rows = enumerate(tuple(tokens) for tokens in frame["tokens"])
        values = self.q.running_values([single(k, tokens[:-1], tokens[-1:], True) for k, tokens in rows])
        return [float(value[-1]) for value in values]


class ServedOutcome:
    """Takes a column `transcript`, as mdp.labels.transcripts writes conversations."""

    def __init__(self, classifier: OutcomeClassifier) -> None:
        self.classifier = classifier

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> list[list[float]]:
        """The probability of each outcome, a list a row."""
        found: list[list[float]] = self.classifier.probabilities(frame["transcript"].tolist()).tolist()
        return found


def _load_pyfunc(path: str) -> ServedPolicy | ServedQ | ServedOutcome:
    """MLflow's entry: the version's directory."""
    from iterative_ppo.learning import outcome_classifier
    from iterative_ppo.learning.language_model import SETTINGS, LanguagePolicy
    from iterative_ppo.learning.q_model import QModel

    folder = Path(path)
    if (folder / SETTINGS).exists():
        return ServedPolicy(LanguagePolicy.load(folder))
    if (folder / outcome_classifier.SETTINGS).exists():
        return ServedOutcome(outcome_classifier.OutcomeClassifier.load(folder))
    return ServedQ(QModel.load(folder))
