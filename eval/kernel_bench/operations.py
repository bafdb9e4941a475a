# SPDX-License-Identifier: Apache-2.0
"""The operations of `mmcompress.kernels` as `mmcompress bench kernels` calls them: on which tokens, and what they cost at least.

`bytes` counts every input once and every output once. `flops` counts the arithmetic of the definition, 2 per multiply-add,
each symmetric pair once, without exponentials. The larger of bytes over copy bandwidth and flops over matmul rate bounds the
time; the roofline fraction is that bound over the measured time. It may exceed 1 where an implementation need not do what the
definition says (greedy selection looks only at tokens that can be next) or where inputs lie in a cache.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROTARY = 64
"""Width of the two rotary tables that `compact` moves, float32."""


@dataclass(frozen=True)
class Size:
    """N tokens of width D; k is what the operation takes it for."""

    n: int
    d: int
    k: int
    dtype: str = "float32"

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    @property
    def heads(self) -> int:
        """Attention heads: of 128 from D = 2048, as in language models, else of 64, as in vision towers."""
        width = 128 if self.d >= 2048 else 64
        return self.d // width if self.d % width == 0 else 1


class Draw:
    """Random inputs, the same in every process."""

    def __init__(self, size: Size, device: str, seed: int = 5) -> None:
        self.size, self.device, self.generator = size, device, torch.Generator().manual_seed(seed)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device, DTYPES[self.size.dtype] if x.is_floating_point() else None)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def tokens(self) -> Tensor:
        """[1, N, D]: clusters of about 16, half as wide as they are apart, and something that all share, so that cosines are
        about 0.8 inside of a cluster and 0.2 outside."""
        n, d = self.size.n, self.size.d
        centers = self.noise(-(-n // 16), d)
        x = self.noise(n, d).mul_(0.5).add_(centers[self.whole(len(centers), n)]).add_(0.5 * self.noise(d))
        return self.place(x[None])

    def heads(self) -> Tensor:
        """[1, heads, N, D / heads], strided as attention modules give it."""
        return self.place(self.noise(1, self.size.n, self.size.heads, self.size.d // self.size.heads)).transpose(1, 2)


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """One call of a public function, `mmcompress.kernels.<package>.<its name>`."""

    package: str
    text: str
    inputs: Callable[[Draw], Call]
    flops: Callable[[Size], float]
    bytes: Callable[[Size], float]
    k: int | None = None
    """Where the swept k means nothing to it: the k it takes, 0 for none. `d` likewise."""
    d: int | None = None
    function: str | None = None
    """The public function, where it has another name."""


def _attention_rows(draw: Draw) -> Call:
    q, k = draw.heads()[:, :, : draw.size.k], draw.heads()
    return (q, k, q.shape[3] ** -0.5), {}


def _attention_received(draw: Draw) -> Call:
    q, k = draw.heads(), draw.heads()
    return (q, k, q.shape[3] ** -0.5), {}


def _max_coverage(draw: Draw) -> Call:
    logits = draw.noise(draw.size.d, 32) @ draw.noise(32, draw.size.n) / 2
    return (draw.place(logits.softmax(-1)[None] / draw.size.d), draw.size.k), {}


def _anchors(draw: Draw) -> Call:
    first = torch.zeros(1, dtype=torch.int64, device=draw.device)
    return (draw.tokens(), draw.size.k), {"first": first, "nearest": True}


def _merge(draw: Draw) -> Call:
    n, k = draw.size.n, draw.size.k
    weight = draw.noise(1, n).exp().to(draw.device)
    return (draw.tokens(), draw.place(draw.whole(k + 1, 1, n) - 1), k, weight), {"mean": True}


def _compact(draw: Draw) -> Call:
    n = draw.size.n
    kept = torch.randperm(n, generator=draw.generator)[: draw.size.k].sort().values[None]
    tables = [draw.noise(1, n, ROTARY).to(draw.device) for _ in range(2)]
    positions, mask = draw.whole(n, 1, n, 3), draw.whole(2, 1, n).bool()
    return ([draw.tokens(), draw.place(positions), *tables, draw.place(mask)], draw.place(kept)), {}


def _rank_filter(draw: Draw) -> Call:
    n = draw.size.n
    height = max(side for side in range(1, math.isqrt(n) + 1) if n % side == 0)
    return (draw.place(draw.noise(draw.size.d, height, n // height).abs()), draw.size.k), {}


OPERATIONS: dict[str, Operation] = {
    "match": Operation(
        "match",
        "best cosine match of N tokens among N others",
        lambda draw: ((draw.tokens(), draw.tokens()), {}),
        flops=lambda s: 2 * s.n**2 * s.d,
        bytes=lambda s: 2 * s.n * s.d * s.item + 12 * s.n,
        k=1,
    ),
    "attention_received": Operation(
        "attention",
        "mean over N queries of the softmax that N keys receive, heads of 64 (from D = 2048: 128)",
        _attention_received,
        flops=lambda s: 2 * s.n**2 * s.d,
        bytes=lambda s: 2 * s.n * s.d * s.item + 4 * s.n,
        k=0,
    ),
    "attention_rows": Operation(
        "attention",
        "softmax of k = 32 queries on N keys",
        _attention_rows,
        flops=lambda s: 2 * min(s.k, s.n) * s.n * s.d,
        bytes=lambda s: (min(s.k, s.n) + s.n) * s.d * s.item + 4 * s.heads * min(s.k, s.n) * s.n,
        k=32,
    ),
    "max_min": Operation(
        "diverse",
        "k of N tokens by farthest-point selection",
        lambda draw: ((draw.tokens(), draw.size.k), {}),
        flops=lambda s: s.n**2 * s.d,
        bytes=lambda s: s.n * s.d * s.item + 8 * s.k,
    ),
    "anchors": Operation(
        "diverse",
        "k of N tokens by farthest-point selection from a given one, and the nearest of them to each token",
        _anchors,
        flops=lambda s: 2 * s.k * s.n * s.d,
        bytes=lambda s: s.n * s.d * s.item + 8 * (s.n + s.k),
        function="max_min",
    ),
    "greedy_map": Operation(
        "diverse",
        "k of N tokens by greedy DPP MAP",
        lambda draw: ((draw.tokens(), draw.noise(1, draw.size.n).to(draw.device), draw.size.k), {}),
        flops=lambda s: 2 * s.k * s.n * s.d + s.k**2 * s.n,
        bytes=lambda s: s.n * s.d * s.item + 4 * s.n + 8 * s.k,
    ),
    "max_coverage": Operation(
        "coverage",
        "k of N tokens by facility location in a table of D targets",
        _max_coverage,
        flops=lambda s: 3 * s.k * s.d * s.n,
        bytes=lambda s: s.d * s.n * s.item + 8 * s.k,
    ),
    "merge": Operation(
        "merge",
        "weighted means of N tokens in k groups",
        _merge,
        flops=lambda s: 2 * s.n * s.d,
        bytes=lambda s: (s.n + s.k) * s.d * s.item + 12 * s.n,
    ),
    "compact": Operation(
        "compact",
        "k of N tokens with positions, rotary tables and mask",
        _compact,
        flops=lambda s: 0,
        bytes=lambda s: 2 * s.k * (s.d * s.item + 2 * ROTARY * 4 + 3 * 8 + 1) + 8 * s.k,
    ),
    "density_peaks": Operation(
        "density",
        "spread and gap of N tokens by k = 5 neighbours",
        lambda draw: ((draw.tokens(), draw.size.k), {}),
        flops=lambda s: 1.5 * s.n**2 * s.d,
        bytes=lambda s: s.n * s.d * s.item + 8 * s.n,
        k=5,
    ),
    "components": Operation(
        "components",
        "connected components of N tokens above a cosine of 0.75",
        lambda draw: ((draw.tokens(), 0.75), {}),
        flops=lambda s: s.n**2 * s.d,
        bytes=lambda s: s.n * s.d * s.item + 16 * s.n,
        k=0,
    ),
    "rank_filter": Operation(
        "rank_filter",
        "D = 64 maps of N cells, windows of k = 3 by 3, sorted (w log2 w) and weighted (10 w)",
        _rank_filter,
        flops=lambda s: s.d * s.n * s.k**2 * (2 * math.log2(s.k) + 10),
        bytes=lambda s: s.d * s.n * (s.item + 4),
        k=3,
        d=64,
    ),
}


def sizes(
    name: str, ns: Sequence[int], ds: Sequence[int], ks: Sequence[int], dtypes: Sequence[str]
) -> dict[tuple[int, int, str], list[Size]]:
    """The sweep of an operation: by (d, k, dtype) the sizes with N rising; N below k is left out."""
    op, found = OPERATIONS[name], {}
    for d in [op.d] if op.d is not None else ds:
        for k in [op.k] if op.k is not None else ks:
            for dtype in dtypes:
                fits = [n for n in sorted(set(ns)) if op.k is not None or n >= k]
                found[d, k, dtype] = [Size(n, d, k, dtype) for n in fits]
    return found


def caller(name: str, provider: str, call: Call) -> Callable[[], Any]:
    """The public function with these inputs, by the implementation `provider`. "compile" is the naive one with its naive twin
    under torch.compile: from here on, in this process."""
    operation = OPERATIONS[name]
    module, public = importlib.import_module(f"mmcompress.kernels.{operation.package}"), operation.function or name
    function, (arguments, options) = getattr(module, public), call
    implementation = provider
    if provider == "compile":
        compile_twin(module.__name__, public)
        implementation = "naive"
    return lambda: function(*arguments, **options, implementation=implementation)


def compile_twin(package: str, name: str) -> None:
    twin = importlib.import_module(f"{package}.naive")
    function = getattr(twin, name)
    if not hasattr(function, "_torchdynamo_orig_callable"):
        config: Any = torch._dynamo.config
        config.recompile_limit = 256  # a new shape must not fall back to eager unnoticed
        config.fail_on_recompile_limit_hit = True
        setattr(twin, name, torch.compile(function))
