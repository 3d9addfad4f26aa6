"""Microseconds a step of stochastic fits: our engines, stock Pyro, NumPyro and a hand-written loop.

    python -m benchmarks.speed_steps [--cases affine_coupling/iwae] [--particles 10] [--seconds 30]
    python -m benchmarks.speed_steps --device cuda

Eight schools (non-centred), float64, one thread; all have the same guide, objective and particles. Early
is the median of the first dozen stretches behind the first step (for a captured engine: right after the
capture), late is the last fifth of the time. A fit begins captured and is compiled beside it after some
seconds; "compiled" waits for the compiler first, as a fit's long run has it. Nothing comes from a cache.

Every contestant runs in a process of its own; they take turns, and the fastest round counts. Of stock
Pyro's two ways of taking particles (in a vectorised plate or one after another), the faster one is
compared with. With ``--device cuda`` all of torch is on the GPU, and what runs on the CPU alone is left
out: our compiled engine, which is a CUDA graph there, and NumPyro.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import machine, options
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown

NAME = "speed_steps"
CASES = ("mean_field/elbo", "mean_field/iwae", "affine_coupling/elbo", "affine_coupling/iwae")
QUICK = ("affine_coupling/iwae",)
EARLY_AIM, LATE_AIM = 6, 50
ENGINES = ("captured", "compiled", "eager")
TORCH, JAX = "benchmarks.peers.steps_torch", "benchmarks.peers.steps_numpyro"
STOCK = ("Pyro SVI.step, vectorised", "Pyro SVI.step, one by one")


def contestants(with_numpyro: bool, device: str = "cpu") -> dict[str, tuple[str, dict[str, Any]]]:
    """What to call for each, by its name in the table."""
    if device != "cpu":
        everyone = contestants(False)
        able = {who: call for who, call in everyone.items() if who != "ours, compiled"}
        return {who: (target, more | {"device": device}) for who, (target, more) in able.items()}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        f"ours, {engine}": (f"{TORCH}:ours", {"engine": engine}) for engine in ENGINES
    }
    for words, vectorize in zip(STOCK, (True, False), strict=True):
        found[words] = (f"{TORCH}:stock", {"vectorize": vectorize})
    if with_numpyro:
        found["NumPyro, compiled loop"] = (f"{JAX}:run", {"loop": True})
        found["NumPyro, a call each"] = (f"{JAX}:run", {"loop": False})
    found["torch by hand"] = (f"{TORCH}:by_hand", {})
    return found


def best(rows: Sequence[dict[str, Any]], kind: str) -> float | None:
    """The fewest microseconds among rounds; None where all failed."""
    return min((row[kind] for row in rows if row.get("error") is None), default=None)


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per contestant of one case, with what the others take over it."""
    names = list(dict.fromkeys(row["who"] for row in rows))
    times = {
        name: {
            k: best([r for r in rows if r["who"] == name], k) for k in ("first", "early", "late")
        }
        for name in names
    }
    stock = [t for name in STOCK if name in times and (t := times[name]["early"]) is not None]
    slow = [t for name in STOCK if name in times and (t := times[name]["late"]) is not None]
    lines = []
    for name in names:
        line: dict[str, Any] = {"who": name, **times[name]}
        for kind, theirs in (("early", stock), ("late", slow)):
            mine = line[kind]
            line[f"{kind}_ratio"] = min(theirs) / mine if theirs and mine else None
        lines.append(line)
    return lines


def aims(case: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What our fastest engine shows against stock Pyro, beside the aims."""
    ours = [line for line in lines if line["who"].startswith("ours") and line["early_ratio"]]
    if not ours:
        return []
    found = []
    # What was compiled before the first step is not what a fit has right after its capture.
    early = [line for line in ours if "compiled" not in line["who"]] or ours
    for kind, words, aim, able in (
        ("early", "right after capture", EARLY_AIM, early),
        ("late", "long", LATE_AIM, ours),
    ):
        line = max(able, key=lambda one: one[f"{kind}_ratio"])
        ratio = line[f"{kind}_ratio"]
        found.append(
            {
                "case": case,
                "against stock Pyro": f"{words} ({line['who'].removeprefix('ours, ')})",
                "measured": f"{ratio:.3g}×",
                "aim": f"at least {aim}×",
                "met": ratio >= aim,
            }
        )
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    columns = {
        "who": "eight schools",
        "first": "first step (s)",
        "early": "early (µs a step)",
        "early_ratio": "Pyro over it",
        "late": "late (µs a step)",
        "late_ratio": "Pyro over it",
    }
    parts, verdicts = ["## Steps of stochastic fits"], []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        lines = table(mine)
        verdicts += aims(case, lines)
        parts += [f"### {case}, {mine[0]['particles']} particles", markdown(columns, lines)]
        failed = {row["who"]: row["error"] for row in mine if row.get("error")}
        if failed:
            parts.append("\n".join(f"- {who} failed: {error}" for who, error in failed.items()))
    parts.append(
        "First: seconds from nothing to the end of the first step (tracing, capture, compilation). "
        "Early: right behind it. Late: the last fifth of the run."
    )
    parts.append(markdown(["case", "against stock Pyro", "measured", "aim", "met"], verdicts))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__)
    words.add_argument("--cases", type=options.listed, default=None, help=", ".join(CASES))
    words.add_argument("--particles", type=int, default=10)
    words.add_argument("--device", default="cpu", help="of torch: cpu, cuda (%(default)s)")
    words.add_argument("--rounds", type=int, default=None, help="turns of each (2)")
    words.add_argument("--seconds", type=options.positive, default=None, help="of ours (30)")
    words.add_argument("--peer-seconds", type=options.positive, default=None, help="of others (5)")
    asked = words.parse_args(argv)
    cases = options.chosen(asked.cases or (QUICK if asked.quick else CASES), CASES, "case")
    rounds = asked.rounds or (1 if asked.quick else 2)
    mine = asked.seconds or (5.0 if asked.quick else 30.0)
    theirs = asked.peer_seconds or (2.0 if asked.quick else 5.0)
    if reason := machine.numpyro_missing():
        options.say(reason)
    everyone = contestants(machine.numpyro_missing() is None, asked.device)
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for case in cases:
        guide, _, objective = case.partition("/")
        for turn in range(rounds):
            for who, (target, more) in everyone.items():
                seconds = mine if who.startswith("ours") else theirs
                key = {"case": case, "who": who, "particles": asked.particles}
                key |= {"round": turn, "seconds": seconds, "device": asked.device}
                arguments = {"guide": guide, "objective": objective, "seed": turn}
                arguments |= {"particles": asked.particles, "seconds": seconds} | more
                row = records.measure(key, target, arguments, cap=seconds + 120)
                rows.append(row)
                options.say(f"{case}, round {turn + 1} of {rounds}: {who} {_line(row)}")
    options.publish(asked.out, NAME, report(rows))
    return 0


def _line(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"failed: {row['error']}"
    return f"{row['early']:,.0f} then {row['late']:,.0f} µs a step"


if __name__ == "__main__":
    sys.exit(main())
