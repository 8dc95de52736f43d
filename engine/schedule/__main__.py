"""`python -m engine.schedule profile`: measure this machine's cost table, print it and plot it.

`python -m engine.schedule simulate`: replay a load through the scheduler on a table from a file.
`python -m engine.schedule predict`: the same for what `make bench-load` measured, beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from engine.config import POLICIES, EngineConfig
from engine.errors import LoadError
from engine.schedule.acceptance import Acceptance
from engine.schedule.cost import CostTable, Knots, Work
from engine.schedule.loads import Arrival, closed_load, poisson_load
from engine.schedule.predict import predict, read, table
from engine.schedule.simulate import Outcome, Simulator
from engine.schedule.store import cache_folder, decode, key_of, save

DEMO = Path(__file__).resolve().parents[1] / "demo"
WIDTH = 50  # characters of a bar


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.schedule", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    profile = commands.add_parser("profile", help="measure what rounds cost here")
    profile.add_argument("--model", default=str(DEMO / "target"))
    profile.add_argument("--draft", default=str(DEMO / "dspark"))
    profile.add_argument("--device", default="cpu")
    profile.add_argument("--dtype", default="auto")
    profile.add_argument("--threads", type=int, default=1)
    profile.add_argument("--max-running", type=int, default=64)
    profile.add_argument("--seconds", type=float, default=15.0, help="to measure for, about (default 15)")
    profile.add_argument("--cost-cache", help="where to keep the table; '' keeps none (default: the user's cache)")
    profile.add_argument("--json", action="store_true", help="the table alone, as JSON; `simulate --table` reads it")
    simulate = commands.add_parser("simulate", help="replay a load on a table from a file")
    simulate.add_argument("--table", type=Path, required=True, help="JSON that `profile --json` wrote")
    simulate.add_argument("--acceptance", type=Path, required=True,
        help='JSON: a list of {"conditional": [...], "spread": 1.5, "bias": 0}, one a kind of request')  # fmt: skip
    simulate.add_argument("--policy", choices=POLICIES, default="auto")
    simulate.add_argument("--draft-tokens", type=int, help="policy fixed: this many")
    load = simulate.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, default=8, help="so many always run (default 8)")
    load.add_argument("--rate", type=float, help="requests a second, arriving at random, on one of --replicas")
    load.add_argument("--trace", type=Path, help="JSON lines: at_s, prompt, tokens, acceptance, priority")
    simulate.add_argument("--replicas", type=int, default=1)
    simulate.add_argument("--requests", type=int, default=200)
    simulate.add_argument("--tokens", type=int, default=128, help="a request generates (default 128)")
    simulate.add_argument("--seconds", type=float, default=60.0, help="of arrivals at --rate (default 60)")
    simulate.add_argument("--max-running", type=int, default=64)
    simulate.add_argument("--json", action="store_true")
    foretell = commands.add_parser("predict", help="predict what `make bench-load` measured, beside what it measured")
    foretell.add_argument("--measured", type=Path, required=True, metavar="FILE", help="its points.jsonl")
    foretell.add_argument("--profiles", type=Path, metavar="FILE", help="default: profiles.json beside it")
    foretell.add_argument("--json", action="store_true", help="one line an arm and concurrency")
    given = parser.parse_args(arguments)
    try:
        return {"profile": _profile, "simulate": _simulate, "predict": _predict}[given.command](given)
    except LoadError as error:
        print(f"engine.schedule: {error}", file=sys.stderr)
        return 2


def _profile(given: argparse.Namespace) -> int:
    from engine.loading import load_engine, warm_up
    from engine.schedule.measure import measure

    config = EngineConfig(
        model=given.model,
        draft=given.draft,
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        max_running=given.max_running,
        cost_cache=given.cost_cache,
    )
    engine = load_engine(config)
    warm_up(engine)
    costs = measure(engine, given.seconds)
    folder = cache_folder(config)
    if folder is not None:
        save(folder, key_of(config, engine.info), costs)
    print(json.dumps(asdict(costs)) if given.json else picture(costs, given.max_running, engine.info.block_size))
    return 0


def picture(table: CostTable, max_running: int, block_size: int) -> str:
    """The table as text: its parts, then a plain round beside rounds that draft, by requests running."""
    lines = [
        *_bars("target pass by rows, one request", "rows", table.verify),
        *_bars("drafting by blocks", "blocks", table.draft),
        *_bars("absorbing by rows", "rows", table.absorb),
        "",
        f"a further request {table.request_s * 1e6:.1f} µs; 1,000 tokens of context {table.context_s * 1e6:.2f} ms a "
        f"request, {table.row_context_s * 1e6:.2f} ms a drafted row; a prompt row {table.prefill_row:.2f} of a row",
        "",
        "ms a round, and tokens a round that a draft must bring to be as fast as plain decoding",
        f"{'requests':>10s}{'plain':>9s}" + "".join(f"{f'ℓ = {n}':>18s}" for n in _some(block_size)),
    ]
    running = 1
    while running <= max_running:
        plain = table.seconds(Work(requests=running, rows=running))
        cells = []
        for n in _some(block_size):
            work = Work(running, running * (1 + n), 0, 0, 0, running, 0, running * (1 + n) // 2)
            seconds = table.seconds(work)
            cells.append(f"{seconds * 1e3:9.2f} {seconds / plain:5.2f} tok")
        lines.append(f"{running:10d}{plain * 1e3:9.2f}" + "".join(f"{cell:>18s}" for cell in cells))
        running *= 2
    return "\n".join(lines)


def _some(block_size: int) -> list[int]:
    return sorted({n for n in (1, 3, block_size) if 0 < n <= block_size})


def _bars(title: str, unit: str, knots: Knots) -> list[str]:
    most = max(seconds for _, seconds in knots) or 1.0
    lines = ["", f"{title}, ms"]
    lines += [f"{x:8.0f} {unit:6s}{s * 1e3:9.3f}  {'█' * max(round(WIDTH * s / most), 1)}" for x, s in knots]
    return lines


def _simulate(given: argparse.Namespace) -> int:
    costs = _read_table(given.table)
    profiles = _read_profiles(given.acceptance)
    if given.replicas < 1:
        raise LoadError(f"--replicas must be at least 1, got {given.replicas}")
    kinds = len(profiles)
    if given.trace is not None:
        arrivals = _read_trace(given.trace, kinds)
    elif given.rate is not None:
        arrivals = poisson_load(given.rate, given.seconds, given.tokens, kinds)
    else:
        arrivals = closed_load(given.concurrency, given.requests, given.tokens, kinds)
    most = given.max_running if given.trace or given.rate else given.concurrency
    outcomes = []
    for replica in range(given.replicas):
        simulator = Simulator(costs, profiles, given.policy, given.draft_tokens, most, seed=replica)
        outcomes.append(simulator.run(arrivals[replica :: given.replicas]))
    summary = _summary(given, outcomes)
    if given.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name:32s} {value:.3f}" if isinstance(value, float) else f"{name:32s} {value}")
    return 0


def _predict(given: argparse.Namespace) -> int:
    lines = []
    for line in predict(read(given.measured, given.profiles or given.measured.with_name("profiles.json"))):
        lines.append(line)
        if given.json:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
    if not lines:
        raise LoadError(
            f"{given.measured} has no arm whose costs and blocks were recorded; run `make bench-load` again"
        )
    if not given.json:
        print(table(lines))
    return 0


def _summary(given: argparse.Namespace, outcomes: list[Outcome]) -> dict[str, float | int | str]:
    latencies = sorted(s for o in outcomes for s in o.latency_s)
    rates = sorted(rate for o in outcomes for rate in o.rates)
    rounds = max(sum(o.rounds for o in outcomes), 1)

    def at(values: list[float], share: float) -> float:
        return values[min(int(share * len(values)), len(values) - 1)] if values else 0.0

    return {
        "policy": given.policy,
        "replicas": given.replicas,
        "requests": len(latencies),
        "tokens_per_s": sum(o.tokens_per_s for o in outcomes),
        "tokens_per_s_per_user_p50": at(rates, 0.5),
        "tokens_per_s_per_user_p5": at(rates, 0.05),
        "latency_s_p50": at(latencies, 0.5),
        "latency_s_p95": at(latencies, 0.95),
        "mean_accepted_length": sum(o.tokens for o in outcomes) / rounds,
        "mean_verify_budget": sum(o.verified for o in outcomes) / rounds,
        "draft_skip_share": 1 - sum(o.drafted_rounds for o in outcomes) / rounds,
    }


def _read_table(path: Path) -> CostTable:
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no cost table ({error!r}); write one with `profile --json`") from error


def _read_profiles(path: Path) -> tuple[Acceptance, ...]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        profiles = tuple(Acceptance(**{**entry, "conditional": tuple(entry["conditional"])}) for entry in entries)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no acceptance profiles ({error!r})") from error
    if not profiles or len({len(p.conditional) for p in profiles}) != 1 or not profiles[0].conditional:
        raise LoadError(f"{path}: profiles must all have the same positions, one at least")
    if any(not 0 < c < 1 for profile in profiles for c in profile.conditional):
        raise LoadError(f"{path}: conditional acceptances must lie between 0 and 1")
    return profiles


def _read_trace(path: Path, kinds: int) -> list[Arrival]:
    arrivals = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            arrival = Arrival(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise LoadError(f"{path} line {number} is no arrival ({error})") from error
        if not 0 <= arrival.acceptance < kinds or arrival.tokens < 1 or arrival.prompt < 1:
            raise LoadError(f"{path} line {number}: acceptance, tokens or prompt is out of range")
        arrivals.append(arrival)
    return sorted(arrivals, key=lambda a: a.at_s)


if __name__ == "__main__":
    sys.exit(main())
