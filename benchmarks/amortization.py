"""What an encoder loses against the closed form, and what refinement gives back.

    python -m benchmarks.amortization [--families full_rank,mixture]

Factor analysis, x_i ~ N(W z_i + mu, diag(psi)) with 2 factors of 6 variables, whose posterior and
evidence are known for each datum. For each local family and two encoders, the default one and one of a
single hidden unit: the fit on minibatches, what its ELBO lacks of the evidence, how `amortization_gap`
splits that, the importance-weighted bound of 100 draws, and the seconds of each call. All gaps are means
over rows, in nats a datum.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "amortization"
FAMILIES = ("mean_field", "full_rank", "mixture", "affine_coupling")
ENCODERS = {"default": 64, "narrow": 1}
QUICK = ("mean_field", "full_rank")
COLUMNS = {
    "family": "local",
    "encoder": "encoder",
    "fit_s": "fit (s)",
    "steps": "steps",
    "gap": "evidence - ELBO",
    "amortization": "amortization gap",
    "approximation": "approximation gap",
    "gap_s": "gaps in (s)",
    "refined_gap": "evidence - ELBO, refined",
    "refine_s": "refined in (s)",
    "iwae_gap": "evidence - IWAE-100",
    "per_datum_s": "per datum (s)",
    "worst": "worst z",
}


def one(family: str, hidden: int, rows: int, draws: int) -> dict[str, Any]:
    """One family and encoder, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, evidence = _model(rows)
    spec = vi.guides.Amortized(local=family, hidden=(hidden,))
    fit_s, fitted = _timed(lambda: vi.fit(model, spec, batch_size=min(100, rows), seed=0))
    gap_s, gaps = _timed(lambda: fitted.amortization_gap(draws=draws))
    refine_s, refined = _timed(lambda: fitted.refine(seed=0))
    per_datum_s, frame = _timed(lambda: fitted.per_datum(draws=draws))
    bounds = fitted.per_datum(draws=100, seed=1)["log_evidence"]
    finite = frame["khat"] < 0.5
    errors = (frame["log_evidence"] - evidence).abs() / frame["log_evidence_se"]
    return {
        "fit_s": fit_s,
        "steps": len(fitted.losses),
        "gap": float((evidence - gaps["elbo"]).mean()),
        "amortization": gaps.attrs["amortization"],
        "approximation": gaps.attrs["approximation"],
        "gap_s": gap_s,
        "refined_gap": float(evidence.mean() - (refined.elbo or 0.0) / rows),
        "refine_s": refine_s,
        "iwae_gap": float((evidence - bounds).mean()),
        "per_datum_s": per_datum_s,
        "worst": float(errors[finite].max()),
    }


def _model(rows: int) -> tuple[Any, Any]:
    """Factor analysis of so many rows, and log p(x_i) of each."""
    import pyro
    import pyro.distributions as dist
    import torch

    import pyro_vi_kit as vi

    generator = torch.Generator().manual_seed(0)
    W, mu = torch.randn(6, 2, generator=generator), torch.randn(6, generator=generator)
    psi = 0.3 + torch.rand(6, generator=generator)
    noise = psi.sqrt() * torch.randn(rows, 6, generator=generator)
    x = torch.randn(rows, 2, generator=generator) @ W.T + mu + noise

    def factors(x: torch.Tensor) -> None:
        with pyro.plate("row", len(x)) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + mu, psi.sqrt()).to_event(1), obs=x[index])

    evidence = dist.MultivariateNormal(mu, W @ W.T + psi.diag()).log_prob(x)
    return vi.Model(factors, x), evidence.numpy()


def _timed(function: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


def report(rows: Sequence[dict[str, Any]], data: int, draws: int) -> str:
    """All of it as Markdown."""
    return "\n\n".join(
        [
            "## Amortization",
            f"Factor analysis of {data:,} rows, minibatches of {min(100, data)}, float64, one thread; "
            f"gaps in nats a datum, {draws:,} draws of each. *Narrow* is an encoder of one hidden unit. "
            "*Worst z* is the largest error of a row's log evidence, in its standard errors, among rows "
            "with k-hat below 0.5.",
            markdown(COLUMNS, [row for row in rows if not row["error"]]),
            *failures(rows, lambda r: f"{r['family']}, {r['encoder']}"),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=600.0)
    words.add_argument("--families", type=options.listed, default=None, help=", ".join(FAMILIES))
    words.add_argument("--rows", type=int, default=None, help="of data (2,000)")
    asked = words.parse_args(argv)
    default = list(QUICK if asked.quick else FAMILIES)
    names = options.chosen(asked.families, FAMILIES, "family") if asked.families else default
    data, draws = asked.rows or (300 if asked.quick else 2000), 300 if asked.quick else 1000
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for family in names:
        for encoder, hidden in ENCODERS.items():
            key = {"family": family, "encoder": encoder, "rows": data, "draws": draws}
            arguments = {"family": family, "hidden": hidden, "rows": data, "draws": draws}
            target = f"benchmarks.{NAME}:one"
            row = records.measure(key, target, arguments, cap=asked.cap or 600.0)
            rows.append(row)
            options.say(f"{family}, {encoder}: {row['error'] or 'done'}")
    options.publish(asked.out, NAME, report(rows, data, draws))
    return 0


if __name__ == "__main__":
    sys.exit(main())
