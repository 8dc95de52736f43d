"""Templates that came with hostile weights: no hang, no memory, no file, and the next conversation is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import psutil
import pytest
from dspark.v1 import generation_pb2 as wire

from server.chat import ChatError, TemplateSource
from server.template_process import Renderer
from tests.server.conftest import Launch
from tests.server.test_service import refused

HELLO = [{"role": "user", "content": "hello"}]
# Endless when the first message says so.
NESTED = (
    "{% if messages[0].content == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
    "{% elif messages[0].content == 'memory' %}{% set a = 'x' * 2000000000 %}{{ a|length }}"
    "{% elif messages[0].content == 'long' %}{{ 'x' * 5000 }}"
    "{% elif messages[0].content == 'power' %}{% set n = messages|length + 8 %}{{ n ** (n ** n) }}"
    "{% elif messages[0].content == 'surrogate' %}{{ '\\ud800' }}"
    "{% elif messages[0].content == 'python' %}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{% else %}<{{ messages[0].content }}>{% endif %}"
)

Make = Callable[..., Renderer]


@pytest.fixture
async def renderer() -> AsyncIterator[Make]:
    made: list[Renderer] = []

    def make(source: str, render_s: float = 60, start_s: float = 60) -> Renderer:
        made.append(Renderer(TemplateSource(source, {}), 1000, render_s, start_s))
        return made[-1]

    yield make
    for one in made:
        await one.stop()


async def render(renderer: Renderer, content: str) -> str:
    return await renderer.render([{"role": "user", "content": content}], {}, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("content", "render_s", "why"),
    [
        ("loop", 0.5, "not done after 0.5 s"),
        ("power", 0.5, "not done after 0.5 s|memory|fails on these messages"),
        ("memory", 60, "fails on these messages|memory"),
        ("long", 60, "5000 characters; at most 1000"),
        ("surrogate", 60, "half a character"),
        ("python", 60, "fails on these messages"),
    ],
)
async def test_a_hostile_rendering_ends_and_the_next_one_is_right(
    renderer: Make, content: str, render_s: float, why: str
) -> None:
    one = renderer(NESTED, render_s)
    await one.start()
    with pytest.raises(ChatError, match=why):
        await render(one, content)
    one._render_s = 60  # a good one may take its time on a busy machine
    assert await render(one, "hello") == "<hello>"


async def test_the_event_loop_and_others_go_on_meanwhile(renderer: Make) -> None:
    one = renderer(NESTED)
    await one.start()
    hostile = asyncio.ensure_future(render(one, "loop"))
    await asyncio.sleep(0)
    assert [await render(one, str(number)) for number in range(3)] == ["<0>", "<1>", "<2>"]
    assert not hostile.done()
    hostile.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hostile


async def test_a_cancelled_rendering_leaves_no_process(renderer: Make) -> None:
    one = renderer(NESTED)
    await one.start()
    hostile = asyncio.ensure_future(render(one, "loop"))
    await asyncio.sleep(0.2)
    (process,) = [child for child in psutil.Process().children() if "server.template_process" in child.cmdline()]
    hostile.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hostile
    assert not process.is_running()


@pytest.mark.parametrize("source", ["{% if %}", "{{ 9 ** (9 ** 9) }}"])
async def test_what_cannot_be_compiled_is_found_at_start(renderer: Make, source: str) -> None:
    """Constants are folded when a template is compiled: that too can run away."""
    with pytest.raises(ValueError, match=r".+"):
        await renderer(source, start_s=3).start()


async def test_it_sees_nothing_of_the_servers_environment(renderer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEBODYS_SECRET", "1")
    one = renderer("{{ 1 }}")
    await one.start()
    (process,) = [child for child in psutil.Process().children() if "server.template_process" in child.cmdline()]
    assert "SOMEBODYS_SECRET" not in process.environ()


async def test_the_service_names_the_field(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await launch(template=TemplateSource(NESTED, {}))
    chat = wire.Chat(messages=[wire.ChatMessage(role="user", content="python")])
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(chat=chat)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details["BadRequest"].field_violations] == ["chat"]
