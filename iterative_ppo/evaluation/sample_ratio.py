"""Sample-ratio mismatch: do the arms hold the shares that assignment should give them? If not, nothing is decided."""

from __future__ import annotations

import numpy as np

ONE_LOOK_P = 0.001
CONTINUOUS_E = 1000.0
PRIOR_WEIGHT = 300.0
"""Weight of the Beta prior about the share: at a half its standard deviation is 3 points."""


def one_look_p(champion: int, challenger: int, share: float) -> float:
    """p-value of the chi-square test of the arms' counts, for one look only. `share` is the challenger's."""
    from scipy.stats import chisquare

    units = champion + challenger
    return float(chisquare([champion, challenger], [units * (1 - share), units * share]).pvalue) if units else 1.0


def e_value(champion: np.ndarray, challenger: np.ndarray, share: float) -> np.ndarray:
    """Beta-binomial e-process of the arms' counts, any shape: valid at every look (Lindon & Malek 2022)."""
    from scipy.special import betaln

    a, b = PRIOR_WEIGHT * share, PRIOR_WEIGHT * (1 - share)
    mixture = betaln(challenger + a, champion + b) - betaln(a, b)
    return np.exp(np.minimum(mixture - challenger * np.log(share) - champion * np.log1p(-share), 700.0))


def mismatch(champion: int, challenger: int, share: float, one_look: bool) -> str | None:
    """Why no decision may be taken, or None. `one_look`: chi-square p < .001; else the e-process at 1000."""
    if one_look:
        p_value = one_look_p(champion, challenger, share)
        off, measure = p_value < ONE_LOOK_P, f"p = {p_value:.2g}, least {ONE_LOOK_P:g}"
    else:
        value = float(e_value(np.array(champion), np.array(challenger), share))
        off, measure = value >= CONTINUOUS_E, f"e-value {value:.3g}, below {CONTINUOUS_E:g} expected"
    if not off:
        return None
    return (
        f"sample-ratio mismatch: {challenger} of {champion + challenger} units are the challenger's, {share:.1%} "
        f"expected ({measure}); find the fault in assignment or logging, then start anew under a new salt"
    )
