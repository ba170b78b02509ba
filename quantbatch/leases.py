"""Which driver works on which shard, so that rivals don't do the same work twice.

Two drivers on one output are safe without this: the commit records decide (see `ledger`). Leases
only spare work, so all that can go wrong with one is that a shard is computed twice, or that a
driver waits a minute for a rival that died on another machine.

    OUT/_quantbatch/drivers/<driver>   put again every few seconds by a driver that works
    OUT/_quantbatch/leases/<shard>     claimed by the driver that begins a shard: who it is

A lease counts as long as its driver's object is at most TTL_S older than our own, both by the
store's clock: what our machines think of the time plays no part. A driver that ends takes its
object away, and one that was killed on this machine is seen to be gone at once, so that the next
run of the same command need not wait for it.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import logging
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.errors import StorageError
from quantbatch.storage import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quantbatch.storage import Store

logger = logging.getLogger(__name__)

DRIVERS, LEASES = f"{PRIVATE}/drivers", f"{PRIVATE}/leases"
TTL_S = 60.0
"""How long a driver is believed to work after its last sign of life."""
BEAT_S = TTL_S / 4
"""Seconds between two signs of life: three may get lost."""
READS_AT_ONCE = 16


class Driver(NamedTuple):
    """A driver process, so named that others on the same machine can tell whether it runs."""

    id: str
    machine: str
    """Of this boot and these process numbers; empty where the system does not say."""
    pid: int
    started: str
    """When the process began, in the kernel's ticks: numbers of processes are used again."""

    @classmethod
    def this(cls) -> Driver:
        """Return a name for this process as a driver."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex[:12], _machine(), pid, _started(pid) or "")

    @classmethod
    def from_bytes(cls, data: bytes) -> Driver:
        """Read what `to_bytes` wrote; what is damaged names nobody."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls("", "", 0, "")

    def to_bytes(self) -> bytes:
        """Return the name as JSON."""
        return json.dumps(self._asdict()).encode()

    def is_gone(self) -> bool:
        """Tell whether the process is known to have ended: only if it ran on this machine."""
        return (
            bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started
        )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - no path: pid:[...]
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process began; None if there is none, or only what its parent did not reap."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


class Survey(NamedTuple):
    """Who works on the shards that are left."""

    held: frozenset[int]
    """By rivals, now."""
    abandoned: frozenset[int]
    """By rivals that are gone: some of their chunks may be done."""


@dataclass
class Leases:
    """The leases of an output, as one driver sees them; copies in other processes are as good."""

    store: Store
    driver: Driver
    _taken: dict[int, bool] = field(default_factory=dict)
    _abandoned: frozenset[int] = frozenset()
    """As of the last survey."""

    def survey(self, shards: Iterable[int]) -> Survey:
        """Look at who works on some shards, before a round over what is left of them.

        Raises:
            StorageError: The store does not say.
        """
        listed = {Path(info.key).stem for info in self.store.list(LEASES)}
        wanted = [shard for shard in dict.fromkeys(shards) if f"{shard:06d}" in listed]
        with ThreadPoolExecutor(READS_AT_ONCE, "leases") as pool:
            holders = dict(zip(wanted, pool.map(self._holder, wanted), strict=True))
        others = {shard: h for shard, h in holders.items() if h.id != self.driver.id}
        working = self._working(others.values()) if others else frozenset()
        held = frozenset(shard for shard, holder in others.items() if holder.id in working)
        self._abandoned = frozenset(others) - held
        self._taken.clear()
        return Survey(held, self._abandoned)

    def take(self, shard: int) -> bool:
        """Make a shard ours unless a rival works on it, and tell which it is.

        The answer stays the same until the next survey. A shard that a rival worked on since the
        last one is not ours either: what it did must be looked at first.
        """
        if shard not in self._taken:
            try:
                self._taken[shard] = self._take(shard)
            except StorageError as error:
                # Work that may be done twice is better than none.
                logger.debug("shard %d could not be leased: %s", shard, error)
                return True
        return self._taken[shard]

    def is_refused(self, shard: int) -> bool:
        """Tell whether `take` found a rival on a shard."""
        return not self._taken.get(shard, True)

    def _take(self, shard: int) -> bool:
        key, ours = f"{LEASES}/{shard:06d}.json", self.driver.to_bytes()
        holder = Driver.from_bytes(self.store.claim(key, ours))
        if holder.id != self.driver.id and shard in self._abandoned and not self._working([holder]):
            self.store.put(key, ours)
            # Another driver may have found the same: whose object it is now has the shard.
            holder = Driver.from_bytes(self.store.read(key))
        return holder.id == self.driver.id

    def _holder(self, shard: int) -> Driver:
        try:
            return Driver.from_bytes(self.store.read(f"{LEASES}/{shard:06d}.json"))
        except FileNotFoundError:
            return Driver.from_bytes(b"")

    def _working(self, drivers: Iterable[Driver]) -> frozenset[str]:
        """Return the ids of those rivals that are working, as far as can be known."""
        beating = self._beating_rivals()
        return frozenset(d.id for d in set(drivers) if d.id in beating and not d.is_gone())

    def _beating_rivals(self) -> frozenset[str]:
        found = {Path(info.key).stem: info.modified_s for info in self.store.list(DRIVERS)}
        now = found.pop(self.driver.id, None)
        if now is None:  # somebody tidied up
            self._beat()
            now = self.store.info(self._key).modified_s
        return frozenset(id for id, beat in found.items() if now - beat <= TTL_S)

    @property
    def _key(self) -> str:
        return f"{DRIVERS}/{self.driver.id}.json"

    def _beat(self) -> None:
        self.store.put(self._key, self.driver.to_bytes())

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life from a thread; at the end, all that is leased to us is free."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                try:
                    self._beat()
                except StorageError as error:
                    # Rivals may then take over what we work on, which is only a pity.
                    logger.debug("no sign of life could be given: %s", error)

        self._beat()
        thread = threading.Thread(target=beat, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=2)  # a store that hangs must not hold up the end
            with contextlib.suppress(StorageError):
                self.store.delete(self._key)


@dataclass(frozen=True)
class Permits:
    """Tells the gate which chunks may begin: those of shards that we can lease."""

    leases: Leases
    first_chunks: tuple[int, ...]
    """Of each shard."""

    def begin(self, chunk: int, *, reading: bool) -> bool:
        """Lease the shard of a chunk, and tell whether it is ours.

        A chunk that is only read takes no lease: replicas may be long in coming.
        """
        shard = bisect.bisect_right(self.first_chunks, chunk) - 1
        return not self.leases.is_refused(shard) if reading else self.leases.take(shard)
