"""What follows from `input.format: openai-batch` for the rest of a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantbatch.spec import JobSpec

BATCH_FILE = "openai-batch"
_SOURCES = ("template", "messages", "column")


def filled_in(data: dict[str, Any]) -> dict[str, Any]:
    """Return a spec with what is usual for a batch file, where it says nothing else."""

    def over(usual: dict[str, Any], name: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
        given = data.get(name)
        return usual | (given or {}) if isinstance(given, dict | None) else given

    prompt: dict[str, Any] = {"format": "text"}
    given = data.get("prompt")
    if given is None or (isinstance(given, dict) and not any(map(given.get, _SOURCES))):
        prompt["column"] = "body"
    output: dict[str, Any] = {"format": BATCH_FILE}
    said = data.get("output")
    if isinstance(said, dict) and said.get("format", BATCH_FILE) == BATCH_FILE:
        output["keep"] = ["custom_id"]
    return data | {
        "input": over({"key": "custom_id"}, "input"),
        "prompt": over(prompt, "prompt"),
        "task": over({"kind": "openai"}, "task"),
        "sampling": over({"temperature": 1.0}, "sampling"),
        "output": over(output, "output"),
    }


def check(spec: JobSpec) -> None:
    """Refuse what does not go with a batch file, or only with one.

    Raises:
        ValueError: There is such a thing.
    """
    if spec.input.format != BATCH_FILE:
        if spec.task.kind == "openai" or spec.output.format == BATCH_FILE:
            raise ValueError(
                "the task openai and the output format openai-batch need the input format"
                " openai-batch"
            )
        return
    if spec.task.kind != "openai":
        raise ValueError(f"input.format openai-batch is the task openai, not {spec.task.kind}")
    if (spec.prompt.column, spec.prompt.format) != ("body", "text"):
        raise ValueError(
            "requests of a batch file have their own messages: leave out prompt, but for"
            " chat_template_kwargs"
        )
    if spec.input.key != "custom_id":
        raise ValueError("input.key of a batch file is custom_id: leave it out")
    if spec.engine.too_long != "error":
        raise ValueError("engine.too_long: requests of a batch file are not cut, only refused")
    if spec.output.format == BATCH_FILE and spec.output.keep != ["custom_id"]:
        raise ValueError("output.keep: lines of a batch hold the custom_id and no other column")
    if spec.output.format == BATCH_FILE and spec.output.prefix:
        raise ValueError("output.prefix: lines of a batch have no columns to put it before")
