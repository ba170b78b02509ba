"""Random numbers by hashing: as good as those of a generator, for seeds and steps of any kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.engine.noise import gumbel_noise

torch.set_num_threads(1)
ROWS, WORDS = 64, 2000
SEEDS = {
    "consecutive": torch.arange(ROWS),
    "high bits only": torch.arange(ROWS) << 32,
    "highest bits only": torch.arange(ROWS) << 57,
    "multiples of 2**16": torch.arange(ROWS) << 16,
    "hashed": (torch.arange(ROWS) * 0x1E3779B97F4A7C15) & (2**63 - 1),
}


def uniform(seeds: torch.Tensor, steps: torch.Tensor, words: int = WORDS) -> torch.Tensor:
    """The numbers before they became Gumbel noise, in float64."""
    return (-(-gumbel_noise(seeds, steps, words).double()).exp()).exp()


@pytest.mark.parametrize("kind", SEEDS)
@pytest.mark.parametrize("step", [0, 1, 4096, 2**31 - 1])
def test_numbers_are_uniform(kind: str, step: int) -> None:
    found = uniform(SEEDS[kind], torch.full((ROWS,), step)).flatten()
    assert found.min() > 0
    assert found.max() < 1
    count = found.numel()
    # 1.63 / sqrt(n) is Kolmogorov and Smirnov's bound for 1 %; the numbers are always the same.
    sorted_ = found.sort().values
    ideal = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert float((sorted_ - ideal).abs().max()) < 1.63 / count**0.5
    bins = torch.histc(found.float(), bins=64, min=0, max=1)
    chi2 = float(((bins - count / 64) ** 2 / (count / 64)).sum())
    assert 25 < chi2 < 118, "63 degrees of freedom, beyond one in 30,000 on either side"


@pytest.mark.parametrize("kind", SEEDS)
def test_neighbours_are_independent(kind: str) -> None:
    """Tokens beside each other, steps beside each other, seeds beside each other."""
    seeds = SEEDS[kind]
    now, later = (uniform(seeds, torch.full((ROWS,), step)) for step in (5, 6))
    pairs = {
        "tokens": (now[:, :-1], now[:, 1:]),
        "steps": (now, later),
        "seeds": (now[:-1], now[1:]),
        "seeds by two": (now[:-2], now[2:]),
        "a step on, a token on": (now[:, :-1], later[:, 1:]),
    }
    for name, (one, other) in pairs.items():
        for power in (1, 2):
            both = torch.stack([(one - 0.5).abs().flatten() ** power, other.flatten() ** power])
            correlation = float(torch.corrcoef(both)[0, 1])
            assert abs(correlation) < 4.5 / one.numel() ** 0.5, name
        joint = torch.histogramdd(
            torch.stack([one.flatten(), other.flatten()], 1).float(),
            bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0],
        ).hist  # fmt: skip
        mean = one.numel() / 64
        chi2 = float(((joint - mean) ** 2 / mean).sum())
        assert 25 < chi2 < 118, name


def test_no_two_seeds_or_steps_have_the_same_numbers() -> None:
    seeds = torch.tensor(sorted(set(torch.cat(list(SEEDS.values())).tolist())))
    rows = gumbel_noise(seeds, torch.zeros_like(seeds), 8)
    assert len({tuple(row) for row in rows.tolist()}) == len(seeds)
    steps = torch.arange(20_000)
    rows = gumbel_noise(torch.full_like(steps, 2**40 + 3), steps, 8)
    assert len({tuple(row) for row in rows.tolist()}) == len(steps)


def test_it_is_gumbel_noise() -> None:
    found = gumbel_noise(torch.arange(200), torch.zeros(200, dtype=torch.long), 1000)
    assert float(found.mean()) == pytest.approx(0.57722, abs=0.012)
    assert float(found.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**20)), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_a_number_depends_on_its_own_seed_step_and_token_only(
    rows: list[tuple[int, int]], words: int
) -> None:
    seeds, steps = (torch.tensor(column) for column in zip(*rows, strict=True))
    together = gumbel_noise(seeds, steps, 40)
    for row in range(len(rows)):
        alone = gumbel_noise(seeds[row : row + 1], steps[row : row + 1], words)
        assert torch.equal(alone[0], together[row, :words])
