"""Calibration over simulated data sets: is the truth where a guide says that it is?"""

from pyro_vi_kit.calibration.judging import CalibrationVerdict
from pyro_vi_kit.calibration.result import Calibration
from pyro_vi_kit.calibration.running import calibrate
from pyro_vi_kit.calibration.trial import Fitter

__all__ = ["Calibration", "CalibrationVerdict", "Fitter", "calibrate"]
