"""What a process can still say when it dies, and a watchdog for calls that never return.

A segmentation fault, or a kernel that hangs while it holds Python's lock, leaves nobody to raise an
exception. `faulthandler` does both from C: on a fatal signal, or when a deadline passes, it writes
where every thread was to a file that was opened before, and ends the process. The process of the
same name that starts after it on the same machine reads the file and tells (`gate`).

There is one of each in a process, as there is one `faulthandler`. What is killed from outside (out
of memory) or leaves by itself says nothing. Nor does anybody where there is no folder that nobody
else can write to: the name of a file that we open must not be another user's link.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from quantbatch.suspects import DIED, HUNG, Death

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

ARMED_AGAIN_AFTER_S = 1.0
"""Setting the deadline again starts a thread: 60 us (measured), too much for each step."""
KEPT_S = 24 * 3600.0
"""How long last words are kept of a process that was not started again on the same machine."""
_FATAL = re.compile(r"Fatal Python error: (.+)|Timeout \((.+)\)!")
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')


class LastWords:
    """Keeps the file of a process.

    Args:
        name: Of the process: the next of that name finds what it left.
        folder: Where the file is; None is a folder of this user's in the temporary one.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.before = Death()
        """How the process of that name before this one ended."""
        try:
            folder = folder or Path(tempfile.gettempdir(), f"quantbatch-{os.getuid()}")
            self._path = _ours(folder) / f"{re.sub(r'[^A-Za-z0-9-]', '_', name)}.words"
            self._file = self._opened()
        except OSError as error:
            logger.warning("a process that dies can't say of what: %s", error)
            self._path = Path(os.devnull)
            self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        faulthandler.enable(self._file)

    def _opened(self) -> IO[str]:
        with contextlib.suppress(FileNotFoundError):
            self.before = read(self._path.read_text(encoding="utf-8", errors="replace"))
        file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        # Tells `_ours` that this process lives.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return file

    def say(self, words: str) -> None:
        """Leave words before the process ends itself."""
        with contextlib.suppress(OSError):  # a full disk must not keep it from that
            self._file.write(f"Fatal Python error: {words}\n")
            self._file.flush()

    def watchdog(self, deadline_s: float) -> Watchdog:
        """Return a watchdog that ends the process if a step takes too long."""
        return Watchdog(self._file, deadline_s)

    def close(self) -> None:
        """Leave nothing behind: the process ends well."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._file.close()
        if self._path != Path(os.devnull):
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def within(deadline_s: float, words: LastWords | None) -> Iterator[None]:
    """End the process if what is done meanwhile takes too long; not one that has no last words."""
    dog = words.watchdog(deadline_s) if words else None
    if dog:
        dog.alive()
    try:
        yield
    finally:
        if dog:
            dog.rest()


class Watchdog:
    """Ends the process if nobody says for some time that work goes on."""

    def __init__(self, file: IO[str], deadline_s: float) -> None:
        self._file = file
        self._deadline_s = deadline_s
        self._armed_at: float | None = None

    def alive(self) -> None:
        """Say that work goes on; a step is beginning, or a part of it is done."""
        now = time.monotonic()
        if self._armed_at is None or now - self._armed_at > ARMED_AGAIN_AFTER_S:
            self._armed_at = now
            # A second more: the step may begin just before the timer would be set again.
            faulthandler.dump_traceback_later(
                self._deadline_s + ARMED_AGAIN_AFTER_S, exit=True, file=self._file
            )

    def rest(self) -> None:
        """Say that there is nothing to do."""
        if self._armed_at is not None:
            faulthandler.cancel_dump_traceback_later()
            self._armed_at = None


def _ours(folder: Path) -> Path:
    """Make a folder that only this user can write to, and remove what is of no use any more: what
    Ray ends is not asked to clean up.

    Raises:
        PermissionError: It is another's, or others can write to it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    for path in folder.glob("*.words"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                with path.open(encoding="utf-8") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
    return folder


def read(text: str) -> Death:
    """Understand what `faulthandler` wrote."""
    found = _FATAL.search(text)
    if found is None:
        return Death()
    frame = _FRAME.search(text, found.end())
    where = f", in {frame[3]} ({Path(frame[1]).name}:{frame[2]})" if frame else ""
    if found[2]:
        return Death(HUNG, f": it took longer than {found[2]}{where}")
    return Death(DIED, f": {found[1].strip()[:500]}{where}")
