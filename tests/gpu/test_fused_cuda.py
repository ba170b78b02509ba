"""Our kernel for matrices in 4 bits on a CUDA card: right, the same each time, and recordable.

    python -m pytest -m gpu tests/gpu/test_fused_cuda.py

Without a card it runs in Triton's interpreter, see `tests/unit/weights/test_fused_kernel.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.records import Request, RequestId
from quantbatch.spec import Model, Sampling
from tests.unit.weights.products import CASES, Case, check, weights

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
pytest.importorskip("triton", reason="Triton comes with torch for cards only")

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
LARGE = [
    Case(32, 4096, 4096, rows=32, columns=128, splits=4),
    Case(31, 14_336, 4096, rows=32, columns=64),
    Case(200, 5120, 5120, rows=128, columns=128, splits=2),
    Case(128, 4096, 14_336, rows=128, columns=128, splits=8, nested=False, bias=True),
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_products_are_those_of_bitsandbytes(case: Case) -> None:
    import torch

    # Tensor cores add up in less than float32; without that it would be 1.1, as in float16.
    check(case, torch.device("cuda"), most=1.3)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_recorded_product_is_the_same_to_the_bit(splits: int) -> None:
    import torch

    from quantbatch.weights.four_bit import Tiles, packed_of
    from quantbatch.weights.fused_kernel import multiply

    case = Case(32, 1024, 4096)
    packed = packed_of(*weights(case, torch.device("cuda")), torch.bfloat16)
    assert packed is not None
    tiles = Tiles(32, 64, splits)
    x = torch.randn(32, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = multiply(x, packed, None, tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = multiply(x, packed, None, tiles)
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)


def answers(model: Any, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    from quantbatch.engine.continuous import ContinuousEngine, EngineLimits

    limits = EngineLimits(rows=32, kv_tokens=8192, step_tokens=256, refill_share=1 / 8)
    engine = ContinuousEngine(model, load_tokenizer(QUICKSTART), limits)
    try:
        engine.add(requests)
        found: dict[RequestId, Any] = {}
        while engine.has_work():
            found |= {answer.id: answer for answer in engine.step()}
        return [tuple(found[request.id].token_ids) for request in requests]
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_answers_with_and_without_the_kernel_differ_at_ties_only(kind: str, billion: Path) -> None:
    import torch

    from quantbatch.model.checkpoint import open_checkpoint
    from quantbatch.weights import dtypes, fused, loading

    fields = {"id": str(billion), "quantization": {"kind": kind}}
    spec = Model.model_validate(fields).resolved()
    checkpoint = open_checkpoint(spec)
    model = loading.load(checkpoint, dtypes.resolve(checkpoint, spec, "cuda"), "cuda").model
    requests = [
        Request(
            RequestId(0, row),
            tuple(20 + (row * 7919 + k * 104729) % 2000 for k in range(1 + (37 * row) % 90)),
            Sampling(max_new_tokens=4),
            seed=row,
        )
        for row in range(64)
    ]
    ids = torch.arange(20, 44, device="cuda")[None]
    with torch.inference_mode():
        plain = model(ids).logits.float()
    before = answers(model, requests)
    reserved = torch.cuda.memory_reserved()
    used = fused.use_where_faster(model)
    print(f"{kind}: {used}, {(torch.cuda.memory_reserved() - reserved) >> 20} MiB more")
    assert used, "every doubt leaves bitsandbytes, and here there must be none"
    with torch.inference_mode():
        distance = float((model(ids).logits.float() - plain).norm() / plain.norm())
    after = answers(model, requests)
    same = sum(one == other for one, other in zip(before, after, strict=True))
    print(f"{kind}: scores differ by {distance:.4f}, {same} of {len(requests)} rows equal")
    assert distance < 0.05
    assert same >= 0.8 * len(requests)
