# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.compile_kernels 90 232448`: compiles the Triton kernels for GPUs of compute capability 9.0, without one.

Operations are called with tensors of the CPU; a driver without a device says what to compile for, and launches only compile.
Fails if a kernel does not compile, takes more shared memory than the given bytes, or is in no case here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from mmcompress.kernels import configs
from mmcompress.kernels.match.rule import Rule
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

MODULES = ("attention", "compact", "components", "coverage", "density", "diverse", "match", "merge", "rank_filter")


class NoDevice:
    """What Triton asks a driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Module, function and arguments: together they launch every kernel, with and without what makes other code."""
    x, y = torch.randn(2, 80, 72).to(dtype), torch.randn(2, 70, 72).to(dtype)
    mask, ends = torch.ones(2, 80, dtype=torch.bool), torch.tensor([0, 30, 80], dtype=torch.int32)
    weight = torch.rand(2, 80)
    yield "match", "match", (x, y, Rule(), None, None)
    yield "match", "match", (x, x, Rule(8, False, False, 4, -1, 2, exclude_self=True), mask, mask)
    yield "match", "match", (x[0], x[0], Rule(3), None, mask[0], ends, ends)
    yield "match", "match", (x, x, Rule(2, frame=10, low=1, high=1, same_cell=True), None, mask)
    q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t, heads in ((x, 4), (y, 2)))
    bias = torch.zeros(2, 70)
    yield "attention", "attention_received", (q, q, 0.1, "mean", None, None, None, None, 0, None)
    yield "attention", "attention_received", (q, k, 0.1, "max", None, bias == 0, bias, None, None, None)
    yield "attention", "attention_rows", (q, k, 0.1, torch.zeros(2, 4, 80, 70))
    wide = torch.randn(1, 1, 80, 512).to(dtype)
    yield "attention", "attention_marginals", (wide, wide, 0.1, 1)
    yield "diverse", "max_min", (x, 5, weight, mask.long()[:, 0])
    yield "diverse", "max_min", (x, 5, None, None, True)
    yield "diverse", "greedy_map", (x, weight, 5)
    many = torch.randn(1, 4100, 72).to(dtype)
    yield "diverse", "max_min", (many, 2, None, None)
    yield "diverse", "max_min", (many, 2, torch.rand(1, 4100), mask.long()[:1, 0], True)
    yield "diverse", "max_min_ragged", (x[0], 9, None, ends.long()[:2], ends, torch.tensor([0, 4, 9]))
    yield "diverse", "greedy_map", (many, torch.rand(1, 4100), 2)
    yield "coverage", "soft_coverage", (y, x, 0.1)
    yield "coverage", "max_coverage", (torch.rand(2, 300, 80), 3, mask)
    yield "coverage", "max_coverage", (torch.rand(2, 300, 80), 3, None, weight)
    yield "merge", "merge", (x, torch.randint(-1, 9, (2, 80)), 9, weight, True)
    yield "merge", "merge", (x, torch.randint(-1, 9, (2, 80)), 9, None, False)
    yield "compact", "compact", ([x, y[:1], mask], torch.randint(70, (2, 9)), torch.rand(2, 9) < 0.5)
    yield "density", "density_peaks", (x, 5, mask)
    yield "density", "nearest", (x[0], y[0], None, ends, ends.clamp_max(70), (50, 50))
    yield "components", "components", (x, 0.5, mask)
    for side in (3, 7):
        yield "rank_filter", "rank_filter", (torch.rand(2, 8, 9), side, torch.ones(1, 8, 9, dtype=torch.bool))


def main(capability: int, shared: int) -> None:
    made: dict[str, list[int]] = {}
    plain = JITFunction.run

    def only_compile(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        kernel = plain(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"], name
        assert kernel.metadata.shared <= shared, f"{name}: {kernel.metadata.shared} bytes of shared memory, {options}"
        made.setdefault(name, []).append(kernel.metadata.shared)
        return kernel

    triton.runtime.driver.set_active(NoDevice(capability))
    JITFunction.run = only_compile
    configs.family = lambda device: configs.FAMILIES[capability // 10]
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for package, name, arguments in cases(dtype):
            getattr(importlib.import_module(f"mmcompress.kernels.{package}.triton"), name)(*arguments)
    for name, sizes in sorted(made.items()):
        print(f"{name.removeprefix('mmcompress.kernels.')}: {max(sizes)} bytes of shared memory at most")
    kernels = {
        f"{function.fn.__module__}.{function.fn.__name__}"
        for name, module in sys.modules.items()
        if name.startswith("mmcompress.kernels.")
        for function in vars(module).values()
        if isinstance(function, JITFunction) and function.fn.__name__.endswith("_kernel")
    }
    assert kernels == set(made), f"in no case: {', '.join(sorted(kernels - set(made)))}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
