# SPDX-License-Identifier: Apache-2.0
"""What is known of values without waiting for a device."""

from __future__ import annotations

from torch import Tensor


def known_zero(x: Tensor) -> bool:
    """Whether all of `x` is 0, as far as that is known: False for a tensor on a device, which would have to be waited for."""
    return x.device.type == "cpu" and not x.numpy().any()
