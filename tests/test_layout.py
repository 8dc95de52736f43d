"""The import rules of DESIGN section 2, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("engine", "kernels", "server", "clients", "proto", "dspark", "tests", "docker")
PROTOBUF = ("dspark", "google", "grpc_health", "grpc_reflection", "grpc_status")
PLOTTING = ("matplotlib", "seaborn", "plotly")


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as a dotted name; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def offences(folder: str, forbidden: tuple[str, ...], leave_out: str | None = None) -> list[str]:
    """`file imports module` for every import in `folder` that lies in `forbidden`."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        if leave_out is None or not path.is_relative_to(ROOT / leave_out)
        for name in imports(path)
        if within(name, forbidden)
    ]


def test_the_engine_knows_no_transport_and_no_telemetry() -> None:
    assert offences("engine", ("grpc", "asyncio", "opentelemetry", "uvloop", "server", "clients", "tests")) == []


def test_only_training_imports_training_tools() -> None:
    forbidden = ("engine.training", "transformers", "tensorboard", "torch.utils.tensorboard", *PLOTTING)
    assert offences("engine", forbidden, leave_out="engine/training") == []


def test_kernels_import_nothing_of_ours() -> None:
    assert offences("kernels", tuple(name for name in OURS if name != "kernels")) == []


def test_nothing_needs_triton_until_a_tensor_lies_on_a_gpu() -> None:
    """Outside kernels/triton it is imported inside functions only."""
    for folder in ("engine", "kernels", "server"):
        for path in sources(folder):
            if path.is_relative_to(ROOT / "kernels" / "triton"):
                continue
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            names = [
                name for node in statements if isinstance(node, ast.ImportFrom | ast.Import) for name in named(node)
            ]
            assert not [name for name in names if within(name, ("triton", "kernels.triton"))], path


def named(node: ast.ImportFrom | ast.Import) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def test_kernels_package_is_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_protobuf_appears_only_in_server_and_clients(folder: str) -> None:
    assert offences(folder, PROTOBUF) == []


def test_servers_and_clients_do_not_train() -> None:
    for folder in ("server", "clients"):
        assert offences(folder, ("engine.training", "transformers", "tests")) == []


def test_only_the_load_generators_picture_is_drawn_outside_training() -> None:
    assert offences("server", PLOTTING) == []
    assert offences("clients", PLOTTING, leave_out="clients/load/plot.py") == []


def test_clients_do_not_reach_into_the_server() -> None:
    assert offences("clients", ("engine", "kernels", "server.worker", "server.service")) == []


@pytest.mark.parametrize("folder", ["engine", "kernels", "server", "clients", "tests"])
def test_nothing_imports_a_package_called_proto(folder: str) -> None:
    """proto-plus owns that name; ours is `dspark`, under the import root `proto/`."""
    assert offences(folder, ("proto",)) == []


def test_the_servers_front_process_does_without_pytorch() -> None:
    """Only the engine's process pays for it, in memory and in seconds."""
    heavy = ("torch", "numba", "transformers", "engine.engine")
    program = f"import sys, server.__main__, server.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_distribution_called_kernels_is_installed() -> None:
    """Hugging Face's would clash with the folder of that name."""
    from importlib.metadata import PackageNotFoundError, version

    with pytest.raises(PackageNotFoundError):
        version("kernels")


def test_the_reader_sees_imports_of_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "engine" / "a" / "b.py"
    path.parent.mkdir(parents=True)
    path.write_text("import grpc.aio as g\ndef f():\n    from .. import x\n    from .c import d\n    import os.path\n")
    assert set(imports(path)) == {"grpc.aio", "os.path", "engine", "engine.x", "engine.a.c", "engine.a.c.d"}
