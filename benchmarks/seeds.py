"""What a few seeds tell: intervals, tests of equality and of difference, and what these can see.

Values are shares in [0, 1], one per seed. benchmarks/equivalence.py says what each is used for.
"""

import numpy as np
from scipy import stats

MARGIN = 0.05  # success rate: what counts as no difference
MOST = 40  # seeds of a study that anybody would run
FEWEST = 5  # seeds of an interval: with four it covers 88 %, with three 61 %


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Computes the 95 % bootstrap-t interval of the mean of shares in [0, 1], by resampling seeds.

    Percentiles alone would cover 85 % at five seeds. NaN below FEWEST."""
    n = len(values)
    if n < FEWEST:
        return np.nan, np.nan
    spread = values.std(ddof=1) / n**0.5
    drawn = np.random.default_rng(0).choice(values, (draws, n))
    spreads = drawn.std(axis=1, ddof=1) / n**0.5
    varied = spreads > 1e-9  # not the same seed n times, up to rounding
    t = (drawn.mean(axis=1) - values.mean())[varied] / spreads[varied]
    low, high = np.quantile(t, (0.975, 0.025)) if len(t) else (0.0, 0.0)
    return tuple(float(np.clip(values.mean() - end * spread, 0.0, 1.0)) for end in (low, high))


def tell_nothing(values: np.ndarray, base: np.ndarray) -> bool:
    """Tells whether too few seeds, or equal ones on one side, hide how much seeds vary: p is 1."""
    spread = min(values.std(), base.std())  # of equal values, up to rounding, is 0
    return min(len(values), len(base)) < 2 or spread < 1e-9


def tost(values: np.ndarray, base: np.ndarray, margin: float) -> float:
    """Computes the p of two one-sided Welch t-tests.

    It is the larger of those for "lower by the margin or more" and "higher by the margin or more".
    """
    if tell_nothing(values, base):
        return 1.0
    lower = stats.ttest_ind(values + margin, base, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind(values - margin, base, equal_var=False, alternative="less").pvalue
    return float(max(lower, upper))


def welch(values: np.ndarray, base: np.ndarray) -> float:
    """Computes the p of a two-sided Welch t-test."""
    if tell_nothing(values, base):
        return 1.0
    return float(stats.ttest_ind(values, base, equal_var=False).pvalue)


def holm(p: list[float]) -> list[float]:
    """Corrects p values for their number (Holm 1979)."""
    order = np.argsort(p)
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def power(deviation: float, seeds: int, arms: int, studies: int = 400) -> float:
    """Computes how often an arm that is truly equal is found equivalent.

    At the strictest step of Holm's correction, p · arms < 0.05. deviation: of seeds."""
    drawn = np.random.default_rng(0).normal(0.0, deviation, (studies, 2, seeds))
    return float(np.mean([tost(a, b, MARGIN) * arms < 0.05 for a, b in drawn]))


def least_gain(deviation: float, seeds: int, arms: int, studies: int = 2000) -> float:
    """Finds the least true gain, to a thousandth, that 80 % of studies see: at most 1.

    They see it at the strictest step of Holm's correction, p · arms < 0.05 of a two-sided Welch
    t-test. deviation: of seeds, with and without the gain."""
    values, base = np.random.default_rng(0).normal(0.0, deviation, (2, studies, seeds))
    for gain in np.arange(0.0, 1.0, 0.001):
        p = stats.ttest_ind(values + gain, base, axis=1, equal_var=False).pvalue
        if np.mean(p * arms < 0.05) >= 0.8:
            return float(gain)
    return 1.0
