# SPDX-License-Identifier: Apache-2.0
"""ToMe in plain timm and open_clip vision transformers, against the paper's steps written out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmcompress as mm
from mmcompress.ops import bipartite_match

timm = pytest.importorskip("timm", reason="needs timm")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": 32, "num_classes": 7}


def timm_model(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**{**TINY, **options}).eval()
    return _spread(model)


def clip_model() -> Any:
    torch.manual_seed(0)
    vision = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    return _spread(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval())


def _spread(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def by_hand(
    x: Tensor, blocks: list[Any], parts: Callable[[Any, Tensor], tuple], schedule: list[int], prop: bool
) -> Tensor:
    """The blocks with attention + log(size), merge on the keys and MLP: [n, T, C] after the last one."""
    size = torch.ones(x.shape[:2])
    for block, r in zip(blocks, schedule, strict=True):
        q, k, v, out, norm, mlp, scale = parts(block, x)
        logits = q @ k.transpose(2, 3) * scale
        logits = logits + size.log()[:, None, None] if prop else logits
        x = x + out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        target, count = bipartite_match(k.mean(1), r, 1)
        table = F.one_hot(target, count).float().transpose(1, 2) * size[:, None]
        x, size = table @ x / table.sum(-1, keepdim=True), table.sum(-1)
        x = x + mlp(norm(x))
    return x


def timm_parts(block: Any, x: Tensor) -> tuple:
    at = block.attn
    q, k, v = at.qkv(block.norm1(x)).unflatten(-1, (3, at.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v, at.proj, block.norm2, block.mlp, at.scale


def clip_parts(block: Any, x: Tensor) -> tuple:
    at = block.attn
    qkv = F.linear(block.ln_1(x), at.in_proj_weight, at.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, at.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v, at.out_proj, block.ln_2, block.mlp, at.head_dim**-0.5


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("proportional", [True, False])
def test_timm_equals_the_paper_by_hand(proportional: bool, fused: bool) -> None:
    model = timm_model()
    for block in model.blocks:
        block.attn.fused_attn = fused
    pixels = torch.randn(2, 3, 32, 32)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    expected = by_hand(x, list(model.blocks), timm_parts, [3, 3, 2, 2], proportional)
    logits = model.forward_head(model.norm(expected))
    mm.compress(model, mm.ToMe(r=(3, 3, 2, 2), proportional=proportional))
    assert torch.allclose(model(pixels), logits, atol=1e-4)
    report = str(mm.report(model))
    assert "17, after each block 14, 11, 9, 7" in report


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_open_clip_equals_the_paper_by_hand(proportional: bool) -> None:
    clip = clip_model()
    tower, pixels = clip.visual, torch.randn(2, 3, 32, 32)
    stock = clip.encode_image(pixels)
    x = tower._embeds(pixels)
    expected = by_hand(x, list(tower.transformer.resblocks), clip_parts, [3, 3, 2, 2], proportional)
    pooled = tower.ln_post(expected)[:, 0] @ tower.proj
    with mm.compressed(clip, mm.ToMe(r=(3, 3, 2, 2), proportional=proportional)):
        found = clip.encode_image(pixels)
    assert torch.allclose(found, pooled, atol=1e-4)
    assert torch.equal(clip.encode_image(pixels), stock)
    with mm.compressed(tower, "tome", r=3):
        assert not torch.equal(tower(pixels), stock)


@torch.no_grad()
def test_a_published_architecture_by_name() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    pixels = torch.randn(1, 3, 224, 224)
    stock = model(pixels)
    assert mm.compress(model, "tome", r=13) is model
    lengths: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda m, a: lengths.append(a[0].shape[1]))
    out = model(pixels)
    assert out.shape == stock.shape
    assert lengths == [197 - 13 * (i + 1) for i in range(12)]
    mm.uncompress(model)
    assert torch.equal(model(pixels), stock)


def test_gradients_flow_and_half_precision() -> None:
    model = mm.compress(timm_model(), "tome", r=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters())
    with torch.no_grad():
        assert model.to(torch.bfloat16)(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("changed", [None, "behind", "before"])
@pytest.mark.parametrize("make", [timm_model, clip_model])
def test_shorter_streams_give_what_full_ones_do(make: Callable[[], Any], changed: str | None) -> None:
    """Without a backward pass to come the streams of the blocks get shorter for good; hooks of others still see, and may change,
    all tokens between two blocks."""
    model, pixels = make(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tower = getattr(model, "visual", model)
    blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
    mm.compress(model, mm.ToMe(r=(3, 0, 3, 2)))
    seen: list[tuple[int, ...]] = []

    def change(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        with torch.no_grad():
            x[:, 5:].mul_(0.5)
        return x

    if changed == "behind":
        blocks[1].register_forward_hook(lambda module, args, output: change(output))
    elif changed == "before":
        blocks[2].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]), prepend=True)
    full = _answer(model, pixels).detach()
    with torch.inference_mode():
        short = _answer(model, pixels)
    assert (full - short).abs().max() < 1e-5
    assert seen == ([] if changed is None else [(2, 17, 32)] * 2)
    if changed is not None:
        mm.compress(plain := make(), mm.ToMe(r=(3, 0, 3, 2)))
        assert (_answer(plain, pixels) - full).abs().max() > 1e-3


@torch.no_grad()
def test_average_pooling_and_no_cls() -> None:
    """Without CLS all tokens take part; the head sees every patch as its cluster, so its mean is weighted by size."""
    model = mm.compress(timm_model(class_token=False, global_pool="avg"), "tome", keep=4)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert mm.report(model).merged and sum(mm.report(model).merged) == 12


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ("visionzip", ValueError, "exactly one stage that acts inside the encoder"),
        ("tome(keep=0.5) >> fastv(layer=2)", ValueError, "exactly one stage"),
    ],
)
def test_only_encoder_stages(plan: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mm.compress(timm_model(), plan)


def test_towers_of_other_kinds_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="rotary positions"):
        mm.compress(timm.create_model("eva02_tiny_patch14_224", pretrained=False), "tome")
    with pytest.raises(NotImplementedError, match=r"ResNet is not supported.*timm vision transformers"):
        mm.compress(timm.create_model("resnet10t", pretrained=False), "tome")
    custom = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"Sequential is not supported"):
        mm.compress(custom, "tome")


@torch.no_grad()
def test_there_is_no_trace_of_a_tower() -> None:
    model = mm.compress(timm_model(), "tome", keep=0.5)
    with pytest.raises(ValueError, match="no call yet"):
        mm.report(model)
    with pytest.raises(ValueError, match="has no trace"):
        mm.trace(model)


def _answer(model: Any, pixels: Tensor) -> Tensor:
    return model.encode_image(pixels) if hasattr(model, "encode_image") else model(pixels)


def _projections(model: Any) -> list[str]:
    return ["qkv"] if not hasattr(model, "visual") else ["c_fc"]


@torch.no_grad()
@pytest.mark.parametrize("make", [timm_model, clip_model])
def test_replaced_blocks_and_copies_are_found(make: Callable[[], Any]) -> None:
    """LoRA put on and taken off after `compress`, another block, a copy; asked by the model, its tower and wrappers."""
    peft = pytest.importorskip("peft")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def put(model: Any) -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=_projections(model), init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    def stock(model: Any) -> Any:
        return model.get_base_model()

    def alike(a: Tensor, b: Tensor) -> bool:
        """But for where weights lie in memory, by which some processors round."""
        return bool((a - b).abs().max() < 1e-5)

    model = mm.compress(_spread(make()), "tome", keep=0.5)
    first = _answer(model, pixels)
    right = _answer(stock(mm.compress(put(_spread(make())), "tome", keep=0.5)), pixels)
    assert (right - first).abs().max() > 1e-3
    adapted = put(model)
    assert alike(_answer(stock(adapted), pixels), right)
    report = mm.report(adapted)
    assert report == mm.report(getattr(model, "visual", model)) and sum(report.merged) == report.tokens // 2
    bare = adapted.unload()
    assert alike(_answer(bare, pixels), first)
    twin = copy.deepcopy(bare)
    assert alike(_answer(twin, pixels), first) and mm.report(twin) == report
    tower = getattr(twin, "visual", twin)
    blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
    blocks[1] = copy.deepcopy(blocks[1])
    assert alike(_answer(twin, pixels), first)
    mm.uncompress(tower)
    for part in (twin, *tower.modules()):
        assert not part._forward_pre_hooks and not part._forward_hooks
    assert (_answer(twin, pixels) - first).abs().max() > 1e-3


@pytest.mark.parametrize("make", [timm_model, clip_model])
def test_replayed_blocks_and_threads(make: Callable[[], Any]) -> None:
    model = mm.compress(_spread(make()), "tome", keep=0.5)
    pixels = [torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [_answer(model, x).square().mean() for x in pixels[:2]]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.set_grad_checkpointing(True)
    found = gradients()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 + 1e-4 * b.abs().max()
    model.set_grad_checkpointing(False)
    with torch.no_grad():
        right = [_answer(model, x) for x in pixels]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(8):
            with torch.no_grad():
                if not torch.equal(_answer(model, pixels[i % 3]), right[i % 3]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
