# SPDX-License-Identifier: Apache-2.0
"""Whose rules: the benchmark's own tool, LLaVA's scripts or lmms-eval. They differ often, so results name theirs."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast

Protocol: TypeAlias = Literal["official", "llava", "lmms"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "llava", "lmms")


def check_protocol(protocol: str) -> Protocol:
    """`protocol` if there is such a one; raises ValueError otherwise."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    return cast(Protocol, protocol)
