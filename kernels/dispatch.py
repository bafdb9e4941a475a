# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

IMPLEMENTATIONS = ("auto", "naive", "blocked", "triton")

PLAIN = {"merge": 1 << 14}
"""Up to so many numbers of one visual "blocked" on the CPU is the naive twin, by operation: features (merge). There the time of the
calls counts, and the twin makes fewest of them. Of one visual, so that a batch gives what its members give alone."""


@dataclass
class Preference:
    """What "auto" means for now; `used`: whether an operation asked."""

    implementation: str
    used: bool = False


_PREFERENCE: ContextVar[Preference | None] = ContextVar("preference", default=None)


@contextmanager
def preferring(implementation: str) -> Iterator[Preference]:
    """Within the block "auto" means `implementation`, in this thread: to compare whole methods with their naive twins."""
    preference = Preference(_known(implementation))
    token = _PREFERENCE.set(preference)
    try:
        yield preference
    finally:
        _PREFERENCE.reset(token)


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose among {', '.join(IMPLEMENTATIONS)}")
    return implementation


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
    preference = _PREFERENCE.get()
    if _known(implementation) == "auto" and preference:
        implementation, preference.used = preference.implementation, True
    on_gpu = x.device.type == "cuda" and has_triton()
    if implementation == "auto":
        return "triton" if on_gpu else "blocked"
    if implementation == "triton" and not on_gpu and not (has_triton() and interpreted()):
        raise ValueError(
            f"implementation='triton' on {x.device}: Triton kernels need a CUDA device (or TRITON_INTERPRET=1 in the environment "
            f"before Triton is imported, which runs them slowly on the CPU); use 'auto'"
        )
    return implementation


def plain(operation: str, size: int) -> bool:
    """Whether a visual of that size is left to the naive twin."""
    return size <= PLAIN[operation]
