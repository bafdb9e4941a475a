# SPDX-License-Identifier: Apache-2.0
"""What belongs to a token travels with it: masks of the caller and of the model, packed rows, keywords, labels."""

from __future__ import annotations

import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mmcompress as mm
from mmcompress.runtime.adapter import Encoded
from mmcompress.runtime.call import Call
from mmcompress.runtime.packing import follow, pack, renumbered
from mmcompress.visuals import Layout

from . import families
from .reference import captured
from .test_engine import close
from .tiny import IMAGE, build, prompts, text_config

TWO: list[list[int | str]] = [[3, "image", 2, "image", 6]]
INPUTS = [
    "by_feature(keep=0.5)",
    "divprune(keep=0.3)",
    "pairs_mean(keep=0.5)",
    "visionzip(keep=0.5)",
    "prumerge(keep=0.5)",
]
LAYERS = ["fastv(layer=2, keep=0.5)", "sparsevlm", "dart", "by_feature(keep=0.6) >> fastv(layer=2, keep=0.5)"]
CUT = "by_hidden(layer=2, keep=0.5)"


def kept(model: Any, inputs: dict[str, Tensor], row: int = 0, layer: int = 0) -> Tensor:
    """Places of the tokens that come to a layer, ascending."""
    visuals = [v for v in mm.trace(model).visuals if v.row == row]
    live = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    live[inputs["input_ids"][row] == IMAGE] = False
    for visual in visuals:
        live[visual.span.patches[visual.kept_cells(layer)]] = True
    return live.nonzero()[:, 0]


def masks(ids: Tensor, floats: bool) -> dict[str, Tensor]:
    """Masks [1, 1, S, S] of the caller for one row: images see all of themselves; all images see each other; two blocks."""
    length, image = ids.shape[1], ids[0] == IMAGE
    causal = torch.ones(length, length).tril().bool()
    run = (image.long().diff(prepend=torch.zeros(1, dtype=torch.long)) == 1).cumsum(0) * image
    block = causal.clone()
    half = int((run == 2).nonzero()[0, 0]) - 1
    block[half:, :half] = False
    found = {
        "themselves": causal | ((run[:, None] == run) & image & image[:, None]),
        "each other": causal | (image & image[:, None]),
        "blocks": block,
    }
    if floats:
        found = {
            name: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            for name, mask in found.items()
        }
    return {name: mask[None, None] for name, mask in found.items()}


# ---------------------------------------------------------------------- who sees whom
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["themselves", "each other", "blocks"])
@pytest.mark.parametrize(
    "plan",
    ["by_feature(keep=0.5)", "divprune(keep=0.3)", "by_feature(keep=0.6) >> divprune(keep=0.5)", "backwards(keep=0.5)"],
)
def test_a_mask_of_the_caller_loses_rows_and_columns(attention: str, name: str, plan: str) -> None:
    """Equal to the stock language model on what is left, given the rows and columns of its places, whatever the order in them."""
    model = build(attention=attention)
    inputs = prompts(model, TWO, seed=1)
    given = {**inputs, "attention_mask": masks(inputs["input_ids"], attention == "eager")[name]}
    with captured(model) as seen:
        stock = model(**given).logits
    mm.compress(model, plan)
    for use in (False, True):
        out = model(**given, use_cache=use).logits[0]
        live = kept(model, inputs)
        own = live.clone()
        for span in (visual.span for visual in mm.trace(model).visuals):
            own[torch.isin(live, span.patches)] = span.patches[span.selection.keep[span.selection_row]]
        mm.uncompress(model)
        mask = given["attention_mask"][:, :, live][..., live]
        positions = own[None] if mm.as_pipeline(plan).position_policy() == "keep" else torch.arange(len(live))[None]
        language_model = model.model.language_model
        hidden = language_model(
            inputs_embeds=seen["inputs_embeds"][:, own], attention_mask=mask, position_ids=positions, use_cache=use
        ).last_hidden_state
        close(out[live][live == own], model.lm_head(hidden)[0, live == own])
        mm.compress(model, plan)
    mm.uncompress(model)
    assert torch.equal(mm.compress(model, "uniform(keep=1.0)")(**given).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("name", ["themselves", "each other", "blocks"])
@pytest.mark.parametrize("layer", [1, 2])
def test_cuts_read_attention_under_the_mask(name: str, layer: int) -> None:
    """fastv keeps what the model's own attention under that mask names, and later layers get its rows and columns."""
    model = build(attention="eager")
    inputs = prompts(model, TWO, seed=2)
    given = {**inputs, "attention_mask": masks(inputs["input_ids"], True)[name]}
    weights = model(**given, output_attentions=True).attentions[layer - 1][0].mean(0)[-1]
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    best = places[weights[places].sort(descending=True, stable=True).indices[:16]].sort().values
    mm.compress(model, f"fastv(layer={layer}, keep=0.5)")
    logits = model(**given).logits[0]
    live = kept(model, inputs, layer=layer)
    assert torch.equal(live[inputs["input_ids"][0, live] == IMAGE], best)
    sdpa = build(attention="sdpa")
    mm.compress(sdpa, f"fastv(layer={layer}, keep=0.5)")
    close(sdpa(**{**inputs, "attention_mask": masks(inputs["input_ids"], False)[name]}).logits[0], logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("plan", "images"),
    [
        ("by_feature(keep=0.5)", 1),
        ("by_feature(keep=0.5)", 2),
        ("by_hidden(layer=2, keep=0.5)", 1),
        ("by_feature(keep=0.6) >> by_hidden(layer=2, keep=0.5)", 1),
    ],
)
def test_a_mask_of_the_caller_in_later_turns(plan: str, images: int) -> None:
    """Cached turns, with an image, of several tokens and of one, under masks of the caller equal one run over everything."""
    model = build()
    first = prompts(model, [[3, "image", 2, "image", 6] if images == 2 else [3, "image", 6]], seed=1)
    more = torch.tensor([[11, 12, 13, 14, 15]])
    n = first["input_ids"].shape[1]
    whole = torch.ones(n + 5, n + 5).tril().bool()
    whole[n:, 1] = False  # the later tokens do not see one of the first, nor some of each other
    whole[n + 2 :, n] = False
    whole[n + 1 :, n - 5 : n - 3] = False
    positions = torch.arange(n + 5)[None]
    mm.compress(model, plan, positions="keep")
    joined = {**first, "input_ids": torch.cat([first["input_ids"], more], 1), "attention_mask": whole[None, None]}
    right = model(**joined, position_ids=positions, use_cache=False).logits[0, n:]
    cache, outs = None, []
    ends = [*([20] if images == 2 else []), n, n + 3, n + 4, n + 5]
    for turn, (a, b) in enumerate(itertools.pairwise([0, *ends])):
        given = {"input_ids": joined["input_ids"][:, a:b], "attention_mask": whole[None, None, a:b, :b]}
        if turn < images:
            given["pixel_values"] = first["pixel_values"][turn : turn + 1]
        out = model(**given, position_ids=positions[:, a:b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outs.append(out.logits[0])
    close(torch.cat(outs[images:]), right)
    assert (
        right - model(**{k: v for k, v in joined.items() if k != "attention_mask"}, use_cache=False).logits[0, n:]
    ).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("plan", ["fastv(layer=2, keep=0.5)", "by_feature(keep=0.6) >> fastv(layer=2, keep=0.5)"])
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_cut_of_a_later_turn_reads_a_layer_that_has_run_under_the_mask(plan: str, seed: int) -> None:
    """A picture in the second turn, of which the last word sees ten cells: no other is kept while one of these is left."""
    model = mm.compress(build(), plan, positions="keep")
    turns = [prompts(model, [[5, "image", 4]], seed=1), prompts(model, [[3, "image", 6]], seed=seed)]
    n, m = (turn["input_ids"].shape[1] for turn in turns)
    mask = torch.ones(n + m, n + m).tril().bool()
    mask[-1, n + 3 + 10 : n + 3 + 16] = False
    given = {name: turns[1][name] for name in ("input_ids", "pixel_values")}
    cache, positions = model(**turns[0]).past_key_values, torch.arange(n, n + m)[None]
    model(**given, past_key_values=cache, attention_mask=mask[None, None, n:], position_ids=positions)
    visual = mm.trace(model).visuals[0]
    entered, left = visual.kept_cells(0), visual.kept_cells(2)
    assert int((left >= 10).sum()) == max(0, len(left) - int((entered < 10).sum()))


@torch.no_grad()
@pytest.mark.parametrize("plan", [*INPUTS, *LAYERS])
@pytest.mark.parametrize("which", [0, 1])
def test_a_hidden_picture_is_as_if_it_were_not_there(plan: str, which: int) -> None:
    """A 2-D mask that hides one of two pictures: as the prompt without it, at the positions that the rest has."""
    model = build()
    inputs = prompts(model, TWO, seed=1)
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].view(2, -1)
    mask = inputs["attention_mask"].clone()
    mask[0, places[which]] = 0
    stock = model(**{**inputs, "attention_mask": mask}).logits
    rest = mask[0].nonzero()[:, 0]
    mm.compress(model, plan, positions="keep")
    out = model(**{**inputs, "attention_mask": mask}).logits[0]
    assert [v.span.index for v in mm.trace(model).visuals] == [1 - which]
    short = model(
        input_ids=inputs["input_ids"][:, rest],
        pixel_values=inputs["pixel_values"][1 - which :][:1],
        position_ids=rest[None],
    ).logits[0]
    close(out[rest], short)
    mm.uncompress(model)
    assert torch.equal(mm.compress(model, "uniform(keep=1.0)")(**{**inputs, "attention_mask": mask}).logits, stock)
    mask[0, places[1 - which, :3]] = 0
    mm.compress(model, plan)
    with pytest.raises(ValueError, match=r"hides 3 of the 16 tokens"):
        model(**{**inputs, "attention_mask": mask})


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("plan", [*INPUTS, "voronoi(keep=0.4)"])
def test_packed_rows_are_as_their_samples_alone(attention: str, positions: str, plan: str) -> None:
    model = build(attention=attention)
    parts: list[list[int | str]] = [[5, "image", 4], [3, "image", 2, "image", 6], [4], [2, "image", 3]]
    alone = [prompts(model, [part], seed=i) for i, part in enumerate(parts)]
    packed = {"input_ids": torch.cat([a["input_ids"] for a in alone], 1)}
    packed["pixel_values"] = torch.cat([a["pixel_values"] for a in alone if "pixel_values" in a])
    packed["position_ids"] = torch.cat([torch.arange(a["input_ids"].shape[1]) for a in alone])[None]
    mm.compress(model, plan, positions=positions)
    together = model(**packed, use_cache=False).logits[0]
    kept_then = [v.kept for v in mm.trace(model).visuals]
    assert len(kept_then) == 4 and max(kept_then) < 16
    start = 0
    for sample in alone:
        length = sample["input_ids"].shape[1]
        one = model(**{k: v for k, v in sample.items() if k != "attention_mask"}, use_cache=False).logits[0]
        text = sample["input_ids"][0] != IMAGE
        close(together[start : start + length][text], one[text], 1e-4)
        start += length


@torch.no_grad()
def test_packed_rows_have_their_own_instructions() -> None:
    """A method that reads the question reads that of the sample."""
    model = build()
    alone = [prompts(model, [part], seed=i) for i, part in enumerate([[5, "image", 4], [3, "image", 6]])]
    packed = {
        name: torch.cat([a[name] for a in alone], 1 if name == "input_ids" else 0)
        for name in ("input_ids", "pixel_values")
    }
    packed["position_ids"] = torch.cat([torch.arange(a["input_ids"].shape[1]) for a in alone])[None]
    mm.compress(model, "cdpruner(keep=0.3)")
    model(**packed, use_cache=False)
    together = [v.kept_cells(0).tolist() for v in mm.trace(model).visuals]
    single = []
    for sample in alone:
        model(**sample)
        single += [v.kept_cells(0).tolist() for v in mm.trace(model).visuals]
    assert together == single


@torch.no_grad()
@pytest.mark.parametrize("plan", LAYERS)
def test_cuts_refuse_packed_rows(plan: str) -> None:
    model = build()
    a, b = (prompts(model, [[n, "image", 4]], seed=n) for n in (5, 3))
    packed = {
        name: torch.cat([a[name], b[name]], 1 if name == "input_ids" else 0) for name in ("input_ids", "pixel_values")
    }
    packed["position_ids"] = torch.cat([torch.arange(x["input_ids"].shape[1]) for x in (a, b)])[None]
    stock = model(**packed, use_cache=False).logits
    mm.compress(model, plan)
    with pytest.raises(NotImplementedError, match="one sample per row"):
        model(**packed, use_cache=False)
    assert torch.equal(mm.compress(model, "fastv(layer=2, keep=1.0)")(**packed, use_cache=False).logits, stock)


@torch.no_grad()
def test_masks_that_cannot_be_carried_are_named() -> None:
    model = build()
    inputs = prompts(model, TWO, seed=1)
    length = inputs["input_ids"].shape[1]
    mm.compress(model, "divprune(keep=0.5)")
    bounds = torch.tensor([0, length], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        model(**inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=length, max_length_k=length)
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, length, length, device="cpu")
    with pytest.raises(NotImplementedError, match="BlockMask"):
        model(**{**inputs, "attention_mask": block})


def paligemma(attention: str) -> Any:
    size = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = transformers.SiglipVisionConfig(
        **size, image_size=28, patch_size=7, projection_dim=64, vision_use_head=False
    )
    text = transformers.GemmaConfig(**size, vocab_size=160, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE, projection_dim=64
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("plan", ["by_feature(keep=0.5)", "divprune(keep=0.25)"])
def test_a_prefix_model_keeps_its_mask(attention: str, pad: int, plan: str) -> None:
    """PaliGemma: the prefix sees itself both ways, the suffix is causal; alone, in a padded batch, and in generate."""
    model = paligemma(attention)
    ids = torch.tensor([[IMAGE] * 16 + [5, 6, 7, 8] + [30, 31, 32, 33]])
    kinds = torch.tensor([[0] * 20 + [1] * 4])
    mask = torch.ones_like(ids)
    if pad:
        ids, kinds, mask = (torch.nn.functional.pad(x, (pad, 0)) for x in (ids, kinds, mask))
    given = {"pixel_values": torch.ones(1, 3, 28, 28), "attention_mask": mask}
    with captured(model) as seen:
        model(input_ids=ids, **given, token_type_ids=kinds)
    mm.compress(model, plan)
    out = model(input_ids=ids, **given, token_type_ids=kinds).logits[0]
    live = kept(model, {"input_ids": ids})
    live = live[mask[0, live] == 1]
    other = ids.clone()
    other[0, -1] = 77
    close(model(input_ids=other, **given, token_type_ids=kinds).logits[0, live[:-1]], out[live[:-1]], 1e-5)
    mm.uncompress(model)
    positions = seen["position_ids"][..., live] if mm.as_pipeline(plan).position_policy() == "keep" else None
    if positions is None:
        positions = seen["position_ids"][..., pad : pad + 1] + torch.arange(len(live))
    hidden = model.model.language_model(
        inputs_embeds=seen["inputs_embeds"][:, live],
        attention_mask=None if seen["attention_mask"] is None else seen["attention_mask"][:, :, live][..., live],
        position_ids=positions, use_cache=False,
    ).last_hidden_state  # fmt: skip
    close(out[live], model.lm_head(hidden)[0])


# ---------------------------------------------------------------------- keywords
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_keywords_of_a_token_follow_it(family: str) -> None:
    """Type ids, per-layer inputs and lists of them come to every layer for the tokens that it has."""
    model = families.build(family)
    inputs = families.prompts(model, family, [[5, families.image(family), 4], [3, families.image(family), 6]])
    ids = inputs["input_ids"]
    numbers = torch.arange(ids.numel()).view(ids.shape)
    seen: dict[int, dict[str, Any]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: seen.__setitem__(i, k), with_kwargs=True)
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    mm.compress(model, "by_feature(keep=0.6) >> by_hidden(layer=2, keep=0.5)")
    handles += [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: seen.__setitem__(i, k), with_kwargs=True)
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    more = {
        "expert_types": numbers, "per_layer": numbers[..., None].expand(*ids.shape, 3), "levels": [numbers, numbers + 1],
        "axes": numbers.expand(4, *ids.shape), "scale": torch.ones(2, 7), "flag": True,
    }  # fmt: skip
    try:
        model(**inputs, **more)
    finally:
        for handle in handles:
            handle.remove()
    record = mm.trace(model).call
    for i in (0, 1, 2, 3):
        group = [g for g in record.groups if g.start <= i][-1]
        expected = numbers.gather(1, group.source)
        assert torch.equal(seen[i]["expert_types"], expected)
        assert torch.equal(seen[i]["per_layer"], expected[..., None].expand(*expected.shape, 3))
        assert torch.equal(seen[i]["levels"][1], expected + 1) and torch.equal(seen[i]["axes"][2], expected)
        assert torch.equal(seen[i]["scale"], torch.ones(2, 7)) and seen[i]["flag"] is True


def test_follow_by_shapes() -> None:
    index = torch.tensor([[0, 2], [1, 3]])
    x = torch.arange(8).view(2, 4)
    expected = torch.tensor([[0, 2], [5, 7]])
    assert torch.equal(follow(x, index, 4, "x"), expected)
    assert torch.equal(follow(x[None, :, :, None], index, 4, "x"), expected[None, :, :, None])
    assert torch.equal(follow(x[:1], index, 4, "x"), torch.tensor([[0, 2], [1, 3]]))
    assert follow({"a": (x, None)}, index, 4, "x")["a"][1] is None
    kept_as_it_is = torch.zeros(2, 5)
    assert follow(kept_as_it_is, index, 4, "x") is kept_as_it_is
    assert torch.equal(follow(torch.arange(4), index[:1], 4, "x"), torch.tensor([0, 2]))
    for shape in ((4, 9), (8, 9), (4,)):
        with pytest.raises(NotImplementedError, match=r"^types of shape .*without a batch dimension"):
            follow(torch.zeros(shape), index, 4, "types")


def test_a_sample_whose_first_token_goes_begins_with_number_zero() -> None:
    places = torch.tensor([[0, -1, 2, -1, 4, 5]])
    samples = torch.tensor([[0, 0, 0, 1, 1, 1]])
    numbers, _ = renumbered(torch.tensor([[0, 1, 2, 0, 1, 2]]), places, pack(places, [4]), None, True, samples)
    assert numbers.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted_among_what_has_gone(side: str) -> None:
    row, places, real = [0, 1, 2], [0, -1, 2], [True] * 3
    fill = {"left": ([1, 1], [-1, -1], [False] * 2), "right": ([], [], [])}[side]
    more = {"left": ([], [], []), "right": ([1, 1], [-1, -1], [False] * 2)}[side]
    numbers, at, valid = (torch.tensor([a + b + c]) for a, b, c in zip(fill, (row, places, real), more, strict=True))
    at = at + 2 * (side == "left") * (at >= 0)
    found, gone = renumbered(numbers, at, pack(at, [2]), valid, True)
    assert found.tolist() == [[0, 1]] and gone is not None and gone.tolist() == [1]


def test_a_visual_is_that_of_its_own_encoder_call() -> None:
    calls = [Encoded("image", [Layout.raster(1, 1, n) for n in sizes]) for sizes in ((1, 2), (3,), (4, 5))]
    calls[1].modality = "video"
    for number, found in {0: (calls[0], 0), 1: (calls[0], 1), 2: (calls[2], 0), 3: (calls[2], 1)}.items():
        span: Any = SimpleNamespace(modality="image", index=number)
        assert Call.origin(SimpleNamespace(encoded=calls), span) == found  # type: ignore[arg-type]


# ---------------------------------------------------------------------- losses
@pytest.mark.parametrize("plan", [*INPUTS, "fastv(layer=2, keep=0.5)", "tome(keep=0.5) >> visionzip(keep=0.5)"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_label_behind_a_picture_is_predicted_by_the_last_token_left(plan: str, side: str) -> None:
    model = build()
    inputs = prompts(model, [[3, "image", 4], [1, "image", 5]], seed=1, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    first = [int((row == IMAGE).nonzero()[-1, 0]) + 1 for row in inputs["input_ids"]]
    for row, at in enumerate(first):
        labels[row, at] = inputs["input_ids"][row, at]
    mm.compress(model, plan, positions="keep")
    last = model.model.language_model.norm
    packed: list[Tensor] = []
    handle = last.register_forward_hook(lambda m, a, o: packed.append(o))
    out = model(**inputs, labels=labels)
    handle.remove()
    group = mm.trace(model).call.groups[-1]
    expected = []
    for row, at in enumerate(first):
        slot = int((group.source[row] == at).nonzero()[-1, 0]) - 1  # what stands before the word in the packed row
        assert inputs["input_ids"][row, group.source[row, slot]] == IMAGE
        logits = model.lm_head(packed[0][row, slot])
        expected.append(torch.nn.functional.cross_entropy(logits[None], labels[row, at][None]))
    close(out.loss, torch.stack(expected).mean(), 1e-4)
    assert abs(out.loss.item() - math.log(160)) > 0.01
    out.loss.backward()
    seen = [p for n, p in model.named_parameters() if "multi_modal" in n or ("q_proj" in n and "language" in n)]
    assert seen and all(float(p.grad.abs().sum()) > 0 for p in seen)


@pytest.mark.parametrize("plan", ["divprune(keep=0.5)", "fastv(layer=2, keep=0.5)", "pairs_mean(keep=0.5)"])
@pytest.mark.parametrize("shift", [False, True])
def test_labels_that_are_visual_tokens_do_not_count(plan: str, shift: bool) -> None:
    """Labels at the tokens themselves, and (`shift_labels`) at those before them."""
    model = build()
    inputs = prompts(model, TWO, seed=1)

    def loss(labels: Tensor) -> Tensor:
        ahead = {"shift_labels": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]} if shift else {}
        return model(**inputs, labels=labels, **ahead).loss

    ids = inputs["input_ids"]
    mm.compress(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = loss(ids.masked_fill(ids == IMAGE, -100))
    mm.compress(model, plan)
    with pytest.warns(UserWarning, match="labels hold visual tokens"):
        assert torch.equal(loss(ids), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(loss(ids), right)


# ---------------------------------------------------------------------- what nothing would be done about
@torch.no_grad()
def test_features_among_embeddings_are_warned_about() -> None:
    model = build()
    inputs = prompts(model, [[5, "image", 4]])
    features = torch.cat(list(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], features)
    mm.compress(model, "uniform(keep=0.25)")
    with pytest.warns(UserWarning, match="inputs_embeds came without pixels"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, and not for a step of decoding
        model(inputs_embeds=embeds[:, :1])


@torch.no_grad()
def test_pixels_on_another_road_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    inputs = prompts(model, [[5, "image", 4]])
    original = model.model.get_image_features
    mm.compress(model, "uniform(keep=0.25)")
    monkeypatch.setitem(model.model.__dict__, "get_image_features", original)
    with pytest.raises(
        NotImplementedError, match="pixel_values was given, but LlavaModel did not encode it by get_image_features"
    ):
        model(**inputs)


@torch.no_grad()
def test_layers_that_read_positions_get_them() -> None:
    """Ministral 3 scales queries by position: the positions of the tokens that a layer has come with them."""
    text = getattr(transformers, "Ministral3Config", None)
    if text is None:
        pytest.skip("this transformers has no Ministral 3")
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads pad_token_id"
    sizes = {name: getattr(text_config(), name) for name in names.split()}
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    model = build(text=text(**sizes, head_dim=16, sliding_window=None, rope_parameters=rope))
    inputs = prompts(model, [[5, "image", 4]])
    with captured(model) as seen:
        model(**inputs)
    for plan in ("by_feature(keep=0.5)", "by_hidden(layer=2, keep=0.5)"):
        mm.compress(model, plan, positions="keep")
        cached, plain = (model(**inputs, use_cache=use).logits[0] for use in (True, False))
        live = kept(model, inputs, layer=3)
        mm.uncompress(model)
        close(cached, plain, 1e-4)
        if plan.startswith("by_feature"):
            hidden = model.model.language_model(
                inputs_embeds=seen["inputs_embeds"][:, live],
                position_ids=live[None],
                attention_mask=torch.ones(1, len(live)),
            ).last_hidden_state
            close(plain[live], model.lm_head(hidden)[0])
    mm.compress(model, "by_feature(keep=0.5)")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"flash_attention_2 takes gaps .* use attn_implementation='sdpa'"):
        model(**inputs)
