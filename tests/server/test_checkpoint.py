"""Tokenizer, chat template and generation defaults, read from a checkpoint's directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from engine.errors import LoadError
from engine.messages import Sampling
from server.chat import ChatError, ChatTemplate
from server.checkpoint import Checkpoint, default_sampling
from server.template_process import Renderer
from server.tokenizer import Tokenizer, TokenizerError
from tests.server.fake_engine import EOS, TEMPLATE

MESSAGES = [{"role": "system", "content": "be <b>brief</b>"}, {"role": "user", "content": "hi & bye"}]


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def test_a_template_renders_as_transformers_renders_it(directory: Path, checkpoint: Checkpoint) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(str(directory))
    for arguments in ({}, {"thinking": "slow"}):
        for open_turn in (True, False):
            expected = reference.apply_chat_template(
                MESSAGES, tokenize=False, add_generation_prompt=open_turn, **arguments
            )
            assert checkpoint.template is not None
            assert (
                ChatTemplate(*checkpoint.template).render(MESSAGES, arguments, add_generation_prompt=open_turn)
                == expected
            )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ missing.field.of.nothing }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source).render(MESSAGES)


def test_templates_have_the_helpers_that_checkpoints_use() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%Y')|length }}{{ {'a': '<é>'}|tojson }}"
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
        {"bos_token": "<s>"},
    )
    assert template.render(MESSAGES) == '<s>4{"a": "<é>"}system'


def test_a_template_may_refuse_and_reserved_names_are_refused() -> None:
    template = ChatTemplate(TEMPLATE)
    with pytest.raises(ChatError, match="no villains") as refusal:
        template.render([{"role": "villain", "content": ""}])
    assert refusal.value.field == "messages"
    with pytest.raises(ChatError, match="reserved") as reserved:
        template.render(MESSAGES, {"messages": []})
    assert reserved.value.field == "template_arguments.messages"


def test_a_template_file_wins_and_named_templates_have_a_default(copy: Path) -> None:
    config = {"chat_template": [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(copy)
    assert template is not None
    assert template.render(MESSAGES) == "one"
    (copy / "chat_template.jinja").write_text("three")
    template = ChatTemplate.load(copy)
    assert template is not None
    assert template.render(MESSAGES) == "three"
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert ChatTemplate.load(copy) is None


def test_generation_config_fills_what_requests_leave_out(copy: Path) -> None:
    assert default_sampling(copy) == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert default_sampling(copy).temperature == 0.0
    path.unlink()
    assert default_sampling(copy) == Sampling()


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", '{"top_p": 2}', '{"temperature": "warm"}', '{"temperature": 1e-9}', '{"top_k": -1}'),
        *('{"top_k": Infinity}', '{"repetition_penalty": 1e-9}'),
    ],
)
def test_a_wrong_generation_config_is_named(copy: Path, content: str) -> None:
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(LoadError, match="generation_config"):
        Checkpoint.load(copy)


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("tokenizer.json", None), ("tokenizer_config.json", "{")]
)
def test_a_corrupt_checkpoint_is_named(copy: Path, file: str, content: str | None) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(LoadError, match=file):
        Checkpoint.load(copy)


async def test_a_broken_template_is_named(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% if %}")
    template = Checkpoint.load(copy).template
    assert template is not None
    with pytest.raises(ValueError, match="chat template, line 1"):
        await Renderer(template, 1000).start()


def test_special_tokens_have_bytes_only_when_asked(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.piece(0) == b""
    assert tokenizer.piece(0, skip_special=False) == EOS.encode()
    assert tokenizer.encode(EOS) == [0]
    assert tokenizer.piece(10**6) == b""


def test_byte_fallback_vocabularies_decode() -> None:
    from tokenizers import Tokenizer as HubTokenizer
    from tokenizers import decoders, models

    vocabulary = {"▁hi": 0, "<0xC3>": 1, "<0xA9>": 2}
    hub = HubTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    hub.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert Tokenizer(hub).decode([0, 1, 2]) == " hié"
    hub.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(hub)
