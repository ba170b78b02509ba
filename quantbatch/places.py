"""URIs of a spec: they say where something is, and never who may go there.

A spec is kept beside the output, logged and shown, so a password in it is a password in all of
these. Credentials come from the environment.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_SIGNED = re.compile(
    r"[?&](x-amz-[\w-]+|x-goog-[\w-]+|signature|awsaccesskeyid|sig|token|access_token)=",
    re.IGNORECASE,
)
"""Parts of queries that grant access, of S3, Google's store, Azure's and others."""


def without_credentials(uri: str) -> str:
    """Return a URI that holds no credentials.

    Raises:
        ValueError: It holds some; the message does not repeat them.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    authority = rest.partition("/")[0]
    # A secret key of AWS may hold a slash, so the @ may come later. Ports are numbers, and an
    # access point of S3 has an ARN for a bucket.
    name, colon, port = authority.partition(":")
    named = "@" in authority or (colon and not port.isdigit() and name != "arn")
    if named:
        raise ValueError(
            f"a URI ({scheme}://...) with a user or a password in it: a spec is kept beside the"
            " output and shown, so credentials come from the environment, as for every AWS tool"
        )
    if _SIGNED.search(uri):
        raise ValueError(
            f"a signed URI ({scheme}://...?...): a spec is kept beside the output and shown; leave"
            " out the query, and take credentials from the environment"
        )
    return uri


Uri = Annotated[str, AfterValidator(without_credentials)]
"""A place: a local path, or a URI without credentials."""
