"""The messages and tools of a chat request, as a chat template takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantbatch.batchfile import forms
from quantbatch.batchfile.refusals import bad, unsupported
from quantbatch.toolcalls import Choice

if TYPE_CHECKING:
    from quantbatch.prompts.tokens import Conversation

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal"})


def conversation_of(messages: Any) -> Conversation:  # noqa: ANN401 - any JSON value
    """Return the messages of a body: every content is a text, and arguments of calls are objects,
    as templates want them. Several parts of text are put on lines of their own.

    Raises:
        RowError: A message is wrong, or has a part that is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise bad("messages", messages, "should be a list of messages, and not empty")
    return [_message(f"messages.{index}", each) for index, each in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    if not isinstance(message, dict):
        raise bad(where, message, "is no object")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("role") not in ROLES:
        raise bad(f"{where}.role", given.get("role"), f"should be one of {', '.join(ROLES)}")
    for key in given.keys() - _KEYS:
        raise unsupported(f"{where}.{key}", given[key], "there is no such field of a message")
    made: dict[str, Any] = {"role": given["role"], "content": _content(where, given)}
    for key in ("name", "tool_call_id"):
        if key in given:
            made[key] = _text(f"{where}.{key}", given[key])
    if "tool_calls" in given:
        made["tool_calls"] = _calls(f"{where}.tool_calls", given["tool_calls"])
    return made


def _content(where: str, message: dict[str, Any]) -> str:
    content = message.get("content", message.get("refusal"))
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad(f"{where}.content", content, "should be a text or a list of parts")
    parts = enumerate(content)
    return "\n".join(_part(f"{where}.content.{index}", part) for index, part in parts)


def _part(where: str, part: Any) -> str:  # noqa: ANN401 - any JSON value
    match part:
        case {"type": "text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": str(kind)} if kind not in ("text", "refusal"):
            raise unsupported(f"{where}.type", kind, "only parts of text can be read")
        case _:
            raise bad(where, part, "should be a part such as {type: text, text: ...}")


def _text(where: str, value: Any) -> str:  # noqa: ANN401 - any JSON value
    if not isinstance(value, str):
        raise bad(where, value, "should be a text")
    return value


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - any JSON value
    if not isinstance(calls, list) or not calls:
        raise bad(where, calls, "should be a list of calls, and not empty")
    return [_call(f"{where}.{index}", call) for index, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    match call:
        case {"type": "function", "function": {"name": str(name), "arguments": str(text)}}:
            pass
        case _:
            raise bad(where, call, "should be a call of a function, its arguments a JSON text")
    try:
        arguments: Any = forms.read_json(text)
    except ValueError:
        arguments = text
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def tools_of(tools: Any, choice: Any) -> list[dict[str, Any]] | None:  # noqa: ANN401 - any JSON value
    """Return the tools that the model is told of; None if there are none.

    Raises:
        RowError: A tool is wrong, or the choice among them can't be honoured.
    """
    if tools is not None and not isinstance(tools, list):
        raise bad("tools", tools, "should be a list of tools")
    for index, tool in enumerate(tools or ()):
        _check_tool(f"tools.{index}", tool)
    if choice not in (None, "auto", "none") and not tools:
        raise bad("tool_choice", choice, "needs tools")
    return None if choice == "none" else tools or None


def forced_by(choice: Any, tools: list[dict[str, Any]] | None) -> Choice | None:  # noqa: ANN401 - any JSON value
    """Return which calls a choice forces; None if that is left to the model.

    Raises:
        RowError: The choice can't be honoured.
    """
    match choice:
        case None | "auto" | "none":
            return None
        case "required":
            return Choice()
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in [tool["function"]["name"] for tool in tools or ()]:
                raise bad("tool_choice", choice, "names none of the tools")
            return Choice(name)
        case _:
            raise unsupported("tool_choice", choice, "should be auto, none, required or a function")


def _check_tool(where: str, tool: Any) -> None:  # noqa: ANN401 - any JSON value
    match tool:
        case {"type": "function", "function": {"name": str(name), **others}} if name:
            parameters = others.get("parameters")
            if parameters is not None and not isinstance(parameters, dict):
                raise bad(f"{where}.function.parameters", parameters, "should be a JSON schema")
            if wrong := forms.problem(forms.grammar_of(parameters or {})):
                raise bad(f"{where}.function.parameters", parameters, wrong)
        case {"type": str(kind)} if kind != "function":
            raise unsupported(f"{where}.type", kind, "only functions can be called")
        case _:
            raise bad(where, tool, "should be a function with a name")
