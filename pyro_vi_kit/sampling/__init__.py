"""The reference posterior: NUTS on the same density as the guides, and whether it converged."""

from pyro_vi_kit.sampling.report import SamplerReport, SamplerWarning, diagnose
from pyro_vi_kit.sampling.run import SAMPLERS, nuts

__all__ = ["SAMPLERS", "SamplerReport", "SamplerWarning", "diagnose", "nuts"]
