"""How long one call to a store is tried again, and when.

One call is one HTTP request with its whole answer. It is tried again after trouble that passes:
soon at first, then less and less often, each time after a random part of the wait, so that the many
workers of a job don't come back at the same moment. There is one such loop, around each single
call; what the clients have of their own is switched off, because loops within loops multiply: five
tries of five tries of five are a storm for a store that asks for mercy, and hours for a user.

The loop itself is ten lines in `requests`; tenacity would bring a dependency and the same numbers.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTAGE_S = 150.0
"""Of trouble that one call sits out: twice a minute, which is what the failover of a load balancer
or a restart of a store takes, and some; a job that then stops is continued by the same command."""

FIRST_CONTACT_S = 6.0
"""Of trouble where nothing has ever answered: most often a wrong address, and a user waits."""

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
"""Upper ends of the first wait, and of those to which they double. After 5 s of trouble there are
some 10 tries a minute from each call."""

ANSWER_S = 30.0
"""Until an answer, or the end of its body, must be there, on top of the time for the bytes. S3's
own slowest percentiles are some seconds."""

COMPLETE_S = 120.0
"""The same for putting together the parts of an upload, which takes S3 minutes for big ones; it
sends spaces meanwhile."""

SLOWEST_BYTES_PER_S = 50_000
"""A transfer slower than this is broken off and tried again on another connection. A hundred times
slower than the slowest link on which a job makes sense."""

SAID_AFTER_S = 5.0
"""Of trouble before a line in the log tells of it."""


@dataclass(frozen=True)
class Patience:
    """The numbers, and the clock by which they are meant; tests have their own."""

    outage_s: float = OUTAGE_S
    first_contact_s: float = FIRST_CONTACT_S
    first_wait_s: float = FIRST_WAIT_S
    answer_s: float = ANSWER_S
    complete_s: float = COMPLETE_S
    slowest_bytes_per_s: float = SLOWEST_BYTES_PER_S
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def waits(self, limit_s: Callable[[], float]) -> Iterator[float]:
        """Yield how long to wait before each further try; end when there is to be none.

        Args:
            limit_s: How long trouble is sat out from the moment at which the first wait is asked
                for; asked each time.
        """
        began = self.clock()
        for tries in itertools.count():
            longest = min(self.first_wait_s * 2.0**tries, LONGEST_WAIT_S)
            wait = random.uniform(0, longest)
            if self.clock() + wait > began + limit_s():
                return
            yield wait

    def time_for(self, nbytes: int) -> float:
        """Return how long a call that moves some bytes may take."""
        return self.answer_s + nbytes / self.slowest_bytes_per_s
