# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles to machine code for three generations of GPUs, as its operation launches it, where there is none.

A process without the interpreter calls the operations with tensors of the CPU. A driver that has no device says which GPU to
compile for, and every launch is only a compilation. What comes out means nothing; that it comes out at all, of shared memory
as small as the GPU has, is the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmcompress.kernels.dispatch import has_triton

SHARED = {80: 101376, 90: 232448, 100: 232448}
"""Bytes of shared memory per block: the least of a family (8.6 and 8.9 for Ampere)."""


def assembler() -> str | None:
    """Where ptxas is: in Triton's wheel, or on the path."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(own) if own.exists() else shutil.which("ptxas")


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(SHARED))
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    if not has_triton():
        pytest.skip("Triton is not installed")
    if assembler() is None:
        pytest.skip("there is no ptxas, which makes machine code for GPUs: neither in Triton's wheel nor on the path")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", str(capability), str(SHARED[capability])],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    print(run.stdout)
