"""A Pyro model as a batched, differentiable log density over unconstrained space."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vi_kit.density.batching import Batching, batched, promote
from pyro_vi_kit.density.handlers import Replay, Visit, subsample_indices, swapped_parameters
from pyro_vi_kit.density.layout import Block, global_block
from pyro_vi_kit.density.structure import Site, Structure, discover
from pyro_vi_kit.errors import ModelError, ViError
from pyro_vi_kit.model import Model
from pyro_vi_kit.runtime import RandomStream, isolated, private_params

Values = dict[str, Tensor]


class Terms(NamedTuple):
    """The log joint by part, in nats.

    Attributes:
        shared: What lies outside data plates, `[K]`.
        local: For each data plate, one number per row of the minibatch, `[K, B]`, *without* the
            factor N / B: multi-sample bounds take their logsumexp first and scale afterwards.
        scale: N / B of each data plate.
    """

    shared: Tensor
    local: dict[str, Tensor]
    scale: dict[str, float]

    def total(self) -> Tensor:
        """The log joint `[K]`, an unbiased estimate of it where a plate is subsampled."""
        total = self.shared
        for plate, rows in self.local.items():
            total = total + self.scale[plate] * rows.sum(-1)
        return total


class Density:
    """The unconstrained log density of a model, `log_prob(z): [K, D] -> [K]`.

    Data, learned parameters and minibatch indices are inputs of every call; what the model object
    holds is only their default.

    Args:
        model: The model and its data.
        dtype: Precision of everything: arguments, learned parameters and literals are cast to it.

    Attributes:
        structure: Sites, plates and parameters, as two runs of the model met them.
        latents: The continuous latent sites, in the model's order.
        block: Their layout in a flat vector.
        dim: D, the length of that vector.
        data: The tensors among the model's arguments, cast.
        params: Unconstrained learned parameters by name, copies of the user's.
        observed: Values of the observed sites.
        batching: How K points are evaluated: see `batching.batched`.

    Raises:
        ModelError: If the model raises, has no continuous latent, has discrete latents, changes its
            structure, holds NaN in its data, or draws random numbers outside its sample sites.
    """

    def __init__(self, model: Model, *, dtype: torch.dtype = torch.float64) -> None:
        self.model = model
        self.dtype = dtype
        leaves, self._spec = tree_flatten((model.args, dict(model.kwargs)))
        self._leaves = leaves
        self.data = [self._cast(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        self._promote = False
        self.params: Values = {}
        self._owners: dict[tuple[Any, str], str] = {}
        self.structure, self.observed = self._discover()
        self.params = {
            name: self._cast(p.value).requires_grad_(p.value.is_floating_point())
            for name, p in self.structure.parameters.items()
        }
        self._owners = {
            (p.owner, p.attribute): name
            for name, p in self.structure.parameters.items()
            if p.owner is not None
        }
        self.latents: list[Site] = self.structure.of_kind("latent")
        self._require_usable()
        self.block: Block = global_block(self.latents)
        self.dim = self.block.dim
        self.batching: Batching = self._choose_batching()

    # -- evaluation ---------------------------------------------------------------------------

    def terms(
        self,
        z: Mapping[str, Tensor],
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        jacobian: bool = True,
    ) -> Terms:
        """The log joint at K points, by part.

        Args:
            z: Unconstrained values `[K, *batch, *event]` by site; on a minibatch, the plate's batch
                dim has the minibatch's length.
            params: Unconstrained learned parameters; `self.params` by default.
            data: Tensors in the place of `self.data`, in the same order.
            index: Minibatch indices `[B]` by plate.
            jacobian: Whether the density is that of z (with the log determinant of the constraining
                transforms) or that of the constrained values.
        """
        scale = {
            name: plate.size / len(index[name]) if index and name in index else 1.0
            for name, plate in self.structure.plates.items()
        }

        def single(point: Values) -> tuple[Tensor, dict[str, Tensor]]:
            replay = Replay(unconstrained=point)
            self._run(replay, params, data, index)
            return _add_up(replay.visits, jacobian, self.dtype)

        shared, local = self._batched(single, z)
        return Terms(shared, local, scale)

    def log_prob(
        self,
        z: Tensor,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        *,
        jacobian: bool = True,
    ) -> Tensor:
        """Log density `[K]` in nats at K flat points `[K, D]`, differentiable in z and params."""
        return self.terms(self.block.unpack(z), params, data, jacobian=jacobian).total()

    def log_prob_and_grad(self, z: Tensor, *, jacobian: bool = True) -> tuple[Tensor, Tensor]:
        """Log density `[K]` and its gradient `[K, D]`, detached."""
        z = z.detach().requires_grad_()
        log_prob = self.log_prob(z, jacobian=jacobian)
        (grad,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), grad

    @torch.no_grad()
    def constrain(
        self,
        z: Tensor | Mapping[str, Tensor],
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
    ) -> Values:
        """Latent and deterministic values `{site: [K, *batch, *event]}` at K unconstrained points."""

        def single(point: Values) -> Values:
            replay = Replay(unconstrained=point)
            self._run(replay, params, data)
            return {
                name: visit.value.to(self.dtype)
                for name, visit in replay.visits.items()
                if visit.kind in ("latent", "deterministic")
            }

        return self._batched(single, self._by_site(z))

    @torch.no_grad()
    def log_likelihood(
        self, z: Tensor | Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> Values:
        """Log density of each observation, `{site: [K, *batch]}`, nats."""

        def single(point: Values) -> Values:
            replay = Replay(unconstrained=point)
            self._run(replay, params)
            return {v.name: v.log_prob() for v in replay.visits.values() if v.kind == "observed"}

        return self._batched(single, self._by_site(z))

    @torch.no_grad()
    def simulate(
        self,
        z: Tensor | Mapping[str, Tensor] | None,
        model: Model | None = None,
        params: Mapping[str, Tensor] | None = None,
        *,
        draws: int | None = None,
    ) -> Values:
        """Observed sites drawn anew: predictive draws at z, or from the prior where z is None.

        Uses torch's global random state; enter a `runtime.RandomStream` around it.

        Args:
            z: K unconstrained points, or None for draws of the latents from their prior.
            model: The same model on other arguments; its own by default.
            params: Unconstrained learned parameters.
            draws: How many draws, where z is None.

        Returns:
            `{site: [K, *shape]}` of the latent, observed and deterministic sites.

        Raises:
            ModelError: If a prior cannot be sampled, or the model refuses the new arguments.
        """
        points = {"": torch.zeros(draws or 1)} if z is None else dict(self._by_site(z))

        def single(point: Values) -> Values:
            replay = Replay(unconstrained=point, simulate=True, sample_latents=True)
            self._run(replay, params, model=model)
            return {v.name: v.value for v in replay.visits.values() if v.kind != "factor"}

        try:
            with isolated(self.dtype):
                return batched(single, points, self.batching)
        except Exception:  # vmap has no batching rule for some samplers; a loop needs none
            try:
                with isolated(self.dtype):
                    return batched(single, points, "loop")
            except NotImplementedError as error:
                raise ModelError(f"a site cannot be sampled: {error}") from error

    @torch.no_grad()
    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """The flat point `[D]` of these constrained values; sites left out start at the origin.

        Raises:
            ModelError: If a name is no latent site, or a value is outside its support or shape.
        """
        names = [site.name for site in self.latents]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ModelError(f"no latent site named {unknown[0]!r}; latents: {', '.join(names)}")
        given = {
            name: torch.as_tensor(value, dtype=self.dtype).reshape(
                self.structure.sites[name].batch_shape + self.structure.sites[name].event_shape
            )
            for name, value in values.items()
        }
        replay = Replay(constrained=given)
        with isolated(self.dtype):
            self._run(replay)
        points = {n: replay.visits[n].unconstrained for n in names}
        for name, point in points.items():
            if point is None or not point.isfinite().all():
                raise ModelError(f"the value given for site {name!r} is not inside its support")
        return self.block.pack({n: p.unsqueeze(0) for n, p in points.items()})[0]  # type: ignore[union-attr]

    def observations(self, data: Model | None = None) -> Values:
        """Values of the observed sites, of the model's own data or of the same model on other."""
        if data is None:
            return self.observed
        replay = Replay()
        with isolated(self.dtype), torch.no_grad():
            self._run(replay, model=data)
        return {v.name: v.value for v in replay.visits.values() if v.kind == "observed"}

    def transform(
        self, z: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Constrained value and log determinant of each latent at one unconstrained point.

        Runs the model on these arguments under whatever handlers are active, for a Pyro guide whose
        supports depend on other latents.
        """
        replay = Replay(unconstrained=z)
        self._run(replay, model=self.model.with_args(*args, **kwargs))
        return {
            site.name: (replay.visits[site.name].value, replay.visits[site.name].log_det)  # type: ignore[misc]
            for site in self.latents
        }

    def learned(self, params: Mapping[str, Tensor] | None = None) -> contextlib.AbstractContextManager[None]:
        """A context in which the user's modules hold these parameters instead of their own."""
        values = self.params if params is None else params
        return swapped_parameters({key: values[name] for key, name in self._owners.items()})

    # -- how the model is run -----------------------------------------------------------------

    def arguments(
        self, data: Sequence[Tensor] | None = None, model: Model | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments the model is called with."""
        if model is not None:
            leaves, spec = tree_flatten((model.args, dict(model.kwargs)))
            return tree_unflatten([self._cast(leaf) for leaf in leaves], spec)
        tensors = iter(self.data if data is None else data)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)

    def _run(
        self,
        replay: Replay,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        model: Model | None = None,
    ) -> None:
        args, kwargs = self.arguments(data, model)
        params = self.params if params is None else params
        replay.params = params
        with self._handlers(params, index), replay:
            self.model.fn(*args, **kwargs)

    @contextlib.contextmanager
    def _handlers(
        self, params: Mapping[str, Tensor], index: Mapping[str, Tensor] | None
    ) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(subsample_indices(index or {}))
            if self._owners:
                stack.enter_context(self.learned(params))
                # Otherwise a PyroModule writes its parameters into the user's store by itself.
                stack.enter_context(pyro.settings.context(module_local_params=True))
            if self._promote:
                stack.enter_context(promote(self.dtype))
            yield

    def _batched(self, single: Callable[[Values], Any], z: Mapping[str, Tensor]) -> Any:
        size = next(iter(z.values())).shape[0]
        with isolated(self.dtype):
            # One point needs no vmap, and is what NUTS and mode searches ask for.
            return batched(single, z, "loop" if size == 1 else self.batching)

    def _by_site(self, z: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.block.unpack(z) if isinstance(z, Tensor) else z

    def _cast(self, leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().to(self.dtype) if floating else leaf

    # -- first runs ---------------------------------------------------------------------------

    def _discover(self) -> tuple[Structure, Values]:
        """Structure and observed values, from first runs with validation on."""
        state = pyro.get_param_store().get_state()
        with RandomStream(0), isolated(self.dtype, validate=True), private_params(state):
            before = torch.get_rng_state()
            structure, visits = self._first_runs()
            if not structure.of_kind("discrete") and not structure.parameters:
                self._require_same_state(before)
        return structure, {
            v.name: v.value.detach() for v in visits.values() if v.kind == "observed"
        }

    def _first_runs(self) -> tuple[Structure, dict[str, Visit]]:
        run = functools.partial(self._first_run, self._run)
        try:
            return discover(run)
        except ModelError as error:
            mixed_dtypes = "dtype" in str(error) or "Double" in str(error)
            if self._promote or not mixed_dtypes:
                raise
            # Data that the model closes over keep their own precision.
            self._promote = True
            return discover(run)

    @staticmethod
    def _first_run(run: Callable[[Replay], None], replay: Replay) -> None:
        try:
            with pyro.settings.context(module_local_params=True):
                run(replay)
        except ViError:
            raise
        except Exception as error:
            raise ModelError(f"the model raised {type(error).__name__}: {error}") from error

    @staticmethod
    def _require_same_state(before: Tensor) -> None:
        if not torch.equal(before, torch.get_rng_state()):
            raise ModelError(
                "the model draws random numbers outside its sample sites (torch.randn, dropout in "
                "training mode, ...): make each a pyro.sample site, or call module.eval() first"
            )

    def _require_usable(self) -> None:
        discrete = [site.name for site in self.structure.of_kind("discrete")]
        if discrete:
            raise ModelError(
                f"discrete latent site(s) {', '.join(discrete)}: a continuous guide cannot hold them. "
                "Sum them out in the model (dist.MixtureSameFamily, dist.DiscreteHMM, or a "
                "pyro.factor with logsumexp), or pass a Pyro guide of your own as guide=."
            )
        if not self.latents:
            raise ModelError(
                "the model has no latent sites: every pyro.sample is observed or there is none, so "
                "there is nothing to infer"
            )
        for name, value in self.observed.items():
            if value.is_floating_point() and value.isnan().any():
                raise ModelError(
                    f"the data at site {name!r} hold {int(value.isnan().sum())} NaN: drop the rows, "
                    "or fill the values and hide them with poutine.mask"
                )

    def _choose_batching(self) -> Batching:
        """The first way to batch that agrees with the loop, in value and gradient, at three points."""
        with RandomStream(1), isolated(self.dtype):
            # Three is no likely size of a model's dimension by chance; four, ten or sixteen would be.
            z = 0.3 * torch.randn(3, self.dim)
        self.batching = "loop"
        value, grad = self._probe(z)
        exact = dict(rtol=1e-7, atol=1e-7) if self.dtype == torch.float64 else dict(rtol=1e-3, atol=1e-3)
        for mode in ("vmap", "lift"):
            self.batching = mode
            try:
                close = [
                    torch.allclose(a, b, equal_nan=True, **exact)
                    for a, b in zip(self._probe(z), (value, grad), strict=True)
                ]
            except Exception:  # whatever vmap cannot do, the loop can
                continue
            if all(close):
                return mode
        return "loop"

    def _probe(self, z: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.log_prob_and_grad(z)
        except RuntimeError as error:
            if self.batching == "loop":
                raise ModelError(
                    f"the log density cannot be evaluated or differentiated: {error}"
                ) from error
            raise


def _add_up(
    visits: Mapping[str, Visit], jacobian: bool, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log densities and log determinants of one run, by data plate."""
    shared = torch.zeros((), dtype=dtype)
    local: dict[str, Tensor] = {}
    for visit in visits.values():
        if visit.kind == "deterministic":
            continue
        log_prob = visit.log_prob()
        scales = [(frame.full_size or frame.size) / frame.size for frame in visit.frames]
        if jacobian and visit.log_det is not None:
            log_det = visit.log_det
            for scale in scales:
                # A guide is subsampled with the model, so its Jacobian is scaled with the plates;
                # `poutine.scale` and `poutine.mask` speak of the model alone.
                log_det = log_det * scale
            log_prob = log_prob + log_det
        if not visit.frames:
            shared = shared + log_prob.sum()
            continue
        frame = visit.frames[0]
        rows = _rows(log_prob, int(frame.dim), frame.size) / scales[0]  # type: ignore[arg-type]
        local[frame.name] = local[frame.name] + rows if frame.name in local else rows
    return shared, local


def _rows(log_prob: Tensor, dim: int, size: int) -> Tensor:
    """Sum over all dims but the plate's: `[B]`."""
    shape = torch.broadcast_shapes(log_prob.shape, (size,) + (1,) * (-dim - 1))
    log_prob = log_prob.expand(shape)
    others = [d for d in range(log_prob.dim()) if d != log_prob.dim() + dim]
    return log_prob.sum(others) if others else log_prob
