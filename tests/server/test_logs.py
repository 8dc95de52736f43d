"""One JSON object a line, whatever is logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import configure, log


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_line_is_an_object(own_logging: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    log("first", text="two\nlines")
    log("too quiet", level=logging.DEBUG)
    try:
        raise ValueError("why")
    except ValueError:
        log("failed", level=logging.ERROR, exc_info=True)
    first, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["level"], first["text"]) == ("first", "info", "two\nlines")
    assert "ValueError: why" in failed["error"]


def test_rubbish_in_headers_is_one_short_line(own_logging: None, capsys: pytest.CaptureFixture[str]) -> None:
    """As gRPC's compiled part logs it."""
    configure("warning")
    rubbish = b"\xd2\x085\xd8"
    try:
        rubbish.decode()
    except UnicodeDecodeError:
        logging.getLogger("grpc._cython.cygrpc").exception("Invalid encoding on %s", rubbish)
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["level"] == "warning"
    assert "error" not in line
