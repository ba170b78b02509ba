"""Each call to S3, tried until it is answered: the one place where calls are tried again.

What passes: no connection, a connection that breaks before or after the store did what it was
asked, a body that ends early, an answer that does not come or comes too slowly, status 500 to 599
but 501, 408, 429, and the few codes of `_PASSING`. All else is an answer: no such object, access
denied, an upload that is not there.

Whether a call whose answer was lost was done is not known. To do it again is harmless for all calls
but two. A conditional put then meets itself: `S3Store.claim` reads what is there. And the end of an
upload in parts finds the upload gone: `S3Store` uploads it again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import s3fs
from aiohttp import ClientError as BrokenAnswer
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from typing_extensions import override

from quantbatch.storage.patience import SAID_AFTER_S, Patience
from quantbatch.storage.trouble import answer_of, code_of, said

if TYPE_CHECKING:
    from quantbatch.spec import Storage

logger = logging.getLogger(__name__)

_TROUBLE = (OSError, boto.BotoCoreError, boto.ClientError, BrokenAnswer, ResponseParserError)
"""All that a call raises; to those who ask us, OSErrors only."""
_NO_ANSWER = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    BrokenAnswer,
    ResponseParserError,
    ConnectionResetError,
    TimeoutError,
)
_PASSING = {
    "ConditionalRequestConflict",  # 409: two conditional puts at the same time; S3 asks for another
    "OperationAborted",  # 409, of the same kind
    "RequestTimeout",  # 400: what we sent came too slowly
    "IncompleteBody",  # 400: or not whole
    "BadDigest",  # 400: or changed on the way
    "XAmzContentSHA256Mismatch",
}
CONNECTIONS = 64
"""At a time; calls that queue for one would look slow."""


def passes(error: Exception) -> bool:
    """Tell whether the same call may succeed later."""
    answer = answer_of(error)
    if answer:
        status = answer["ResponseMetadata"].get("HTTPStatusCode", 0)
        return (
            (status >= 500 and status != 501)
            or status in (408, 429)
            or answer["Error"].get("Code") in _PASSING
        )
    if isinstance(error, boto.SSLError):
        return "CERTIFICATE" not in str(error)
    return isinstance(error, _NO_ANSWER)


class _WholeBody(NamedTuple):
    """The body of an answer that has been read, in the place of a stream."""

    data: bytes

    async def read(self) -> bytes:
        return self.data

    def close(self) -> None:
        pass


class PatientS3(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs ships no types
    """s3fs with our way of trying again instead of its own and botocore's.

    Args:
        storage: How to reach the store.
        patience: How long.
        known: Whether it has answered before, maybe another process of this job.
    """

    retries = 1
    cachable = False

    def __init__(self, storage: Storage, patience: Patience, *, known: bool) -> None:
        super().__init__(
            anon=storage.anonymous,
            endpoint_url=storage.endpoint_url,
            client_kwargs={"region_name": storage.region} if storage.region else {},
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": 5,
                "read_timeout": patience.complete_s,
                "max_pool_connections": CONNECTIONS,
            },
            use_listings_cache=False,
            # If-Match of each read would do, but Ceph 16 answers 412 to every one.
            local_expiry_check=True,
        )
        self.patience = patience
        self.known = known

    @override
    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        waits = self.patience.waits(lambda: self._limit_s(method))
        waited = 0.0
        while True:
            try:
                return await self._once(method, *akwarglist, **kwargs)
            except _TROUBLE as error:
                self.known = self.known or answer_of(error) is not None
                wait = next(waits, None) if passes(error) else None
                if wait is None:
                    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                        raise
                    # Of a TimeoutError fsspec makes one without words.
                    raise ConnectionError(said(error)) from error
                if waited <= SAID_AFTER_S < waited + wait:
                    logger.warning("%s: trying again: %s", method, said(error))
            waited += wait
            await self.patience.sleep(wait)

    def _limit_s(self, method: str) -> float:
        # Of an upload that failed the parts are to be forgotten: the store is in trouble as it is,
        # and a rule of the bucket's life cycle removes what stays.
        if method == "abort_multipart_upload" or not self.known:
            return self.patience.first_contact_s
        return self.patience.outage_s

    async def _once(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        limit_s = self.patience.time_for(len(kwargs.get("Body", b"")))
        if method == "complete_multipart_upload":
            limit_s = self.patience.complete_s
        call = super()._call_s3(method, *akwarglist, **kwargs)
        answer = await _within(limit_s, call, method)
        self.known = True
        if method == "get_object":
            # Here, so that a body that breaks off is asked for again by the same loop.
            body = answer["Body"]
            try:
                limit_s = self.patience.time_for(answer["ContentLength"])
                answer["Body"] = _WholeBody(await _within(limit_s, body.read(), method))
            finally:
                body.close()
        return answer

    @override
    async def _abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
        try:
            await super()._abort_mpu(bucket, key, mpu)
        except _TROUBLE as error:
            # What made the upload fail is raised after this, and matters more.
            if code_of(error) != "NoSuchUpload":
                logger.warning("parts of an upload of %s stay: %s", key, said(error))


async def _within(limit_s: float, doing: Any, what: str) -> Any:
    try:
        return await asyncio.wait_for(doing, limit_s)
    except TimeoutError as error:
        raise TimeoutError(f"{what}: not done in {limit_s:,.0f} s") from error
