"""Calibration over simulated data sets: is the truth where a guide says that it is?

From data sets (`data_reuse`, `simulation`) over fits in this process or others (`workers`) to
ranks, their tests (`calibration_tests`) and a verdict. Checks of a fit to the user's own data are
no part of it.
"""

from pyro_vi_kit.validation.calibrate.result import Calibration
from pyro_vi_kit.validation.calibrate.run import calibrate
from pyro_vi_kit.validation.calibrate.simulation import Fitter
from pyro_vi_kit.validation.calibrate.verdict import CalibrationVerdict

__all__ = ["Calibration", "CalibrationVerdict", "Fitter", "calibrate"]
