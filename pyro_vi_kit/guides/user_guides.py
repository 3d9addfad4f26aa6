"""A Pyro guide of the user's beside the model: the sites it has, lacks, and holds at a point.

Stock Pyro warns at most where the two do not go with each other, and trains on: a latent that the guide
lacks is drawn from its prior, which is no bound on anything, and a value outside of its support has a
density all the same where validation is off. Here the site is named before training.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError, first_line
from pyro_vi_kit.core.runtime import validation
from pyro_vi_kit.model.log_density.supports import innermost
from pyro_vi_kit.model.log_density.visits import kind_of, sample_sites

PyroGuide = Callable[..., Any]
Sites = Mapping[str, Any]

# Runs by which a value that does not change is told from one that is drawn.
_RUNS = 4
# Draws of each site that are held against the model's support.
_DRAWS = 64


@dataclass(frozen=True)
class GuideSites:
    """What a guide does about the model's latents.

    Attributes:
        points: Latents that it holds at one value.
        held: Discrete latents that it has a site for.
        summed: Discrete latents that it leaves to be summed out of the model.
        enumerated: Its own sites that it wants to be enumerated.
        latents: How many latents the model has.
        nesting: Batch dims that plates take in guide and model.
    """

    points: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    latents: int = 0
    nesting: int = 0


class Marked(Messenger):
    """Marks discrete sites of a model to be enumerated, as `pyro.infer.config_enumerate` does.

    Args:
        sites: Which; others keep what the user says of them.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        super().__init__()
        self._sites = frozenset(sites)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._sites:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


def look_over(
    model: Callable[..., Any],
    guide: PyroGuide,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str,
) -> GuideSites:
    """Run guide and model, and compare their sites.

    Draws from torch's random state, and declares parameters in Pyro's store: call it where both are the
    fit's own.

    Args:
        model: The user's model.
        guide: The user's guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        name: What the guide is called.

    Raises:
        OptionError: If the guide raises, has a site too many, lacks one, or has one of another shape or
            support; or if a name stands for one parameter in the guide and for another in the model.
        ModelError: If the model raises on what the guide draws.
    """
    with torch.no_grad(), validation(True):
        drawn = _run_guide(guide, args, kwargs, name)
        met, error = _run_model(model, drawn, args, kwargs)
    own = _drawn(drawn)
    latents = _latents(met)
    _require_matching(own, latents, met, error, name)
    _require_shared(drawn, met, name)
    fixed = [site for site, node in own.items() if _is_delta(node["fn"])]
    if fixed:
        with torch.no_grad():
            fixed = _unchanging(guide, args, kwargs, drawn, fixed)
    discrete = [site for site, node in latents.items() if kind_of(node) == "discrete"]
    marked = [n for n, s in sample_sites(drawn).items() if s["infer"].get("enumerate")]
    return GuideSites(
        points=tuple(fixed),
        held=tuple(site for site in discrete if site in own),
        summed=tuple(site for site in discrete if site not in own),
        enumerated=tuple(marked),
        latents=len(latents),
        nesting=max(map(_nesting, (drawn, met))),
    )


def _require_matching(
    own: Sites, latents: Sites, met: poutine.Trace, error: Exception | None, name: str
) -> None:
    """Refuse a guide whose sites are not those of the model, and a model that raised on them."""
    # A site that does not fit is often why the model raises, behind it.
    for site in own:
        if site in latents:
            _require_alike(own[site], latents[site], name)
    if error is not None:
        raise ModelError(
            f"the model raised {type(error).__name__} on what the guide draws: {first_line(error)}"
        ) from error
    _require_known(own, sample_sites(met), name)
    _require_all(own, latents, name)


def _run_guide(
    guide: PyroGuide, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> poutine.Trace:
    try:
        return poutine.trace(guide).get_trace(*args, **kwargs)
    except ViError:
        raise
    except Exception as error:
        raise OptionError(
            f"the guide {name!r} raised {type(error).__name__}: {first_line(error)}. It is called on "
            "the model's own arguments"
        ) from error


def _run_model(
    model: Callable[..., Any],
    drawn: poutine.Trace,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[poutine.Trace, Exception | None]:
    """The model's sites on what the guide drew, and what ended the run before its end."""
    tracer = poutine.trace()
    try:
        with tracer, poutine.replay(trace=drawn):
            model(*args, **kwargs)
    except ViError:
        raise
    except Exception as error:  # noqa: BLE001  the caller tells it, once it has looked at the sites
        return tracer.trace, error
    return tracer.trace, None


def _latents(model: poutine.Trace) -> dict[str, Any]:
    """The latents of a model, computed ones and its own auxiliary ones left out."""
    return {
        name: node
        for name, node in sample_sites(model).items()
        if kind_of(node) in ("latent", "discrete") and not node["infer"].get("is_auxiliary")
    }


def _require_shared(drawn: poutine.Trace, met: poutine.Trace, name: str) -> None:
    """Refuse two parameters of modules under one name.

    Pyro's store keeps the one that it meets first and trains that; the other module goes on with its
    own, which no step moves.
    """
    for parameter in sorted({*drawn.param_nodes} & {*met.param_nodes}):
        given = [trace.nodes[parameter].get("args", ())[1:2] for trace in (drawn, met)]
        first, second = (args[0] if args else None for args in given)
        if (
            isinstance(first, nn.Parameter)
            and isinstance(second, nn.Parameter)
            and first is not second
        ):
            raise OptionError(
                f"the guide {name!r} and the model each have a parameter {parameter!r} of their own "
                f"({tuple(first.shape)} and {tuple(second.shape)}). Pyro's store holds one of a name, "
                "so that the other is never trained: give the module another name in one of them"
            )


def _drawn(guide: poutine.Trace) -> dict[str, Any]:
    """The sites of a guide that stand for latents: in a guide a Delta is as good as any."""
    return {
        name: node
        for name, node in sample_sites(guide).items()
        if not node["is_observed"]
        and not node["infer"].get("_deterministic")
        and not node["infer"].get("is_auxiliary")
    }


def _nesting(trace: poutine.Trace) -> int:
    """Batch dims that the plates of a trace take."""
    frames = [f for node in sample_sites(trace).values() for f in node["cond_indep_stack"]]
    return max((-f.dim for f in frames if f.vectorized), default=0)


def _is_delta(fn: Any) -> bool:
    """Whether a distribution is a Delta, or a Delta that was transformed."""
    base = innermost(fn)
    while isinstance(base, dist.TransformedDistribution):
        base = innermost(base.base_dist)
    return isinstance(base, dist.Delta)


def _require_known(own: Sites, met: Sites, name: str) -> None:
    """Refuse a site of the guide that the model does not draw."""
    for site in own:
        if site not in met:
            latents = [n for n, node in met.items() if not node["is_observed"]]
            near = difflib.get_close_matches(site, latents, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"the guide {name!r} has site {site!r}, which the model has not.{hint} Give it the name "
                "of the latent it stands for, leave it out, or say that it is the guide's own, "
                "infer={'is_auxiliary': True}"
            )
        if met[site]["is_observed"]:
            raise OptionError(
                f"the guide {name!r} has site {site!r}, which is observed in the model: leave it out of "
                "the guide"
            )


def _require_all(own: Sites, latents: Sites, name: str) -> None:
    """Refuse a guide that lacks a latent which cannot be summed out."""
    for site, node in latents.items():
        if site in own:
            continue
        if kind_of(node) != "discrete":
            raise OptionError(
                f"the guide {name!r} lacks the latent {site!r}, which would be drawn from its prior and "
                f"never learn from the data: give the guide a pyro.sample({site!r}, ...)"
            )
        if not node["fn"].has_enumerate_support:
            raise OptionError(
                f"the guide {name!r} lacks the discrete latent {site!r}, and {_kind(node)} has no "
                f"finite list of values to sum it out by: give the guide a pyro.sample({site!r}, ...), "
                "or truncate it to a dist.Categorical"
            )


def _require_alike(ours: Any, theirs: Any, name: str) -> None:
    """Refuse a site whose draws the model cannot have."""
    site, value = theirs["name"], ours["value"]
    wanted = _without_ones(theirs["fn"].shape())
    if _without_ones(value.shape) != wanted:
        raise OptionError(
            f"the guide {name!r} draws site {site!r} of shape {tuple(value.shape)}; in the model it has "
            f"shape {tuple(theirs['fn'].shape())}: put it in the same plates, with the same event dims"
        )
    discrete = [bool(getattr(_support(node), "is_discrete", False)) for node in (ours, theirs)]
    if discrete == [True, False] and not _is_delta(ours["fn"]):
        raise OptionError(
            f"the guide {name!r} draws site {site!r} from {_kind(ours)}, which is discrete; in the "
            f"model it is {_kind(theirs)}: use a continuous distribution"
        )
    outside = _outside(ours, theirs)
    if outside is not None:
        raise OptionError(
            f"the guide {name!r} draws site {site!r} from {_kind(ours)} and so outside of its support "
            f"in the model ({_kind(theirs)}: {_support(theirs)}), as {outside:.4g}: use a distribution "
            "with that support, such as dist.LogNormal for positive numbers, or transform one, "
            "dist.TransformedDistribution(dist.Normal(loc, scale), dist.transforms...)"
        )


def _outside(ours: Any, theirs: Any) -> float | None:
    """A draw of the guide's that the model's support has not, or None."""
    support, fn = _support(theirs), ours["fn"]
    if support is None:
        return None
    draws = ours["value"].unsqueeze(0)
    if not _is_delta(fn):
        # What cannot draw many at once is held to the one draw.
        with torch.no_grad(), contextlib.suppress(Exception):
            draws = torch.cat([draws, fn.sample((_DRAWS,)).reshape(-1, *draws.shape[1:])])
    try:
        inside = support.check(draws)
    except Exception:  # noqa: BLE001  a support that depends on rows, or a check that has no such dims
        return None
    if bool(inside.all()):
        return None
    flat = draws[~inside].flatten() if inside.shape == draws.shape else draws.flatten()
    return float(flat[0])


def _unchanging(
    guide: PyroGuide,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    first: poutine.Trace,
    sites: Sequence[str],
) -> list[str]:
    """Those of these sites that have the same value in every run on the same rows."""
    rows = poutine.Trace()
    nodes: dict[str, Any] = dict(first.nodes)
    for name, node in nodes.items():
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample):
            rows.add_node(name, **{k: v for k, v in node.items() if k != "name"})
    kept = list(sites)
    for _ in range(_RUNS - 1):
        again = poutine.trace(poutine.replay(guide, trace=rows)).get_trace(*args, **kwargs)
        kept = [n for n in kept if n in again.nodes and _same(first.nodes[n], again.nodes[n])]
    return kept


def _same(one: Any, other: Any) -> bool:
    a, b = one["value"], other["value"]
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _support(node: Any) -> Any:
    try:
        return node["fn"].support
    except (NotImplementedError, AttributeError):
        return None


def _kind(node: Any) -> str:
    """The distribution of a site by its class, as a user wrote it."""
    fn = node["fn"]
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _without_ones(shape: Sequence[int] | torch.Size) -> tuple[int, ...]:
    """A shape without the ones that broadcasting puts in front."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def named(sites: Sequence[str]) -> str:
    """Sites in words."""
    return ", ".join(map(repr, sites))


def stacked(traces: Sequence[poutine.Trace], sites: Sequence[str]) -> dict[str, Tensor]:
    """The values of these sites, `{site: [S, ...]}`."""
    nodes: list[dict[str, Any]] = [dict(trace.nodes) for trace in traces]
    return {site: torch.stack([node[site]["value"].detach() for node in nodes]) for site in sites}
