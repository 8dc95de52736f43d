"""`make fuzz`: 100,000 hostile messages to a server of its own on the embedded model; QUICK=1 sends 3,000."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.conftest import engine_of, generate, start
from tests.fuzz.run import fuzz


def main() -> int:
    """Prints one JSON object; returns 0 when nothing crashed and nobody's mistake was INTERNAL."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument("--count", type=int, default=3_000 if quick else 100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start(["--log-level", "warning"], log)
        engine = engine_of(process)
        began = time.monotonic()
        try:
            before = generate(process.address, "import os\n", "--temperature", "0", "--max-tokens", "8")
            outcome = asyncio.run(fuzz(process.address, given.count, given.seed))
            after = generate(process.address, "import os\n", "--temperature", "0", "--max-tokens", "8")
        finally:
            crashed = process.popen.poll() is not None or not engine.is_running()
            code = process.stop()
        text = log.read_text()
        tracebacks = text.count("Traceback")
        result = outcome.as_json() | {
            "crashed": crashed,
            "exit_code": code,
            "tracebacks": tracebacks,
            "serves_the_same_text": before["token_ids"] == after["token_ids"],
            "seconds": round(time.monotonic() - began, 1),
        }
        if tracebacks:
            print(text[text.index("Traceback") - 500 :][:4000], file=sys.stderr)
    print(json.dumps(result, indent=2))
    good = result["ok"] and not crashed and code == 0 and not tracebacks and result["serves_the_same_text"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
