"""The process: engine, gRPC server, readiness, and an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import uvloop
from dspark.v1 import generation_pb2_grpc as wire_grpc
from dspark.v1 import scheduler_pb2_grpc as admin_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.errors import LoadError
from engine.models.hub import resolve
from server.access import Access
from server.address import join
from server.bounds import METADATA_BYTES, SENT_BYTES, Bounds
from server.checkpoint import Checkpoint
from server.collector import pass_over_what_stays
from server.engine_process import EngineProcess
from server.entrance import Credentials, Entrance, entrance
from server.guard import Guard
from server.logs import log
from server.options import Admin, AdminListen, Options
from server.recording import RoundFile
from server.scheduler_service import SERVICE_NAME as ADMIN_NAME
from server.scheduler_service import SchedulerService
from server.service import DEFAULT_BOUNDS, SERVICE_NAME, STALL_S, GenerationService
from server.telemetry import OFF, Telemetry, from_environment
from server.template_process import Renderer
from server.unknown import tolerant_server
from server.worker import Worker

LAST_CALLS_S = 1.0  # for calls that no generation holds open, such as a health watch
CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_send_message_length", SENT_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
    ("grpc.max_concurrent_streams", 4096),  # of one connection
    # Calls that the loop has not taken up: past these numbers gRPC drops them as CANCELLED, without our answer.
    ("grpc.server.max_pending_requests", 65_536),
    ("grpc.server.max_pending_requests_hard_limit", 65_536),
    ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
_READY = health_pb2.HealthCheckResponse.SERVING
_NOT_READY = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A gRPC server around one started engine, made inside a running event loop.

    Health: "" while this process lives, a service's name while there is an engine.

    Args:
        admin: where SchedulerService is served: beside generation, on an address of its own, or nowhere.
        renderer: of the checkpoint's template, if it runs already.
        access: asks every caller for a token.
        interceptors: see every call before all others.
    """

    def __init__(
        self,
        worker: Worker,
        checkpoint: Checkpoint,
        *,
        stall_s: float = STALL_S,
        admin: AdminListen = Admin.SHARED,
        bounds: Bounds = DEFAULT_BOUNDS,
        renderer: Renderer | None = None,
        access: Access | None = None,
        interceptors: Sequence[Any] = (),
        telemetry: Telemetry = OFF,
    ) -> None:
        self._telemetry = telemetry
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._announcing: set[asyncio.Task[None]] = set()
        self._worker = worker
        self._renderer = renderer
        if renderer is None and checkpoint.template is not None:
            self._renderer = Renderer(checkpoint.template, bounds.prompt_bytes)
        self.service = GenerationService(
            worker,
            checkpoint,
            stall_s=stall_s,
            bounds=bounds,
            renderer=self._renderer,
            access=access,
            telemetry=telemetry,
        )
        self._options = (*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", bounds.message_bytes))
        # Telemetry first, so that refusals are traced.
        self._interceptors = [
            *telemetry.interceptors(),
            *interceptors,
            *([access] if access is not None else []),
            Guard(),
        ]
        self._admin = admin
        self.admin_port = 0  # where SchedulerService is served, once started; 0: nowhere
        self._admin_names = () if admin is Admin.OFF else (ADMIN_NAME,)
        shared = admin is Admin.SHARED
        self._grpc = self._make((SERVICE_NAME, *(self._admin_names if shared else ())))
        wire_grpc.add_GenerationServiceServicer_to_server(self.service, self._grpc)
        self._admin_grpc = self._make(self._admin_names) if isinstance(admin, tuple) else self._grpc
        if self._admin_names:
            scheduler = SchedulerService(worker, self.service.answering)
            admin_grpc.add_SchedulerServiceServicer_to_server(scheduler, self._admin_grpc)

    def _make(self, names: tuple[str, ...]) -> grpc.aio.Server:
        """A server that answers for health and reflection of the services of these names."""
        made = tolerant_server(self._options, self._interceptors)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, made)
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), made)
        return made

    async def start(self, host: str, port: int, credentials: Credentials | None = None) -> int:
        """Listens, with TLS where there are credentials, and is ready. Returns the port.

        Args:
            credentials: makes them, for each address anew: gRPC asks the same ones only once what they begin with.

        Raises:
            LoadError: the address cannot be had.
        """
        bound = _bind(self._grpc, host, port, credentials)
        self._telemetry.listening(host, bound)
        self._telemetry.watch(self._worker)
        self.admin_port = bound if self._admin is Admin.SHARED else 0
        if isinstance(self._admin, tuple):
            self.admin_port = _bind(self._admin_grpc, *self._admin, credentials)
            log("admin", listen=join(self._admin[0], self.admin_port))
            await self._admin_grpc.start()
        await self._grpc.start()
        await self._health.set("", _READY)
        self._worker.on_ready = self._follow
        await self._announce()
        return bound

    async def stop(self, drain_s: float) -> None:
        """Refuses new generations, lets running ones finish for `drain_s` seconds, then ends."""
        self.service.draining = True
        await self._announce()
        log("draining", running=len(self.service.active), seconds=drain_s)
        try:
            await asyncio.wait_for(self.service.drained(), drain_s)
        except TimeoutError:
            log("drain_cut_short", running=sorted(self.service.active))
            self._worker.abandon("the server is shutting down; send the request to another one")
        self._worker.rounds.close()  # whoever watches saw the last rounds too
        servers = {self._grpc, self._admin_grpc}
        await asyncio.gather(*(each.stop(min(LAST_CALLS_S, drain_s)) for each in servers))
        if self._renderer is not None:
            await self._renderer.stop()

    async def _announce(self) -> None:
        ready = self._worker.ready and not self.service.draining
        for name in (SERVICE_NAME, *self._admin_names):
            await self._health.set(name, _READY if ready else _NOT_READY)

    def _follow(self, ready: bool) -> None:
        """The engine came or went."""
        task = asyncio.ensure_future(self._announce())
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: Credentials | None) -> int:
    """The port that the server now listens on."""
    try:
        if credentials is None:
            return server.add_insecure_port(join(host, port))
        return server.add_secure_port(join(host, port), credentials())
    except RuntimeError as error:
        raise LoadError(f"cannot listen on {join(host, port)}: {error}") from error


def serve(options: Options) -> int:
    """Loads and serves until SIGTERM or SIGINT.

    Raises:
        LoadError: nothing that could be served, or nowhere to listen.
    """
    log("configuration", settings=options.settings)
    directory = resolve(options.engine.model, options.engine.revision)
    return uvloop.run(_run(options, directory))


async def _run(options: Options, directory: Path) -> int:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def on_signal() -> None:
        if told.is_set():  # asked twice: now
            os._exit(130)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    telemetry = from_environment(options.host, options.metrics_port)
    door = entrance(options)
    worker = Worker(
        lambda: EngineProcess(options.engine, options.log_level), hang_s=options.hang_s, start_s=options.start_s
    )
    try:
        loaded = await _load(worker, directory, options.bounds, told)
        if loaded is not None:
            pass_over_what_stays()
            log("loaded", kv_memory=worker.config.kv_memory, **dataclasses.asdict(worker.info))
            await _serve(options, worker, loaded, door, told, telemetry)
    finally:
        await worker.stop()
        await telemetry.close()
    log("stopped")
    return 0


class _Loaded(NamedTuple):
    checkpoint: Checkpoint
    renderer: Renderer | None


async def _load(worker: Worker, directory: Path, bounds: Bounds, told: asyncio.Event) -> _Loaded | None:
    """Starts the engine's process and reads the text side meanwhile; None when told to stop before both are done."""
    starting = asyncio.ensure_future(worker.start())
    stopping = asyncio.ensure_future(told.wait())
    renderer: Renderer | None = None
    loaded: _Loaded | None = None
    try:
        checkpoint = await asyncio.to_thread(Checkpoint.load, directory)
        if checkpoint.template is not None:
            renderer = Renderer(checkpoint.template, bounds.prompt_bytes)
            try:
                await renderer.start()
            except ValueError as error:
                if told.is_set():  # who signals a whole group may have hit the renderer's process before it left it
                    return None
                raise LoadError(f"{directory}: {error}") from error
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            loaded = _Loaded(checkpoint, renderer)
        return loaded
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.wait([starting, stopping])
        if loaded is None and renderer is not None:
            await renderer.stop()


async def _serve(
    options: Options,
    worker: Worker,
    loaded: _Loaded,
    door: Entrance,
    told: asyncio.Event,
    telemetry: Telemetry,
) -> None:
    server = Server(
        worker,
        loaded.checkpoint,
        admin=options.admin,
        bounds=options.bounds,
        renderer=loaded.renderer,
        access=door.access,
        telemetry=telemetry,
    )
    recording = None
    if options.record_rounds is not None:
        file = RoundFile(options.record_rounds, options.record_bytes)
        recording = asyncio.ensure_future(file.follow(worker.rounds))
    port = await server.start(options.host, options.port, door.credentials)
    with suppress(OSError):  # a full disk behind stdout is no reason not to serve
        print(f"serving {worker.info.model} on {join(options.host, port)}", flush=True)
    await told.wait()
    await server.stop(options.drain_s)
    if recording is not None:
        await asyncio.wait([recording], timeout=LAST_CALLS_S)
