"""What a job asks of Ray, as far as it is arithmetic."""

from __future__ import annotations

import pytest

from quantbatch.cluster import chunks_in_flight
from quantbatch.spec import Cluster


@pytest.mark.parametrize(
    ("replicas", "chunks", "rows_per_chunk", "expected"),
    [
        (1, 1000, 64, 16),  # 1,024 rows
        (1, 1000, 2048, 2),  # one and the next
        (2, 3, 64, 2),  # so that both replicas get one
        (4, 40, 64, 5),  # half of a share of ten: the rest goes to whoever is free
        (8, 64, 128, 4),
        (1, 1, 10, 2),
    ],
)
def test_enough_chunks_for_a_full_batch_and_few_enough_to_share_the_end(
    replicas: int, chunks: int, rows_per_chunk: int, expected: int
) -> None:
    cluster = Cluster(replicas=replicas)
    assert chunks_in_flight(cluster, chunks=chunks, rows=chunks * rows_per_chunk) == expected


def test_a_number_of_chunks_is_obeyed() -> None:
    assert chunks_in_flight(Cluster(chunks_in_flight=7), chunks=1, rows=1) == 7
