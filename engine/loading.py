"""From a configuration to an engine that is ready for its first round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engine import limits
from engine.allocator import keep_freed_memory, take_at_once
from engine.batch import front_indices
from engine.config import PAGE_SIZE, EngineConfig
from engine.device_rounds.fitting import fits
from engine.device_rounds.rounds import paused
from engine.drafters.drafter import Drafter
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.eagle3 import Eagle3Drafter
from engine.drafters.mtp import MTPDrafter
from engine.engine import Engine
from engine.errors import LoadError
from engine.lookup import MOST as MOST_COPIED
from engine.messages import EndConditions, EngineInfo, Request, Sampling, Speculation, SpeculationMode
from engine.models.decoder import DecoderModel
from engine.models.families import load_target, pick_dtype
from engine.models.hub import resolve
from engine.models.layers import page_bytes
from engine.models.loader import read_json
from engine.reproducible import row_invariant
from engine.schedule.calibrate import load_calibration
from engine.schedule.measure import measure
from engine.schedule.store import cache_folder, key_of, load, save
from engine.windows import most_held
from kernels.markov_sample import remember
from kernels.threads import set_threads

MEBIBYTE = 2**20
DRAFTERS: dict[str, Callable[[Path, DecoderModel], Drafter]] = {
    kind.ARCHITECTURE: kind for kind in (DSparkDrafter, Eagle3Drafter, MTPDrafter)
}


def load_engine(config: EngineConfig, device_rounds: bool | None = None) -> Engine:
    """Read the checkpoints, size the caches, make the engine. Its `config` says what was chosen where this one is open.

    Args:
        device_rounds: whether rounds stay on the device where they can; None: on CUDA, if the configuration lets them.

    Raises:
        LoadError: what is wrong with which file, key or tensor, and the mend.
    """
    torch.set_num_threads(config.threads)
    set_threads(config.threads)
    device = _device(config.device)
    directory = resolve(config.model, config.revision)
    dtype = pick_dtype(config.dtype, directory, device)
    target = load_target(directory, dtype=dtype, device=device, max_length=config.max_model_len)
    drafter = None
    draft_directory = None
    if config.draft != "none":
        draft_directory = resolve(config.draft, None)
        drafter = _load_drafter(draft_directory, target)
    kv_memory = config.kv_memory or _free_share(target)
    config = replace(config, device=str(device), kv_memory=kv_memory)
    pages, window_pages, max_length = _size_caches(config, kv_memory, target, drafter)
    if device_rounds is None:
        device_rounds = config.cuda_graphs and device.type == "cuda"
    device_rounds = device_rounds and fits(target, drafter)
    allocated = pages + device_rounds  # nobody's page comes last
    target.allocate(allocated, window_pages)
    if drafter is not None:
        drafter.allocate(allocated)
    if target.stack.native:
        # Idle threads of torch's own pool spin for a while after each of its larger operations, and take the cores
        # from the threads that run our native code: a third of the speed with a drafter at 16 requests.
        torch.set_num_threads(1)
        keep_freed_memory()
    info = EngineInfo(
        model=_name(config.model),
        vocab_size=target.geometry.vocab_size,
        max_model_len=max_length,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        drafter=drafter.kind if drafter is not None else "none",
        draft_model=draft_directory.name if draft_directory is not None else "",
        block_size=drafter.block_size if drafter is not None else 0,
        head=drafter.head if drafter is not None else "none",
        has_confidence=drafter.has_confidence if drafter is not None else False,
        seed_reproducible=row_invariant(target),
        page_size=PAGE_SIZE,
        pages_total=pages,
        parameters=target.parameters,
        policy=config.policy if drafter is not None else "plain",
        eos_ids=eos_ids(directory),
        threads=config.threads,
    )
    calibration = None
    if drafter is not None and draft_directory is not None and drafter.has_confidence:
        calibration = load_calibration(draft_directory, drafter.block_size)
    return Engine(
        config,
        target,
        drafter,
        pages,
        info,
        calibration=calibration,
        window_pages=window_pages,
        device_rounds=device_rounds,
    )


def warm_up(engine: Engine) -> None:
    """Decode a few tokens in every way there is, so that no request waits for code to be compiled, or for memory."""
    caches = [*engine.target.caches, *(engine.drafter.caches if engine.drafter is not None else ())]
    take_at_once([half for cache in caches for half in (cache.k, cache.v)])
    if isinstance(engine.drafter, DSparkDrafter):
        remember(engine.drafter.heads)
    prompt = (0, 0, 0)
    tokens = min(4, engine.info.max_model_len - len(prompt))
    filtered = Sampling(temperature=1.0, top_k=2, top_p=0.9, min_p=0.01)
    fixed = Speculation(SpeculationMode.FIXED)
    ways = [(one, fixed) for one in (Sampling(temperature=0.0), Sampling(), Sampling(seed=0), filtered)]
    policy = engine.config.policy
    if engine.drafter is not None:
        engine.update_policy({"policy": "auto"})  # which a running server may be told to change to
        ways.append((Sampling(), Speculation(SpeculationMode.FIXED, draft_tokens=1)))  # a part of a block
        ways += [(Sampling(), Speculation())] * 2  # what becomes of one is looked at when others have come
        engine.scheduler.cost.absorb_s(1)  # and what needs company, or more tokens
        front_indices(torch.zeros(2, dtype=torch.int64), [1])
    with paused(engine.device_rounds):  # capturing warms those
        for sampling, speculation in ways:
            if tokens > 0:
                engine.submit(Request("warm-up", prompt, EndConditions(tokens), sampling, speculation))
            while engine.has_work:
                engine.step()
    if engine.drafter is not None:
        engine.update_policy({"policy": policy})
    engine.reset()
    if engine.device_rounds is not None:
        engine.device_rounds.capture()
    engine.rounds = 0
    engine.forget_rounds()


def learn_costs(engine: Engine, budget_s: float) -> str:
    """Give the scheduler this machine's cost table: the one kept from an earlier start, or one measured now.

    Args:
        budget_s: seconds that measuring may take.

    Returns:
        Where the table came from: "kept" or "measured".
    """
    folder = cache_folder(engine.config)
    key = key_of(engine.config, engine.info)
    table = load(folder, key) if folder is not None else None
    source = "kept"
    if table is None:
        table, source = measure(engine, budget_s), "measured"
        if folder is not None:
            save(folder, key, table)
    engine.scheduler.use(table)
    return source


def eos_ids(directory: Path) -> tuple[int, ...]:
    """The model's end tokens: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"device {name!r} is unknown; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError("device cuda was asked for, but this machine (or this torch) has none; use --device cpu")
    return device


def _load_drafter(directory: Path, target: DecoderModel) -> Drafter:
    names = read_json(directory / "config.json").get("architectures") or ["none"]
    kind = DRAFTERS.get(names[0])
    if kind is None:
        raise LoadError(f"{directory}: drafter architecture {names[0]} is not served; served are {', '.join(DRAFTERS)}")
    return kind(directory, target)


def _free_share(target: DecoderModel) -> int:
    """Bytes for the caches: a share of what the device has left beside the target's weights."""
    if target.device.type == "cuda":
        return max(256 * MEBIBYTE, int(torch.cuda.mem_get_info(target.device)[0] * 0.8))
    left = limits.memory() - target.parameters * target.dtype.itemsize
    return max(256 * MEBIBYTE, min(left // 4, 8 * 2**30))


def _size_caches(
    config: EngineConfig, kv_memory: int, target: DecoderModel, drafter: Drafter | None
) -> tuple[int, int | None, int]:
    """Pages that kv_memory buys, of these those of layers with a window, and the context length that they can hold.

    Layers with a window get what all running requests' windows need, and a round's prompts; never more than the
    others. So they are never what a request waits for.
    """
    windowed = sum(layer.window > 0 for layer in target.layers)
    own = page_bytes(target.geometry, windowed, target.dtype)
    whole = page_bytes(target.geometry, target.geometry.layers - windowed, target.dtype)
    whole += drafter.page_bytes if drafter is not None else 0
    cost = whole + own
    pages = kv_memory // cost
    if pages < 2:
        raise LoadError(f"kv_memory {kv_memory} bytes holds {pages} pages of {cost} bytes; give at least {2 * cost}")
    longest = -(-target.max_length // PAGE_SIZE)
    # Nobody can use more than every running request at full length.
    most = config.max_running * longest
    window_pages = None
    if windowed:
        block = drafter.block_size if drafter is not None else 0
        block = max(block, MOST_COPIED if block and config.lookup else 0)
        window_pages = config.max_running * most_held(target.window, block) + -(-config.max_batch_tokens // PAGE_SIZE)
        window_pages = min(window_pages, pages, most)
        pages = (kv_memory - window_pages * own) // whole if whole else pages
    pages = min(pages, most)
    held = pages * PAGE_SIZE
    if config.max_model_len is not None and held < config.max_model_len:
        needed = cost * -(-config.max_model_len // PAGE_SIZE)
        raise LoadError(
            f"max_model_len {config.max_model_len} needs {needed} bytes of kv_memory; raise it or lower the length"
        )
    return pages, window_pages, min(target.max_length, held)


def _name(model: str) -> str:
    """A hub id as it is; a directory by its name, its parent's before it where that says little."""
    if not Path(model).exists():
        return model
    path = Path(model).resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("target", "model") else path.name
