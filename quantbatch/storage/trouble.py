"""Turning what file systems and S3's clients raise into one error with a remedy."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import re
import time
from typing import TYPE_CHECKING, Any

from quantbatch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What systems say where something is too large to be written."""
_OVERLOADED = {408, 429, *range(500, 600)} - {501}


def redact(text: str) -> str:
    """Take user info and query strings, where credentials hide, out of the URIs in a text."""
    # A password may hold @, and a secret key of AWS a slash. The bounds keep the time linear.
    text = re.sub(r"(?<=://)(?:[^/\s]{0,300}@|[^/\s@]{0,300}:(?!\d+/)\S{0,300}@)", "", text)
    return re.sub(r"(://[^\s?]{0,300})\?\S*", r"\1", text)


def answer_of(error: BaseException) -> dict[str, Any] | None:
    """Return the answer of S3 that an error tells of; None if there was none.

    It is that of botocore's ClientError, of which s3fs makes OSErrors; to import either takes 0.3 s
    and more.
    """
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return answer
    return None


def code_of(error: BaseException) -> str:
    """Return S3's name for an error, such as NoSuchKey; empty if it has none."""
    answer = answer_of(error)
    return str(answer["Error"].get("Code", "")) if answer else ""


def said(error: BaseException) -> str:
    """Return an error's text, and S3's name for it."""
    answer = answer_of(error)
    text = str(answer["Error"].get("Message", "")) if answer else str(error)
    return redact(": ".join(filter(None, (code_of(error), text))) or type(error).__name__)


@contextlib.contextmanager
def explained(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what file systems and botocore raise into one StorageError with a remedy.

    Args:
        uri: The store, for the message.
        writing: Whether a missing file is an error like others: a folder that can't be made.
    """
    where = redact(uri)
    try:
        yield
    except FileNotFoundError as error:
        if code_of(error) == "NoSuchBucket":
            raise StorageError(
                f"{where}: there is no such bucket", "create it, or correct the uri"
            ) from error
        if writing:
            raise StorageError(f"{where}: {error}", "choose another folder") from error
        raise
    except PermissionError as error:
        if code_of(error) == "RequestTimeTooSkewed":
            raise StorageError(f"{where}: {_skew(error)}", "set this machine's clock") from error
        raise StorageError(
            f"{where}: access denied ({said(error)})",
            "check the permissions, and for S3 the credentials in the environment",
        ) from error
    except OSError as error:
        raise StorageError(f"{where}: {said(error)}", _remedy(error)) from error


def _skew(error: PermissionError) -> str:
    """Say that a request was refused for its time, and how far that is from the store's."""
    answer = answer_of(error) or {}
    theirs = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    text = "the store's clock and this machine's are too far apart"
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(theirs).timestamp()
    except ValueError:
        return text
    return f"{text}: ours is {abs(ahead_s):,.0f} s {'ahead' if ahead_s > 0 else 'behind'}"


def _remedy(error: OSError) -> str:
    answer = answer_of(error)
    if answer and answer["ResponseMetadata"].get("HTTPStatusCode", 0) in _OVERLOADED:
        return "the store has been in trouble for too long; run the same command again later"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room and run the same command again; nothing committed is lost"
        case errno.EFBIG:
            return "the file system takes no larger files: lower output.rows_per_part"
        case errno.EROFS:
            return "the file system is read-only: choose another output"
        case errno.ENOTDIR | errno.EEXIST:
            return "a part of the path is a file: choose another path"
        case _:
            return "check the path, or the endpoint and credentials of the store"
