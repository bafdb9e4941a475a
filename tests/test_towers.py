# SPDX-License-Identifier: Apache-2.0
"""Vision encoders of every architecture that gives signals: what attention says, and where a patch ends up, against the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmcompress as mm
from mmcompress.runtime.encoder import _taken
from mmcompress.runtime.signals import VisionTap
from mmcompress.runtime.twin import As, twin

from .architectures import CLASSES, OLDEST, TABLE, base_of, build, clips, pictures


@dataclass(frozen=True)
class Looks(mm.stage.InputStage):
    """Asks for attention."""

    keep: float = 0.5
    needs: tuple[str, ...] = ("received_attention",)
    name = "looks_at_attention"

    def select(self, visuals: Any) -> Any:
        return mm.selection.Selection.of(torch.arange(visuals.k).expand(len(visuals.features), -1))


REFUSED = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"} if OLDEST else set()
"""In transformers 5.17 these have no decoder apart."""
OTHERWISE = {
    "aya_vision", "cosmos3_edge", "hunyuan_vl", "kimi_k25", "minimax_m3_vl", "video_llava", "vipllava",
}  # fmt: skip
"""Transformers 5.17 encodes these in another form: signals are refused there, or their call raises."""
SIGNALS = sorted(
    name for name, row in TABLE.items() if "patches" in row["signals"] and row["input"] == "ok" and name not in REFUSED
)


def given(model: Any, what: str = "pictures") -> tuple[Any, str, dict[str, Any]]:
    """The method that encodes two "pictures", "uneven" ones (the second one smaller, skipped where it cannot be) or "videos" (of
    packed grids, uneven); their modality, and the arguments."""
    base, modality = base_of(model), "video" if what == "videos" else "image"
    encode = getattr(base, f"get_{modality}_features", None)
    accepted = inspect.signature(encode).parameters if encode is not None else {}
    if what == "videos" and "video_grid_thw" not in accepted:
        pytest.skip("no videos of packed grids")
    shown = clips(model, [1, 2]) if what == "videos" else pictures(model, [[1, 2]])
    found = {name: value for name, value in shown.items() if name in accepted}
    if what != "pictures":
        if not SMALLER.keys() & found.keys():
            pytest.skip("pictures of one size only")
        for name in SMALLER.keys() & found.keys():
            SMALLER[name](model, found)
    return encode, modality, found


def smaller_sizes(model: Any, found: dict[str, Any]) -> None:
    """4 x 6 patches of a packed tower; other towers cut pictures up by their sizes."""
    if not getattr(adapter_for(model), "packed", False):
        pytest.skip("sizes say how pictures are cut")
    patch = model.config.vision_config.patch_size
    found["image_sizes"] = torch.tensor([[8 * patch, 8 * patch], [4 * patch, 6 * patch]])


def smaller_shapes(model: Any, found: dict[str, Any]) -> None:
    found["spatial_shapes"][1] = torch.tensor([4, 6])
    found["pixel_attention_mask"][1, 24:] = 0


def smaller_places(model: Any, found: dict[str, Any]) -> None:
    """6 x 9 patches of 12 x 12."""
    places = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(6), indexing="xy"), -1).flatten(0, 1)
    found["image_position_ids"] = found["image_position_ids"].clone()
    found["image_position_ids"][1] = -1
    found["image_position_ids"][1, :54] = places


def smaller_grids(model: Any, found: dict[str, Any]) -> None:
    """Half as many rows, and columns half as many again."""
    for name in {"image_grid_thw", "video_grid_thw"} & found.keys():
        t, h, w = found[name][1].tolist()
        found[name] = torch.tensor([[t, h, w], [t, h // 2, w * 3 // 2]])
        pixels = name.replace("image_grid_thw", "pixel_values").replace("video_grid_thw", "pixel_values_videos")
        found[pixels] = found[pixels][: int(found[name].prod(1).sum())]


def smaller_targets(model: Any, found: dict[str, Any]) -> None:
    if OLDEST:
        pytest.skip("transformers 5.17 encodes pictures of one size only")
    found["target_sizes"] = torch.tensor([[8, 8], [4, 8]]).int()
    found["pixel_values"] = found["pixel_values"][..., : 96 * model.config.vision_config.patch_size]


def smaller_pooling(model: Any, found: dict[str, Any]) -> None:
    """7 x 7 patches of 8 x 8, pooled 2 x 2: nothing beyond the edges."""
    places = found["image_token_pooling"].view(2, 4, 4, 4).clone()
    places[1, -1, :, 2:], places[1, :, -1, 1::2] = -1, -1
    found["image_token_pooling"] = places.flatten(0, 2)


SMALLER: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "image_sizes": smaller_sizes, "spatial_shapes": smaller_shapes, "image_position_ids": smaller_places,
    "target_sizes": smaller_targets,
    "image_grid_thw": smaller_grids, "video_grid_thw": smaller_grids,
    "image_token_pooling": smaller_pooling,
}  # fmt: skip
"""By an argument that tells sizes: make the second picture smaller."""


def arguments_of(name: str) -> set[str]:
    """Of the class of an architecture; none where this transformers has no such class."""
    return set(inspect.signature(getattr(transformers, CLASSES[name]).forward).parameters) if name in CLASSES else set()


def cases() -> Iterator[tuple[str, str]]:
    """What each architecture is given, as far as the arguments of its class tell."""
    for name in SIGNALS:
        taken = arguments_of(name)
        yield name, "pictures"
        if taken & SMALLER.keys():
            yield name, "uneven"
        if "video_grid_thw" in taken:
            yield name, "videos"


def marked(found: list[tuple[str, str]]) -> list[Any]:
    """What transformers 5.17 encodes in another form is skipped there by name."""
    skip = pytest.mark.skip(reason="transformers 5.17 encodes it in another form")
    return [pytest.param(*case, marks=skip) if OLDEST and case[0] in OTHERWISE else case for case in found]


CASES = list(cases())


@pytest.mark.parametrize("name, what", marked(CASES))
@torch.no_grad()
def test_attention_is_that_of_the_eager_module(name: str, what: str) -> None:
    """`received_attention` of the block whose output is used, against the weights that the module itself gives."""
    model = build(name)
    adapter = adapter_for(model)
    index, weights = max(adapter.feature_blocks), []
    attention = adapter.blocks[index].attention
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: weights.append(eager(module, args, kwargs)), with_kwargs=True
    )
    mm.compress(model, Looks(keep=0.5))
    encode, _, arguments = given(model, what)
    encoded = encode(**arguments).mmcompress
    received, rows = encoded.signals["received_attention"], weights[0]
    own = VisionTap(None, adapter, set(), None)._per_token(
        rows.flatten() if adapter.packed else rows[:, adapter.prefix :], arguments
    )
    wanted = [x[:, 0] for x in adapter.arrange(encoded, arguments, own[..., None])]
    for found, value in zip(received, wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-7)


def eager(module: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What each token receives on average in the eager attention of `module`, [n, T], packed [T]."""
    parts: list[Tensor] = []
    if not hasattr(module, "config"):  # timm's: its weights go through a dropout
        drop = module.attn_drop.register_forward_pre_hook(lambda _, given: parts.append(given[0].mean((1, 2))))
        type(module).forward(twin(module, fused_attn=False), *args, **kwargs)
        drop.remove()
        return parts[0]

    def weigh(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **more: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scale = more.get("scaling") or q.shape[-1] ** -0.5
        logits = q @ k.transpose(2, 3) * scale
        seen = torch.ones(logits.shape, dtype=torch.bool)
        if mask is not None:
            seen = (mask if mask.dtype == torch.bool else mask >= 0).expand(logits.shape)
        shown = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        asking = seen & seen.diagonal(dim1=2, dim2=3)[..., None]  # padding sees tokens, but they do not see it
        parts.append(((shown * asking).sum(2) / asking.sum(2).clamp(min=1)).mean(1))
        return (shown @ v).transpose(1, 2), shown

    ALL_ATTENTION_FUNCTIONS.register("weighed", weigh)
    type(module).forward(twin(module, config=As(module.config, "weighed")), *args, **kwargs)
    return torch.cat(parts, 1)[0] if len(parts) > 1 or kwargs.get("cu_seqlens") is not None else parts[0]


@pytest.mark.parametrize("name, what", marked(CASES))
@torch.no_grad()
def test_a_patch_ends_up_where_arrange_says(name: str, what: str) -> None:
    """Noise on one patch behind the block whose output is used: the tokens that change are those that `arrange` gives it to."""
    model = build(name)
    adapter, (encode, modality, arguments) = adapter_for(model), given(model, what)
    block = adapter.blocks[max(adapter.feature_blocks)].module
    for part in base_of(
        model
    ).modules():  # attention that pools patches and has settled on one of them would not show the others
        if hasattr(part, "image_pooling_2d"):
            part.image_pooling_2d.q_proj.weight.mul_(0.01)
            part.image_pooling_2d.q_proj.bias.mul_(0.01)
    features = adapter.features(encode(**arguments), arguments)
    before = [f.flatten(0, -2) for f in features]
    encoded = adapter.encoded(modality, arguments, [len(f) for f in before])
    seen: list[Tensor] = []
    listening = block.register_forward_hook(lambda module, args, output: seen.append(states(output)))
    encode(**arguments)
    listening.remove()
    shape = seen[0].shape[:-1]
    generator = torch.Generator().manual_seed(0)
    patches = shape[-1] - adapter.prefix
    same = torch.ones(shape if adapter.packed and len(shape) == 1 else (*shape[:-1], patches))
    same = VisionTap(None, adapter, set(), None)._per_token(same.flatten() if adapter.packed else same, arguments)
    for rows in adapter.arrange(encoded, arguments, same[..., None]):
        torch.testing.assert_close(rows, torch.ones_like(rows))
    for at in torch.randperm(patches, generator=generator)[:6].tolist():
        noise = functools.partial(disturbed, adapter.prefix + at)
        noisy = block.register_forward_hook(noise, prepend=True)  # before transformers' own, which record
        after = [f.flatten(0, -2) for f in adapter.features(encode(**arguments), arguments)]
        noisy.remove()
        mark = torch.zeros(shape if adapter.packed and len(shape) == 1 else (*shape[:-1], patches))
        mark[..., at] = 1
        mark = mark[0] if adapter.packed and mark.dim() == 2 else mark
        told = adapter.arrange(
            encoded, arguments, VisionTap(None, adapter, set(), None)._per_token(mark, arguments)[..., None]
        )
        for old, new, says, layout in zip(before, after, told, encoded.layouts, strict=True):
            changed = (old - new).abs().amax(-1)[layout.patch_tokens()] > 0
            assert torch.equal(changed, says[:, 0] != 0), f"patch {at}"


@pytest.mark.parametrize("name, what", marked([case for case in CASES if "features" in TABLE[case[0]]["signals"]]))
@torch.no_grad()
def test_encoder_features_become_tokens_on_the_road(name: str, what: str) -> None:
    """What a method is given as encoder features, sent down the road, is what the model makes of them."""
    model = build(name)
    adapter = adapter_for(model)
    mm.compress(model, Looks(keep=0.5, needs=("encoder_features",)))
    encode, _, arguments = given(model, what)
    output = encode(**arguments)
    encoded, features = output.mmcompress, adapter.features(output, arguments)
    for rows, tokens, layout in zip(encoded.signals["encoder_features"], features, encoded.layouts, strict=True):
        wanted = tokens.flatten(0, -2)[layout.patch_tokens()]
        torch.testing.assert_close(adapter.project(rows[None])[0], wanted, rtol=1e-4, atol=1e-5)


def states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def disturbed(at: int, module: Any, args: tuple, output: Any) -> Any:
    """Other values for patch `at` of every row."""
    hidden = states(output).clone()
    hidden[..., at, :] += torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(at))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@torch.no_grad()
def test_videos_have_an_encoder_of_their_own() -> None:
    """Video-LLaVA: attention, features and clusters of a video are those of its own tower, and its CLS tokens are structural."""
    model = build("video_llava")
    weights: list[Tensor] = []
    base = base_of(model)
    attention = base.video_tower.encoder.layers[max(adapter_for(model).feature_blocks)].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: weights.append(eager(module, args, kwargs)), with_kwargs=True
    )
    mm.compress(model, Looks(keep=0.5, needs=("received_attention", "encoder_features")))
    output = base.get_video_features(**clips(model, [1, 2]))
    encoded, features = output.mmcompress, output.pooler_output.unflatten(0, (2, 2))
    wanted = weights[0].unflatten(0, (2, 2))[:, :, 1:].flatten(1)
    for video, layout in enumerate(encoded.layouts):
        assert layout.structural == (0, 65) and layout.tokens == 130
        torch.testing.assert_close(encoded.signals["received_attention"][video], wanted[video], rtol=1e-4, atol=1e-7)
        rows = base.multi_modal_projector(encoded.signals["encoder_features"][video])
        torch.testing.assert_close(rows, features[video].flatten(0, 1)[layout.patch_tokens()], rtol=1e-4, atol=1e-5)
    mm.compress(model, "tome(keep=0.5)")
    output = base.get_video_features(**clips(model, [1, 2]))
    features, encoded = output.pooler_output.unflatten(0, (2, 2)), output.mmcompress
    for video, layout in enumerate(encoded.layouts):
        tokens, clusters = features[video].flatten(0, 1)[layout.patch_tokens()], encoded.clusters[video]
        assert len(clusters.unique()) == encoded.left[video] == 64
        assert all(len(tokens[clusters == number].unique(dim=0)) == 1 for number in clusters.unique())


def test_keywords_of_a_block_are_taken_by_what_they_are() -> None:
    index = torch.stack([torch.randperm(7)[:4] for _ in range(2)])
    one, tables = index[:1], torch.randn(7, 7)
    assert torch.equal(_taken("position_embeddings", tables, one, 7), tables[index[0]])
    assert torch.equal(_taken("position_embeddings", tables[None], index, 7), tables[index])
    mask = torch.randn(2, 1, 7, 7)
    found = _taken("attention_mask", mask, index, 7)
    assert torch.equal(found[1, 0], mask[1, 0][index[1]][:, index[1]])
    assert torch.equal(_taken("attention_mask", mask[:, :, :1], index, 7)[1, 0, 0], mask[1, 0, 0][index[1]])
    numbers = torch.arange(14).view(2, 7)
    assert torch.equal(_taken("position_ids", numbers, index, 7)[1], numbers[1][index[1]])
    assert torch.equal(_taken("position_ids", numbers.view(1, 7, 2), index, 7)[1], numbers.view(7, 2)[index[1]])
