"""A fitted posterior, of its parts, with its ways out and in: ArviZ data, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vi_kit.core import export, files
from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.options import DRAWS, SEED, checks, optional
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model.groups import coords_of, width_of
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.posterior import storage
from pyro_vi_kit.posterior.corrections import Corrected
from pyro_vi_kit.posterior.model_checks import AgainstData
from pyro_vi_kit.posterior.per_datum import ByRow
from pyro_vi_kit.posterior.sampling import Drawn

# Numbers that the draws of an export make together where nobody says how many there shall be: about
# 100 MB of file.
_EXPORTED = 10_000_000
_MOST_DRAWS, _FEWEST_DRAWS = 1000, 100
# Numbers that all draws together may make in a streamed model to be weighed for an export.
_WEIGHABLE = 10_000_000_000
_LEFT_OUT = (
    "The data are streamed, so that there is nothing here with a row for each datum: no observed_data, "
    "constant_data, log_likelihood and predictive groups; sample_stats only where the draws are few "
    "enough to be weighed on all data."
)


class Posterior(Drawn, Corrected, AgainstData, ByRow):
    """What `vi.fit` returns.

    Args:
        model: The model.
        approximation: The trained guide.
        record: How it was trained.
        density: The model's Density; None where the model has none.
        spec: The guide's options, where it was named or configured.
    """

    @checks(draws=optional(DRAWS), seed=SEED)
    def to_arviz(self, draws: int | None = None, seed: int = 0) -> Any:
        """`InferenceData` (ArviZ 0.x) or `DataTree` (1.x) with one chain of draws from q.

        Groups: posterior, unconstrained_posterior, posterior_predictive, log_likelihood, prior,
        prior_predictive, observed_data, constant_data, sample_stats (log_p, log_q, log_w) and
        loss_trace, those that the model has.

        Args:
            draws: Draws from q; 1,000 when None, and down to 100 where a draw makes many numbers.
            seed: The same seed gives the same draws.
        """
        draws = self._exported(draws)
        with self._few_threads():
            groups = self.groups(draws, seed)
        coords = coords_of(self.model, groups)
        return export.to_arviz(groups, coords, self.attrs(seed))

    @checks(draws=DRAWS, seed=SEED)
    def groups(self, draws: int, seed: int) -> dict[str, export.Group]:
        """What `to_arviz` exports, as plain arrays."""
        groups = self.approximation.groups(draws, seed)
        if not self.approximation.point and self._weighable(draws):
            log_p, log_q = (t.numpy()[None] for t in self.approximation.weigh(draws, seed))
            groups["sample_stats"] = export.Group(
                {"log_p": log_p, "log_q": log_q, "log_w": log_p - log_q}
            )
        history = {name: c for name, c in self.record.history.items() if name != "epoch"}
        dims = {"loss": ["step"]} | {name: ["epoch"] for name in history}
        groups["loss_trace"] = export.Group(
            {"loss": self.losses} | history, dims, sampled=False, attrs={"unit": "nats"}
        )
        return groups

    def _weighable(self, draws: int) -> bool:
        """Whether so many draws are weighed on all data in about a minute."""
        return self.model.stream is None or draws * self.approximation.cost <= _WEIGHABLE

    @checks(seed=SEED)
    def attrs(self, seed: int) -> dict[str, Any]:
        """How it was made and how good it is, in what netCDF can hold."""
        attrs = {"model": self.model.name, "guide": self.guide, "draws_seed": seed}
        verdict = self.verdict
        attrs |= self.record.attrs(self.status) | self._evaluation.attrs()
        if verdict is not None:
            attrs |= {
                "verdict": verdict.level,
                "verdict_reasons": "; ".join(verdict.reasons),
                "verdict_advice": verdict.advice,
            }
        if self.model.stream is not None:
            attrs |= {"streamed_rows": self.model.stream.rows, "left_out": _LEFT_OUT}
        if self.parameters:
            attrs["learned_parameters"] = ", ".join(self.parameters)
        return attrs

    @checks(path=a_path, draws=optional(DRAWS))
    def save(self, path: str | Path, draws: int | None = None) -> Path:
        """Write valid ArviZ netCDF that also holds the guide's tensors; read it with `vi.load`.

        Args:
            path: The file.
            draws: Draws from q in it; 1,000 when None, and down to 100 where a draw makes many numbers.

        Raises:
            FileError: If the path cannot be written.
        """
        draws = self._exported(draws)
        target = files.check_writable(path)
        with self._few_threads():
            groups = self.groups(draws, seed=0)
        groups[storage.GROUP] = storage.guide_group(self.approximation, self.record, self.spec)
        coords = coords_of(self.model, groups)
        return export.write(export.to_arviz(groups, coords, self.attrs(0)), target)

    def _exported(self, draws: int | None) -> int:
        """How many draws an export holds."""
        if draws is not None:
            return draws
        numbers = 1 if self.density is None else max(width_of(self.density), 1)
        return min(_MOST_DRAWS, max(_FEWEST_DRAWS, _EXPORTED // numbers))


@checks(path=a_path, model=a_model)
def load(
    path: str | Path,
    model: Model,
    *,
    guide: GuideSpec | Callable[..., Any] | None = None,
    device: Device | None = None,
) -> Posterior:
    """Read a posterior that `Posterior.save` wrote. Nothing in the file is ever run.

    Args:
        path: The file.
        model: The model it is a posterior of, with its data.
        guide: The configured guide or Pyro guide, where the file cannot name it: one with an encoder
            of the user's, or a Pyro guide callable.
        device: Where to put it, as ``fit`` has it; where the model's data are when None.

    Raises:
        FileError: If the file cannot be read or holds no posterior of this package.
        ModelError: If the model's latents are not those of the file.
        OptionError: If ``guide=`` is needed, or `model` is no `Model`.
    """
    restored = storage.restore(path, model, guide, device)
    return Posterior(
        model, restored.approximation, restored.record, restored.density, restored.spec
    )
