"""Where to listen."""

from __future__ import annotations

import errno
import ipaddress
import socket

from engine.errors import LoadError


def join(host: str, port: int) -> str:
    return f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def probe_address(host: str, port: int) -> None:
    """Fails before a model is loaded when the address cannot be had.

    Raises:
        LoadError: in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        mend = "choose another port, or 0 for any" if error.errno == errno.EADDRINUSE else "check --listen"
        raise LoadError(f"cannot listen on {join(host, port)}: {error.strerror or error}; {mend}") from error
