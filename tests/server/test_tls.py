"""Certificates: served, asked for, renewed without a restart, and refused when they are not in order."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from clients.client import Client, ServerError
from clients.connection import Tls
from clients.retry import Retry
from engine.errors import LoadError
from server.tls import TlsFiles, load, server_credentials, tls_files
from tests.server.conftest import Launch


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write(cert: trustme.LeafCert, directory: Path) -> TlsFiles:
    """Replaces both files, each at once, as a certificate manager does."""
    files = TlsFiles(directory / "cert.pem", directory / "key.pem")
    for path, parts in ((files.cert, cert.cert_chain_pems), (files.key, [cert.private_key_pem])):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(b"".join(part.bytes() for part in parts))
        os.replace(fresh, path)
    return files


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> TlsFiles:
    return write(authority.issue_cert("localhost"), tmp_path)


def trusting(authority: trustme.CA, **more: bytes) -> Tls:
    return Tls(ca=authority.cert_pem.bytes(), server_name="localhost", **more)


async def test_tls_serves_who_trusts_it_and_nobody_else(launch: Launch, authority: trustme.CA, files: TlsFiles) -> None:
    running = await launch("hello world", credentials=partial(server_credentials, files))
    async with Client(running.address, tls=trusting(authority)) as client:
        assert (await client.complete("hi")).text == "hello world"
    for stranger in (trusting(trustme.CA()), Tls(ca=authority.cert_pem.bytes(), server_name="elsewhere"), None):
        async with Client(running.address, tls=stranger, retry=Retry(attempts=1)) as client:
            with pytest.raises(ServerError, match="UNAVAILABLE"):
                await client.info(timeout_s=10)


async def test_mutual_tls_asks_for_a_certificate(
    launch: Launch, authority: trustme.CA, files: TlsFiles, tmp_path: Path
) -> None:
    clients = trustme.CA()
    ca = tmp_path / "clients.pem"
    clients.cert_pem.write_to_path(ca)
    running = await launch(credentials=partial(server_credentials, TlsFiles(files.cert, files.key, ca)))
    for issuer, served in ((clients, True), (trustme.CA(), False), (None, False)):
        own = {}
        if issuer is not None:
            cert = issuer.issue_cert("client")
            own = {"cert": cert.cert_chain_pems[0].bytes(), "key": cert.private_key_pem.bytes()}
        async with Client(running.address, tls=trusting(authority, **own)) as client:
            if served:
                assert (await client.complete("hi")).text
            else:
                with pytest.raises(ServerError, match="UNAVAILABLE"):
                    await client.info(timeout_s=10)


async def test_certificates_are_renewed_without_a_restart(
    launch: Launch, authority: trustme.CA, files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dspark.server")
    running = await launch(credentials=partial(server_credentials, files, look_s=0.0))
    async with Client(running.address, tls=trusting(authority)) as old:
        await old.info()
        files.key.write_text("rubbish")  # keeps the old one
        async with Client(running.address, tls=trusting(authority)) as client:
            await client.info()
        assert "not_reloaded" in caplog.messages
        other = trustme.CA()
        write(other.issue_cert("localhost"), files.cert.parent)
        async with Client(running.address, tls=trusting(other)) as client:
            await client.info()
        assert "reloaded" in caplog.messages
        await old.info()  # a connection that is open stays so


def expired(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert(
        "localhost", not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=datetime(2020, 2, 1, tzinfo=UTC)
    )


def test_what_is_not_in_order_is_refused(authority: trustme.CA, files: TlsFiles, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    mismatched = TlsFiles(files.cert, write(authority.issue_cert("x"), other).key)
    with pytest.raises(LoadError, match=r"other/key.pem is not the key of --tls-cert .*cert.pem"):
        load(mismatched)
    late = tmp_path / "late"
    late.mkdir()
    with pytest.raises(LoadError, match=r"late/cert.pem: certificate has expired; renew it"):
        load(write(expired(authority), late))
    with pytest.raises(LoadError, match=r"--tls-key .*nowhere: No such file"):
        load(TlsFiles(files.cert, tmp_path / "nowhere"))
    with pytest.raises(LoadError, match=r"--tls-cert .*key.pem: no PEM certificate"):
        load(TlsFiles(files.key, files.key))
    with pytest.raises(LoadError, match=r"--tls-client-ca .*key.pem: no PEM certificates"):
        load(TlsFiles(files.cert, files.key, files.key))
    with pytest.raises(LoadError, match=r"--tls-client-ca .*cert.pem: none of its certificates may sign"):
        load(TlsFiles(files.cert, files.key, files.cert))
    locked = tmp_path / "locked.pem"
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(kind, form, serialization.BestAvailableEncryption(b"word")))
    with pytest.raises(LoadError, match="encrypted"):
        load(TlsFiles(files.cert, locked))


def test_flags_come_together() -> None:
    assert tls_files(None, None, None) is None
    for flags, missing in (
        ((None, "k", None), "--tls-cert"),
        (("c", None, None), "--tls-key"),
        ((None, None, "a"), "--tls-cert"),
    ):
        with pytest.raises(LoadError, match=missing):
            tls_files(*flags)


def test_a_certificate_that_soon_expires_is_warned_of(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(write(authority.issue_cert("localhost", not_after=datetime.now(UTC) + timedelta(days=3)), tmp_path))
    assert "certificate_expires_soon" in caplog.messages


def test_credentials_are_grpcs(files: TlsFiles) -> None:
    assert isinstance(server_credentials(files), grpc.ServerCredentials)
