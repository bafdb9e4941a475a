# SPDX-License-Identifier: Apache-2.0
"""Step `tome`: a ViT-L with ToMe by `mm.compress`, beside the paper's way in plain torch and the stock model.

The official way is told in our own words from the card: in each block attention with log(size) on the keys' logits, softmax and
weights in memory; keys averaged over heads and matched by a table of cosines, sorted; merged by adding up what is weighted by
size. The ViT is plain torch, with the parts that our adapter asks of a vision transformer, so that no timm is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmcompress as mm

from .bench import Bench, Item


class Attention(nn.Module):
    """Fused projections; a bias by keyword."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.scale)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    num_prefix_tokens = 1

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16, side: int = 14, pixels: int = 224) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, width, side, side)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (pixels // side) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(pixels)))[:, 0])


def official(model: ViT, pixels: Tensor, schedule: Sequence[int]) -> Tensor:
    """The paper's way, by the card."""
    x, size = model.embed(pixels), None
    for block, r in zip(model.blocks, schedule, strict=True):
        at = block.attn
        q, k, v = at.qkv(block.norm1(x)).unflatten(-1, (3, at.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) * at.scale
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        x = x + at.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if r > 0:
            x, size = merge(x, torch.ones_like(x[..., :1]) if size is None else size, k.mean(1), r)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, C] and sizes [B, T, 1] with the `r` most similar pairs of even and odd tokens merged; the first stays."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    going, staying = order[:, :r], order[:, r:].sort(1)[0]
    into = partner[..., None].gather(1, going)

    def merged(y: Tensor) -> Tensor:
        even, odd = y[:, ::2], y[:, 1::2]
        left, gone = (even.gather(1, at.expand(-1, -1, y.shape[2])) for at in (staying, going))
        return torch.cat([left, odd.scatter_add(1, into.expand(-1, -1, y.shape[2]), gone)], 1)

    total = merged(size)
    return merged(x * size) / total, total


# ---------------------------------------------------------------------- the step
def tome(bench: Bench) -> dict[str, Item]:
    cases = bench.pick(((224, 8, 64), (224, 8, 1), (336, 16, 32), (336, 23, 32)), ((28, 1, 2),))
    return {f"{pixels} pixels, r = {r}, batch {n}": partial(_case, bench, pixels, r, n) for pixels, r, n in cases}


def _case(bench: Bench, pixels: int, r: int, batch: int) -> Iterator[dict[str, Any]]:
    sizes = bench.pick({}, {"width": 32, "depth": 2, "heads": 4, "side": 7})
    model = ViT(pixels=pixels, **sizes).eval()
    depth, tokens = len(model.blocks), model.pos_embed.shape[1]
    schedule = [r] * depth
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, pixels, pixels, generator=generator).to(bench.device)
    model = model.to(bench.device)
    expected = official(model, x[:2], schedule)  # in float32: ours is the same method
    with mm.compressed(model, mm.ToMe(r=tuple(schedule))):
        error = float((model(x[:2]) - expected).abs().max() / expected.abs().max())
    dtype = bench.pick(torch.bfloat16, torch.float32)
    model, x = model.to(dtype), x.to(dtype)
    times = {"stock": bench.wall(lambda: model(x), bench.pick(15, 1), 1.0)}
    times["official"] = bench.wall(lambda: official(model, x, schedule), bench.pick(15, 1), 1.0)
    with mm.compressed(model, mm.ToMe(r=tuple(schedule))):
        times["ours"] = bench.wall(lambda: model(x), bench.pick(15, 1), 1.0)
    for way, ms in times.items():
        yield {
            "model": f"ViT-L/{bench.pick(14, 7)}", "pixels": pixels, "tokens": tokens, "left": tokens - r * depth, "r": r,
            "batch": batch, "dtype": str(dtype).removeprefix("torch."), "way": way, "ms": ms, "images_per_s": 1000 * batch / ms,
            "over_stock": times["stock"] / ms, "largest_error": error if way == "ours" else None,
        }  # fmt: skip
