"""A model's chat template: a conversation in, its text out, or what the template has against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from quantbatch.errors import ModelError, RowError
from quantbatch.prompts.chat_budget import chars_of
from quantbatch.prompts.chat_sandbox import ChatSandbox
from quantbatch.prompts.sandbox import MAX_PROMPT_CHARS, TEMPLATE_ERRORS
from quantbatch.toolcalls import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantbatch import spec
    from quantbatch.prompts.chat_sandbox import ChatProgram
    from quantbatch.prompts.tokens import Conversation


def require_chat_template(prompt: spec.Prompt, chat_template: str | None) -> None:
    """Refuse a chat with a model that has no chat template, or one that is none.

    Raises:
        ModelError: It has none, or it can't be compiled.
    """
    if prompt.format == "chat" and chat_template:
        _compiled(chat_template)
    if prompt.format == "chat" and not chat_template:
        raise ModelError(
            "the model has no chat template, and prompt.format is chat",
            "set prompt.format: text, as base models need it, or use the model's instruct version",
        )


def require_tools(tools: list[dict[str, Any]] | str | None, chat_template: str | None) -> None:
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
        self._program = _compiled(self.source)
        require_tools(tools, template)
        self.family = family_of(self.source)
        """How the model writes calls of the tools, if that is known."""
        self._variables: dict[str, Any] = {
            "add_generation_prompt": True,
            **tokenizer.special_tokens_map,
            **prompt.chat_template_kwargs,
        }

    def render(
        self, conversations: list[Conversation], tools: list[dict[str, Any]] | None = None
    ) -> list[str | RowError]:
        """Return the text of each conversation, or what the template has against it."""
        return [self.render_one(conversation, tools) for conversation in conversations]

    def render_one(
        self, conversation: Conversation, tools: list[dict[str, Any]] | None = None
    ) -> str | RowError:
        """Return the text of a conversation, or what the template has against it."""
        try:
            return self._text(conversation, tools)
        except RowError as error:
            return error
        except TEMPLATE_ERRORS as error:
            return RowError("chat_template", f"the model's chat template: {str(error)[:500]}")

    def _text(self, conversation: Conversation, tools: list[dict[str, Any]] | None) -> str:
        # What tokenizer.apply_chat_template does, less what it repeats on each call.
        values = {
            "messages": [_with_reasoning(plain_values(each)) for each in conversation],
            "tools": plain_values(tools or self._tools),
            "documents": None,
            **self._variables,
        }
        chars = chars_of([values["messages"], values["tools"]], MAX_PROMPT_CHARS)
        return self._program.render(values, chars)


def _compiled(source: str) -> ChatProgram:
    """Compile a chat template.

    Raises:
        ModelError: It can't be.
    """
    hint = "mend the model's chat_template.jinja, or set prompt.format: text"
    try:
        return ChatSandbox().compiled(source)
    except RowError as error:
        raise ModelError(error.message, hint) from error
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ModelError(f"the model's chat template{line}: {str(error)[:500]}", hint) from error
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise ModelError("the model's chat template is nested too deeply", hint) from error


def plain_values(value: Any) -> Any:  # noqa: ANN401 - whatever a row holds
    """Return a value in JSON types, so that a template can't reach anything else."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {str(key): plain_values(item) for key, item in value.items()}
        case list() | tuple():
            return [plain_values(item) for item in value]
        case _:
            return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning the names by which templates ask for it (transformers 5.23)."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = next((message[name] for name in names if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}
