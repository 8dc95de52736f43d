"""Train the DSpark drafter of a target on a time budget.

python -m engine.training.train_dspark --target DIR --corpus DIR --own FILE --state FILE --out DIR
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.training.dspark import DraftConfig, DSpark
from engine.training.dspark_loss import Weights, dspark_loss, expected_length
from engine.training.export import qwen3_keys, read_target, write
from engine.training.model import Qwen3
from engine.training.optim import Optimizers, save_atomic, wsd
from engine.training.pretrain import Windows, average


def sample_anchors(rows: int, length: int, count: int, block: int, rng: torch.Generator) -> Tensor:
    """Distinct sorted anchor positions [rows, count], each with a whole block of text after it."""
    room = torch.rand((rows, length - block - 8), generator=rng)
    return (room.topk(count, 1).indices + 8).sort(1).values


def drafter_loss(
    model: DSpark,
    target: Qwen3,
    tokens: Tensor,
    anchors: Tensor,
    loss_of: Callable[..., tuple[Tensor, Tensor]] = dspark_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, acceptance [N, γ], argmax agreement [N, γ]) on tokens [B, T] at anchors [B, A].

    Slot i of anchor n is taught with the target's distribution at n+i, sees the true token at
    n+i as its Markov input and predicts the one at n+i+1; slots after a document's end are void.
    """
    config = model.config
    table = target.model.embed_tokens.weight
    with torch.no_grad():
        normed, features = target.model(tokens, config.target_layer_ids)
    features = features.clone()
    places = anchors[..., None] + torch.arange(config.block_size)
    rows = torch.arange(len(tokens))[:, None, None]
    previous, goals = tokens[rows, places], tokens[rows, places + 1]
    valid = (previous != 0).long().cumprod(-1).bool()
    hidden = model.hidden(features, anchors, previous[..., 0], table)
    draft, confidence = model.heads(hidden, previous, table)
    with torch.no_grad():
        wanted = target.logits(normed[rows, places])
    loss, accept = loss_of(
        draft.flatten(0, 1),
        confidence.flatten(0, 1),
        wanted.flatten(0, 1),
        goals.flatten(0, 1),
        valid.flatten(0, 1),
        Weights(),
    )
    agree = (draft.argmax(-1) == wanted.argmax(-1)).flatten(0, 1)
    keep = valid.flatten(0, 1).all(-1)
    return loss, accept[keep], agree[keep].float().detach()


@torch.inference_mode()
def evaluate(model: DSpark, target: Qwen3, corpus: Path) -> dict[str, dict[str, float]]:
    """Expected accepted length at temperature 1 and greedy, on held-out text of each domain."""
    out = {}
    rng = torch.Generator().manual_seed(1)
    with np.load(corpus / "heldout.npz") as streams:
        for name in ("code", "prose", "arithmetic"):
            ids = streams[name].astype(np.int64)
            starts = [i * ((len(ids) - 300) // 16) for i in range(16)]
            tokens = torch.from_numpy(np.stack([ids[at : at + 257] for at in starts]))
            anchors = sample_anchors(16, 257, 24, model.config.block_size, rng)
            loss, accept, agree = drafter_loss(model, target, tokens, anchors)
            out[name] = {
                "loss": round(float(loss), 4),
                "tau_sampled": round(float(expected_length(accept).mean()), 3),
                "tau_greedy": round(float(expected_length(agree).mean()), 3),
            }
    return out


def batches(args: argparse.Namespace, at: int, rows: int, length: int, own: Windows) -> Tensor:
    """Half corpus windows, half the target's own text: tokens [rows, length + 1], shuffled."""
    corpus: Windows = args.windows
    half = rows // 2
    one, _ = corpus.batch(at * half * (length // corpus.unit), half, length)
    two, _ = own.batch(at * (rows - half) * (length // own.unit), rows - half, length)
    return torch.cat((one, two))[torch.randperm(rows, generator=torch.Generator().manual_seed(at))]


def train(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One data-parallel worker."""
    workers = args.workers
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.manual_seed(0)
    target = read_target(args.target)
    config = DraftConfig(base=target.config)
    model = DSpark(config)
    if args.compile:
        for layer in (*target.model.layers, *model.layers):
            layer.compile(dynamic=False)
    loss_of = torch.compile(dspark_loss, dynamic=False) if args.compile else dspark_loss
    optimizers = Optimizers(model.named_parameters(), args.muon_lr, args.adam_lr, weight_decay=0.01)
    step, used = 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load(state["optimizers"])
        step, used = state["step"], state["used"]
    with np.load(args.corpus / "train.npz") as streams:
        args.windows = Windows(streams["all"], seed=21)
    own = Windows(np.load(args.own).reshape(-1), seed=22) if args.own else args.windows
    rng = torch.Generator().manual_seed(1000 + rank + 7919 * step)
    clock, saved = torch.tensor(used, dtype=torch.float64), used
    mean = 0.0
    while used < args.minutes * 60:
        begun = time.perf_counter()
        done = used / (args.minutes * 60)
        length = args.long if done >= args.long_from else 256
        rows = max(2 * workers, args.batch_tokens // length)
        tokens = batches(args, step, rows, length, own).chunk(workers)[rank]
        count = args.anchors * length // 256
        anchors = sample_anchors(len(tokens), length + 1, count, config.block_size, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            loss, accept, _ = drafter_loss(model, target, tokens, anchors, loss_of)
        loss.backward()
        average(model, workers, 1.0 / workers)
        optimizers.step(wsd(step, done))
        tau = float(expected_length(accept).mean())
        mean = tau if mean == 0.0 else 0.98 * mean + 0.02 * tau
        step += 1
        clock += time.perf_counter() - begun
        if workers > 1:
            dist.broadcast(clock, 0)
        used = float(clock)
        if step % 20 == 0 and rank == 0:
            speed = rows * length / (time.perf_counter() - begun)
            print(
                f"step {step} minutes {used / 60:.1f} loss {float(loss.detach()):.3f} "
                f"tau {mean:.3f} length {length} tok/s {speed:.0f}",
                flush=True,
            )
        if used - saved > args.save_every * 60 or used >= args.minutes * 60:
            saved = used
            if rank == 0:
                state = {"model": model.state_dict(), "optimizers": optimizers.state()}
                save_atomic({**state, "step": step, "used": used}, args.state)
                keys = {**qwen3_keys(config.base), "num_hidden_layers": config.layers}
                write(args.out, {**keys, **config.public()}, model.state_dict())
                row: dict[str, Any] = {"step": step, "minutes": round(used / 60, 2)}
                row["tau"] = round(mean, 3)
                row |= {"heldout": evaluate(model, target, args.corpus), "loss": asdict(Weights())}
                print(json.dumps(row), flush=True)
                with args.state.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def main() -> None:
    """Train until the minutes are used up; resumes from --state when it exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("target", "corpus", "state", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--own", type=Path, help="array of the target's own text (generate)")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--anchors", type=int, default=24, help="anchors a 256 tokens")
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--long-from", type=float, default=0.92, help="share of the budget")
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes")
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
