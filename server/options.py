"""The server's command line, and the defaults that depend on the machine."""

from __future__ import annotations

import argparse
import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import limits
from engine.config import POLICIES, EngineConfig
from engine.errors import LoadError
from server import settings
from server.address import join
from server.bounds import Bounds
from server.supervisor import HANG_S, START_S
from server.tls import TlsFiles, tls_files

DEMO = Path(__file__).resolve().parent.parent / "engine" / "demo"
EMBEDDED = ("dspark", "dflash", "eagle3", "mtp")  # names of drafters that may lie beside the embedded model
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MEBIBYTE = 2**20


class Admin(enum.Enum):
    """Where SchedulerService is served, unless at an address of its own."""

    SHARED = "beside generation"
    OFF = "nowhere"


AdminListen = Admin | tuple[str, int]


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that the server was told, with defaults filled in."""

    engine: EngineConfig
    host: str
    port: int
    log_level: str
    drain_s: float
    hang_s: float
    start_s: float
    admin: AdminListen
    record_rounds: Path | None
    record_bytes: int
    metrics_port: int | None = None
    tls: TlsFiles | None = None
    auth_tokens: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> value, from: what start prints


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line, the environment and the file; a wrong flag ends the process with code 2 and a message.

    Raises:
        LoadError: values that are well-formed and cannot be served; a wrong variable or file.
    """
    given, sources = settings.read(_parser(), arguments)
    host, port = given.listen
    draft = _draft(given.draft, embedded=given.model is None)
    kv_memory = given.kv_memory
    if kv_memory is None and given.model is None:
        kv_memory = min(256 * MEBIBYTE, limits.memory() // 8)  # the embedded model needs no more
    config = EngineConfig(
        model=given.model or str(DEMO / "target"),
        draft=draft,
        revision=given.revision,
        device=given.device,
        dtype=given.dtype,
        threads=given.threads or limits.cores(),
        kv_memory=kv_memory,
        max_model_len=given.max_model_len,
        policy=given.policy,
        max_running=given.max_running,
        max_batch_tokens=given.max_batch_tokens,
        prefill_chunk=given.prefill_chunk,
        max_queue=given.max_queue,
        draft_tokens=given.draft_tokens,
        confidence_threshold=given.confidence_threshold,
        lookup=given.lookup == "auto",
        cuda_graphs=given.cuda_graphs == "auto",
        cost_cache=given.cost_cache,
    )
    values = vars(given) | {name: getattr(config, name) for name in vars(given) if hasattr(config, name)}
    values["listen"] = join(host, port)
    values["lookup"], values["cuda_graphs"] = given.lookup, given.cuda_graphs
    admin = given.admin_listen
    values["admin_listen"] = join(*admin) if isinstance(admin, tuple) else admin.value
    return Options(
        engine=config,
        host=host,
        port=port,
        log_level=given.log_level,
        drain_s=given.drain_seconds,
        hang_s=given.hang_seconds,
        start_s=given.start_seconds,
        admin=admin,
        metrics_port=given.metrics_port,
        record_rounds=given.record_rounds,
        record_bytes=given.record_rounds_size,
        tls=tls_files(given.tls_cert, given.tls_key, given.tls_client_ca),
        auth_tokens=Path(given.auth_tokens) if given.auth_tokens is not None else None,
        bounds=Bounds(given.max_message_bytes, given.max_prompt_bytes, given.max_prompt_tokens),
        settings={name: {"value": value, "from": sources[name]} for name, value in values.items()},
    )


def _parser() -> argparse.ArgumentParser:
    bounds = Bounds()
    defaults = {name: field.default for name, field in EngineConfig.__dataclass_fields__.items()}
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a language model over gRPC, decoding speculatively.",
        epilog="Every flag can also be set as DSPARK_FLAG_NAME in the environment and as flag_name in the file of"
        " --config; flag over environment over file.",
    )
    add = parser.add_argument
    settings.add_config_flag(parser)
    add("--model", metavar="DIR|FILE.gguf|HUB_ID", help="target checkpoint (default: the embedded demo model)")
    add("--draft", metavar="none|dspark|dflash|eagle3|mtp|DIR|HUB_ID",
        help="drafter; a kind names the embedded one (default: dspark for the embedded model, else none)")  # fmt: skip
    add("--revision", help="revision of a hub id")
    add("--listen", type=_address, default=("127.0.0.1", 50051), metavar="HOST:PORT",
        help="default 127.0.0.1:50051; port 0 picks a free one")  # fmt: skip
    add("--policy", choices=POLICIES, default="auto",
        help="who drafts and how much is verified, for requests that leave it open (default auto)")  # fmt: skip
    add("--draft-tokens", type=_count, help="policy fixed: draft tokens to verify (default: all of a block)")
    add("--confidence-threshold", type=float, default=defaults["confidence_threshold"],
        help="policy threshold: verify while confidence is at least this (default %(default)s)")  # fmt: skip
    add("--lookup", choices=("auto", "never"), default="auto",
        help="policy auto: requests may copy what stood in them, where that beats drafting (default auto)")  # fmt: skip
    add("--cuda-graphs", choices=("auto", "never"), default="auto",
        help="on CUDA: keep rounds on the device and replay them as graphs, where requests and policy let them "
        "(default auto)")  # fmt: skip
    add("--cost-cache", metavar="DIR",
        help="where measured cost tables are kept; '' keeps none (default: the user's cache folder)")  # fmt: skip
    add("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--threads", type=_positive, help="CPU threads (default: the cgroup's cores)")
    add("--kv-memory", type=_size, metavar="BYTES", help="for both caches, such as 512M or 2G")
    add("--max-model-len", type=_positive, help="context length (default: the model's own)")
    add("--max-running", type=_positive, default=defaults["max_running"], help="default %(default)s")
    add("--max-batch-tokens", type=_positive, default=defaults["max_batch_tokens"],
        help="rows in a round (default %(default)s)")  # fmt: skip
    add("--prefill-chunk", type=_positive, default=defaults["prefill_chunk"],
        help="rows of prompt in a round while others decode (default %(default)s)")  # fmt: skip
    add("--max-queue", type=_positive, default=defaults["max_queue"],
        help="requests that may wait (default %(default)s)")  # fmt: skip
    add("--max-message-bytes", type=_size, default=bounds.message_bytes, metavar="BYTES",
        help="largest request message (default %(default)s)")  # fmt: skip
    add("--max-prompt-bytes", type=_size, default=bounds.prompt_bytes, metavar="BYTES",
        help="largest prompt as text (default %(default)s)")  # fmt: skip
    add("--max-prompt-tokens", type=_positive, help="longest prompt (default: what the context holds)")
    add("--tls-cert", metavar="FILE", help="serve TLS with this PEM certificate chain; followed when it changes")
    add("--tls-key", metavar="FILE", help="the certificate's PEM key, without a password")
    add("--tls-client-ca", metavar="FILE", help="mutual TLS: clients need a certificate signed by one of these")
    add("--auth-tokens", metavar="FILE",
        help="TOML file of bearer tokens, their limits and scopes (README); followed when it changes")  # fmt: skip
    add("--drain-seconds", type=_seconds, default=30.0,
        help="on SIGTERM, how long running requests may take to finish (default %(default)s)")  # fmt: skip
    add("--hang-seconds", type=_some_seconds, default=HANG_S,
        help="restart an engine that gives no sign for this long (default %(default)s)")  # fmt: skip
    add("--start-seconds", type=_some_seconds, default=START_S,
        help="how long loading and compiling may take (default %(default)s)")  # fmt: skip
    add("--admin-listen", type=_admin, default=Admin.SHARED, metavar="HOST:PORT|off",
        help="serve SchedulerService (watching and changing the policy) here and not beside generation; off: nowhere "
        "(default: beside generation, on --listen)")  # fmt: skip
    add("--record-rounds", type=Path, metavar="FILE", help="append every round's decision record as a line of JSON")
    add("--record-rounds-size", type=_size, default=64 * MEBIBYTE, metavar="BYTES",
        help="at this size FILE becomes FILE.1, in place of the one before (default 64M)")  # fmt: skip
    add("--metrics-port", type=_port, metavar="PORT",
        help="serve Prometheus metrics there, on --listen's host; 0 picks a free one (default: none)")  # fmt: skip
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


def _draft(given: str | None, *, embedded: bool) -> str:
    name = given or ("dspark" if embedded else "none")
    if name not in EMBEDDED:
        return name
    if not (DEMO / name).is_dir():
        raise LoadError(f"--draft {name}: no such drafter is embedded; give the directory or hub id of one")
    return str(DEMO / name)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:50051")
    return host or "127.0.0.1", int(port)


def _admin(text: str) -> AdminListen:
    return Admin.OFF if text == "off" else _address(text)


def _port(text: str) -> int:
    if (value := _count(text)) > 65535:
        raise argparse.ArgumentTypeError("must be at most 65535")
    return value


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 512M or 2G")
    return size


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if (value := _count(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _some_seconds(text: str) -> float:
    if (value := _seconds(text)) == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value
