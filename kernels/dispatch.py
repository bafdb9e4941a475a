# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
import os

from torch import Tensor

IMPLEMENTATIONS = ("auto", "naive", "blocked", "triton")


@functools.cache
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(implementation: str, x: Tensor) -> str:
    """The implementation for tensors like `x`: "auto" takes Triton on CUDA devices and blocked torch elsewhere.

    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose among {', '.join(IMPLEMENTATIONS)}")
    on_gpu = x.device.type == "cuda" and has_triton()
    if implementation == "auto":
        return "triton" if on_gpu else "blocked"
    if implementation == "triton" and not on_gpu and not (has_triton() and interpreted()):
        raise ValueError(
            f"implementation='triton' on {x.device}: Triton kernels need a CUDA device (or TRITON_INTERPRET=1 in the environment "
            f"before Triton is imported, which runs them slowly on the CPU); use 'auto'"
        )
    return implementation
