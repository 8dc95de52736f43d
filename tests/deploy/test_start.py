"""The image's entry point, and the program that asks for health."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from docker import health as health_program
from docker import levels, start
from engine.schedule import jit as decisions_jit
from kernels import jit as kernels_jit
from server.service import SERVICE_NAME
from tests.deploy.chart import ROOT

V3 = levels.LEVELS[-1].flags
EVERYTHING = levels.LEVELS[0].flags


def test_the_best_level_that_a_processor_can_run_is_named() -> None:
    environment: dict[str, str] = {}
    assert start.choose_level(environment, EVERYTHING | {"sse4_2"}) == levels.LEVELS[0].name
    assert environment["NUMBA_CPU_NAME"] == "x86-64-v4" and "+avx512bf16" in environment["NUMBA_CPU_FEATURES"]
    environment = {}
    assert start.choose_level(environment, V3) == "x86-64-v3"
    assert "avx512" not in environment["NUMBA_CPU_FEATURES"]


def test_levels_are_ordered_and_each_needs_more() -> None:
    assert all(level.flags > weaker.flags for level, weaker in itertools.pairwise(levels.LEVELS))
    assert levels.supported(V3 | {"avx512f"}) == [levels.LEVELS[-1]]
    assert levels.supported(V3 - {"fma"}) == []


def test_features_of_a_level_are_those_that_the_kernels_ask_for() -> None:
    """kernels/ looks for names in NUMBA_CPU_FEATURES: one that no level names would be off in every image."""
    asked = set()
    for path in (ROOT / "kernels").glob("*.py"):
        asked |= set(re.findall(r'has_feature\("([a-z0-9]+)"\)', path.read_text(encoding="utf-8")))
    assert asked and {f"+{name}" for name in asked} <= set(levels.LEVELS[0].features)


def test_a_processor_without_a_level_compiles_for_itself() -> None:
    environment: dict[str, str] = {}
    assert start.choose_level(environment, frozenset()) is None and environment == {}


def test_who_names_a_processor_keeps_it() -> None:
    environment = {"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": "+avx2"}
    assert start.choose_level(environment, EVERYTHING) is None and environment["NUMBA_CPU_NAME"] == "znver4"
    environment = {"NUMBA_CPU_NAME": "host", "NUMBA_CPU_FEATURES": "+avx2"}
    assert start.choose_level(environment, EVERYTHING) is None and environment == {}


def test_flags_are_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert levels.flags_here(tmp_path / "cpuinfo") == {"fpu", "avx", "avx2"}
    assert levels.flags_here(tmp_path / "nowhere") == frozenset()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert levels.flags_here(tmp_path / "cpuinfo") == frozenset()


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, Path]:
    """kernels/ with compiled code, and an empty /tmp."""
    made = tmp_path / "kernels" / "__pycache__" / "native-0123abcd" / "deep"
    made.mkdir(parents=True)
    (made / "f.nbi").write_bytes(b"index")
    (tmp_path / "tmp").mkdir()
    return tmp_path / "kernels", tmp_path / "tmp"


def test_native_code_is_copied_where_it_may_be_written(
    image: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, temporary = image
    assert start.copy_native(kernels, temporary, 10001) == 0  # a writable image needs no copy
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert start.copy_native(kernels, temporary, 10001) == 1
    assert (temporary / "native-10001-0123abcd" / "deep" / "f.nbi").read_bytes() == b"index"
    assert start.copy_native(kernels, temporary, 10001) == 0  # a restarted container finds it
    assert [path.name for path in temporary.iterdir()] == ["native-10001-0123abcd"]


def test_a_full_disk_leaves_nothing_half_copied(image: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, temporary = image

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match="No space"):
        start.copy_native(kernels, temporary, 10001)
    assert list(temporary.iterdir()) == []


def cache_folder(module: ModuleType) -> Path:
    """Where a module that compiles keeps what it compiled, asked anew."""
    choose = module._cache_directory.__wrapped__
    return Path(choose(module.__file__) if inspect.signature(choose).parameters else choose())


@pytest.mark.parametrize("module", [kernels_jit, decisions_jit], ids=lambda module: module.__name__)
def test_copies_lie_where_they_are_looked_for(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code lies beside its sources if it may, else in /tmp under another name, which a copy must have."""
    written = cache_folder(module)  # by the build
    assert written.parent.parent in start.COMPILED
    (tmp_path / "sources" / "__pycache__" / written.name).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert start.copy_native(tmp_path / "sources", tmp_path, os.getuid()) == 1
    assert cache_folder(module).is_dir()


def test_no_other_folder_keeps_native_code() -> None:
    """Whoever compiles elsewhere must tell the image's entry point."""
    users = {path.parent for name in ("engine", "kernels", "server") for path in (ROOT / name).rglob("*.py")
             if "CACHE_DIR" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert users == set(start.COMPILED)


@pytest.fixture
def served() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None)


def test_health_follows_the_service(served: tuple[str, health.HealthServicer]) -> None:
    address, servicer = served
    ask = ["--server", address, "--service", SERVICE_NAME]
    assert health_program.main(ask) == 1  # not known yet: still loading
    servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    assert health_program.main(ask) == 0
    servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert health_program.main(ask) == 1
    assert health_program.main(["--server", address]) == 0  # the process itself


def test_health_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert health_program.main(["--server", "127.0.0.1:1", "--timeout", "0.2"]) == 1
    assert "UNAVAILABLE" in (text := capsys.readouterr().err) or "DEADLINE_EXCEEDED" in text


def test_health_over_tls_trusts_the_certificate_itself(tmp_path: Path) -> None:
    """As probes have it: the chain of a kubernetes.io/tls secret without its authority, and mutual TLS."""
    authority, strangers = trustme.CA(), trustme.CA()
    own, other, probe = authority.issue_cert("demo.svc"), strangers.issue_cert("demo.svc"), authority.issue_cert("p")
    paths = {name: str(tmp_path / name) for name in ("ca", "other", "cert", "key")}
    Path(paths["ca"]).write_bytes(own.cert_chain_pems[0].bytes())
    Path(paths["other"]).write_bytes(other.cert_chain_pems[0].bytes())
    probe.cert_chain_pems[0].write_to_path(paths["cert"])
    probe.private_key_pem.write_to_path(paths["key"])
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    ask = ["--server", f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}", "--timeout", "2"]
    own_certificate = ["--tls-cert", paths["cert"], "--tls-key", paths["key"]]
    server.start()
    try:
        named = [*ask, "--server-name", "demo.svc", "--tls-ca"]
        assert health_program.main([*named, paths["ca"], *own_certificate]) == 0
        assert health_program.main([*named, paths["other"], *own_certificate]) == 1
        assert health_program.main([*named, paths["ca"]]) == 1  # it asks for ours
        assert health_program.main([*ask, "--server-name", "else.svc", "--tls-ca", paths["ca"], *own_certificate]) == 1
    finally:
        server.stop(None)


def test_health_with_half_a_certificate_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--tls-cert", "a.pem"], ["--tls-ca", str(tmp_path / "none.pem")]):
        with pytest.raises(SystemExit) as caught:
            health_program.main(arguments)
        assert caught.value.code == 2
    assert "none.pem: No such file" in capsys.readouterr().err
