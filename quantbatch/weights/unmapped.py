"""Reads the files of weights that are quantized as they are loaded, instead of mapping them.

transformers maps all files of a checkpoint, and each page that was looked at counts as memory of
the process until the last tensor is there: 61 GB to make 18 of a 32B model. The kernel can take
such pages back, but who goes by resident sizes does not know that. Where mapped files do cost
memory (Windows, MPS) transformers has safetensors read each tensor for itself; there is no argument
to ask for it (modeling_utils.py, 5.23), hence this.

Weights that stay as they are in the file are better mapped: a CPU needs no copy of them, and
replicas of one node share them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from transformers import modeling_utils

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def unmapped_files() -> Iterator[None]:
    """Have transformers read tensors from files that it would map, while the body runs."""
    namespace: Any = modeling_utils
    real = namespace.safe_open

    def read(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of a library without types
        return real(*args, **kwargs | ({"backend": "pread"} if "backend" in kwargs else {}))

    namespace.safe_open = read
    try:
        yield
    finally:
        namespace.safe_open = real
