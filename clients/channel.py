"""What our channels ask of gRPC: load balancing, signs of life, sizes."""

from __future__ import annotations

import json

MAX_MESSAGE = 16 * 2**20  # bytes, as the server's
KEEPALIVE_MS = 30_000  # the server allows a ping every 5 s
KEEPALIVE_TIMEOUT_MS = 10_000
RESOLVE_MS = 5_000

Options = list[tuple[str, str | int]]


def channel_options() -> Options:
    """Arguments of every channel.

    `round_robin` spreads calls over all addresses of a name, such as `dns:///dspark-headless:50051` of a Kubernetes
    headless service, and leaves out those that do not answer. gRPC looks the name up again whenever a connection
    ends, but by default not more than every 30 s, in which calls would miss a server that came back. The first
    reconnection is early, since calls fail at once while the channel waits for it.
    """
    return [
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.dns_min_time_between_resolutions_ms", RESOLVE_MS),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
