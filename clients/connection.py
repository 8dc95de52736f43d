"""How a client reaches a server: TLS, mutual TLS, bearer tokens."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from clients.channel import channel_options

TOKEN_VARIABLE = "DSPARK_TOKEN"
_HERE = ("127.", "localhost", "[::1]", "unix:")


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM contents. `ca`: who may have signed the server's certificate; None: whom this machine trusts.

    `cert` and `key` are for servers that ask clients for a certificate; `server_name` is the name that the server's
    certificate must carry, where that is not the address.
    """

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None


def open_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel with our options."""
    options = channel_options()
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return grpc.aio.secure_channel(address, credentials, options=options)


def call_metadata(address: str, token: str | None, tls: Tls | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    if token is None:
        return ()
    if tls is None and not address.startswith(_HERE):
        warnings.warn(f"the token travels to {address} without TLS, readable by everybody on the way", stacklevel=3)
    return (("authorization", f"Bearer {token}"),)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `token_from` and `tls_from` read."""
    add = parser.add_argument
    add("--tls", action="store_true", help="use TLS, trusting whom this machine trusts; the flags below imply it")
    add("--tls-ca", metavar="FILE", help="PEM certificates of who may have signed the server's")
    add("--tls-cert", metavar="FILE", help="our PEM certificate, for a server that asks for one")
    add("--tls-key", metavar="FILE", help="its PEM key")
    add("--server-name", metavar="NAME", help="name in the server's certificate, where it is not the address")
    add("--token-file", metavar="FILE", help=f"file with our bearer token (default: the variable {TOKEN_VARIABLE})")


def tls_from(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Tls | None:
    """What the flags say; a file that cannot be read ends the process with code 2."""
    if (given.tls_cert is None) != (given.tls_key is None):
        parser.error("--tls-cert and --tls-key come together")
    if not (given.tls or given.tls_ca or given.tls_cert or given.server_name):
        return None
    ca, cert, key = (_file(parser, name, getattr(given, name)) for name in ("tls_ca", "tls_cert", "tls_key"))
    return Tls(ca, cert, key, given.server_name)


def token_from(
    given: argparse.Namespace, parser: argparse.ArgumentParser, environ: Mapping[str, str] = os.environ
) -> str | None:
    """The token; one that no header can carry ends the process with code 2."""
    content = _file(parser, "token_file", given.token_file)
    token = content.decode(errors="replace").strip() if content is not None else environ.get(TOKEN_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in token) or (content is not None and not token):
        where = f"--token-file {given.token_file}" if content is not None else TOKEN_VARIABLE
        parser.error(f"{where}: not a token, which is one line of visible ASCII characters")
    return token or None


def _file(parser: argparse.ArgumentParser, name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        parser.error(f"--{name.replace('_', '-')} {path}: {error.strerror or error}")
