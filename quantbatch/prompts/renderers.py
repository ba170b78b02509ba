"""What makes prompts of a job's rows: the spec's prompt, or the requests that the rows are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantbatch.batchfile.prompts import RequestRenderer
from quantbatch.prompts.asking import Asker
from quantbatch.prompts.rendering import Renderer
from quantbatch.prompts.tools import ToolRenderer
from quantbatch.spec import Classify, Embed, Generate, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantbatch.prompts.tokens import TooLong
    from quantbatch.spec import JobSpec

AnyRenderer = Renderer | Asker | RequestRenderer | ToolRenderer


def renderer_of(
    spec: JobSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    too_long: TooLong = "error",
) -> AnyRenderer:
    """Return what makes token ids of a job's rows.

    Args:
        spec: The job.
        tokenizer: The model's; nobody else may use it meanwhile.
        max_prompt_tokens: Longest prompt.
        too_long: What becomes of a longer one.
    """
    if spec.input.format == "openai-batch":
        return RequestRenderer(spec, tokenizer, max_prompt_tokens=max_prompt_tokens)
    if isinstance(spec.task, Classify | Score | Embed):
        return Asker(
            spec.prompt,
            spec.task,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            too_long=too_long,
        )
    if isinstance(spec.task, Generate) and spec.task.calls_tools:
        return ToolRenderer(
            spec.prompt,
            spec.task,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            too_long=too_long,
        )
    return Renderer(spec.prompt, tokenizer, max_prompt_tokens=max_prompt_tokens, too_long=too_long)
