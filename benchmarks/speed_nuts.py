"""Effective samples a second: `vi.nuts` against Pyro's NUTS and NumPyro's.

    python -m benchmarks.speed_nuts [--models eight_schools] [--cap 120] [--draws 1000]

The smallest bulk effective sample size (ArviZ) over all sites, over the seconds that sampling took with
its warm-up. Cold: the whole process, imports and compilation included, over one run. Warm: from the call
to the draws; for ours and NumPyro's the second run in that process, which finds things compiled. All in
float64, chains one after another on one thread, unless the line says otherwise. Pyro's NUTS stops at
the cap, with the draws that it has; where these are fewer than 20, each of its iterations, warm-up
included, counts as an effective sample, and ratios over it are lower bounds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lib import machine, options
from benchmarks.lib.processes import call
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown

NAME = "speed_nuts"
MODELS = ("eight_schools", "logistic_regression")
TORCH, JAX = "benchmarks.peers.nuts_torch", "benchmarks.peers.nuts_numpyro"
OURS, PYRO = "ours", "Pyro"
_BOUNDED = (
    "{} had not made 20 draws at the cap. Each iteration that it had made, warm-up and all, counts as "
    "an effective sample here; ours over it, within the cap, is at least what stands here."
)
PYRO_AIMS = {"eight_schools": 30, "logistic_regression": 10}


def contestants(quick: bool, with_numpyro: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """What to call for each, by its name in the table."""
    cores = os.cpu_count() or 1
    found: dict[str, tuple[str, dict[str, Any]]] = {OURS: (f"{TORCH}:ours", {"cores": 1})}
    if cores > 1 and not quick:
        found[f"ours, {cores} cores"] = (f"{TORCH}:ours", {"cores": cores})
    found[PYRO] = (f"{TORCH}:stock", {})
    if with_numpyro:
        methods = ("sequential",) if quick else ("sequential", "vectorized", "parallel")
        for method in methods:
            found[f"NumPyro, {method}"] = (f"{JAX}:run", {"method": method})
    return found


def measure(target: str, arguments: dict[str, Any], who: str, cap: float) -> dict[str, Any]:
    """One contestant, one round, in a fresh process: a cold run, and behind it a warm one.

    Pyro's NUTS runs once: it prepares nothing that a second run could use.
    """
    more: dict[str, Any] = {"cap": cap} if who == PYRO else {"repeats": 2}
    done = call(target, arguments | more, cap=3 * cap)
    if done.error is not None:
        return {"error": done.error}
    first, last = done.value[0], done.value[-1]
    # What came behind the first run's draws is no part of it.
    later = sum(run["after"] for run in done.value) + sum(r["seconds"] for r in done.value[1:])
    cold = done.seconds - later
    return {
        "ess": last["ess"],
        "rhat": last["rhat"],
        "first_seconds": first["seconds"],
        "warm_seconds": last["seconds"],
        "warm": last["ess"] / last["seconds"],
        "cold_seconds": cold,
        "cold": first["ess"] / cold,
        "bound": bool(first.get("bound")),
        "error": None,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per contestant of one model, medians over rounds, with what ours makes over it."""
    names = list(dict.fromkeys(row["who"] for row in rows))
    lines = []
    for name in names:
        mine = [row for row in rows if row["who"] == name and row["error"] is None]
        keys = ("ess", "rhat", "warm_seconds", "warm", "cold_seconds", "cold")
        values = {key: [r[key] for r in mine if r[key] is not None] for key in keys}
        medians = {key: median(found) for key, found in values.items() if found}
        lines.append({"who": name, "bound": any(r.get("bound") for r in mine)} | medians)
    ours = next((line for line in lines if line["who"] == OURS), {})
    for line in lines:
        for kind in ("warm", "cold"):
            if kind in line and kind in ours:
                line[f"{kind}_ratio"] = ours[kind] / line[kind]
    return lines


def aims(model: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be shown."""
    found = [
        (model, "Pyro, warm", line["warm_ratio"], PYRO_AIMS[model], line["bound"])
        for line in lines
        if line["who"] == PYRO and "warm_ratio" in line
    ]
    cold = [
        line["cold_ratio"] for line in lines if "NumPyro" in line["who"] and "cold_ratio" in line
    ]
    if cold:
        found.append((model, "the best of NumPyro, cold", min(cold), 1, False))
    return [
        {
            "model": name,
            "ours over": words,
            "measured": f"{'at least ' if bound else ''}{ratio:.3g}×",
            "aim": f"at least {aim}×",
            "met": ratio >= aim,
        }
        for name, words, ratio, aim, bound in found
    ]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    columns = {
        "who": "NUTS",
        "ess": "min bulk ESS",
        "rhat": "max R-hat",
        "warm_seconds": "warm (s)",
        "warm": "ESS/s warm",
        "warm_ratio": "ours over it",
        "cold_seconds": "cold (s)",
        "cold": "ESS/s cold",
        "cold_ratio": "ours over it",
    }
    parts, verdicts = ["## NUTS: effective samples a second"], []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines = table(mine)
        verdicts += aims(model, lines)
        plan = f"{mine[0]['chains']} chains of {mine[0]['tune']} + {mine[0]['draws']} draws"
        parts += [f"### {model}, {plan}", markdown(columns, lines)]
        parts += [_BOUNDED.format(line["who"]) for line in lines if line["bound"]]
        failed = {row["who"]: row["error"] for row in mine if row["error"]}
        if failed:
            parts.append("\n".join(f"- {who} failed: {error}" for who, error in failed.items()))
    parts.append(markdown(["model", "ours over", "measured", "aim", "met"], verdicts))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=180.0)
    words.add_argument("--models", type=options.listed, default=None, help=", ".join(MODELS))
    words.add_argument("--chains", type=int, default=None, help="of each (4)")
    words.add_argument("--tune", type=int, default=None, help="warm-up draws of a chain (400)")
    words.add_argument("--draws", type=int, default=None, help="draws of a chain (1000)")
    words.add_argument("--rounds", type=int, default=None, help="turns of each (3)")
    asked = words.parse_args(argv)
    quick = asked.quick
    cap = asked.cap or (30.0 if quick else 180.0)
    default = MODELS[:1] if quick else MODELS
    names = options.chosen(asked.models or default, MODELS, "model")
    rounds = asked.rounds or (1 if quick else 3)
    plan = {"chains": asked.chains or (2 if quick else 4), "tune": asked.tune or 400}
    plan["draws"] = asked.draws or (300 if quick else 1000)
    if reason := machine.numpyro_missing():
        options.say(reason)
    everyone = contestants(quick, machine.numpyro_missing() is None)
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for model in names:
        for turn in range(rounds):
            for who, (target, more) in everyone.items():
                key = {"model": model, "who": who, "round": turn, **plan}
                row = records.find(key)
                if row is None:
                    arguments = {"name": model, "seed": 10 * turn, **plan, **more}
                    row = records.add(key | measure(target, arguments, who, cap))
                rows.append(row)
                what = row["error"] or f"{row['warm']:,.0f} effective samples a second, warm"
                options.say(f"{model}, round {turn + 1} of {rounds}: {who}: {what}")
    options.publish(asked.out, NAME, report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
