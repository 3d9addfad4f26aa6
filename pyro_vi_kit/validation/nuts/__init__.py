"""The reference posterior: NUTS on the same density as the guides, and whether it converged."""

from pyro_vi_kit.validation.nuts.report import SamplerReport, SamplerWarning, diagnose
from pyro_vi_kit.validation.nuts.run import SAMPLERS, nuts

__all__ = ["SAMPLERS", "SamplerReport", "SamplerWarning", "diagnose", "nuts"]
