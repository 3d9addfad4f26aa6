"""Mode covering against mode seeking: the best single Gaussians by either KL, by fit and by quadrature.

    python -m benchmarks.kl_direction

The target is that of models/kl_direction.py, 2/3 N(0, sd 1/4) + 1/3 N(1/2, sd 1/100). Forward KL(p || q)
has one optimum, the target's own mean and sd; reverse KL(q || p) has two, found from two starts. Each is
fitted with the options that the table names, and found by minimising a trapezoid sum.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import ROOT
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "kl_direction"
OPTIMA = ("forward", "reverse, hill", "reverse, needle")
STARTS = {"forward": (0.2, 0.3), "reverse, hill": (0.0, 0.25), "reverse, needle": (0.5, 0.01)}
WITHIN = 1e-3
# With the score function a draw costs as much noise as log p varies; with any other, as its slope does,
# which is hundreds of nats a unit on the needle's flanks.
PARTICLES = {True: 4096, False: 8192}
COLUMNS = {
    "optimum": "optimum",
    "options": "vi.fit(model, ...)",
    "loc": "mean",
    "scale": "sd",
    "loc_error": "error of the mean",
    "scale_error": "error of the sd",
    "evaluations": "evaluations",
    "seconds": "seconds",
    "verdict": "verdict",
    "ok": "within 1e-3",
}


def target() -> tuple[Any, Any, float]:
    """Points `[n]` of a grid, the target's log density there, and the grid's width."""
    import numpy as np

    from pyro_vi_kit.model.modelfile import load_model_file

    module = sys.modules[load_model_file(ROOT / "models" / "kl_direction.py").fn.__module__]
    x = np.linspace(-3.0, 3.5, 650_001)
    parts = [
        math.log(weight / scale) - 0.5 * ((x - loc) / scale) ** 2
        for weight, loc, scale in zip(module.WEIGHTS, module.LOCS, module.SCALES, strict=True)
    ]
    return x, np.logaddexp(*parts) - 0.5 * math.log(2 * math.pi), float(x[1] - x[0])


def by_quadrature(optimum: str) -> tuple[float, float]:
    """Mean and sd of the best Gaussian."""
    import numpy as np
    from scipy.optimize import minimize

    x, log_p, width = target()

    def divergence(point: Any) -> float:
        loc, log_scale = point
        log_q = -0.5 * ((x - loc) / np.exp(log_scale)) ** 2 - log_scale
        log_q = log_q - 0.5 * math.log(2 * math.pi)
        upper, lower = (log_p, log_q) if optimum == "forward" else (log_q, log_p)
        return float((np.exp(upper) * (upper - lower)).sum() * width)

    loc, scale = STARTS[optimum]
    found = minimize(
        divergence,
        (loc, math.log(scale)),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-13},
    )
    return float(found.x[0]), math.exp(float(found.x[1]))


def asked_of(optimum: str, particles: int) -> dict[str, Any]:
    """The options of the fit; the objective's in a form that JSON can hold."""
    if optimum == "forward":
        return {"objective": "forward_kl", "tol": 1e-8}
    start = STARTS[optimum][0]
    return {"particles": particles, "estimator": "score", "init": {"z": start}, "tol": 1e-4}


def words_of(wanted: dict[str, Any]) -> str:
    """The same as one would write it."""
    given = dict(wanted)
    first = [f"objective=Elbo({given.pop('particles')})"] if "particles" in given else []
    return ", ".join([*first, *(f"{name}={value!r}" for name, value in given.items())])


def one(optimum: str, particles: int, seed: int) -> dict[str, Any]:
    """One fit, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi
    from pyro_vi_kit.model.modelfile import load_model_file

    torch.set_num_threads(1)
    model = load_model_file(ROOT / "models" / "kl_direction.py")
    wanted = asked_of(optimum, particles)
    words = words_of(wanted)
    if "particles" in wanted:
        wanted["objective"] = vi.objectives.Elbo(wanted.pop("particles"))
    posterior = vi.fit(model, seed=seed, progress=False, **wanted)
    with torch.no_grad():
        q = posterior.approximation.guide.families["latent"]()  # type: ignore[attr-defined]
    loc, scale = float(q.mean), float(q.stddev)
    expected = by_quadrature(optimum)
    return {
        "options": words,
        "loc": loc,
        "scale": scale,
        "exact_loc": expected[0],
        "exact_scale": expected[1],
        "loc_error": abs(loc - expected[0]),
        "scale_error": abs(scale - expected[1]),
        "evaluations": posterior.evaluations,
        "seconds": posterior.seconds,
        "verdict": str(getattr(posterior.verdict, "level", None)),
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Target and optima; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    x, log_p, _ = target()
    shown = (x > -1.0) & (x < 1.3)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    titles = ("forward KL(p || q) covers", "reverse KL(q || p) seeks a mode")
    for ax, title, kind in zip(axes, titles, ("forward", "reverse"), strict=True):
        ax.fill_between(x[shown], np.exp(log_p[shown]), color="0.8", label="target p")
        for row in rows:
            if not row["optimum"].startswith(kind) or row["error"]:
                continue
            scale = row["scale"]
            density = (
                np.exp(-0.5 * ((x - row["loc"]) / scale) ** 2) / scale / math.sqrt(2 * math.pi)
            )
            label = f"q: N({row['loc']:.3f}, sd {scale:.3f})"
            ax.plot(x[shown], density[shown], label=label, linewidth=1.5)
        # The needle is forty times as high as the hill.
        ax.set_yscale("symlog", linthresh=2.0)
        ax.set(title=title, xlabel="z", ylim=(0.0, 60.0))
        ax.legend(fontsize="small", loc="upper left")
    axes[0].set_ylabel("density (linear up to 2)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    shown = [row | {"ok": within(row)} for row in rows if not row["error"]]
    return "\n\n".join(
        [
            "## Direction of the KL",
            "The best single Gaussian for 2/3 N(0, sd 1/4) + 1/3 N(1/2, sd 1/100), by fit; errors "
            "against the minimum of a trapezoid sum.",
            markdown(COLUMNS, shown),
            *failures(rows, lambda r: f"{r['optimum']}"),
        ]
    )


def within(row: dict[str, Any]) -> bool:
    """Whether a fit is as near to the quadrature's optimum as it must."""
    return max(row["loc_error"], row["scale_error"]) <= WITHIN


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=300.0)
    words.add_argument("--seed", type=int, default=0)
    asked = words.parse_args(argv)
    common = {"particles": PARTICLES[asked.quick], "seed": asked.seed}
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.kl_direction:one",
        [{"optimum": optimum, **common} for optimum in OPTIMA],
        lambda row: "within 1e-3" if within(row) else "not within 1e-3",
        cap=asked.cap or 300.0,
    )
    picture = asked.out / f"{NAME}.png"
    if plot(rows, picture):
        options.say(f"written: {picture}")
    options.publish(asked.out, NAME, report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
