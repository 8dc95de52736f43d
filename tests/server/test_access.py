"""Tokens: who may call what, how much at once, and what one tenant learns of another."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import scheduler_pb2 as scheduler
from dspark.v1 import scheduler_pb2_grpc as scheduler_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from clients.client import Client, ServerError
from clients.connection import Tls
from clients.events import Options
from clients.scheduler import SchedulerClient
from engine.errors import LoadError
from server import tokens
from server.access import Access
from server.options import Admin, AdminListen
from server.tls import TlsFiles, server_credentials
from server.tokens import Grant, TokenTable
from tests.server.conftest import Launch, Running, until
from tests.server.test_service import collect, refused

ALICE, BOB, ROOT = "alice-0123456789abcdef", "bob-0123456789abcdef", "root-0123456789abcdef"
FILE = f"""
[[token]]
name = "alice"
token = "{ALICE}"
max_concurrent = 2
max_queued = 1

[[token]]
name = "bob"
sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"

[[token]]
name = "root"
token = "{ROOT}"
admin = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return path


def as_(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),)}


def secured(file: Path) -> dict[str, Any]:
    return {"access": Access(file, look_s=0.0)}


async def test_a_call_needs_a_token_that_is_known(launch: Launch, file: Path) -> None:
    running = await launch("hello world", serving=secured(file))
    for metadata in (
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", ALICE),),
        (("authorization", f"Basic {ALICE}"),),
        (("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")),
        (("authorization", "Bearer"),),
        (("authorization", f"Bearer {hashlib.sha256(BOB.encode()).hexdigest()}"),),
    ):
        for call in (
            running.stub.Generate(wire.GenerateRequest(text="hi"), metadata=metadata),
            running.stub.GetModelInfo(wire.GetModelInfoRequest(), metadata=metadata),
        ):
            error, details = await refused(call)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert details["RequestInfo"].request_id == details["x-request-id"]
    assert not running.engine.seen
    for token in (ALICE, BOB, ROOT):
        assert await collect(running, wire.GenerateRequest(text="hi"), **as_(token))
    async with Client(running.address, token=BOB) as client:
        assert (await client.complete("hi")).text == "hello world"
        assert await client.detokenize(await client.tokenize("hello")) == "hello"
        assert (await client.info())["model"] == "scripted"


async def test_probes_need_none_and_reflection_does(launch: Launch, file: Path) -> None:
    running = await launch(serving=secured(file))
    health = health_pb2_grpc.HealthStub(running.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status
    reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
    error, _ = await refused(reflection.ServerReflectionInfo(iter(ask)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [answer async for answer in reflection.ServerReflectionInfo(iter(ask), **as_(BOB))]


@pytest.mark.parametrize("admin", [Admin.SHARED, ("127.0.0.1", 0)], ids=["shared", "apart"])
async def test_the_schedulers_service_needs_admin_scope(launch: Launch, file: Path, admin: AdminListen) -> None:
    running = await launch(admin=admin, serving=secured(file))
    address = f"127.0.0.1:{running.server.admin_port}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = scheduler_grpc.SchedulerServiceStub(channel)
        for token, code in ((ALICE, grpc.StatusCode.PERMISSION_DENIED), ("wrong", grpc.StatusCode.UNAUTHENTICATED)):
            for call in (
                stub.GetPolicy(scheduler.GetPolicyRequest(), **as_(token)),
                stub.UpdatePolicy(scheduler.UpdatePolicyRequest(policy={"max_running": 1}), **as_(token)),
                stub.WatchRounds(scheduler.WatchRoundsRequest(), **as_(token)),
            ):
                error, _ = await refused(call)
                assert error.code() is code
        assert (await stub.GetPolicy(scheduler.GetPolicyRequest(), **as_(ROOT))).policy.max_running > 1
    async with Client(address, token=ROOT) as client:
        assert (await SchedulerClient(client).update_policy({"max_running": 3}))["max_running"] == 3


async def test_the_schedulers_own_address_has_the_servers_certificate(
    launch: Launch, tmp_path: Path, file: Path
) -> None:
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    (tmp_path / "cert.pem").write_bytes(b"".join(part.bytes() for part in cert.cert_chain_pems))
    cert.private_key_pem.write_to_path(tmp_path / "key.pem")
    credentials = partial(server_credentials, TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem"))
    running = await launch(admin=("127.0.0.1", 0), serving=secured(file), credentials=credentials)
    address = f"127.0.0.1:{running.server.admin_port}"
    tls = Tls(ca=authority.cert_pem.bytes(), server_name="localhost")
    async with Client(address, token=ROOT, tls=tls) as client:
        assert await SchedulerClient(client).policy()
    async with Client(address, token=ROOT) as client:
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await SchedulerClient(client).policy()


async def begin(running: Running, token: str, request_id: str, priority: int = 0) -> AsyncIterator[Any]:
    request = wire.GenerateRequest(text="hi", request_id=request_id, max_tokens=20, priority=priority)
    return running.stub.Generate(request, **as_(token)).__aiter__()


async def test_a_token_has_its_share_and_others_theirs(launch: Launch, file: Path) -> None:
    gate = threading.Semaphore(0)
    running = await launch("hello world, " * 20, eos=False, gate=gate, serving=secured(file))
    calls = [asyncio.ensure_future(exhaust(await begin(running, ALICE, f"a{n}"))) for n in range(3)]
    await until(lambda: len(running.server.service.active) == 3)
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi"), **as_(ALICE)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    pause = details["RetryInfo"].retry_delay.ToMilliseconds()
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == str(pause)
    assert pause > 0
    calls.append(asyncio.ensure_future(exhaust(await begin(running, BOB, "b"))))
    await until(lambda: len(running.server.service.active) == 4)
    gate.release(2)
    await until(lambda: len(running.engine.running) == 3)  # two of alice's three, and bob's
    gate.release(10_000)
    assert all(await asyncio.gather(*calls))
    assert len(running.engine.seen) == 4


async def exhaust(call: AsyncIterator[Any]) -> list[Any]:
    return [message async for message in call]


async def test_whoever_waits_may_leave_and_priority_goes_first(launch: Launch, file: Path) -> None:
    file.write_text(FILE.replace("max_concurrent = 2\nmax_queued = 1", "max_concurrent = 1"))  # noqa: ASYNC240
    gate = threading.Semaphore(0)
    running = await launch("hello world, " * 20, eos=False, gate=gate, serving=secured(file))
    first = asyncio.ensure_future(exhaust(await begin(running, ALICE, "first")))
    await until(lambda: len(running.engine.seen) == 1)
    low = asyncio.ensure_future(exhaust(await begin(running, ALICE, "low")))
    leaver = running.stub.Generate(wire.GenerateRequest(text="hi", request_id="leaver"), **as_(ALICE))
    await until(lambda: len(running.server.service.active) == 3)
    high = asyncio.ensure_future(exhaust(await begin(running, ALICE, "high", priority=1)))
    await until(lambda: len(running.server.service.active) == 4)
    leaver.cancel()
    await until(lambda: len(running.server.service.active) == 3)
    gate.release(10_000)
    assert all(await asyncio.gather(first, low, high))
    assert [request.request_id.partition("#")[0] for request in running.engine.seen] == ["first", "high", "low"]
    assert not running.server.service.active


async def test_tenants_share_neither_names_nor_cached_prefixes(launch: Launch, file: Path) -> None:
    gate = threading.Semaphore(0)
    running = await launch(gate=gate, serving=secured(file))
    mine = asyncio.ensure_future(exhaust(await begin(running, ALICE, "same")))
    await until(lambda: len(running.engine.seen) == 1)
    theirs = asyncio.ensure_future(exhaust(await begin(running, BOB, "same")))  # no ALREADY_EXISTS, which would tell
    await asyncio.sleep(0.05)
    error, _ = await refused(running.stub.Generate(wire.GenerateRequest(text="hi", request_id="same"), **as_(ALICE)))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    gate.release(10_000)
    assert await mine and await theirs
    for token, salt in ((ALICE, ""), (ALICE, "x"), (BOB, ""), (BOB, "alice\0"), (ALICE, "bob\0")):
        await collect(running, wire.GenerateRequest(text="hi", cache_salt=salt), **as_(token))
    salts = [request.cache_salt for request in running.engine.seen]
    assert len(set(salts)) == len(salts) - 2  # the two named `same` salted as their tenants' later ones
    assert (salts[0], salts[1]) == (salts[2], salts[4])


async def test_without_tokens_salts_are_the_clients(launch: Launch) -> None:
    running = await launch()
    await collect(running, wire.GenerateRequest(text="hi", cache_salt="mine"))
    assert running.engine.seen[0].cache_salt == "mine"


async def test_the_file_is_followed(launch: Launch, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    running = await launch(serving=secured(file))
    fresh = file.with_suffix(".new")
    fresh.write_text('[[token]]\nname = "carol"\ntoken = "carol-0123456789abcdef"\n')
    os.replace(fresh, file)
    error, _ = await refused(running.stub.GetModelInfo(wire.GetModelInfoRequest(), **as_(ALICE)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    await running.stub.GetModelInfo(wire.GetModelInfoRequest(), **as_("carol-0123456789abcdef"))
    file.write_text("[[token]]\nname = 5")  # noqa: ASYNC240
    await running.stub.GetModelInfo(wire.GetModelInfoRequest(), **as_("carol-0123456789abcdef"))
    assert "not_reloaded" in caplog.messages


SECRET = "s3cr3t-0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (f"token = '{SECRET}", "not TOML"),
        (f"[[token]]\nname='a'\ntoken='{SECRET}' {SECRET}", "not TOML"),
        (f"token = '{SECRET}'", r"list of \[\[token\]\]"),
        ("", r"list of \[\[token\]\]"),
        (f"[[token]]\ntoken = '{SECRET}'", "token 1: name"),
        (f"[[token]]\nname = 'a/b'\ntoken = '{SECRET}'", "token 1: name"),
        ("[[token]]\nname = 'a'", r"\(a\): give either"),
        (f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nsha256 = 'x'", "give either"),
        ("[[token]]\nname = 'a'\ntoken = 'short'", "at least 16"),
        (f"[[token]]\nname = 'a'\nsha256 = '{SECRET}'", "64 hexadecimal"),
        (f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nadmin = 'yes'", "admin"),
        (f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nmax_concurrent = 0", "max_concurrent"),
        (f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\nmax_queud = 1", "unknown key 'max_queud'"),
        (f"[[token]]\nname = 'a'\ntoken = '{SECRET}'\n" * 2, "the same name"),
        (f"[[token]]\nname='a'\ntoken='{SECRET}'\n[[token]]\nname='b'\ntoken='{SECRET}'", "the same token"),
    ],
)
def test_a_wrong_file_is_named_and_its_tokens_are_not(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    with pytest.raises(LoadError, match=named) as error:
        tokens.load(path)
    assert str(path) in str(error.value)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None


def test_looking_a_token_up_compares_with_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long for the first as for the last and for none."""
    grants = [Grant(str(n), hashlib.sha256(str(n).encode()).digest()) for n in range(5)]
    compared: list[bytes] = []
    real = tokens.hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    table = TokenTable(grants)
    for token in ("0", "4", "nobody"):
        table.find(token)
    assert [len(compared)] == [15]


def test_the_command_lines_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clients.arguments import build_parser
    from clients.connection import token_from

    parser = build_parser()
    path = tmp_path / "token"
    path.write_text(f"{ALICE}\n")
    given = parser.parse_args(["info", "--token-file", str(path)])
    assert token_from(given, parser, {"DSPARK_TOKEN": BOB}) == ALICE
    bare = parser.parse_args(["info"])
    assert token_from(bare, parser, {"DSPARK_TOKEN": BOB}) == BOB
    assert token_from(bare, parser, {}) is None
    path.write_text("two words")
    with pytest.raises(SystemExit):
        token_from(given, parser, {})
    assert "two words" not in capsys.readouterr().err


async def test_a_token_without_tls_is_warned_of(launch: Launch) -> None:
    with pytest.warns(UserWarning, match="without TLS"):
        Client("models.example:50051", token=ALICE)
    with pytest.raises(ServerError):
        async with Client("127.0.0.1:1", token=ALICE) as client:  # loopback: no warning
            await client.complete("hi", Options(max_tokens=1), timeout_s=5)
