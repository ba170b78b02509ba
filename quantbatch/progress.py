"""Telling a person, or a log, how a run goes."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from quantbatch.preflight import Job
    from quantbatch.records import Receipt
    from quantbatch.report import RunFigures

JSON_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Told what happens in a run, in this order."""

    def planned(self, job: Job) -> None:
        """The job may start."""
        ...

    def started(self, device: str) -> None:
        """Ray is there; replicas are loading the model."""
        ...

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """A chunk is committed."""
        ...


class Silent:
    """Says nothing."""

    def planned(self, job: Job) -> None:
        """See `Progress`."""

    def started(self, device: str) -> None:
        """See `Progress`."""

    def committed(self, receipt: Receipt, figures: RunFigures) -> None:
        """See `Progress`."""
