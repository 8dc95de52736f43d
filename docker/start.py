"""The image's entry point: native code out of the image, then the server, with its flags: `python -m docker.start`.

The root file system may be read-only, and Numba uses a cache only where it may write. So the compiled code is copied
to where kernels/jit.py and engine/schedule/jit.py look for it in that case: a few megabytes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from types import FrameType

from docker.levels import flags_here, supported

ROOT = Path(__file__).resolve().parent.parent
COMPILED = (ROOT / "kernels", ROOT / "engine" / "schedule")  # folders of native sources
TOLD_TO_END = 128 + signal.SIGTERM


def choose_level(environment: MutableMapping[str, str], flags: frozenset[str]) -> str | None:
    """Names the best level that was compiled for to Numba. Returns its name.

    Whoever names a processor keeps it: NUMBA_CPU_NAME=host compiles for exactly this one.
    """
    named = environment.get("NUMBA_CPU_NAME")
    if named == "host":
        del environment["NUMBA_CPU_NAME"]
        environment.pop("NUMBA_CPU_FEATURES", None)
    levels = supported(flags)
    if named or not levels:
        return None
    environment.update(levels[0].environment())
    return levels[0].name


def copy_native(sources: Path, temporary: Path, user: int) -> int:
    """Copies what the image carries for a folder of sources to where it may be written. Returns how many folders."""
    copied = 0
    if os.access(sources, os.W_OK):
        return copied  # it is used where it is
    for folder in sorted((sources / "__pycache__").glob("native-*")):
        target = temporary / folder.name.replace("native-", f"native-{user}-", 1)
        if target.exists():
            continue
        partial = Path(tempfile.mkdtemp(prefix="native-partial-", dir=temporary))
        try:
            shutil.copytree(folder, partial, dirs_exist_ok=True, copy_function=shutil.copyfile)
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        copied += 1
    return copied


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(TOLD_TO_END)


def main(arguments: list[str]) -> int:
    """Serves; returns what the server returns."""
    # The kernel drops signals that process 1 has no handler for; the server sets its own once it has loaded enough.
    signal.signal(signal.SIGTERM, _end)
    choose_level(os.environ, flags_here())
    try:
        for sources in COMPILED:
            copy_native(sources, Path(tempfile.gettempdir()), os.getuid())
    except OSError as error:
        print(f"native code could not be copied ({error}); it is compiled now instead", file=sys.stderr)
    from server.__main__ import main as serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
