"""A gate that is gone, as its processes and its driver see it; Ray's part is a stand-in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ray.exceptions import ActorDiedError

from quantbatch.gatekeeper import Door, RemoteGate
from quantbatch.suspects import Death

if TYPE_CHECKING:
    from collections.abc import Callable


class Gone:
    """An actor that died: whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *_: object, **__: object) -> str:
        return "a reference"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: str) -> None:
        assert reference == "a reference"
        raise ActorDiedError

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(Door, "name", "a")


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda door: door.starts(Death()), ""),
        (lambda door: door.ready(), None),
        (lambda door: door.begin(1), False),
        (lambda door: door.end(1, answered=True), None),
    ],
)
def test_a_process_goes_on_without_chunks(ask: Callable[[Door], object], answer: object) -> None:
    assert ask(Door(Gone(), "round")) == answer


def test_a_driver_that_drains_has_nothing_to_wait_for() -> None:
    gate = RemoteGate.__new__(RemoteGate)
    gate._gate = Gone()
    assert gate.close() == set()
    with pytest.raises(ActorDiedError):
        gate.lost()  # the run ends with it, see `cluster.explained`
