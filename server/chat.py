"""Chat messages to prompt text, by the checkpoint's own template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

RESERVED = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatError(Exception):
    """The conversation cannot become a prompt. `field` is relative to the Chat message, or empty."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class _TemplateRefusal(jinja2.TemplateError):
    """What `raise_exception` raises: the template itself says what is wrong."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it just renders them."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)` without underscored names: templates come from the hub, and those reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace's attribute must not start with '_': {name}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function where the class would offer its attributes.
    return dict(*args, **kwargs)


class TemplateSource(NamedTuple):
    """A template that nothing has looked at yet, and the special tokens that it may use."""

    source: str
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, directory: Path) -> TemplateSource | None:
        """The checkpoint's template: `chat_template.jinja`, else in `tokenizer_config.json`; None without.

        Raises:
            ValueError: unreadable configuration.
        """
        config: dict[str, Any] = {}
        path = directory / "tokenizer_config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        own_file = directory / "chat_template.jinja"
        if own_file.is_file():
            source = own_file.read_text(encoding="utf-8")
        if not isinstance(source, str):
            return None
        special = {}
        for name in _SPECIAL:
            token = config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                special[name] = token
        return cls(source, special)


class ChatTemplate:
    """A compiled template with its special tokens.

    Raises:
        ValueError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["namespace"] = _Namespace
        environment.globals["dict"] = _new_dict
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        self._special = dict(special_tokens or {})

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The checkpoint's, compiled; None without.

        Raises:
            ValueError: unreadable configuration or template.
        """
        found = TemplateSource.load(directory)
        return cls(*found) if found is not None else None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        arguments: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt's text.

        Raises:
            ChatError: the template refuses the messages, or fails on them.
        """
        arguments = dict(arguments or {})
        for name in arguments:
            if name in RESERVED:
                raise ChatError(f"template_arguments.{name}", "this name is reserved; rename the argument")
        values = {**self._special, **arguments}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except _TemplateRefusal as error:
            raise ChatError("messages", f"the model's chat template refuses them: {error.message}") from error
        except Exception as error:  # whatever a template's own code may raise
            raise ChatError("", f"the model's chat template fails on these messages: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
