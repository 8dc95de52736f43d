"""Prompts in, token ids out: text, ids or a conversation."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from dspark.v1 import generation_pb2 as wire
from google.protobuf import struct_pb2

from server.bounds import MAX_MESSAGES, Bounds
from server.chat import ChatError
from server.checkpoint import Checkpoint
from server.convert import ModelFacts, check_ids
from server.problems import CallError, Violation, invalid
from server.template_process import Renderer

LONG_TEXT = 8192  # characters from which encoding leaves the event loop
MAX_NESTING = 32


class Prompts:
    """Makes prompts for one checkpoint.

    Args:
        renderer: of its chat template; None without one.
    """

    def __init__(self, checkpoint: Checkpoint, renderer: Renderer | None, bounds: Bounds) -> None:
        self._tokenizer = checkpoint.tokenizer
        self._renderer = renderer
        self._bounds = bounds

    async def for_generate(self, message: wire.GenerateRequest, facts: ModelFacts) -> list[int]:
        """The prompt's token ids.

        Raises:
            CallError: INVALID_ARGUMENT naming the field.
        """
        kind = message.WhichOneof("prompt")
        limit = min(facts.max_model_len - 1, self._bounds.prompt_tokens or facts.max_model_len)
        if kind == "token_ids":
            _check_length("token_ids", len(message.token_ids.ids), limit)  # before looking at each of millions
            return check_ids("token_ids.ids", message.token_ids.ids, facts.vocab_size)
        if kind == "text":
            ids = await self._encode(self._fitting("text", message.text, facts), True)
        elif kind == "chat":
            ids = await self._encode(self._fitting("chat", await self._render(message.chat), facts), False)
        else:
            raise _invalid("prompt", "is missing; set one of text, token_ids, chat")
        _check_length(kind, len(ids), limit)
        return ids

    async def for_tokenize(self, message: wire.TokenizeRequest) -> list[int]:
        """Ids as `for_generate` would make them, also more than the context holds.

        Raises:
            CallError: INVALID_ARGUMENT naming the field.
        """
        kind = message.WhichOneof("input")
        if kind == "text":
            special = message.add_special_tokens or not message.HasField("add_special_tokens")
            return await self._encode(self._small("text", message.text), special)
        if kind == "chat":
            return await self._encode(await self._render(message.chat), False)
        raise _invalid("input", "is missing; set one of text, chat")

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A template writes its own special tokens, so a rendered conversation gets no others.
        encode = self._tokenizer.encode
        if len(text) < LONG_TEXT:
            return encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

    def _small(self, field: str, text: str) -> str:
        limit = self._bounds.prompt_bytes
        size = len(text) if text.isascii() or len(text) > limit else len(text.encode())
        if size > limit:
            raise _invalid(field, f"the prompt is larger than the {limit} bytes that are taken; shorten it")
        return text

    def _fitting(self, field: str, text: str, facts: ModelFacts) -> str:
        # No need to tokenise what cannot fit even if every token were the longest.
        if len(text) > facts.max_model_len * self._tokenizer.longest_piece:
            raise _invalid(field, f"{len(text)} characters cannot fit {facts.max_model_len} tokens; shorten it")
        return self._small(field, text)

    async def _render(self, chat: wire.Chat) -> str:
        if self._renderer is None:
            raise _invalid("chat", "this checkpoint has no chat template; use text or token_ids")
        if not chat.messages:
            raise _invalid("chat.messages", "the conversation is empty; give at least one message")
        if len(chat.messages) > MAX_MESSAGES:
            raise _invalid("chat.messages", f"at most {MAX_MESSAGES} messages, got {len(chat.messages)}")
        for index, message in enumerate(chat.messages):
            if not message.role:
                raise _invalid(f"chat.messages[{index}].role", "is empty; such as system, user or assistant")
        open_turn = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
        try:
            return await self._renderer.render(
                [{"role": message.role, "content": message.content} for message in chat.messages],
                {name: _plain(value) for name, value in chat.template_arguments.fields.items()},
                add_generation_prompt=open_turn,
            )
        except ChatError as error:
            raise _invalid(f"chat.{error.field}".rstrip("."), error.message) from error


def _check_length(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise _invalid(field, f"the prompt has {count} tokens and at most {limit} are taken; shorten it to {limit}")


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
