"""From chat messages to the prompt that the model was trained on: its own chat template, and no other."""

from collections.abc import Mapping, Sequence
from typing import Any

from paged.errors import InvalidRequestError

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The conversation as token ids.

    Raises:
      InvalidRequestError: a message is malformed, there is no template, or the template refuses the messages.
    """
    if tokenizer is None:
        raise InvalidRequestError("chat needs a tokenizer, and the engine runs without one", param="messages")
    if chat_template is None and not tokenizer.chat_template:
        raise InvalidRequestError(
            "the model has no chat template: use completions, or give a chat_template", "messages"
        )
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
            param="continue_final_message",
        )
    check_messages(messages)
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error


def check_messages(messages: Sequence[Message]) -> None:
    """Text content only, known roles, at least one message."""
    if not messages or isinstance(messages, (str, Mapping)):
        raise InvalidRequestError("messages must be a list with at least one message", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise InvalidRequestError(f"messages[{i}].role must be one of {', '.join(ROLES)}", f"messages[{i}].role")
        if not isinstance(message.get("content"), str):
            raise InvalidRequestError(f"messages[{i}].content must be text", param=f"messages[{i}].content")
