"""Why a request is refused: the option, its value and the reason, as that row's error."""

from __future__ import annotations

import json

from quantbatch.errors import RowError

BAD_REQUEST = "bad_request"
"""`error_type` of a request that is not as the API wants it."""
UNSUPPORTED = "unsupported_option"
"""`error_type` of a request with an option that can't be honoured."""
_SHOWN = 80
"""Characters of a value that an error message shows."""


def bad(name: str, value: object, why: str) -> RowError:
    """Return the error of an option that is not as the API wants it."""
    return _error(BAD_REQUEST, name, value, why)


def unsupported(name: str, value: object, why: str) -> RowError:
    """Return the error of an option that can't be honoured."""
    return _error(UNSUPPORTED, name, value, why)


def _error(kind: str, name: str, value: object, why: str) -> RowError:
    shown = "" if value is None else json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return RowError(kind, f"{name}: {shown}: {why}" if shown else f"{name}: {why}")
