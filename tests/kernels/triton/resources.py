"""Compiles every kernel, without a GPU, as the wrappers launch it at the shapes of Qwen3-8B and its drafter.

    python -m tests.kernels.triton.resources                          rewrites kernels/results/triton_resources.json
    python -m tests.kernels.triton.resources --only select verify     rewrites what it says of two files' kernels
    python -m tests.kernels.triton.resources --print --targets 90     only prints it

Launches are caught on their way, so what is compiled are the real configurations. Registers, stack (where
spilled registers live) and local memory are read from the cubin by the cuobjdump that Triton brings along.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).resolve().parents[3] / "kernels" / "results" / "triton_resources.json"
TARGETS = (80, 90, 100)
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@contextmanager
def caught() -> Iterator[list[tuple[str, JITFunction, list[Any], dict[str, Any]]]]:
    """Launches are put on a list instead of being run: kernel's name, kernel, arguments, keyword arguments."""
    launches: list[tuple[str, JITFunction, list[Any], dict[str, Any]]] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        module = self.fn.__module__.rsplit(".", 1)[1]
        launches.append((f"{module}.{self.fn.__name__}", self, list(args), kwargs))

    before = JITFunction.run
    JITFunction.run = catch
    try:
        yield launches
    finally:
        JITFunction.run = before


def build(kernel: JITFunction, args: list[Any], kwargs: dict[str, Any], capability: int) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread, bytes of shared memory a block."""
    names = list(inspect.signature(kernel.fn).parameters)
    given = dict(zip(names, args, strict=False)) | {name: value for name, value in kwargs.items() if name in names}
    options = {name: value for name, value in kwargs.items() if name not in names}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        value = given[name]
        if name in constant or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def main() -> None:
    from tests.kernels.triton.launches import every_launch

    parser = argparse.ArgumentParser(prog="python -m tests.kernels.triton.resources")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="kernels of these files, without .py")
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS)
    options = parser.parse_args()
    with caught() as launches:
        labels = every_launch(launches)
    table: dict[str, dict[str, dict[str, int]]] = {}
    if options.only and not options.print:
        kept = json.loads(RESULTS.read_text())["kernels"]
        table = {name: found for name, found in kept.items() if name.split(".")[0] not in options.only}
    for label, (name, kernel, args, kwargs) in zip(labels, launches, strict=True):
        if options.only and name.split(".")[0] not in options.only:
            continue
        flags = " ".join(flag.lower() for flag, value in kwargs.items() if value is True)
        name = " ".join(part for part in (name, label, flags) if part)
        for target in options.targets:
            found = build(kernel, args, kwargs, target)
            table.setdefault(name, {})[f"sm_{target}"] = found
            print(name, target, found, file=sys.stderr, flush=True)
    text = json.dumps({"triton": triton.__version__, "kernels": dict(sorted(table.items()))}, indent=1)
    print(text)
    if not options.print:
        RESULTS.parent.mkdir(exist_ok=True)
        lines = re.sub(r"{[^{}]*}", lambda found: " ".join(found[0].split()), text)
        RESULTS.write_text(lines + "\n")


if __name__ == "__main__":
    main()
