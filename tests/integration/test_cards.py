"""A job is judged by the cluster's own cards, before one of them is asked for."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from quantbatch import cluster, pipeline
from quantbatch.errors import DoesNotFit
from quantbatch.spec import Cluster, JobSpec
from tests.integration.support import MODEL
from tests.unit.model.test_known_sizes import KNOWN, checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Iterator

CARDS = {"accelerator_type:L4": 1, "accelerator_type:A100": 1}
"""A node has one kind of card in truth; two stand for a cluster with two kinds."""


@pytest.fixture
def cards_of_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray on this machine that believes in its cards; the machine itself has none."""
    monkeypatch.setattr("quantbatch.model.thiscard.local_cards", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(
        num_cpus=2, num_gpus=1, resources=CARDS, include_dashboard=False,
        logging_level="ERROR", log_to_driver=False,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def hollow_model(folder: Path, name: str) -> Path:
    """Save a published model as far as planning looks at it: the tensors' data are holes in a
    sparse file, which take no room.
    """
    checkpoint = checkpoint_of(KNOWN[name].config)
    folder.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for tensor in checkpoint.tensors:
        start, end = end, end + 2 * tensor.numel
        header[tensor.name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(checkpoint.config | config))
    for file_name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODEL / file_name).is_file():
            (folder / file_name).write_bytes((MODEL / file_name).read_bytes())
    return folder


def make_spec(folder: Path, model: Path, **changes: Any) -> JobSpec:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "in" / "a.parquet")
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(model), "bits": 16},
        "prompt": {"template": "{{ text }}", "format": "text"},
        "output": {"uri": str(folder / "out")},
    }
    return JobSpec.model_validate(fields | changes)


def test_a_job_that_no_card_of_the_cluster_holds_is_refused(
    tmp_path: Path, cards_of_ray: None
) -> None:
    del cards_of_ray
    with cluster.connected(Cluster()) as session:
        assert session.cards == ("A100", "L4")
    spec = make_spec(tmp_path, hollow_model(tmp_path / "model", "Mistral Small 24B"))
    with pytest.raises(DoesNotFit, match=r"on L4, a card of the cluster: .* at 16 bits") as caught:
        pipeline.run(spec)
    assert caught.value.hint.startswith("model.bits 4 fits")
    # Nobody waited for a card, and nothing was answered.
    assert ray.available_resources()["GPU"] == 1
    assert not list((tmp_path / "out").glob("*.parquet"))
