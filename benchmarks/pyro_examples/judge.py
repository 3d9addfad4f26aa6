"""What becomes of a model in the kit: examined, compared with Pyro's own trace, fitted, sampled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import infer, poutine

import pyro_vi_kit as vi
from benchmarks.pyro_examples.hooks import Found
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import subsample_indices

BUDGET = 2.0  # seconds of a fit: whether it runs is asked here, not how good it gets
_LARGEST_FOR_NUTS = 2_000  # dimensions
_POINTS = 3
_FEW = 16  # draws that tell whether an ELBO is finite

Outcome = tuple[str, str]


def ways(found: Found, known: bool) -> Iterator[tuple[str, Callable[[vi.Model], Outcome]]]:
    """Everything to be tried with a model, by name.

    Args:
        found: The model.
        known: Whether it was met before, with another guide.
    """
    if not known:
        yield "check", _check
        yield "density", _density
        yield "mean_field", lambda model: _fit(model, "mean_field")
        yield "full_rank", lambda model: _fit(model, "full_rank", in_full=False)
        yield "batches", _batches
        yield "nuts", _nuts
    if found.guide is not None:
        yield "own guide", lambda model: _fit(model, found.guide)


def attempt(way: Callable[[vi.Model], Outcome], found: Found) -> Outcome:
    """``works``, ``refused``, ``wrong``, ``crash`` or ``not asked``, with the details."""
    try:
        outcome = way(vi.Model(found.model, *found.args, kwargs=found.kwargs))
    except vi.ViError as error:
        outcome = "refused", str(error)
    except Exception as error:  # noqa: BLE001  whatever is raised is the finding
        outcome = "crash", f"{type(error).__name__}: {error} [{_innermost_line(error)}]"
    theirs = None if outcome[0] in ("works", "not asked") else _raised_by_pyro(found)
    return ("not asked", f"Pyro raises {theirs}") if theirs else outcome


def _raised_by_pyro(found: Found) -> str | None:
    """What the model raises in Pyro itself by now, after the example's own first step."""
    try:
        with torch.no_grad():
            poutine.trace(found.model).get_trace(*found.args, **found.kwargs).compute_log_prob()
    except Exception as error:  # noqa: BLE001  of the example
        return f"{type(error).__name__}: {error}"
    return None


def _innermost_line(error: BaseException) -> str:
    """Where in the package it was raised."""
    line, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "pyro_vi_kit" in code.co_filename:
            line = f"{code.co_filename.rpartition('pyro_vi_kit/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _check(model: vi.Model) -> Outcome:
    report = vi.check(model, verbose=False)
    told = [f"{c.name}: {c.message}" for c in report.checks if c.outcome == "fail"]
    return ("works", "") if report.ok else ("refused", "; ".join(told))


def _fit(model: vi.Model, guide: Any, *, in_full: bool = True, **options: Any) -> Outcome:
    """Fitted and drawn from; ``in_full`` with verdict, table and export, which take the most time."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted = vi.fit(model, guide, budget=BUDGET, seed=0, progress=False, **options)
        words = [fitted.status.reason]
        fitted.sample(5, seed=0)
        if not in_full:
            last = fitted.approximation.weigh(_FEW, 0)
            log_w = (last.log_p - last.log_q).mean()
            return ("works" if log_w.isfinite() else "wrong"), f"{words[0]}, elbo {log_w:.6g}"
        if fitted.elbo is not None:
            words.append(f"elbo {fitted.elbo:.6g}")
            if not math.isfinite(fitted.elbo):
                return "wrong", ", ".join(words)
        if fitted.verdict is not None:
            words.append(str(fitted.verdict.level))
        fitted.summary()
        fitted.to_arviz()
    words += dict.fromkeys(str(w.message)[:200] for w in told if w.category is not UserWarning)
    return "works", ", ".join(words)


def _batches(model: vi.Model) -> Outcome:
    """Minibatches of the first plate that declares a subsample, as the model itself takes them."""
    structure = Density(model).structure
    for name in structure.subsampled:
        if structure.plates[name].size >= 8:
            rows = structure.subsampled.get(name, structure.plates[name].size // 4)
            return _fit(model, "mean_field", in_full=False, batch_size={name: rows})
    return "not asked", "no plate that declares a subsample"


def _nuts(model: vi.Model) -> Outcome:
    density = Density(model)
    if density.dim > _LARGEST_FOR_NUTS:
        return "not asked", f"{density.dim} dimensions"
    vi.nuts(model, chains=2, draws=10, tune=10, seed=0, progress=False)
    return "works", ""


# -- the density beside Pyro's ----------------------------------------------------------------------


def _density(model: vi.Model) -> Outcome:
    """In float64; and where that is not what Pyro has in the example's own precision, in that one."""
    outcome = _compared(model, torch.float64)
    own = torch.get_default_dtype()
    if outcome[0] == "wrong" and own != torch.float64 and _compared(model, own)[0] == "works":
        return "works", f"in {own}; in float64 {outcome[1]}, by its rounding"
    return outcome


def _compared(model: vi.Model, dtype: torch.dtype) -> Outcome:
    density = Density(model, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    z = 0.3 * torch.randn(_POINTS, density.dim, generator=generator, dtype=torch.float64).to(dtype)
    ours = density.log_prob(z, jacobian=False).detach().double()
    values = density.constrain(z)
    latents = [site.name for site in density.latents]
    worst = ""
    for k in range(_POINTS):
        point = {name: values[name][k].to(torch.get_default_dtype()) for name in latents}
        try:
            theirs, size = _plain(model, point, enumerated=bool(density.discrete))
        except Exception as error:  # noqa: BLE001  Pyro's, or of the model's own
            return "not asked", f"Pyro raises {type(error).__name__}: {error}"
        if theirs == ours[k] == -math.inf:
            return "not asked", "no density at three points near the origin, in Pyro either"
        # Pyro's numbers are of float32 in most examples: 24 bits, and sums of many terms.
        if not abs(ours[k] - theirs) <= 1e-5 * size + 1e-3 * max(1.0, abs(theirs) ** 0.5):
            worst = f"{ours[k]:.8g}, and by Pyro's own trace {theirs:.8g}"
    return ("wrong", worst) if worst else ("works", f"{density.dim} dimensions")


def _plain(
    model: vi.Model, point: dict[str, torch.Tensor], enumerated: bool
) -> tuple[float, float]:
    """The log joint at a point as Pyro computes it, and the size of its terms."""
    given = poutine.condition(model.fn, data=point)
    with (
        torch.no_grad(),
        pyro.validation_enabled(False),
        pyro.get_param_store().scope(pyro.get_param_store().get_state()),
        subsample_indices({}),
    ):
        if enumerated:
            loss = infer.TraceEnum_ELBO(strict_enumeration_warning=False)
            summed = poutine.infer_config(given, _in_parallel)  # type: ignore[arg-type]
            total = -float(loss.loss(summed, lambda *_, **__: None, *model.args, **model.kwargs))
            return total, abs(total)
        trace = poutine.trace(given).get_trace(*model.args, **model.kwargs)
        trace.compute_log_prob()
        terms = [n["log_prob"] for n in trace.nodes.values() if "log_prob" in n]
        total = sum(float(term.double().sum()) for term in terms)
        return total, sum(float(term.double().abs().sum()) for term in terms)


def _in_parallel(site: Any) -> dict[str, Any]:
    """All values of a discrete site, also where an example would draw some of them."""
    finite = getattr(site["fn"], "has_enumerate_support", False) and not site["is_observed"]
    return {"enumerate": "parallel", "num_samples": None, "expand": False} if finite else {}
