"""Steps on the Density: K particles in one vectorised pass of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vi_kit.core.checkpoint import cloned
from pyro_vi_kit.core.contracts import LogWeights
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream, isolated, seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.local.streamed import weigh_all
from pyro_vi_kit.model.groups import width_of
from pyro_vi_kit.model.log_density import Density, Plate
from pyro_vi_kit.objectives import Objective, surrogate
from pyro_vi_kit.objectives.base import reduced
from pyro_vi_kit.objectives.stratified import combined
from pyro_vi_kit.optimize.engines import adam, tables
from pyro_vi_kit.optimize.engines.base import Average, Window, torch_optimizer
from pyro_vi_kit.optimize.engines.batches import Batch, BatchSource, StreamedBatches
from pyro_vi_kit.optimize.engines.tables import tables_of

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
Reduce = Callable[[Tensor], Tensor]

_EVALUATION_ROWS = 2048
_REPORTED = 64
_EVALUATION_NUMBERS = 20_000_000


class EagerEngine:
    """Runs the bound on the model's Density, uncaptured.

    What is trained lies in one flat vector, and the parameters of the guide and of the model are views
    of it: an update is a few operations, whatever the number of parameters.

    Args:
        guide: The guide to train; its density's learned parameters are trained with it.
        objective: The bound.
        seed: Of the noise.
        batches: Minibatches of the data plate; the full data when None.
        optimizer: Makes a torch optimiser from parameters; Adam when None.
        estimator: Of the gradient: one of `objectives.ESTIMATORS` but ``auto``.
        clip: Length of the gradient at the most.
        precision: ``bfloat16`` for mixed precision (`torch.autocast`) in the model and the guide; None
            for none. Parameters and updates keep their own.
    """

    def __init__(
        self,
        guide: Guide,
        objective: Objective,
        *,
        seed: int,
        batches: BatchSource | None = None,
        optimizer: OptimizerFactory | None = None,
        estimator: str = "pathwise",
        clip: float | None = None,
        precision: str | None = None,
    ) -> None:
        self.guide = guide
        self.objective = objective
        self.estimator = estimator
        self.clip = clip
        self.precision = precision
        self.params = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in guide.density.params.items()
        }
        self.skipped = 0
        self.batches = batches
        self._stream = RandomStream(seed, "steps")
        self._evaluation_seed = seed_of(seed, "looks")
        self.tables = [] if batches is None else tables_of(guide, batches.plates)
        apart = self._rows_of_tables()
        self.trained = {
            n: p for n, p in self.parameters().items() if p.requires_grad and id(p) not in apart
        }
        self.adam = adam.start(_flattened(self.trained, guide.density))
        self._optimizer = None if optimizer is None else self._made_by(optimizer)
        self._rates = [group.get("lr") for group in self._groups]
        # The noise of a minibatch does not know of draws: times a draw and its mirror image it cancels.
        even = objective.particles % 2 == 0
        self.antithetic = batches is not None and even and not objective.multi_sample
        # A bound per datum holds for given globals, so all its particles share one draw of them.
        self.share = objective.multi_sample and any(b.plate for b in guide.blocks)

    def _made_by(self, factory: OptimizerFactory) -> Optimizer:
        """The optimiser of the user's.

        Raises:
            OptionError: If rows of a table are to be moved by their minibatches.
        """
        if self.tables:
            raise OptionError(
                "optimizer= moves all rows of a plate at each step; with batch_size= and latents in "
                f"plate {self.tables[0].plate!r} leave it out"
            )
        return torch_optimizer(factory)(self.trained.values())

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """What an optimiser of the user's moves, and at which rates."""
        return [] if self._optimizer is None else self._optimizer.param_groups

    def _rows_of_tables(self) -> set[int]:
        """Which parameters are moved row by row."""
        return {id(table.table.rows) for table in self.tables}

    @property
    def name(self) -> str:
        """What the engine is called."""
        return "eager"

    @property
    def particles(self) -> int:
        """K."""
        return self.objective.particles

    def parameters(self) -> dict[str, Tensor]:
        """Guide parameters by their names, the model's under ``model.``."""
        guide = dict(self.guide.named_parameters())
        return guide | {f"model.{name}": value for name, value in self.params.items()}

    def run(self, steps: int, rate: float) -> Window:
        """So many updates at this learning rate."""
        bounds, average, density = [], Average(), self.guide.density
        for _ in range(steps):
            # Batches are read on the CPU, so outside of what makes the device the default one.
            with self._stream:
                batch = self.batches.next() if self.batches else Batch({})
                rows = [table.pick(batch.index) for table in self.tables]
                with isolated(density.dtype, density.device):
                    bound, gradient, *row_gradients = self.gradient(batch, [row.x for row in rows])
            finite = adam.finite(bound, gradient, *row_gradients)
            self._move(gradient, finite, rate)
            for table, row, slope in zip(self.tables, rows, row_gradients, strict=True):
                table.put(batch.index, tables.update(row, slope, finite, rate))
            bounds.append(torch.where(finite, bound, torch.nan))
            average.add({"": self.adam.x})
        return self._told(bounds, average.values[""])

    def _told(self, bounds: list[Tensor], average: Tensor) -> Window:
        """What a run gave: the bound of each step, and the mean of the trained parameters `[P]`."""
        found = torch.stack(bounds).double().cpu()
        self.skipped += int(found.isnan().sum())
        means = split(average, self.trained)
        return Window(found, means | self._unmoved())

    def _unmoved(self) -> dict[str, Tensor]:
        """Parameters that no step moves. Tables are left out: their rows are averages already."""
        known = self.trained.keys()
        apart = self._rows_of_tables()
        return {
            n: p.detach().clone()
            for n, p in self.parameters().items()
            if n not in known and id(p) not in apart
        }

    def gradient(
        self,
        batch: Batch | None,
        rows: Sequence[Tensor] = (),
        updates: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The bound, nats, and the loss's gradients, on the noise that comes next.

        Args:
            batch: What the step sees of the data; all of them when None.
            rows: What the tables hold for its rows, `[B, p]` each.
            updates: Steps taken so far, a scalar; this engine's own when None.

        Returns:
            The bound, the gradient `[P]`, and one `[B, p]` for each table.
        """
        updates = self.adam.updates if updates is None else updates
        batch = (batch or Batch())._replace(params=self.params, updates=updates)
        held = [row.detach().requires_grad_() for row in rows]
        with self._holding(held), self._mixed_precision():
            bound, loss = surrogate(
                self.guide,
                self.objective,
                self.particles,
                batch,
                share=self.share,
                estimator=self.estimator,
                mirrored=self.antithetic,
            )
            wanted = [*self.trained.values(), *held]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        count = len(self.trained)
        parts = [gradient.reshape(-1) for gradient in gradients[:count]]
        flat = torch.cat(parts) if parts else self.adam.x
        flat, *slopes = adam.clipped([flat, *gradients[count:]], self.clip)
        return bound.to(flat.dtype), flat, *slopes

    @contextlib.contextmanager
    def _holding(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """The guide's tables show these rows."""
        for table, row in zip(self.tables, rows, strict=True):
            table.table.held = row
        try:
            yield
        finally:
            for table in self.tables:
                table.table.held = None

    def _mixed_precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        # Without its cache of cast weights a recorded step is the step itself.
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.adam.x.device.type, dtype=dtype, cache_enabled=False)

    @torch.no_grad()
    def _move(self, gradient: Tensor, finite: Tensor, rate: float) -> None:
        """One update, in place."""
        if self._optimizer is None:
            state = adam.update(self.adam, gradient, finite, rate)
            # Parameters are views of x, so x itself has to stay.
            self.adam = state._replace(x=self.adam.x.copy_(state.x))
        elif finite:
            for name, part in split(gradient, self.trained).items():
                self.trained[name].grad = part
            self._optimizer.step()

    def scale_rates(self, factor: float) -> float | None:
        """Bring the rates of a torch optimiser of the user's to this multiple of what they were.

        Returns:
            The first of them now; None where there is none.
        """
        groups = self._groups
        for group, rate in zip(groups, self._rates, strict=True):
            if rate is not None:
                group["lr"] = rate * factor
        return groups[0].get("lr") if groups else None

    # -- stopping and going on ----------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a step depends on, as tensors and plain values of its own."""
        return {
            "name": self.name,
            "adam": cloned(list(self.adam)),
            "tables": [cloned(list(table.state)) for table in self.tables],
            "constants": cloned(self._constants()),
            "stream": self._stream.state(),
            "batches": None if self.batches is None else self.batches.state(),
            "optimizer": None if self._optimizer is None else cloned(self._optimizer.state_dict()),
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, in an engine made with the same options."""
        # Parameters are views of x, so x itself has to stay.
        x = self.adam.x
        moments = [part.to(x.device) for part in cloned(state["adam"][1:])]
        self.adam = adam.AdamState(x.copy_(state["adam"][0]), *moments)
        for name, value in self._constants().items():
            value.copy_(state["constants"][name])
        for table, parts in zip(self.tables, state["tables"], strict=True):
            # The guide shows the averages, so these tensors have to stay.
            for mine, part in zip(table.state, parts, strict=True):
                mine.copy_(part)
        self._stream.restore(state["stream"])
        if self.batches is not None:
            self.batches.restore(state["batches"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]

    def _constants(self) -> dict[str, Tensor]:
        """What belongs to the guide or the model and is not in the flat vector: frames, buffers."""
        model = {f"model.{name}": value for name, value in self.params.items()}
        everything = self.guide.state_dict(keep_vars=True) | model
        return {n: v.detach() for n, v in everything.items() if n not in self.trained}

    @torch.no_grad()
    def evaluate(self, replicates: int, *, report: bool = False) -> Tensor:
        """Independent estimates of the bound, `[replicates]`, nats, on the same noise at every call.

        Of an upper bound they are what a comparison maximises, unless it is to ``report`` the bound.
        They see all data, but for one case: where nothing but an encoder and the model's parameters
        depends on a plate of more than 2,048 rows, they are of the bound on that many rows of it. Of
        streamed data without local latents they see 2,000 batches at the most.
        """
        local = [b.plate for b in self.guide.blocks if b.plate is not None]
        density = self.guide.density
        reduce = self.objective.bound if report else self.objective.look
        with RandomStream(self._evaluation_seed), isolated(density.dtype, density.device):
            if isinstance(self.batches, StreamedBatches):
                return self._evaluate_streamed(self.batches, replicates, bool(local), reduce).cpu()
            index = self._rows_evaluated(local)
            if not self.objective.multi_sample or not local:
                return self._joint_bounds(replicates, index, reduce).cpu()
            return torch.stack([self._bound(reduce, index) for _ in range(replicates)]).cpu()

    def reported(self, found: float | None) -> float | None:
        """The trained bound, nats, where a look at it found this; None where it is the ELBO."""
        if self.objective.is_elbo or not self.objective.upper:
            return None if self.objective.is_elbo else found
        return float(self.evaluate(_REPORTED, report=True).mean())

    def _joint_bounds(
        self, replicates: int, index: Mapping[str, Tensor] | None, reduce: Reduce
    ) -> Tensor:
        """Bounds of all latents at once, `[replicates]`, from as many draws as memory has room for."""
        # Draws count for less than rows do where steps see some of these.
        each = 1 if self.batches is not None else self.particles
        width = max(width_of(self.guide.density), 1)
        chunk = max(1, _EVALUATION_NUMBERS // (width * each))
        bounds = []
        for start in range(0, replicates, chunk):
            count = min(chunk, replicates - start)
            joint = self._weights(count * each, index).joint()
            bounds.append(reduce(joint.reshape(each, count)))
        return torch.cat(bounds)

    def _rows_evaluated(self, plates: Sequence[Plate]) -> dict[str, Tensor] | None:
        """The rows that the bound is evaluated on; all when None."""
        if any(block.plate is None for block in self.guide.blocks):
            # The optimum of some rows is not that of all: for N of them it is sqrt(N / rows) sds away.
            return None
        large = [plate for plate in plates if plate.size > _EVALUATION_ROWS]
        cast = self.guide.density.cast
        rows = {
            p.name: cast(torch.randperm(p.size, device="cpu")[:_EVALUATION_ROWS]) for p in large
        }
        return rows or None

    def _evaluate_streamed(
        self, batches: StreamedBatches, replicates: int, local: bool, reduce: Reduce
    ) -> Tensor:
        if local:
            data = batches.evaluated(_EVALUATION_ROWS)
            return torch.stack([self._bound(reduce, None, data) for _ in range(replicates)])
        draw = self.guide.draw(replicates * self.particles)
        log_p, log_q = weigh_all(self.guide, draw, self.params, batches.looked_at())
        return reduce((log_p - log_q).reshape(self.particles, replicates))

    def _bound(
        self,
        reduce: Reduce,
        index: Mapping[str, Tensor] | None,
        data: list[Tensor] | None = None,
    ) -> Tensor:
        weights = self._weights(self.particles, index, data, share=self.share)
        return reduced(reduce, weights)

    def _weights(
        self,
        draws: int,
        index: Mapping[str, Tensor] | None,
        data: list[Tensor] | None = None,
        *,
        share: bool = False,
    ) -> LogWeights:
        """The objective's log weights of fresh draws."""
        stratified = self.estimator == "stratified"
        draw = self.guide.draw(draws, index, data=data, share=share, stratified=stratified)
        batch = Batch(index or {}, data, self.params)
        found = self.objective.weights(self.guide, draw, batch)
        return combined(self.objective, found, draw.strata) if stratified else found


def _flattened(parameters: Mapping[str, Tensor], density: Density) -> Tensor:
    """The parameters as one vector `[P]`, of which they become views."""
    parts = [p.detach().reshape(-1) for p in parameters.values()]
    flat = torch.cat(parts or [torch.zeros(0, dtype=density.dtype, device=density.device)])
    settle(parameters, flat)
    return flat


def settle(parameters: Mapping[str, Tensor], flat: Tensor) -> None:
    """Make the parameters views of a vector `[P]`."""
    for name, part in split(flat, parameters).items():
        parameters[name].data = part


def split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a vector `[P]` in the shapes of these parameters."""
    parts = flat.split([value.numel() for value in like.values()])
    return {
        name: part.view(value.shape)
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }
