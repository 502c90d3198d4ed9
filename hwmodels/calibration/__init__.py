"""How are the analytic model's coefficients fitted to measured kernels?"""

from hwmodels.calibration.fitting import Calibrated, Fit, calibrate, coefficients_of
from hwmodels.calibration.profilefile import profile_text, save_profile
from hwmodels.calibration.tables import Measured, open_measured

__all__ = [
    "Calibrated",
    "Fit",
    "Measured",
    "calibrate",
    "coefficients_of",
    "open_measured",
    "profile_text",
    "save_profile",
]
