"""Sums over discrete variables in log space, one variable after another, and draws of them.

Tensor variable elimination (Obermeyer et al. 2019, https://arxiv.org/abs/1902.03210): variables inside
a plate are summed out row by row, what remains is multiplied over the plate and goes on outside it.
Shapes alone decide the order; nothing here looks at a tensor's values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError

# A plate, by its name, or a variable, by its number.
Name = str | int
Plates = frozenset[str]

_MOST_STATES = 20_000_000


@dataclass(frozen=True, eq=False)
class Factor:
    """A log factor with a name for each dim.

    Attributes:
        value: Its values, nats.
        names: What each dim is: every plate around the factor, and the variables it depends on.
        plates: The plates around it.
        sources: The sites it is made of.
    """

    value: Tensor
    names: tuple[Name, ...]
    plates: Plates
    sources: frozenset[str]

    @property
    def variables(self) -> set[int]:
        """The variables it depends on."""
        return {name for name in self.names if isinstance(name, int)}


class Step(NamedTuple):
    """A variable that was summed out, and the product of factors in which it was."""

    variable: int
    product: Factor


def eliminate(
    factors: Iterable[Factor], homes: Mapping[int, Plates]
) -> tuple[list[Factor], list[Step]]:
    """Sum out every variable.

    Args:
        factors: Log factors; impossible combinations are large negative numbers, not -inf.
        homes: The plates around each variable.

    Returns:
        What is left: one factor per connected component, inside the plates that its last variable was
        in. And the steps, in order.

    Raises:
        ModelError: If variables in two plates, neither inside the other, meet in one factor, or too
            many combinations would have to be held at once.
    """
    todo, done, steps = list(factors), [], []
    while todo:
        leaf = max((factor.plates for factor in todo), key=lambda plates: (len(plates), *plates))
        group = [factor for factor in todo if factor.plates == leaf]
        todo = [factor for factor in todo if factor.plates != leaf]
        own = [v for v, home in homes.items() if home == leaf]
        for component in _components(group, own):
            factor = _sum_out(component, own, steps)
            if not factor.variables:
                done.append(factor)
                continue
            outside: Plates = frozenset().union(*(homes[v] for v in factor.variables))
            if not outside < leaf:
                raise ModelError(_crossed(factor))
            todo.append(_out_of(factor, leaf - outside))
    return done, steps


def draw(steps: Sequence[Step], homes: Mapping[int, Plates]) -> tuple[dict[int, Factor], Tensor]:
    """One exact joint draw of the eliminated variables, from torch's global random state.

    Args:
        steps: Those of an elimination.
        homes: The plates around each variable.

    Returns:
        The index of each variable's state, with its plates as dims; and the log probability of the
        draw, nats.
    """
    drawn: dict[int, Factor] = {}
    log_q = torch.zeros(())
    for variable, product in reversed(steps):
        logits, names = product.value, product.names
        for other in product.variables - {variable}:
            logits, names = _select(logits, names, other, drawn[other])
        order = (*sorted(homes[variable]), variable)
        logits = _aligned(logits, names, order).log_softmax(-1)
        uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device)
        noise = -torch.log(-torch.log(uniform))
        index = (logits + noise).argmax(-1)
        log_q = log_q + logits.gather(-1, index.unsqueeze(-1)).sum()
        drawn[variable] = Factor(index, order[:-1], homes[variable], frozenset())
    return drawn, log_q


def product(factors: Sequence[Factor], names: Sequence[Name]) -> Tensor:
    """The sum of log factors, its dims in the order of ``names``, of size 1 where nothing varies."""
    total = _aligned(factors[0].value, factors[0].names, names)
    for factor in factors[1:]:
        total = total + _aligned(factor.value, factor.names, names)
    return total


def _components(group: Sequence[Factor], variables: Sequence[int]) -> list[list[Factor]]:
    """Factors that share one of these variables, directly or through others."""
    own, leader = set(variables), list(range(len(group)))

    def led_by(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    holder: dict[int, int] = {}
    for i, factor in enumerate(group):
        for variable in factor.variables & own:
            one, other = sorted((led_by(holder.setdefault(variable, i)), led_by(i)))
            leader[other] = one
    components: dict[int, list[Factor]] = {}
    for i, factor in enumerate(group):
        components.setdefault(led_by(i), []).append(factor)
    return list(components.values())


def _sum_out(factors: list[Factor], variables: Sequence[int], steps: list[Step]) -> Factor:
    """The product of connected factors with these variables summed out, the cheapest one first.

    A chain has thousands of variables: what a sum costs is counted anew only where factors changed.
    """
    left = dict(enumerate(factors))
    holders: dict[int, list[int]] = {variable: [] for variable in variables}
    for key, factor in left.items():
        for variable in factor.variables & holders.keys():
            holders[variable].append(key)

    def cost(variable: int) -> int:
        return _states([left[key] for key in holders[variable]])

    waiting = {variable: cost(variable) for variable, keys in holders.items() if keys}
    while waiting:
        variable = min(waiting, key=waiting.__getitem__)
        del waiting[variable]
        summed = set(holders[variable])
        joined = _joined([left.pop(key) for key in holders[variable]])
        steps.append(Step(variable, joined))
        dim = joined.names.index(variable)
        names = joined.names[:dim] + joined.names[dim + 1 :]
        key = len(factors) + len(steps)  # behind all others
        left[key] = Factor(joined.value.logsumexp(dim), names, joined.plates, joined.sources)
        for other in left[key].variables & waiting.keys():
            holders[other] = [known for known in holders[other] if known not in summed] + [key]
            waiting[other] = cost(other)
    return _joined(list(left.values()))


def _joined(factors: Sequence[Factor]) -> Factor:
    if len(factors) == 1:
        return factors[0]
    names = tuple(dict.fromkeys(name for factor in factors for name in factor.names))
    if _states(factors) > _MOST_STATES:
        sites = sorted(frozenset().union(*(factor.sources for factor in factors)))
        raise ModelError(
            f"summing out the discrete sites behind {', '.join(sites[:5])} needs more than "
            f"{_MOST_STATES:,} numbers at once: put independent sites into a pyro.plate, and chains "
            "into pyro.markov, or write them as dist.DiscreteHMM"
        )
    sources = frozenset().union(*(factor.sources for factor in factors))
    return Factor(product(factors, names), names, factors[0].plates, sources)


def _states(factors: Sequence[Factor]) -> int:
    """How many numbers the product of these factors has."""
    sizes = {n: s for f in factors for n, s in zip(f.names, f.value.shape, strict=True)}
    return math.prod(sizes.values())


def _out_of(factor: Factor, plates: Plates) -> Factor:
    """The product over plates, which is a sum of logs."""
    dims = [i for i, name in enumerate(factor.names) if name in plates]
    names = tuple(name for name in factor.names if name not in plates)
    return Factor(factor.value.sum(dims), names, factor.plates - plates, factor.sources)


def _aligned(value: Tensor, names: Sequence[Name], target: Sequence[Name]) -> Tensor:
    """Dims in the order of ``target``, which has all of ``names``; missing ones get size 1."""
    order = sorted(range(len(names)), key=lambda i: target.index(names[i]))
    sizes = {name: value.shape[i] for i, name in enumerate(names)}
    return value.permute(order).reshape([sizes.get(name, 1) for name in target])


def _select(
    logits: Tensor, names: tuple[Name, ...], variable: int, drawn: Factor
) -> tuple[Tensor, tuple[Name, ...]]:
    """The logits at the drawn state of another variable."""
    dim = names.index(variable)
    rest = names[:dim] + names[dim + 1 :]
    logits = logits.movedim(dim, -1)
    index = _aligned(drawn.value, drawn.names, rest).expand(logits.shape[:-1])
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1), rest


def _crossed(factor: Factor) -> str:
    return (
        f"the discrete sites behind {', '.join(sorted(factor.sources))} depend on each other across the "
        f"plates {', '.join(sorted(factor.plates))}, so that they cannot be summed out plate by "
        "plate: write one of the plates as a loop, for i in pyro.plate(...)"
    )
