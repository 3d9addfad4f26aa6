"""Calibration over simulated data sets: is the truth where a guide says that it is?"""

from pyro_vi_kit.validation.calibrate.judging import CalibrationVerdict
from pyro_vi_kit.validation.calibrate.result import Calibration
from pyro_vi_kit.validation.calibrate.running import calibrate
from pyro_vi_kit.validation.calibrate.trial import Fitter

__all__ = ["Calibration", "CalibrationVerdict", "Fitter", "calibrate"]
