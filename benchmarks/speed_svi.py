"""Time to a posterior against stock Pyro's and NumPyro's SVI, warm and cold.

    python -m benchmarks.speed_svi [--posteriors ark,dogs] [--guides mean_field] [--cap 60]

Warm: from `vi.fit()` to the posterior, in a process that has fitted something else before, against the
time that Adam (0.01, one particle, autoguide with defaults) needs to bring its ELBO within 0.05 nats of
the family's optimum for the first time. The peers are told for free when that is: their ELBO is looked
up by our density on 16,384 common draws while the clock stands still. NumPyro's time includes its own
compilation. Cold: whole processes, imports and all, the peers stopping at that very step.

Contestants take turns, in processes of their own with one thread, ours before and after the peers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lib import machine, options, references
from benchmarks.lib.processes import call
from benchmarks.lib.records import Records
from benchmarks.lib.tables import DASH, Measured, markdown, median_of

NAME = "speed_svi"
GUIDES = ("mean_field", "full_rank")
WITHIN = 0.05
PEERS = {"pyro": "benchmarks.peers.pyro_svi", "numpyro": "benchmarks.peers.numpyro_svi"}
WORDS = {"pyro": "stock Pyro", "numpyro": "NumPyro"}
AIMS = {("warm", "pyro"): 30, ("warm", "numpyro"): 10, ("cold", "pyro"): 3, ("cold", "numpyro"): 2}
MAX_EVALUATIONS = 8000


def measure(
    name: str, guide: str, seed: int, repeats: int, cap: float, peers: Sequence[str]
) -> dict[str, Any]:
    """Every contestant on one posterior: warm, then cold."""
    optimum = references.Reference(name).optimum(guide)
    if optimum is None:
        raise ValueError(f"the optimum of {guide} is not known")
    target = optimum[0] - WITHIN
    ours = {"name": name, "guide": guide, "seeds": list(range(seed, seed + repeats))}
    row: dict[str, Any] = {}
    fits = _fits(ours, cap, row)
    for peer in peers:
        arguments = {"name": name, "guide": guide, "seed": seed, "target": target, "cap": cap}
        _keep(row, peer, call(f"{PEERS[peer]}:race", arguments, cap=cap))
    fits += _fits(ours, cap, row)
    if fits:
        row["warm"] = median(fit["seconds"] for fit in fits)
        row["evaluations"] = median(fit["evaluations"] for fit in fits)
        row["gap"] = optimum[0] - median(fit["elbo"] for fit in fits)
        row["engine"] = fits[0]["engine"]
    _cold(row, name, guide, seed, peers, repeats=min(repeats, 3), cap=cap)
    return row


def _fits(arguments: dict[str, Any], cap: float, row: dict[str, Any]) -> list[dict[str, Any]]:
    done = call("benchmarks.lib.ours:fits", arguments, cap=cap * len(arguments["seeds"]))
    if done.error is not None:
        row["error"] = done.error
    return done.value or []


def _keep(row: dict[str, Any], peer: str, done: Any) -> None:
    """The peer's warm race, or why it could not run it."""
    if done.error is not None:
        row[f"{peer}_failed"] = done.error
        return
    finish = done.value
    row[f"{peer}_warm"] = finish["seconds"]
    row[f"{peer}_setup"] = finish["setup"]
    row[f"{peer}_reached"] = finish["reached"]
    row[f"{peer}_steps"] = finish["steps"]
    row[f"{peer}_best"] = finish["best"]


def _cold(
    row: dict[str, Any],
    name: str,
    guide: str,
    seed: int,
    peers: Sequence[str],
    *,
    repeats: int,
    cap: float,
) -> None:
    """Whole processes, in turns.

    A peer that did not reach the target is started once for a single step: it would have taken at least
    that and the cap.
    """
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        arguments = {"name": name, "guide": guide, "seed": seed}
        done = call("benchmarks.lib.ours:cold", arguments, cap=cap)
        if done.error is None:
            times.setdefault("ours", []).append(done.seconds)
        for peer in peers:
            if f"{peer}_failed" in row or (not row[f"{peer}_reached"] and peer in times):
                continue
            steps = row[f"{peer}_steps"] if row[f"{peer}_reached"] else 1
            done = call(f"{PEERS[peer]}:cold", arguments | {"steps": steps}, cap=cap)
            if done.error is None:
                rest = 0.0 if row[f"{peer}_reached"] else row[f"{peer}_warm"]
                times.setdefault(peer, []).append(done.seconds + rest)
    for who, seconds in times.items():
        row["cold" if who == "ours" else f"{who}_cold"] = median(seconds)


def peer_time(row: dict[str, Any], peer: str, kind: str) -> Measured | None:
    """What a peer took; a lower bound where it did not arrive; None where it could not run."""
    seconds = row.get(f"{peer}_{kind}")
    return None if seconds is None else Measured(seconds, not row[f"{peer}_reached"])


def ratio(row: dict[str, Any], peer: str, kind: str) -> Measured | None:
    """How many times our time a peer took; None where one of us has no time or we did not arrive."""
    theirs, mine = peer_time(row, peer, kind), row.get(kind)
    if theirs is None or mine is None or not row["gap"] <= WITHIN:
        return None
    return theirs.over(Measured(mine))


def report(rows: Sequence[dict[str, Any]], peers: Sequence[str], cap: float) -> str:
    """All of it as Markdown."""
    parts = [
        "## Time to a posterior",
        f"Seconds until the ELBO is within {WITHIN} nats of the family's optimum: ours is the whole of "
        f"`vi.fit()`, the peers' (Adam 0.01, one particle, at most {cap:g} s) is the first time that "
        "it is there. Warm: imports done before; set-up (tracing, NumPyro's compilation, a step) "
        "counts. Cold: whole processes. "
        "× is a peer's time over ours, measured side by side.",
    ]
    for guide in dict.fromkeys(row["guide"] for row in rows):
        mine = [row for row in rows if row["guide"] == guide]
        parts += [f"### {guide}", _table(mine, peers), _medians(mine, peers)]
        left_out = [
            f"- {WORDS[peer]} cannot start on {row['posterior']}: {row[f'{peer}_failed']}"
            for peer in peers
            for row in mine
            if f"{peer}_failed" in row
        ]
        if left_out:
            parts.append("\n".join(left_out))
    return "\n\n".join(parts)


def _table(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    columns = {
        "posterior": "posterior",
        "evaluations": "gradient evaluations",
        "gap": "below optimum (nats)",
        "warm": "ours warm (s)",
        "cold": "ours cold (s)",
    }
    for peer in peers:
        columns[f"{peer}_setup"] = f"{WORDS[peer]} set-up (s)"
        for kind in ("warm", "cold"):
            columns |= {f"{peer}_{kind}": f"{WORDS[peer]} {kind} (s)", f"{peer}_{kind}_ratio": "×"}
    shown = []
    for row in rows:
        line = {key: row.get(key) for key in ("posterior", "evaluations", "gap", "warm", "cold")}
        for peer in peers:
            line[f"{peer}_setup"] = row.get(f"{peer}_setup")
            for kind in ("warm", "cold"):
                for key, value in (
                    (f"{peer}_{kind}", peer_time(row, peer, kind)),
                    (f"{peer}_{kind}_ratio", ratio(row, peer, kind)),
                ):
                    line[key] = DASH if value is None else str(value)
        shown.append(line)
    return markdown(columns, shown)


def _medians(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    table = []
    counts = [row["evaluations"] for row in rows if "evaluations" in row]
    if counts:
        middle = median(counts)
        table.append(
            {
                "median over the posteriors": "gradient evaluations",
                "measured": f"{middle:,.0f}",
                "aim": f"at most {MAX_EVALUATIONS:,}",
                "met": middle <= MAX_EVALUATIONS,
            }
        )
    for kind in ("warm", "cold"):
        for peer in peers:
            ratios = [value for row in rows if (value := ratio(row, peer, kind)) is not None]
            middle = median_of(ratios)
            if middle is None:
                continue
            aim = AIMS[kind, peer]
            table.append(
                {
                    "median over the posteriors": f"{WORDS[peer]} over ours, {kind} ({len(ratios)})",
                    "measured": f"{middle}×",
                    "aim": f"at least {aim}×",
                    "met": _met(middle, aim),
                }
            )
    return markdown(["median over the posteriors", "measured", "aim", "met"], table)


def _met(measured: Measured, aim: float) -> bool | str:
    """Whether the aim is met; a lower bound under it shows neither."""
    if measured.value >= aim:
        return True
    return "not shown: raise --cap" if measured.at_least else False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=60.0)
    words.add_argument("--posteriors", type=options.listed, default=None, help="all by default")
    words.add_argument("--guides", type=options.listed, default=list(GUIDES))
    words.add_argument("--seeds", type=options.integers, default=[0], help="one race each")
    words.add_argument("--repeats", type=int, default=None, help="fits of ours in a turn (3)")
    asked = words.parse_args(argv)
    if reason := references.missing():
        sys.exit(reason)
    cap = asked.cap or (5.0 if asked.quick else 60.0)
    repeats = asked.repeats or (1 if asked.quick else 3)
    peers = list(PEERS)
    if reason := machine.numpyro_missing():
        options.say(reason)
        peers.remove("numpyro")
    default = references.QUICK[1:2] if asked.quick else references.names()
    names = (
        options.chosen(asked.posteriors, references.names(), "posterior")
        if asked.posteriors
        else default
    )
    guides = options.chosen(asked.guides, GUIDES, "guide")
    cells = [(name, guide, seed) for guide in guides for name in names for seed in asked.seeds]
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for i, (name, guide, seed) in enumerate(cells, 1):
        key = {
            "posterior": name,
            "guide": guide,
            "seed": seed,
            "cap": cap,
            "peers": ",".join(peers),
        }
        row = records.find(key)
        if row is None:
            row = records.add(key | measure(name, guide, seed, repeats, cap, peers))
        rows.append(row)
        options.say(f"[{i}/{len(cells)}] {name}, {guide}: {_line(row, peers)}")
    options.publish(asked.out, NAME, report(rows, peers, cap))
    return 0


def _line(row: dict[str, Any], peers: Sequence[str]) -> str:
    if "warm" not in row:
        return f"ours failed: {row['error']}"
    times = [f"ours {row['warm']:.2f} s warm"]
    times += [f"{WORDS[peer]} {peer_time(row, peer, 'warm') or 'cannot'}" for peer in peers]
    return ", ".join(times)


if __name__ == "__main__":
    sys.exit(main())
