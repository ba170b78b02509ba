"""The fault proxy itself: what it passes on, what it counts, and each kind of trouble as boto3
sees it, which is told to try once."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.faults.proxy import Operation

if TYPE_CHECKING:
    from tests.faults.proxy import FaultProxy, Kind
    from tests.integration.support import Bucket


@pytest.fixture
def client(fault_proxy: FaultProxy) -> Any:
    once = Config(retries={"total_max_attempts": 1}, read_timeout=1)
    return boto3.client("s3", endpoint_url=fault_proxy.endpoint, config=once)


def test_everything_passes_and_is_counted(
    client: Any, fault_proxy: FaultProxy, bucket: Bucket
) -> None:
    name = bucket.uri.removeprefix("s3://")
    body = uuid.uuid4().bytes * 400_000
    client.put_object(Bucket=name, Key="a b+ü", Body=body)
    assert client.get_object(Bucket=name, Key="a b+ü")["Body"].read() == body
    assert client.head_object(Bucket=name, Key="a b+ü")["ContentLength"] == len(body)
    assert [o["Key"] for o in client.list_objects_v2(Bucket=name)["Contents"]] == ["a b+ü"]
    upload = {"Bucket": name, "Key": "m"}
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
    part = client.upload_part(**upload, PartNumber=1, Body=body)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**upload, MultipartUpload=parts)
    other = client.create_multipart_upload(Bucket=name, Key="n")["UploadId"]
    client.abort_multipart_upload(Bucket=name, Key="n", UploadId=other)
    client.delete_object(Bucket=name, Key="m")
    assert [call.operation for call in fault_proxy.calls] == [
        Operation.PUT, Operation.GET, Operation.HEAD, Operation.LIST, Operation.CREATE_UPLOAD,
        Operation.UPLOAD_PART, Operation.COMPLETE, Operation.CREATE_UPLOAD, Operation.ABORT,
        Operation.DELETE,
    ]  # fmt: skip
    assert fault_proxy.faults == 0


@pytest.mark.parametrize(
    ("kind", "code", "applied"),
    [
        ("500", "InternalError", False),
        ("503", "SlowDown", False),
        ("429", "TooManyRequests", False),
        ("409", "ConditionalRequestConflict", False),
        ("403", "AccessDenied", False),
        ("skew", "RequestTimeTooSkewed", False),
        ("no_bucket", "NoSuchBucket", False),
        ("500_after", "InternalError", True),
    ],
)
def test_answers_that_are_errors(
    client: Any, fault_proxy: FaultProxy, bucket: Bucket, kind: Kind, code: str, applied: bool
) -> None:
    fault_proxy.fail(kind, operation=Operation.PUT, times=1)
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket.uri.removeprefix("s3://"), Key="out/k", Body=b"data")
    assert caught.value.response["Error"]["Code"] == code
    assert [info.key for info in bucket.store("out").list()] == ["k"] * applied
    assert fault_proxy.count() == 1


@pytest.mark.parametrize(
    ("kind", "error", "applied"),
    [
        ("reset_before", (ConnectionClosedError, HTTPClientError), False),
        ("reset_after", (ConnectionClosedError, HTTPClientError), True),
        ("hang", ReadTimeoutError, False),
        ("hang_after", ReadTimeoutError, True),
    ],
)
def test_connections_that_fail(
    client: Any,
    fault_proxy: FaultProxy,
    bucket: Bucket,
    kind: Kind,
    error: type[Exception],
    applied: bool,
) -> None:
    fault_proxy.fail(kind, times=1)
    with pytest.raises(error):
        client.put_object(Bucket=bucket.uri.removeprefix("s3://"), Key="out/k", Body=b"data")
    assert [info.key for info in bucket.store("out").list()] == ["k"] * applied


def test_rules_have_an_end_a_place_and_a_probability(
    client: Any, fault_proxy: FaultProxy, bucket: Bucket
) -> None:
    name = bucket.uri.removeprefix("s3://")
    fault_proxy.fail("500", contains="/two", times=2)
    for key in ("one", "two", "two", "two"):
        try:
            client.put_object(Bucket=name, Key=key, Body=b"")
        except ClientError:
            assert key == "two"
    assert [call.kind for call in fault_proxy.calls] == [None, "500", "500", None]
    fault_proxy.clear()
    fault_proxy.fail("429", probability=0.3)
    for _ in range(100):
        try:
            client.get_object(Bucket=name, Key="one")
        except ClientError as error:
            assert error.response["Error"]["Code"] == "TooManyRequests"  # noqa: PT017
    assert 15 <= fault_proxy.faults <= 45


def test_a_truncated_answer_ends_in_the_middle(
    client: Any, fault_proxy: FaultProxy, bucket: Bucket
) -> None:
    name = bucket.uri.removeprefix("s3://")
    client.put_object(Bucket=name, Key="k", Body=b"data" * 100)
    fault_proxy.fail("truncate", operation=Operation.GET, times=1)
    with pytest.raises((ResponseStreamingError, IncompleteReadError)):
        client.get_object(Bucket=name, Key="k")["Body"].read()
    fault_proxy.fail("truncate", operation=Operation.PUT, times=1)
    with pytest.raises((ConnectionClosedError, HTTPClientError)):
        client.put_object(Bucket=name, Key="k", Body=b"more")
    assert client.get_object(Bucket=name, Key="k")["Body"].read() == b"more"
