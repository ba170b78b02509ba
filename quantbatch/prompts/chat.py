"""A model's chat template: a conversation in, its text out, or what the template has against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from quantbatch.errors import ModelError, RowError
from quantbatch.toolcalls import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantbatch import spec
    from quantbatch.prompts.tokens import Conversation

CHAT_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a chat template can raise on a conversation that it does not expect."""


def require_chat_template(prompt: spec.Prompt, chat_template: str | None) -> None:
    """Refuse a chat with a model that has no chat template.

    Raises:
        ModelError: It has none.
    """
    if prompt.format == "chat" and not chat_template:
        raise ModelError(
            "the model has no chat template, and prompt.format is chat",
            "set prompt.format: text, as base models need it, or use the model's instruct version",
        )


def require_tools(tools: list[dict[str, Any]] | None, chat_template: str | None) -> None:
    """Refuse tools that a model's chat template would not tell it of.

    Raises:
        ModelError: It knows none.
    """
    if tools and "tools" not in (chat_template or ""):
        raise ModelError(
            "task.tools: the model's chat template knows no tools",
            "use a model that was trained to call them, or describe them in the prompt",
        )


class ChatTemplate:
    """The model's chat template.

    Args:
        prompt: The spec's prompt.
        tokenizer: The model's.
        tools: Tools that every conversation has.
    """

    def __init__(
        self,
        prompt: spec.Prompt,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self._tools = tools or None
        try:
            template: str | None = tokenizer.get_chat_template()
        except ValueError:
            template = None
        require_chat_template(prompt, template)
        self.source = template or ""
        require_tools(tools, template)
        self.family = family_of(self.source) if tools else None
        """How the model writes calls of the tools, if that is known."""
        self._variables: dict[str, Any] = {
            "add_generation_prompt": True,
            **tokenizer.special_tokens_map,
            **prompt.chat_template_kwargs,
        }

    def render(self, conversations: list[Conversation]) -> list[str | RowError]:
        """Return the text of each conversation, or what the template has against it."""
        try:
            return [*self._texts(conversations)]
        except CHAT_ERRORS:
            return [self.render_one(conversation) for conversation in conversations]

    def render_one(
        self, conversation: Conversation, tools: list[dict[str, Any]] | None = None
    ) -> str | RowError:
        """Return the text of a conversation, or what the template has against it."""
        try:
            return self._texts([conversation], tools)[0]
        except CHAT_ERRORS as error:
            return RowError("chat_template", f"the model's chat template: {str(error)[:500]}")

    def _texts(
        self, conversations: list[Conversation], tools: list[dict[str, Any]] | None = None
    ) -> list[str]:
        # What tokenizer.apply_chat_template does, less what it repeats on each call.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=conversations,
            tools=cast("Any", tools or self._tools),
            chat_template=self.source,
            **self._variables,
        )
        texts: list[str] = rendered[0]
        return texts
