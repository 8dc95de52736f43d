"""What a runner speaks with the benchmark: one JSON object a line, requests on stdin, answers on the first stdout.

    → {"model": DIR, "dtype": …, "threads": N, "requests": most at once, "length": most tokens of one, …}
    ← {"versions": {…}, "note": …}
    → {"mode": MODE, "prompts": [[token ids], …], "tokens": N}            work, any number of times
    ← {"seconds": from submission to the last token, "outputs": [[token ids], …]}
    ← {"error": text}                                                     in place of either

Imports the standard library only: it runs in every peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Mode = Callable[[Prompts, int], Prompts]  # greedy, exactly so many new tokens a prompt


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Mode]]]) -> None:
    """Answers until stdin ends. Whatever libraries print goes to stderr.

    Args:
        start: from the first line to what is answered to it (without modes) and a function for every mode.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        ready, modes = start(json.loads(sys.stdin.readline()))
    except BaseException as error:
        traceback.print_exc()
        answer({"error": _line(error)})
        return
    answer(ready)
    for line in sys.stdin:
        work = json.loads(line)
        try:
            began = time.perf_counter()
            outputs = modes[work["mode"]](work["prompts"], work["tokens"])
            answer({"seconds": time.perf_counter() - began, "outputs": outputs})
        except Exception as error:
            traceback.print_exc()
            answer({"error": _line(error)})


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:400]
