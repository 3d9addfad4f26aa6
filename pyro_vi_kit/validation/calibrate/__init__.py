"""Calibration over simulated data sets: is the truth where a guide says that it is?"""

from pyro_vi_kit.validation.calibrate.result import Calibration
from pyro_vi_kit.validation.calibrate.run import calibrate
from pyro_vi_kit.validation.calibrate.simulation import Fitter
from pyro_vi_kit.validation.calibrate.verdict import CalibrationVerdict

__all__ = ["Calibration", "CalibrationVerdict", "Fitter", "calibrate"]
