"""Asks a server for its health: `python -m docker.health`. Returns 0 if it serves.

For Docker's health check, and for Kubernetes where TLS is on: its own gRPC probes do not speak that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(arguments: Sequence[str] | None = None) -> int:
    """One question. Prints the answer; 0 for SERVING, 1 for anything else, 2 for wrong usage."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.tls_cert is None) != (given.tls_key is None) or (given.tls_cert and given.tls_ca is None):
        parser.error("--tls-cert, --tls-key and --tls-ca come together")
    try:
        channel = _channel(given)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    with channel:
        request = health_pb2.HealthCheckRequest(service=given.service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=given.timeout)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m docker.health", description=__doc__)
    add = parser.add_argument
    add("--server", default="127.0.0.1:50051", metavar="HOST:PORT", help="default %(default)s")
    add("--service", default="", metavar="NAME", help="a service's name; '' asks for the process (default)")
    add("--timeout", type=float, default=3.0, metavar="SECONDS", help="default %(default)s")
    add("--tls-ca", metavar="FILE", help="use TLS and trust these PEM certificates; the server's own will do")
    add("--server-name", metavar="NAME", help="name in the server's certificate, where it is not the address")
    add("--tls-cert", metavar="FILE", help="our own PEM certificate, for mutual TLS")
    add("--tls-key", metavar="FILE", help="its PEM key")
    return parser


def _channel(given: argparse.Namespace) -> grpc.Channel:
    if given.tls_ca is None:
        return grpc.insecure_channel(given.server)
    ca, key, cert = (
        Path(path).read_bytes() if path is not None else None for path in (given.tls_ca, given.tls_key, given.tls_cert)
    )
    options = [("grpc.ssl_target_name_override", given.server_name)] if given.server_name else []
    return grpc.secure_channel(given.server, grpc.ssl_channel_credentials(ca, key, cert), options=options)


if __name__ == "__main__":
    sys.exit(main())
