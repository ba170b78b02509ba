"""How sure one may be of a figure that comes from some rows.

Tokens of one row resemble each other (the divergence of tokens has a design effect of about 2
within rows, measured), so intervals come from resampling whole rows: 2,000 times as many rows are
drawn with replacement, the figure is computed again each time, and the interval holds the middle
95 % of what came out (the percentile bootstrap; Efron 1979). The draws are seeded, so the same
comparison gives the same intervals.

The bootstrap can't see what did not happen in any row. So for counts that are 0 (or all rows) the
other end of the interval is the exact one: if none of n rows flipped, the true share is below
1 - 0.05^(1/n), nearly 3/n, with 95 % confidence (the rule of three; Hanley and Lippman-Hand 1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
MOST_NUMBERS, LEAST_RESAMPLES = 400_000_000, 200
"""A quantile of very many tokens is resampled less often: about 4 s for this many numbers."""
BLOCK_NUMBERS = 4_000_000
"""Numbers that resampling holds at once: 32 MB."""


class Interval(NamedTuple):
    """A figure, and where it may lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Resamples rows.

    Args:
        rows: How many there are.
        resamples: How often.
        seed: Of the draws.
    """

    rows: int
    resamples: int = RESAMPLES
    seed: int = SEED

    def ratio(
        self,
        numerators: NDArray[np.float64],
        denominators: NDArray[np.float64],
        change: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.asarray,
    ) -> Interval:
        """Return the interval of a sum over rows divided by another: a mean over tokens.

        Args:
            numerators: For each row, such as the sum of its tokens' divergence.
            denominators: For each row, such as its tokens.
            change: Applied to the ratio, such as exp.
        """
        sums = np.stack([numerators, denominators], axis=1).astype(float)
        draws = self._draws(self.resamples, self.rows)
        drawn = np.concatenate([counts @ sums for counts in draws])
        with np.errstate(invalid="ignore", divide="ignore"):
            value = change(np.divide(*sums.sum(0)))
            ratios = change(drawn[:, 0] / drawn[:, 1])
        return _middle(float(value), ratios)

    def share(self, hits: NDArray[np.bool_]) -> Interval:
        """Return the interval of the share of rows of which something is true."""
        found = self.ratio(hits.astype(float), np.ones(len(hits)))
        if not hits.any():
            return found._replace(high=rule_of_three(len(hits)))
        if hits.all():
            return found._replace(low=1 - rule_of_three(len(hits)))
        return found

    def quantile(
        self, values: NDArray[np.float64], row_of: NDArray[np.int64], q: float
    ) -> Interval:
        """Return the interval of a quantile over tokens: the least value that at least the share q
        of them does not exceed.

        Args:
            values: Of each token.
            row_of: Which row it belongs to.
            q: Such as 0.99.
        """
        if not len(values):
            return Interval(math.nan, math.nan, math.nan)
        order = np.argsort(values, kind="stable")
        ordered, rows = values[order], row_of[order]
        resamples = min(self.resamples, max(LEAST_RESAMPLES, MOST_NUMBERS // len(values)))
        draws = self._draws(resamples, len(values))
        found = [ordered[_weighted_place(counts[:, rows], q)] for counts in draws]
        place = _weighted_place(np.ones((1, len(values))), q)
        return _middle(float(ordered[place][0]), np.concatenate(found))

    def _draws(self, resamples: int, width: int) -> Iterator[NDArray[np.float64]]:
        """Yield how often each row was drawn, a block (resamples, rows) at a time.

        Args:
            resamples: How many.
            width: Numbers that a resample will need.
        """
        random = np.random.default_rng(self.seed)
        at_once = max(1, BLOCK_NUMBERS // max(width, self.rows))
        for begin in range(0, resamples, at_once):
            count = min(at_once, resamples - begin)
            drawn = random.integers(self.rows, size=(count, self.rows))
            flat = (drawn + self.rows * np.arange(count)[:, None]).ravel()
            counts = np.bincount(flat, minlength=count * self.rows)
            yield counts.reshape(count, self.rows).astype(float)


def _weighted_place(weights: NDArray[np.float64], q: float) -> NDArray[np.int64]:
    """Return for each row of weights the first place where at least the share q is reached."""
    reached = weights.cumsum(1)
    # A little less, since 0.99 * 100 is 99.00000000000001.
    needed = q * reached[:, -1:] * (1 - 1e-12)
    places: NDArray[np.int64] = (reached < needed).sum(1)
    return places.clip(max=weights.shape[1] - 1)


def _middle(value: float, drawn: NDArray[np.float64]) -> Interval:
    """Return the middle of what was drawn, less draws of nothing but empty rows."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, math.nan, math.nan)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def rule_of_three(rows: int) -> float:
    """Return the share below which something lies, with 95 % confidence, that no row showed."""
    return 1 - (1 - LEVEL) ** (1 / rows) if rows else 1.0


class McNemar(NamedTuple):
    """Whether two widths are right equally often on the same rows."""

    worse: int
    """Rows that the reference gets right and the candidate wrong."""
    better: int
    """Rows that only the candidate gets right."""
    exact_p: float
    mid_p: float
    """Less conservative; the one to read (Fagerland, Lydersen and Laake 2013)."""


def mcnemar(worse: int, better: int) -> McNemar:
    """Test whether changes go either way equally often (McNemar 1947), with exact probabilities.

    If they do, `worse` of the changed rows is a binomial count with probability 1/2. The exact p
    is that of a split at least as uneven; mid-p counts just as uneven ones half.
    """
    changed, fewer = worse + better, min(worse, better)
    if not changed:
        return McNemar(0, 0, 1.0, 1.0)
    ways = [math.comb(changed, k) for k in range(fewer + 1)]
    # Whole numbers until the end: 2 ** changed is more than a float holds from 1,024 on.
    both = 1 if 2 * fewer == changed else 2
    as_uneven = both * ways[-1]
    more_uneven = 2 * sum(ways[:-1])
    everything = 2**changed
    return McNemar(
        worse,
        better,
        (more_uneven + as_uneven) / everything,
        (2 * more_uneven + as_uneven) / (2 * everything),
    )
