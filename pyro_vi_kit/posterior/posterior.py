"""A fitted posterior, of its parts, and how it is read from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.options import checks
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.posterior import storage
from pyro_vi_kit.posterior.corrected import Corrected
from pyro_vi_kit.posterior.exported import Exported
from pyro_vi_kit.posterior.model_checks import AgainstData
from pyro_vi_kit.posterior.per_datum import ByRow
from pyro_vi_kit.posterior.sampling import Drawn


class Posterior(Drawn, Corrected, AgainstData, ByRow, Exported):
    """What `vi.fit` returns.

    Args:
        model: The model.
        approximation: The trained guide.
        record: How it was trained.
        density: The model's Density; None where the model has none.
        spec: The guide's options, where it was named or configured.
    """


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
