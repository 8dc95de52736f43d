"""Train the embedded target on a time budget.

python -m engine.training.pretrain --corpus DIR --state FILE --minutes 65 [--compile]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from engine.training.model import ModelConfig, Qwen3
from engine.training.optim import Optimizers, save_atomic, wsd


class Windows:
    """Seeded walk over a token stream in non-overlapping windows, reshuffled every epoch."""

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.unit = 256
        self.count = (len(stream) - 1) // self.unit

    def batch(self, at: int, rows: int, length: int) -> tuple[Tensor, int]:
        """Tokens [rows, length + 1] and the next position; `at` counts units of 256 tokens."""
        units = length // self.unit
        out = np.empty((rows, length + 1), dtype=np.int64)
        for row in range(rows):
            epoch, index = divmod(at, self.count)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            start = min(int(order[index]) * self.unit, len(self.stream) - length - 1)
            out[row] = self.stream[start : start + length + 1]
            at += units
        return torch.from_numpy(out), at


@torch.inference_mode()
def evaluate(model: Qwen3, corpus: Path, tokens: int = 16_384, length: int = 512) -> dict[str, float]:
    """Mean held-out loss (nats a token) of each domain."""
    out = {}
    with np.load(corpus / "heldout.npz") as streams:
        for name in ("code", "prose", "arithmetic"):
            ids = streams[name].astype(np.int64)
            rows = min(tokens, len(ids) - 1) // length
            starts = [i * ((len(ids) - length - 1) // rows) for i in range(rows)]
            batch = torch.from_numpy(np.stack([ids[at : at + length + 1] for at in starts]))
            parts = [float(model.loss(part)) for part in batch.split(4)]
            out[name] = round(float(np.mean(parts)), 4)
    return out


def average(model: nn.Module, workers: int, scale: float) -> None:
    """Sum the gradients of all workers, multiply by scale, clip their norm to 1."""
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    if workers > 1:
        dist.all_reduce(flat)
    flat *= scale
    flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
    parts = flat.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def train(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One data-parallel worker; workers meet once a step, so busy machines slow them little."""
    workers = args.workers
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.manual_seed(0)
    config = ModelConfig()
    model = Qwen3(config)
    muon = args.optimizer == "muon"
    optimizers = Optimizers(model.named_parameters(), args.muon_lr, args.adam_lr, muon=muon)
    step, at, seen, used = 0, 0, 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load(state["optimizers"])
        step, at, seen, used = state["step"], state["at"], state["seen"], state["used"]
    if args.compile:
        model.quicken()
    with np.load(args.corpus / "train.npz") as streams:
        windows = Windows(streams["all"], seed=11)
    minutes, saved, mean = args.minutes, used, 0.0
    log = args.state.with_suffix(".jsonl")
    micros = args.batch_tokens // (args.micro_tokens * workers)
    clock = torch.tensor(used, dtype=torch.float64)
    while used < minutes * 60:
        begun = time.perf_counter()
        done = used / (minutes * 60)
        length = 256 if done < args.short_until else args.long if done >= args.long_from else 512
        value = 0.0
        tokens, at = windows.batch(at, args.batch_tokens // length, length)
        for part in tokens.chunk(workers)[rank].chunk(micros):
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                loss = model.loss(part)
            loss.backward()
            value += float(loss.detach()) / micros
        average(model, workers, 1.0 / (micros * workers))
        optimizers.step(wsd(step, done))
        mean = value if mean == 0.0 else 0.98 * mean + 0.02 * value
        step, seen = step + 1, seen + tokens.numel() - len(tokens)
        spent = time.perf_counter() - begun
        clock += spent
        if workers > 1:
            dist.broadcast(clock, 0)
        used = float(clock)
        if (step % 20 == 0 or step < 4) and rank == 0:
            print(
                f"step {step} minutes {used / 60:.1f} tokens {seen / 1e6:.2f}M loss {mean:.3f} "
                f"length {length} tok/s {args.batch_tokens / spent:.0f}",
                flush=True,
            )
        if used - saved > args.save_every * 60 or used >= minutes * 60:
            saved = used
            if rank == 0:
                counts = {"step": step, "at": at, "seen": seen, "used": used}
                state = {"model": model.state_dict(), "optimizers": optimizers.state()}
                save_atomic({**state, "config": vars(config), **counts}, args.state)
                row: dict[str, Any] = {"step": step, "minutes": round(used / 60, 2), "tokens": seen}
                row |= {"train": round(mean, 4), "heldout": evaluate(model, args.corpus)}
                print(json.dumps(row), flush=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if args.control and args.control.exists():
                minutes = float(args.control.read_text())


def main() -> None:
    """Train until the minutes are used up; resumes from --state when it exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--short-until", type=float, default=0.45, help="share at length 256")
    parser.add_argument("--long-from", type=float, default=0.88, help="share of the budget")
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes")
    parser.add_argument("--control", type=Path, help="file with a new total of minutes, if any")
    args = parser.parse_args()
    args.state.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"{folder}/meet"
        if args.workers == 1:
            train(0, args, rendezvous)
        else:
            spawn(train, args=(args, rendezvous), nprocs=args.workers)


if __name__ == "__main__":
    main()
