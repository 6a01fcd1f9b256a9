"""Nanoseconds in other units."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


Ns = npt.NDArray[np.int64]
