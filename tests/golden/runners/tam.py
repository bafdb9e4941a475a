# SPDX-License-Identifier: Apache-2.0
"""tam_rank_filter."""

from __future__ import annotations

from typing import Any

from mmcompress.kernels.rank_filter import rank_filter

from ..form import Arrays, Results, runner


@runner("tam_rank_filter")
def tam_rank_filter(arrays: Arrays, params: dict[str, Any]) -> Results:
    for case in params["cases"]:
        yield f"out_{case['i']}", rank_filter(arrays[f"in_{case['i']}"], case["kernel"])
