"""The process: engine, gRPC server, readiness, and an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import uvloop
from dspark.v1 import generation_pb2_grpc as wire_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.engine import Engine
from engine.errors import LoadError
from engine.loading import load_engine, warm_up
from engine.messages import EngineInfo
from engine.models.hub import resolve
from server.address import join
from server.checkpoint import Checkpoint
from server.logs import log
from server.options import Options
from server.service import SERVICE_NAME, GenerationService
from server.worker import EngineLike, Worker

MAX_RECEIVED = 16 * 2**20
# The event loop and the engine take turns every few hundred microseconds; at Python's 5 ms a round waits for the other.
SWITCH_S = 0.0002
LAST_CALLS_S = 1.0  # for calls that no generation holds open, such as a health watch
CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_receive_message_length", MAX_RECEIVED),
    ("grpc.max_send_message_length", MAX_RECEIVED),
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
_READY = health_pb2.HealthCheckResponse.SERVING
_NOT_READY = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A gRPC server around one engine, made inside a running event loop.

    Health: "" while the process lives, the service's name while ready."""

    def __init__(self, engine: EngineLike, info: EngineInfo, checkpoint: Checkpoint, *, stall_s: float = 30.0) -> None:
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._readiness: set[asyncio.Task[None]] = set()
        self._worker = Worker(engine, on_broken=self._engine_broke)
        self.service = GenerationService(self._worker, info, checkpoint, stall_s=stall_s)
        self._grpc = grpc.aio.server(options=CHANNEL_OPTIONS)
        wire_grpc.add_GenerationServiceServicer_to_server(self.service, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    async def start(self, host: str, port: int) -> int:
        """Listens, and is ready. Returns the port.

        Raises:
            LoadError: the address cannot be had.
        """
        try:
            bound = self._grpc.add_insecure_port(join(host, port))
        except RuntimeError as error:
            raise LoadError(f"cannot listen on {join(host, port)}: {error}") from error
        self._worker.start()
        await self._grpc.start()
        await self._health.set("", _READY)
        await self._health.set(SERVICE_NAME, _READY)
        return bound

    async def stop(self, drain_s: float) -> None:
        """Refuses new generations, lets running ones finish for `drain_s` seconds, then ends."""
        self.service.draining = True
        await self._health.set(SERVICE_NAME, _NOT_READY)
        log("draining", running=len(self.service.active), seconds=drain_s)
        try:
            await asyncio.wait_for(self.service.drained(), drain_s)
        except TimeoutError:
            log("drain_cut_short", running=sorted(self.service.active))
        await self._grpc.stop(min(LAST_CALLS_S, drain_s))
        await self._worker.stop()

    def _engine_broke(self) -> None:
        task = asyncio.ensure_future(self._health.set(SERVICE_NAME, _NOT_READY))
        self._readiness.add(task)
        task.add_done_callback(self._readiness.discard)


def serve(options: Options) -> int:
    """Loads and serves until SIGTERM or SIGINT.

    Raises:
        LoadError: nothing that could be served, or nowhere to listen.
    """
    log("configuration", listen=join(options.host, options.port), **dataclasses.asdict(options.engine))
    directory = resolve(options.engine.model, options.engine.revision)
    checkpoint = Checkpoint.load(Path(directory))
    engine = load_engine(options.engine)
    log("loaded", **dataclasses.asdict(engine.info))
    began = time.monotonic()
    warm_up(engine)
    log("warm", seconds=round(time.monotonic() - began, 3))
    sys.setswitchinterval(SWITCH_S)
    return uvloop.run(_run(engine, checkpoint, options))


async def _run(engine: Engine, checkpoint: Checkpoint, options: Options) -> int:
    server = Server(engine, engine.info, checkpoint)
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def on_signal() -> None:
        if told.is_set():  # asked twice: now
            os._exit(130)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    port = await server.start(options.host, options.port)
    print(f"serving {engine.info.model} on {join(options.host, port)}", flush=True)
    await told.wait()
    await server.stop(options.drain_s)
    log("stopped")
    return 0
