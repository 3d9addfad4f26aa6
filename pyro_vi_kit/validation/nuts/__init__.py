"""The reference posterior: NUTS on the same density as the guides, and whether it converged.

`target` is the density of one point as a sampler calls it; nutpie and Pyro are the samplers. There
is none of our own: short chains that judge a fit are in `posterior.diagnostics`.
"""

from pyro_vi_kit.validation.nuts.report import SamplerReport, SamplerWarning, diagnose
from pyro_vi_kit.validation.nuts.run import SAMPLERS, nuts

__all__ = ["SAMPLERS", "SamplerReport", "SamplerWarning", "diagnose", "nuts"]
