"""How every model is executed: captured, eager by choice, or fallen back with its reason.

    python -m benchmarks.engines_table [--models eight_schools,dogs]

For every model file of models/ and benchmarks/posteriordb/: the log density with its gradient at 10
points (which L-BFGS and NUTS call) and a stochastic step (mean field, ELBO, 10 particles), each captured
and checked in a process of its own. Operations are those of the recording; seconds are those of the
capture with its check; the times are medians of calls before and after it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lib import options, references
from benchmarks.lib.processes import ROOT
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "engines_table"
POINTS = 10
COLUMNS = {
    "model": "model",
    "dim": "D",
    "density": "density is",
    "operations": "operations",
    "capture_s": "capture (s)",
    "eager_ms": "eager (ms)",
    "captured_ms": "captured (ms)",
    "step": "step is",
    "step_first_s": "first step (s)",
    "step_ms": "step (ms)",
}


def files() -> dict[str, Path]:
    """Model files by name; a posterior's name is its file's."""
    found = sorted((ROOT / "models").glob("[a-z]*.py"))
    found += [references.Reference(name).path for name in references.names()]
    return {path.stem: path for path in found}


def one(path: str) -> dict[str, Any]:
    """What becomes of one model, in the process of a worker."""
    import torch

    from pyro_vi_kit import guides, objectives
    from pyro_vi_kit.capture import CaptureError, capture
    from pyro_vi_kit.core.runtime import RandomStream
    from pyro_vi_kit.model.log_density import Density
    from pyro_vi_kit.model.modelfile import load_model_file
    from pyro_vi_kit.optimize import engines

    torch.set_num_threads(1)
    density = Density(load_model_file(path))
    generator = torch.Generator().manual_seed(0)
    shape = (POINTS, density.dim)
    points = [0.1 * torch.randn(shape, generator=generator, dtype=density.dtype) for _ in range(3)]

    def evaluate(z: torch.Tensor, *data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().requires_grad_()
        log_prob = density.log_prob(z, data=data)
        (gradient,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), gradient

    found: dict[str, Any] = {"dim": density.dim}
    found["eager_ms"] = _milliseconds(lambda: evaluate(points[0], *density.data))
    started = time.perf_counter()
    try:
        rest = density.data
        program = capture(evaluate, [points[0], *rest], [[other, *rest] for other in points[1:]])
    except (CaptureError, RuntimeError) as error:
        found |= {"density": "eager", "density_why": _first_line(error)}
    else:
        found["capture_s"] = time.perf_counter() - started
        found["density"] = f"captured ({program.how})"
        found["operations"] = len(program.graph.nodes)
        found["captured_ms"] = _milliseconds(lambda: program(points[0], *rest))

    with RandomStream(0):
        guide = guides.specify("mean_field").build(density)
    engine = engines.CapturedEngine(guide, objectives.Elbo(particles=POINTS), seed=0)
    started = time.perf_counter()
    engine.run(1, 0.001)
    found["step_first_s"] = time.perf_counter() - started
    found |= {"step": engine.name, "step_why": engine.note}
    found["step_ms"] = _milliseconds(lambda: engine.run(1, 0.001))
    return found


def _milliseconds(function: Callable[[], object]) -> float:
    """The median of some calls, behind one that does not count; for half a second at the most."""
    function()
    times: list[float] = []
    until = time.perf_counter() + 0.5
    while not times or (time.perf_counter() < until and len(times) < 100):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return median(times)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    fine = [row for row in rows if not row["error"]]
    captured = sum(row["step"] != "eager" for row in fine)
    reasons = [
        f"- {row['model']}, {part}: {why}"
        for row in fine
        for part in ("density", "step")
        if (why := row.get(f"{part}_why"))
    ]
    from pyro_vi_kit.model.gradients import PATIENCE

    return "\n\n".join(
        [
            "## How models are executed",
            f"{POINTS} points or particles at once, float64, one thread. {captured} of {len(rows)} have "
            "their steps captured. None is eager by choice here; a fit evaluates a density as it is "
            f"until a capture pays, after {PATIENCE} calls with one number of points.",
            markdown(COLUMNS, fine),
            *(["Fallen back, and why:\n\n" + "\n".join(reasons)] if reasons else []),
            *failures(rows, lambda r: f"{r['model']}"),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=120.0)
    words.add_argument("--models", type=options.listed, default=None, help="all by default")
    asked = words.parse_args(argv)
    known = files()
    if reason := references.missing():
        options.say(reason)
        known = {name: path for name, path in known.items() if path.parent != references.FILES}
    default = [name for name in known if not asked.quick or _is_quick(known[name])]
    names = options.chosen(asked.models, list(known), "model") if asked.models else default
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for i, name in enumerate(names, 1):
        target, arguments = "benchmarks.engines_table:one", {"path": str(known[name])}
        row = records.measure({"model": name}, target, arguments, cap=asked.cap or 120.0)
        rows.append(row)
        options.say(f"[{i}/{len(names)}] {name}: {row['error'] or row['step']}")
    options.publish(asked.out, NAME, report(rows))
    return 0


def _is_quick(path: Path) -> bool:
    """The small models, and the one that is too long to capture."""
    if path.parent == references.FILES:
        return path.stem in (*references.QUICK, "hudson_lynx_hare_lotka_volterra")
    return path.stem in ("eight_schools_centered", "logistic_regression")


if __name__ == "__main__":
    sys.exit(main())
