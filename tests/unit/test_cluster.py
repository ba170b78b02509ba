"""What a job asks of Ray, as far as it is arithmetic."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from ray._private.worker import print_to_stdstream
from ray.exceptions import ActorDiedError, OutOfDiskError, RaySystemError
from typing_extensions import override

from quantbatch import dataset_threads, sizing
from quantbatch.cluster import Dropped, _quiet_raylet, card_names, chunks_in_flight, explained
from quantbatch.errors import Stopped
from quantbatch.spec import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def node(*, alive: bool = True, gpus: int = 1, label: str = "", **cards: int) -> dict[str, Any]:
    resources = {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {})
    resources |= {f"accelerator_type:{name}": 1.0 for name in cards}
    labels = {"ray.io/accelerator-type": label} if label else {}
    return {"Alive": alive, "Resources": resources, "Labels": labels}


def test_the_cards_of_a_cluster_are_those_of_its_live_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [
        node(A10G=1),
        node(A10G=1, label="A10G"),
        node(label="L40S"),
        node(alive=False, T4=1),
        node(gpus=0, V100=1),  # a head that names a card without having one
        {"Alive": True, "Resources": {"GPU": 1.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0})
    assert card_names(Cluster(gpus_per_replica=0)) == ()
    assert card_names(Cluster(gpus_per_replica=5, cpu_fallback=True)) == ()
    assert card_names(Cluster()) == ("A10G", "L40S")
    smallest = sizing.smallest(card_names(Cluster()))
    assert smallest is not None
    assert smallest.name == "A10G"
    assert sizing.smallest(["AMD-Instinct-MI300X-OAM"]) is None
    assert sizing.smallest(["A100", "A100-80G"]) == sizing.smallest(["A100-40G"])


@pytest.mark.parametrize(
    "error", [OutOfDiskError("Local disk is full\nand more"), ActorDiedError()]
)
def test_what_is_lost_on_a_node_comes_again_and_is_no_fault_of_ours(error: Exception) -> None:
    dropped = Dropped()
    dropped.note(error)
    dropped.raise_fault()
    assert dropped.cause
    assert "\n" not in dropped.cause
    with pytest.raises(Stopped, match="the same command continues"), explained():
        raise error


def test_what_our_stages_raise_is_a_fault() -> None:
    dropped = Dropped()
    dropped.note(AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        dropped.raise_fault()


def test_what_ray_says_of_processes_that_die_is_kept_off_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(what: str) -> None:
        # As `ray._private.worker.listen_error_messages` does.
        data = {"lines": [f"A worker died {what}"], "pid": "raylet", "is_err": False}
        print_to_stdstream(data, ignore_prefix=False)

    with _quiet_raylet():
        say("in a run")
    assert capsys.readouterr().out == ""
    say("of somebody else")
    assert "of somebody else" in capsys.readouterr().out


def test_what_a_signal_raises_in_the_middle_of_a_dataset_is_not_logged_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("ray.data.exceptions")
    with Dropped().noted():
        log.error("Full stack trace:")
    assert not caplog.records
    assert not log.disabled


class _Executing(threading.Thread):
    """Executes a dataset until it is told to stop, and may not like that."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(daemon=True)
        self.error, self.told = error, threading.Event()

    @override
    def run(self) -> None:
        self.told.wait(60)

    def shutdown(self, *, force: bool) -> None:
        assert not force
        self.told.set()
        if self.error:
            raise self.error


@pytest.fixture
def executing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Executing]]:
    monkeypatch.setattr(dataset_threads, "StreamingExecutor", _Executing)
    found = [_Executing(RaySystemError("the cluster is gone")), _Executing(None)]
    for each in found:
        each.start()
    yield found
    for each in found:
        each.told.set()


def test_an_execution_that_can_not_be_stopped_changes_nothing(executing: list[_Executing]) -> None:
    dataset_threads.end()
    assert not any(each.is_alive() for each in executing)
