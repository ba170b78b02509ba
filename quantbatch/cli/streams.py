"""Standard output and error where the disk behind them may be full.

A log is often a file, and a line that it can't take must not end a job of hours: what is printed
while a job runs is then lost, no more. (Python itself would raise at the print, keep the line in
its buffer, raise again at the next one, and in the end leave with code 120.)

A result that is lost is said on stderr. The exit code of `run` tells of the job, which is done;
that of another command, whose result is what it is for, is then 2.
"""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""EIO too: a network disk says it late, of what it took before."""
EXIT_RESULT_LOST = 2


class _Forgiving(io.FileIO):
    """A file to which a write fails for no lack of room."""

    forgiven = _NO_ROOM
    """A pipe that nobody reads still breaks."""
    lost: OSError | None = None

    @override
    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in self.forgiven:
                raise
            self.lost = error
            return memoryview(data).nbytes


def forgive() -> _Forgiving | None:
    """Make stdout and stderr lose what their disks can't take; return the file under stdout.

    Both write what the terminal's encoding lacks, in a file name or a row, as escapes. Streams that
    a test put in their place stay.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        log = _Forgiving(2, "w", closefd=False)
        # Ctrl-C ends all of `quantbatch run 2>&1 | tee log`; what is under way is finished still.
        log.forgiven = _NO_ROOM | {errno.EPIPE}
        sys.stderr = _text_over(log, sys.stderr)
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        under = _Forgiving(1, "w", closefd=False)
        sys.stdout = _text_over(under, sys.stdout)
        return under
    return None


def _text_over(file: _Forgiving, before: io.TextIOWrapper) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
    )


def code_after(code: int | str | None, stdout: _Forgiving | None, args: Sequence[str]) -> int:
    """Return the exit code of a command, and complain if its result was lost.

    Args:
        code: With which it would leave.
        stdout: What `forgive` returned.
        args: The command line.
    """
    sys.stdout.flush()
    code = code if isinstance(code, int) else int(code is not None)
    if stdout is None or stdout.lost is None:
        return code
    sys.stderr.write(f"error: stdout: {stdout.lost.strerror}: the result is lost\n")
    return code if code or args[:1] == ["run"] else EXIT_RESULT_LOST
