"""Random Pyro models from a grammar: sites, plates, supports, dependencies, precisions, in-place writes.

A model is a list of statements, drawn from a seed and then fixed; `Program.run` executes it as an
ordinary Pyro model, in the precisions that it names or all in double.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

A, B = "a", "b"
DIMS = {A: -1, B: -2}
NO_VALUES = ("factor", "observed")
DOUBLE, SINGLE = torch.float64, torch.float32


@dataclass
class State:
    """One run: values so far by name, and the precision that a statement's tensors have."""

    data: dict[str, Tensor]
    double: bool
    sizes: dict[str, int]
    values: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def precision(self, own: torch.dtype) -> torch.dtype:
        """A statement's own precision, or double in all of them."""
        return DOUBLE if self.double else own


@dataclass(frozen=True)
class Statement:
    """One line of a model.

    Attributes:
        name: Of its site.
        plates: Around it.
        kind: latent, discrete, observed, factor, deterministic or written.
        inputs: Earlier values that it depends on, each in plates that are among its own.
        run: Executes it.
        words: What it is, for a report.
    """

    name: str
    plates: tuple[str, ...]
    kind: str
    inputs: tuple[str, ...]
    run: Callable[[State], Any]
    words: str


@dataclass(frozen=True)
class Program:
    """A random model.

    Attributes:
        seed: What it was drawn from.
        sizes: Rows of each plate.
        subsampled: The plate that declares a subsample, with its size, if one does.
        statements: In order.
        data: Its arguments, by name of the observed site.
    """

    seed: int
    sizes: dict[str, int]
    subsampled: dict[str, int]
    statements: tuple[Statement, ...]
    data: dict[str, Tensor]

    def model(self, data: dict[str, Tensor]) -> None:
        """The model in its own precisions."""
        self.run(data, double=False)

    def run(self, data: dict[str, Tensor], double: bool) -> None:
        """Execute it under whatever handlers are active."""
        state = State(data, double, self.sizes)
        plates = {
            name: pyro.plate(name, size, subsample_size=self.subsampled.get(name), dim=DIMS[name])
            for name, size in self.sizes.items()
        }
        for statement in self.statements:
            with contextlib.ExitStack() as stack:
                for name in statement.plates:
                    rows: Any = stack.enter_context(plates[name])
                    state.rows[name] = rows
                state.values[statement.name] = statement.run(state)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, plates {self.sizes}, subsampled {self.subsampled}"]
        for s in self.statements:
            inputs = f" given {', '.join(s.inputs)}" if s.inputs else ""
            lines.append(f"  {s.name} [{', '.join(s.plates)}]: {s.words}{inputs}")
        return "\n".join(lines)


# Latents by support: a maker of the distribution from a centre near zero, and the event dims.
def _ordered(centre: Tensor) -> Any:
    base = dist.Normal(centre.unsqueeze(-1).expand(*centre.shape, 3), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])


def _spread(centre: Tensor, n: int) -> Tensor:
    return centre.unsqueeze(-1) + torch.linspace(0.0, 1.0, n, dtype=centre.dtype)


LATENTS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "Normal": (lambda c: dist.Normal(c, 1.0), 0),
    "StudentT": (lambda c: dist.StudentT(5.0, c, 1.0), 0),
    "Laplace": (lambda c: dist.Laplace(c, 1.5), 0),
    "Cauchy": (lambda c: dist.Cauchy(c, 1.0), 0),
    "LogNormal": (lambda c: dist.LogNormal(c, 0.5), 0),
    "Gamma": (lambda c: dist.Gamma(2.0 + c.exp(), 1.0), 0),
    "InverseGamma": (lambda c: dist.InverseGamma(3.0, c.exp()), 0),
    "HalfNormal": (lambda c: dist.HalfNormal(c.exp()), 0),
    "HalfCauchy": (lambda c: dist.HalfCauchy(c.exp()), 0),
    "Exponential": (lambda c: dist.Exponential(c.exp()), 0),
    "Beta": (lambda c: dist.Beta(1.0 + c.exp(), 2.0), 0),
    "Kumaraswamy": (lambda c: dist.Kumaraswamy(1.0 + c.exp(), torch.full_like(c, 2.0)), 0),
    "Uniform up to a latent": (lambda c: dist.Uniform(-torch.ones_like(c), c.exp()), 0),
    "Uniform from a latent": (lambda c: dist.Uniform(c, c + 2.0), 0),
    "Gumbel": (lambda c: dist.Gumbel(c, 1.0), 0),
    "Pareto": (lambda c: dist.Pareto(torch.ones_like(c), 1.0 + c.exp()), 0),
    "Dirichlet": (lambda c: dist.Dirichlet(1.0 + _spread(c, 3).exp()), 1),
    "MultivariateNormal": (
        lambda c: dist.MultivariateNormal(
            _spread(c, 2), torch.eye(2, dtype=c.dtype) + 0.3 * torch.ones(2, 2, dtype=c.dtype)
        ),
        1,
    ),
    "vector of Normals": (lambda c: dist.Normal(_spread(c, 3), 1.0).to_event(1), 1),
    "ordered": (_ordered, 1),
    "LKJCholesky": (lambda c: dist.LKJCholesky(3, 1.0 + c.exp()), 2),
    "Wishart": (
        lambda c: dist.Wishart(4.0 + c.exp(), covariance_matrix=torch.eye(2, dtype=c.dtype)),
        2,
    ),
    "a matrix of Normals": (
        lambda c: dist.Normal(_spread(c, 4).unflatten(-1, (2, 2)), 1.0).to_event(2),
        2,
    ),
}


class Grammar:
    """Draws programs.

    Args:
        seed: Of the program.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._statements: list[Statement] = []
        self._event: dict[str, int] = {}
        self._depends_on_states: set[str] = set()
        self._data: dict[str, Tensor] = {}
        self.precision = self._random.choice(["single", "double", "mixed"])
        names = self._random.choice([(), (A,), (A,), (A, B), (A, B)])
        self.sizes = {name: self._random.randint(2, 4) for name in names}
        self.subsampled: dict[str, int] = {}
        # Enumerated sites of a subsampled plate would be other ones at each run of the oracle.
        self.discrete = self._random.random() < 0.3
        if A in self.sizes and not self.discrete and self._random.random() < 0.25:
            self.subsampled = {A: self._random.randint(1, self.sizes[A] - 1)}

    def program(self) -> Program:
        """One model: a few latents, perhaps a discrete one, what is computed, data."""
        for _ in range(self._random.randint(1, 4)):
            self._latent()
        if self.discrete:
            self._discrete()
        for _ in range(self._random.randint(0, 2)):
            self._random.choice([self._written, self._factor, self._deterministic, self._latent])()
        for _ in range(self._random.randint(1, 2)):
            self._observed()
        return Program(self.seed, self.sizes, self.subsampled, tuple(self._statements), self._data)

    # -- parts ----------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        if self.precision == "mixed":
            return self._random.choice([SINGLE, DOUBLE])
        return SINGLE if self.precision == "single" else DOUBLE

    def _plates(self) -> tuple[str, ...]:
        return tuple(name for name in reversed(self.sizes) if self._random.random() < 0.5)

    def _inputs(self, plates: tuple[str, ...], most: int = 2) -> tuple[str, ...]:
        possible = [
            s.name
            for s in self._statements
            if s.kind not in NO_VALUES and set(s.plates) <= set(plates)
        ]
        count = min(len(possible), self._random.randint(0, most))
        return tuple(self._random.sample(possible, count))

    def _add(
        self,
        kind: str,
        plates: tuple[str, ...],
        inputs: tuple[str, ...],
        run: Callable[[State], Any],
        words: str,
        event: int = 0,
    ) -> str:
        name = f"{kind[0]}{len(self._statements)}"
        self._statements.append(Statement(name, plates, kind, inputs, run, words))
        self._event[name] = event
        return name

    def _centre(self, inputs: tuple[str, ...], dtype: torch.dtype) -> Callable[[State], Tensor]:
        """A number near zero that depends on these values, `[*batch]`."""
        shift = round(self._random.uniform(-0.5, 0.5), 2)
        events = dict(self._event)

        def centre(state: State) -> Tensor:
            total = torch.tensor(shift, dtype=state.precision(dtype))
            for name in inputs:
                value = state.values[name]
                for _ in range(events[name]):
                    value = (value * torch.linspace(0.5, 1.0, value.shape[-1]).to(value)).sum(-1)
                total = total + 0.5 * torch.tanh(value)
            return total

        return centre

    def _latent(self) -> None:
        plates = self._plates()
        inputs, dtype = self._inputs(plates), self._dtype()
        # A support that depends on discrete sites has no one value for all of theirs.
        inputs = tuple(name for name in inputs if name not in self._depends_on_states)
        words = self._random.choice(list(LATENTS))
        make, event = LATENTS[words]
        centre, name = self._centre(inputs, dtype), f"l{len(self._statements)}"
        scale = self._random.choice([None, None, None, 0.5, 3.0])

        def run(state: State) -> Tensor:
            with _scaled(scale):
                return pyro.sample(name, make(centre(state)))

        scaled = f", scale {scale}" if scale else ""
        self._add("latent", plates, inputs, run, f"{words}, {_word(dtype)}{scaled}", event)

    def _discrete(self) -> None:
        plates = self._random.choice([(), (A,)]) if A in self.sizes else ()
        inputs, dtype = self._inputs(plates, 1), self._dtype()
        centre, name = self._centre(inputs, dtype), f"d{len(self._statements)}"
        states = self._random.choice([2, 3])

        def run(state: State) -> Tensor:
            logits = centre(state)
            fn = (
                dist.Bernoulli(logits=logits)
                if states == 2
                else dist.Categorical(logits=_spread(logits, 3))
            )
            return pyro.sample(name, fn).to(logits.dtype)

        self._add("discrete", plates, inputs, run, f"{states} states")
        self._depends_on_states.add(name)

    def _written(self) -> None:
        """A tensor that is made and then written into, through views too; of constants and latents."""
        inputs, dtype = self._inputs((), 1), self._dtype()
        if self._depends_on_states & set(inputs):
            inputs = ()  # one cell cannot hold all values of a discrete site
        centre, way = self._centre(inputs, dtype), self._random.choice(list(WRITES))
        write = WRITES[way]

        def run(state: State) -> Tensor:
            whole = torch.zeros(3, 4, dtype=state.precision(dtype))
            write(whole, centre(state))
            return whole.sum(-1)

        self._add("written", (), inputs, run, f"{way}, {_word(dtype)}", 1)

    def _factor(self) -> None:
        plates = self._plates()
        inputs, dtype = self._inputs(plates), self._dtype()
        centre, name = self._centre(inputs, dtype), f"f{len(self._statements)}"
        self._note_states(name, inputs)
        self._add(
            "factor",
            plates,
            inputs,
            lambda state: pyro.factor(name, -centre(state).square()),
            "minus a square",
        )

    def _deterministic(self) -> None:
        plates = self._plates()
        inputs, dtype = self._inputs(plates), self._dtype()
        centre, name = self._centre(inputs, dtype), f"d{len(self._statements)}"
        self._note_states(name, inputs)

        def run(state: State) -> Tensor:
            return pyro.deterministic(name, 2.0 * centre(state), event_dim=0)

        self._add("deterministic", plates, inputs, run, "twice its input")

    def _note_states(self, name: str, inputs: tuple[str, ...]) -> None:
        if self._depends_on_states & set(inputs):
            self._depends_on_states.add(name)

    def _observed(self) -> None:
        plates = self._plates()
        inputs, dtype = self._inputs(plates, 3), self._dtype()
        name = f"o{len(self._statements)}"
        kind = self._random.choice(list(OBSERVED))
        make, draw = OBSERVED[kind]
        # `obs_mask` makes a latent of its own.
        how = self._random.choice(["", "mask", "scale", "obs_mask"])
        if how == "scale" and self.discrete:
            how = ""  # sites of the same discrete latents need one scale, as in Pyro
        if how == "obs_mask" and (kind not in CONTINUOUS or not plates or self.discrete):
            how = "mask"
        shape = [self.sizes[p] if p in plates else 1 for p in (B, A)] if B in plates else []
        shape = shape or [self.sizes[p] for p in plates]
        value = draw(torch.rand(shape, generator=self._generator, dtype=DOUBLE))
        self._data[name] = value.to(dtype) if value.is_floating_point() else value
        if how in ("mask", "obs_mask"):
            self._data[f"{name} mask"] = torch.rand(shape, generator=self._generator) > 0.4
        centre = self._centre(inputs, dtype)

        def run(state: State) -> None:
            y = _rows(state.data[name], plates, state.rows)
            mask = _rows(state.data.get(f"{name} mask"), plates, state.rows)
            fn = make(centre(state))
            if how == "obs_mask":
                pyro.sample(name, fn, obs=y, obs_mask=mask)
                return
            masked = poutine.mask(mask=mask) if how == "mask" else contextlib.nullcontext()
            with masked, _scaled(2.5 if how == "scale" else None):
                pyro.sample(name, fn, obs=y)

        self._add("observed", plates, inputs, run, f"{kind} {how}, {_word(dtype)}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scaled(scale: float | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if scale is None else poutine.scale(scale=scale)


def _rows(value: Tensor | None, plates: tuple[str, ...], rows: dict[str, Tensor]) -> Any:
    """The rows of a minibatch."""
    if value is not None and A in plates:
        return value[..., rows[A]]
    return value


def _counts(u: Tensor) -> Tensor:
    return (4.0 * u).floor()


OBSERVED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "Normal": (lambda c: dist.Normal(c, 0.7), lambda u: 4.0 * u - 2.0),
    "StudentT": (lambda c: dist.StudentT(4.0, c, 1.0), lambda u: 6.0 * u - 3.0),
    "Poisson": (lambda c: dist.Poisson(c.exp()), _counts),
    "NegativeBinomial": (lambda c: dist.NegativeBinomial(3.0, logits=c), _counts),
    "Bernoulli": (lambda c: dist.Bernoulli(logits=c), torch.round),
    "Binomial": (lambda c: dist.Binomial(5, logits=c), _counts),
    "Categorical": (
        lambda c: dist.Categorical(logits=_spread(c, 3)),
        lambda u: (3.0 * u).floor().clamp(max=2).long(),
    ),
    "Gamma": (lambda c: dist.Gamma(2.0, c.exp()), lambda u: u + 0.1),
    "LogNormal": (lambda c: dist.LogNormal(c, 1.0), lambda u: u + 0.1),
    "Beta": (lambda c: dist.Beta(1.0 + c.exp(), 1.5), lambda u: 0.05 + 0.9 * u),
}


CONTINUOUS = ("Normal", "StudentT", "Gamma", "LogNormal", "Beta")


def _diagonal(whole: Tensor, value: Tensor) -> None:
    whole.diagonal().copy_(value.expand(3))


def _flat(whole: Tensor, value: Tensor) -> None:
    whole.view(-1)[2:5] = value
    whole.view(-1)[:2].fill_(1.5)


def _row(whole: Tensor, value: Tensor) -> None:
    row = whole[1]
    row += value
    whole[0].fill_(2.0)


def _copies(whole: Tensor, value: Tensor) -> None:
    whole[1:].copy_(value.expand(2, 4))
    whole.T[0].mul_(2.0)


def _columns(whole: Tensor, value: Tensor) -> None:
    for column, part in enumerate(whole.unbind(-1)):
        part.fill_(0.25 * column)
    whole.narrow(0, 1, 1).add_(value)


def _masked(whole: Tensor, value: Tensor) -> None:
    whole[:, 1:3].fill_(1.0)
    whole[whole > 0.5] = value


def _cell(whole: Tensor, value: Tensor) -> None:
    whole[0][2] = value
    whole[1:, :2].sub_(1.0)


WRITES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "diagonal": _diagonal,
    "view(-1)": _flat,
    "a row": _row,
    "copy_": _copies,
    "unbind, narrow": _columns,
    "a mask": _masked,
    "a cell": _cell,
}
