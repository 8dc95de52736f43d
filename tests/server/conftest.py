"""A checkpoint's text files, and a server around a scripted engine, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2_grpc as wire_grpc

from server.app import Server
from server.chat import TemplateSource
from server.checkpoint import Checkpoint
from server.entrance import Credentials
from server.options import Admin, AdminListen
from server.telemetry import OFF, Telemetry, from_environment
from server.worker import Worker
from tests.server import fake_engine
from tests.server.otlp import Collector, collecting


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_engine.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint.load(directory)


@pytest.fixture(scope="session")
def vocab_size(checkpoint: Checkpoint) -> int:
    return len(checkpoint.tokenizer._pieces)


@dataclass
class Running:
    """A server under test."""

    server: Server
    engine: fake_engine.ScriptedEngine
    channel: grpc.aio.Channel
    stub: Any
    address: str


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Waits for something that another thread or task brings about."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # what it waits for tells nobody
            await asyncio.sleep(0.005)


Launch = Callable[..., Any]


@pytest.fixture
async def launch(checkpoint: Checkpoint, vocab_size: int) -> AsyncIterator[Launch]:
    """Starts a server: `await launch(reply_text, serving={Server's options}, **engine_options)`."""
    async with AsyncExitStack() as stack:

        async def start(
            reply: str = "hello world",
            *,
            stall_s: float = 30.0,
            max_model_len: int = 512,
            eos: bool = True,
            admin: AdminListen = Admin.SHARED,
            template: TemplateSource | None = None,
            serving: Mapping[str, Any] | None = None,
            credentials: Credentials | None = None,
            telemetry: Telemetry = OFF,
            **options: Any,
        ) -> Running:
            ids = checkpoint.tokenizer.encode(reply) + [0] * eos
            engine = fake_engine.ScriptedEngine(ids, **options)
            facts = fake_engine.info(vocab_size, max_model_len)
            own = replace(checkpoint, template=template) if template is not None else checkpoint
            keywords = {"stall_s": stall_s, "admin": admin, "telemetry": telemetry, **(serving or {})}
            return await stack.enter_async_context(_serving(engine, facts, own, keywords, credentials))

        yield start


@asynccontextmanager
async def _serving(
    engine: fake_engine.ScriptedEngine,
    facts: Any,
    checkpoint: Checkpoint,
    keywords: Mapping[str, Any],
    credentials: Credentials | None,
) -> AsyncIterator[Running]:
    worker = Worker(lambda: fake_engine.EngineThread(engine, facts))
    await worker.start()
    server = Server(worker, checkpoint, **keywords)
    port = await server.start("127.0.0.1", 0, credentials)
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield Running(server, engine, channel, wire_grpc.GenerationServiceStub(channel), address)
    if engine.gate is not None:
        engine.gate.release(10_000)
    await server.stop(0.2)
    await worker.stop()
    if "telemetry" in keywords:
        await keywords["telemetry"].close()


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """Takes what telemetry sends; the standard variables lead there."""
    async with collecting() as kept:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", kept.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
        yield kept


@pytest.fixture
def telemetry(collector: Collector) -> Telemetry:
    return from_environment("127.0.0.1", None)
