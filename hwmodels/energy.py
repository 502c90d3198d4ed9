"""What a step costs in power: devices draw more the busier their multiply units and memory are."""

from __future__ import annotations

import numpy as np

from hwmodels.hardware import Device
from hwmodels.operators import Array

#: Dynamic power as shares of TDP - idle: clocks and leakage of a running device, memory at its peak bandwidth, multiply
#: units at their peak rate. Fitted to the measured power of Llama-2-70B on A100 at TP2, TP4 and TP8 that
#: Splitwise published (splitwise-sim @8f99e7d): decode draws 0.72, 0.59 and 0.44 of TDP at 63 %, 38 % and 19 % of the
#: memory's peak, prefill reaches TDP at about half of the arithmetic peak.
RUNNING, MEMORY, COMPUTE = 0.19, 0.75, 1.5


def power_w(device: Device, compute_share: Array | float, memory_share: Array | float) -> Array:
    """Power of one device in watts while a step runs.

    compute_share, memory_share   arithmetic and memory traffic as fractions of the device's peaks, in [0, 1]
    """
    dynamic = np.minimum(1.0, RUNNING + MEMORY * np.asarray(memory_share) + COMPUTE * np.asarray(compute_share))
    power: Array = device.idle_w + (device.tdp_w - device.idle_w) * dynamic
    return power
