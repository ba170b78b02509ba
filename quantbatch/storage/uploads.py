"""Uploads to S3 that were never completed: invisible, and paid for until they are aborted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantbatch.storage.s3 import S3Store
from quantbatch.storage.trouble import explained

if TYPE_CHECKING:
    from quantbatch.storage.contract import Store


class Upload(NamedTuple):
    """The parts of an object that is not there yet."""

    path: str
    """The object's key in the bucket."""
    id: str
    begun_s: float
    """When it was begun, in seconds since 1970 by the store's clock."""


def unfinished(store: Store) -> list[Upload]:
    """Return the uploads under a store that were begun and not completed; only S3 has any."""
    if not isinstance(store, S3Store):
        return []
    bucket, prefix = _place(store)
    uploads: list[Upload] = []
    marker: dict[str, str] = {}
    with explained(store.uri):
        while True:
            found = store._fs.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
            )
            for each in found.get("Uploads", ()):
                begun_s = each["Initiated"].timestamp()
                uploads.append(Upload(each["Key"], each["UploadId"], begun_s))
            if not found.get("IsTruncated"):
                return uploads
            marker = {
                "KeyMarker": found["NextKeyMarker"],
                "UploadIdMarker": found["NextUploadIdMarker"],
            }


def abort(store: Store, upload: Upload) -> None:
    """Take the parts of an upload away; whoever is still at it fails to complete it."""
    assert isinstance(store, S3Store), "only S3 has uploads"
    bucket, _ = _place(store)
    with explained(store.uri):
        store._fs.call_s3(
            "abort_multipart_upload", Bucket=bucket, Key=upload.path, UploadId=upload.id
        )


def _place(store: S3Store) -> tuple[str, str]:
    """Return the bucket of a store, and what the keys of its objects begin with."""
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/" if prefix else ""
