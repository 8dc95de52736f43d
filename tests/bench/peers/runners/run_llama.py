"""llama.cpp's server inside Python (xllamacpp), as many slots as requests, on the quantised file itself."""

from __future__ import annotations

import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from protocol import Mode, Prompts, serve


def start(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Mode]]:
    import xllamacpp

    package = importlib.import_module(told["package"])
    folder = Path(told["cache"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.MODEL_NAME
    if not path.exists():
        Path(package.assemble(folder / f"{package.MODEL_NAME}.partial")).rename(path)

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = told["threads"]
    params.n_parallel = told["requests"]
    params.n_ctx = told["requests"] * told["length"]  # shared out evenly among the slots
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)

    def plain(prompts: Prompts, tokens: int) -> Prompts:
        def one(prompt: list[int]) -> list[int]:
            ask = {
                "prompt": prompt,
                "n_predict": tokens,
                "temperature": 0.0,
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
            }
            # Its own endpoint: the one that Python reaches without HTTP speaks OpenAI's language, without token ids.
            address = f"{server.listening_address}/completion"
            request = Request(address, json.dumps(ask).encode(), {"Content-Type": "application/json"})
            with urlopen(request, timeout=600) as reply:
                return list(json.load(reply)["tokens"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts))

    flags = [part.strip() for part in xllamacpp.get_system_info().split("|") if part.strip().endswith("= 1")]
    note = f"{path.name}, {os.path.getsize(path) / 1e6:.0f} MB; built with {', '.join(f[:-4].strip() for f in flags)}"
    return {"versions": {"xllamacpp": version("xllamacpp")}, "note": note}, {"plain": plain}


if __name__ == "__main__":
    serve(start)
