"""Prompts in, token ids out: text, ids or a conversation."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from dspark.v1 import generation_pb2 as wire
from google.protobuf import struct_pb2

from server.chat import ChatError
from server.checkpoint import Checkpoint
from server.convert import ModelFacts, check_ids
from server.problems import CallError, Violation, invalid

LONG_TEXT = 8192  # characters from which encoding leaves the event loop
MAX_NESTING = 32


async def for_generate(message: wire.GenerateRequest, checkpoint: Checkpoint, facts: ModelFacts) -> list[int]:
    """The prompt's token ids.

    Raises:
        CallError: INVALID_ARGUMENT naming the field.
    """
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return check_ids("token_ids.ids", message.token_ids.ids, facts.vocab_size)
    if kind == "text":
        # No need to tokenise what cannot fit even if every token were the longest.
        longest = facts.max_model_len * checkpoint.tokenizer.longest_piece
        if len(message.text) > longest:
            raise _invalid(
                "text",
                f"{len(message.text)} characters cannot fit {facts.max_model_len} tokens; shorten it",
            )
        return await _encode(checkpoint, message.text, True)
    if kind == "chat":
        return await _encode(checkpoint, _render(message.chat, checkpoint), False)
    raise _invalid("prompt", "is missing; set one of text, token_ids, chat")


async def for_tokenize(message: wire.TokenizeRequest, checkpoint: Checkpoint) -> list[int]:
    """Ids as `for_generate` would make them, of any length.

    Raises:
        CallError: INVALID_ARGUMENT naming the field.
    """
    kind = message.WhichOneof("input")
    if kind == "text":
        special = message.add_special_tokens or not message.HasField("add_special_tokens")
        return await _encode(checkpoint, message.text, special)
    if kind == "chat":
        return await _encode(checkpoint, _render(message.chat, checkpoint), False)
    raise _invalid("input", "is missing; set one of text, chat")


async def _encode(checkpoint: Checkpoint, text: str, add_special_tokens: bool) -> list[int]:
    # A template writes its own special tokens, so a rendered conversation gets no others.
    encode = checkpoint.tokenizer.encode
    if len(text) < LONG_TEXT:
        return encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)


def _render(chat: wire.Chat, checkpoint: Checkpoint) -> str:
    if checkpoint.template is None:
        raise _invalid("chat", "this checkpoint has no chat template; use text or token_ids")
    if not chat.messages:
        raise _invalid("chat.messages", "the conversation is empty; give at least one message")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise _invalid(f"chat.messages[{index}].role", "is empty; such as system, user or assistant")
    open_turn = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
    try:
        return checkpoint.template.render(
            [{"role": message.role, "content": message.content} for message in chat.messages],
            {name: _plain(value) for name, value in chat.template_arguments.fields.items()},
            add_generation_prompt=open_turn,
        )
    except ChatError as error:
        raise _invalid(f"chat.{error.field}".rstrip("."), error.message) from error


def _plain(value: struct_pb2.Value, depth: int = 0) -> Any:
    """A Struct's value as a template expects it: whole numbers as int."""
    if depth > MAX_NESTING:
        raise _invalid("chat.template_arguments", f"nested deeper than {MAX_NESTING}")
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {name: _plain(child, depth + 1) for name, child in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(child, depth + 1) for child in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        if not math.isfinite(number):
            raise _invalid("chat.template_arguments", f"{number} is not a finite number")
        return int(number) if number.is_integer() else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def _invalid(field: str, description: str) -> CallError:
    return invalid([Violation(field, description)])
