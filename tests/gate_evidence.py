"""What the offline gate is shown of a challenger that is better in every respect, and parts to spoil it with."""

from __future__ import annotations

from iterative_ppo.config import load_config
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.certificate import Certificate
from iterative_ppo.evaluation.evidence import OfflineEvidence
from iterative_ppo.evaluation.non_inferiority import Guardrail, proportion
from iterative_ppo.evaluation.ope import Estimate
from iterative_ppo.evaluation.weights import Support

UNGUARDED = {
    f"gate.guardrails.{name}.{key}": value
    for name in load_config().gate.guardrails
    for key, value in (("margin", 1000.0), ("limit", None))
}
"""Settings under which no guardrail can break."""
SUPPORT = Support(known=900, effective=600.0, largest=0.01, mean=1.0)
CERTIFICATE = Certificate(0.03, 0.01, 0.05, SUPPORT, conversations=200, left_out=0, refusal=None)
ESTIMATE = Estimate("doubly_robust_gain", 0.04, 0.01, 0.07, SUPPORT, left_out=0, refusal=None)
ACCEPTANCE = Guardrail("acceptance", "higher", margin=0.05, alpha=0.05)
HELD, BROKEN = (proportion(ACCEPTANCE, Arm(800, 1000), Arm(k, 1000)) for k in (810, 700))
GOOD = OfflineEvidence(
    states=200,
    samples=4,
    q_champion=0.30,
    q_challenger=0.35,
    q_gain_low=0.02,
    q_gain_high=0.08,
    kl_challenger_champion=1.0,
    kl_champion_challenger=1.2,
    missing_eos=0.01,
    repetition=0.1,
    length_ratio=1.1,
    abstained=0.1,
    q_r2=0.4,
    state_baseline_r2=0.2,
    certificate=CERTIFICATE,
    estimates={"doubly_robust_gain": ESTIMATE},
    guardrails=(HELD,),
)
