"""Turning what file systems and S3's clients raise into one error with a remedy."""

from __future__ import annotations

import contextlib
import errno
import re
from typing import TYPE_CHECKING

from quantbatch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


def redact(text: str) -> str:
    """Take user info and query strings, where credentials hide, out of the URIs in a text."""
    # A password may hold @, and a secret key of AWS a slash. The bounds keep the time linear.
    text = re.sub(r"(?<=://)(?:[^/\s]{0,300}@|[^/\s@]{0,300}:(?!\d+/)\S{0,300}@)", "", text)
    return re.sub(r"(://[^\s?]{0,300})\?\S*", r"\1", text)


@contextlib.contextmanager
def explained(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what file systems and botocore raise into one StorageError with a remedy.

    Args:
        uri: The store, for the message.
        writing: Whether a missing file is an error like others: a folder that can't be made.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "specified bucket does not exist" in str(error):
            raise StorageError(
                f"{redact(uri)}: there is no such bucket", "create it, or correct the uri"
            ) from error
        if writing:
            raise StorageError(f"{redact(uri)}: {error}", "choose another folder") from error
        raise
    except PermissionError as error:
        raise StorageError(
            f"{redact(uri)}: access denied ({redact(str(error))})",
            "check the permissions, and for S3 the credentials in the environment",
        ) from error
    except OSError as error:
        raise StorageError(f"{redact(uri)}: {redact(str(error))}", _remedy(error)) from error
    except Exception as error:
        # botocore's exceptions have no common base with OSError, and importing it here would cost
        # 0.3 s.
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise
        raise StorageError(
            f"{redact(uri)}: {redact(str(error))}",
            "check the endpoint, the region and the credentials",
        ) from error


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room and run the same command again; nothing committed is lost"
        case errno.EROFS:
            return "the file system is read-only: choose another output"
        case errno.ENOTDIR | errno.EEXIST:
            return "a part of the path is a file: choose another path"
        case _:
            return "check the path, or the endpoint and credentials of the store"
