"""Who gets in, and how the way there is kept private: tokens and certificates, read before anything that takes time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import grpc

from server.access import Access
from server.address import is_loopback, join
from server.logs import log
from server.options import Options
from server.tls import load, server_credentials

Credentials = Callable[[], grpc.ServerCredentials]


class Entrance(NamedTuple):
    """What asks for tokens and what makes TLS credentials; None for a server without."""

    access: Access | None
    credentials: Credentials | None


def entrance(options: Options) -> Entrance:
    """Certificates and tokens, before anything that takes time.

    Raises:
        LoadError: files that cannot be used.
    """
    credentials = None
    if options.tls is not None:
        load(options.tls)
        credentials = partial(server_credentials, options.tls)
    access = Access(options.auth_tokens) if options.auth_tokens is not None else None
    listens = [(options.host, options.port), *([options.admin] if isinstance(options.admin, tuple) else [])]
    open_to_others = [join(*listen) for listen in listens if not is_loopback(listen[0])]
    if access is not None and credentials is None and open_to_others:
        reason = "tokens travel readably without TLS; give --tls-cert and --tls-key, or end TLS before this server"
        log("tokens_without_tls", level=logging.WARNING, listen=open_to_others, reason=reason)
    return Entrance(access, credentials)
