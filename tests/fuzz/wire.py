"""What no gRPC client would send: raw bytes to the port, from rubbish to HTTP/2 with wrong frames."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _END_HEADERS = 1, 4


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack("!I", len(body))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + body


def _header(name: bytes, value: bytes) -> bytes:
    """HPACK: a literal that is never indexed, no Huffman code."""
    return b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _request(path: bytes) -> bytes:
    pairs = [
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"fuzz")),
        *((b"te", b"trailers"), (b"content-type", b"application/grpc")),
    ]
    return b"".join(_header(*pair) for pair in pairs)


def call_of(path: bytes) -> bytes:
    """The bytes of a connection that calls a method with an empty message."""
    opened = _PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_HEADERS, _END_HEADERS, 1, _request(path))
    return opened + _frame(_DATA, _END_STREAM, 1, b"\0" * 5)


def attack(rng: random.Random, path: str, message: bytes) -> bytes:
    """The bytes of one connection."""
    start = _PREFACE + _frame(_SETTINGS, 0, 0, b"")
    opened = start + _frame(_HEADERS, _END_HEADERS, 1, _request(path.encode()))
    prefixed = b"\0" + struct.pack("!I", len(message)) + message
    match rng.randrange(10):
        case 0:
            return rng.randbytes(rng.randrange(300))
        case 1:
            return _PREFACE[: rng.randrange(len(_PREFACE))]
        case 2:  # a message that ends early
            return opened + _frame(_DATA, _END_STREAM, 1, prefixed[: rng.randrange(len(prefixed))])
        case 3:  # one that claims to be larger than it is, or than it may be
            return opened + _frame(_DATA, _END_STREAM, 1, b"\0\xff\xff\xff\xff" + message)
        case 4:  # compressed, in no encoding
            return opened + _frame(_DATA, _END_STREAM, 1, b"\1" + prefixed[1:])
        case 5:  # a frame of a stream that was never opened, and frames of the wrong size
            return (
                opened + _frame(_DATA, 0, 99, prefixed) + _frame(_PING, 0, 0, b"123") + _frame(_WINDOW, 0, 1, b"\0" * 4)
            )
        case 6:  # headers without an end, and rubbish in them
            return (
                start
                + _frame(_HEADERS, 0, 1, _request(path.encode())[:-5])
                + _frame(_CONTINUATION, 0, 1, rng.randbytes(30))
            )
        case 7:  # a good request that is taken back at once, often
            good = _frame(_HEADERS, _END_HEADERS, 1, _request(path.encode())) + _frame(_DATA, _END_STREAM, 1, prefixed)
            return start + good + _frame(_RST, 0, 1, struct.pack("!I", 8)) * 3
        case 8:  # a path that is no text
            return call_of(b"/" + rng.randbytes(rng.randrange(1, 30)))
        case _:
            return (
                opened + _frame(_DATA, _END_STREAM, 1, prefixed) + rng.randbytes(20) + _frame(_GOAWAY, 0, 0, b"\0" * 8)
            )


async def strike(host: str, port: int, data: bytes, patience_s: float = 0.05) -> None:
    """Opens a connection, sends, listens a moment, leaves."""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(data)
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(4096), patience_s)
        finally:
            writer.close()
