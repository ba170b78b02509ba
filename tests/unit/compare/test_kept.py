"""Records of widths that are done: what comes back, and when they count."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from quantbatch.compare.figures import Measured, Said
from quantbatch.compare.job import Choices, prepare
from quantbatch.compare.kept import Kept
from tests.unit.compare.test_report import LOADING, apart, said
from tests.unit.compare.test_rows import spec_of, write

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.compare.candidates import Candidate

OURS = said("abc", "abd", None)
MEASURED = Measured("nf4", LOADING, said("abc", None, " x ", cut="abc"), apart(0.1 + 0.2, 3))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    write(tmp_path, [3])
    return Kept(tmp_path / "kept", prepare(spec_of(tmp_path), Choices("16,4")), "cpu")


def candidate(kept: Kept) -> Candidate:
    return kept.prepared.candidates[1]


def test_a_width_comes_back_as_it_was(kept: Kept) -> None:
    assert kept.load(candidate(kept), OURS) is None
    kept.save(MEASURED, candidate(kept), OURS)
    found = kept.load(candidate(kept), OURS)
    assert found is not None
    assert (found.name, found.loading, found.said) == ("nf4", LOADING, MEASURED.said)
    assert found.differences is not None
    assert MEASURED.differences is not None
    for field in fields(found.differences):
        there, here = (getattr(m.differences, field.name) for m in (found, MEASURED))
        assert np.array_equal(there, here)
        assert np.asarray(there).dtype == np.asarray(here).dtype
    kept.clear()
    assert not kept.folder.exists()
    kept.clear()


def test_it_counts_for_the_same_comparison_only(kept: Kept, tmp_path: Path) -> None:
    kept.save(MEASURED, candidate(kept), OURS)
    assert kept.load(candidate(kept), Said(OURS.answers, 99.0)) is not None
    others: list[tuple[Kept, Any, Said]] = [
        (kept, candidate(kept), said("abc", "abX", None)),
        (replace(kept, device="cuda"), candidate(kept), OURS),
        (kept, replace(candidate(kept), model=kept.prepared.candidates[0].model), OURS),
    ]
    for choices in (Choices("16,4", rows=2), Choices("16,4", with_prompts=True)):
        prepared = prepare(spec_of(tmp_path), choices)
        others.append((replace(kept, prepared=prepared), candidate(kept), OURS))
    for where, width, reference in others:
        assert where.load(width, reference) is None


def test_a_record_that_is_cut_short_does_not_count(kept: Kept) -> None:
    kept.save(MEASURED, candidate(kept), OURS)
    path = kept.folder / "nf4.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert kept.load(candidate(kept), OURS) is None
