# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, Triton kernels run in its interpreter. Triton reads this when a kernel is defined, so it is set before any
test imports one."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
