"""TLS and mutual TLS: certificates from files, proven before use, reloaded when the files change."""

from __future__ import annotations

import logging
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import LoadError
from server.logs import log
from server.reload import LOOK_S, Reloading

WARN_DAYS = 14
_DAY_S = 86_400.0
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `client_ca`: clients must show a certificate that one of these signed (mutual TLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def tls_files(cert: str | None, key: str | None, client_ca: str | None) -> TlsFiles | None:
    """What the flags name; None for a server without TLS.

    Raises:
        LoadError: one is missing.
    """
    if cert is None and key is None:
        if client_ca is not None:
            raise LoadError("--tls-client-ca needs TLS: give --tls-cert and --tls-key too")
        return None
    if cert is None or key is None:
        missing = "--tls-cert" if cert is None else "--tls-key"
        raise LoadError(f"{missing} is missing: a certificate and its key come together")
    return TlsFiles(Path(cert), Path(key), Path(client_ca) if client_ca is not None else None)


def server_credentials(files: TlsFiles, look_s: float = LOOK_S) -> grpc.ServerCredentials:
    """Credentials that follow the files: every new connection gets what lies there, if that is in order.

    Raises:
        LoadError: missing, unreadable, expired or mismatched files, named.
    """
    paths = [path for path in (files.cert, files.key, files.client_ca) if path is not None]
    certificates = Reloading("certificates", paths, lambda: load(files), look_s)
    current = certificates.get()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake; None for no change."""
        nonlocal current
        latest = certificates.get()
        if latest is current:
            return None
        current = latest
        return latest

    return grpc.dynamic_ssl_server_credentials(
        current,
        fetch,  # type: ignore[arg-type]  # the stub does not know that None means no change
        require_client_authentication=files.client_ca is not None,
    )


def load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """Reads and proves the files.

    Raises:
        LoadError: naming the file and the mend.
    """
    cert, key = _read("--tls-cert", files.cert), _read("--tls-key", files.key)
    leaf = _PEM.search(cert)
    if leaf is None:
        raise LoadError(f"--tls-cert {files.cert}: no PEM certificate in it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        raise LoadError(_pair_problem(files, error)) from error
    end = _prove(context, leaf[0], files.cert)
    if files.client_ca is None:
        authorities = None
    else:
        authorities = _read("--tls-client-ca", files.client_ca)
        _check_authorities(authorities, files.client_ca)
    log("certificates", cert=str(files.cert), days_left=int((end - time.time()) / _DAY_S))
    if end - time.time() < WARN_DAYS * _DAY_S:
        log("certificate_expires_soon", level=logging.WARNING, cert=str(files.cert))
    pair = (key.encode(), cert.encode())
    return grpc.ssl_server_certificate_configuration([pair], authorities.encode() if authorities else None)


def _read(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise LoadError(f"{flag} {path}: {error.strerror or error}; name a PEM file that can be read") from error


def _no_password() -> bytes:
    raise LoadError("--tls-key: the key is encrypted; give one without a password, readable by this user only")


def _pair_problem(files: TlsFiles, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"--tls-key {files.key} is not the key of --tls-cert {files.cert}; give the pair that was made together"
    return f"--tls-cert {files.cert} with --tls-key {files.key}: not a usable PEM pair ({error.reason or error})"


def _prove(context: ssl.SSLContext, leaf: str, path: Path) -> float:
    """A handshake in memory with a client that trusts just this certificate; returns when it ends to be valid."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False  # which names it must carry, only its clients know
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        trusting.load_verify_locations(cadata=leaf)
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(to_client, to_server)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        waiting = [client, server]
        while waiting:
            side = waiting.pop(0)
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(side)
    except ssl.SSLCertVerificationError as error:
        raise LoadError(f"--tls-cert {path}: {error.verify_message}; renew it") from error
    except ssl.SSLError as error:
        raise LoadError(f"--tls-cert {path}: not a usable certificate ({error.reason or error})") from error
    seen = client.getpeercert()
    assert seen is not None
    return float(ssl.cert_time_to_seconds(str(seen["notAfter"])))


def _check_authorities(text: str, path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise LoadError(f"--tls-client-ca {path}: no PEM certificates in it") from error
    ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    if not ends:
        raise LoadError(f"--tls-client-ca {path}: none of its certificates may sign others; give the authority's")
    if max(ends) < time.time():
        raise LoadError(f"--tls-client-ca {path}: every certificate in it has expired; renew it")
