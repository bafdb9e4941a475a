# SPDX-License-Identifier: Apache-2.0
"""Hooks follow the model: modules replaced, copied or wrapped after `compress`, bodies without a head, threads, replayed blocks."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmcompress as mm

from . import families, tiny
from .families import FAMILIES
from .tiny import GREEDY, build, prompts

peft = pytest.importorskip("peft")

OF_ENCODER = ("visionzip(keep=0.5)", "tome(keep=0.5)", "prumerge(keep=0.5)", "downsample(keep=0.25)")
PLANS = (*OF_ENCODER, "fastv(layer=2, keep=0.5)", "sparsevlm(keep=0.5)", "tome(keep=0.5) >> visionzip(keep=0.5)")
TURN: list[list[int | str]] = [[5, "image", 4]]


def spread(model: nn.Module, part: str) -> None:
    """Other weights in parameters whose names have `part`."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    targets = options.pop("targets", ["q_proj", "k_proj", "v_proj"])
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    found = peft.get_peft_model(model, config).eval()
    spread(found, "modules_to_save")
    return found


def answers(model: Any, inputs: dict[str, Tensor], by: str) -> Tensor:
    if by == "forward":
        return model(**inputs).logits
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def kept(model: Any) -> list[tuple[int, list[int]]]:
    """Of each visual of the last call: tokens that enter the LLM, and those that are left before its last layer."""
    return [(v.kept, v.kept_cells(tiny.LAYERS - 1).tolist()) for v in mm.trace(model).visuals]


def hooks_of(model: nn.Module) -> list[Any]:
    """Hooks that are not of transformers itself, which records outputs by hooks that stay."""
    all_ = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [hook for hook in all_ if "output_captur" not in getattr(hook, "__qualname__", "")]


# ---------------------------------------------------------------------- modules replaced after compress
@torch.no_grad()
@pytest.mark.parametrize("by", ["forward", "generate"])
@pytest.mark.parametrize("plan", PLANS)
def test_lora_put_on_merged_and_unloaded_after_compress(plan: str, by: str) -> None:
    """The same as if it had been done before, at every step of the way; unloaded, the model is the first one again."""
    inputs = prompts(build(), TURN)
    first = answers(mm.compress(build(), plan), inputs, by)
    expected = mm.compress(with_lora(build()), plan)
    right = answers(expected, inputs, by)
    assert (right - first).abs().max() > 0.1  # LoRA does change the model
    model = mm.compress(build(), plan)
    answers(model, inputs, by)
    adapted = with_lora(model)
    assert torch.equal(answers(adapted, inputs, by), right)
    assert kept(adapted) == kept(expected) == kept(model)
    bare = adapted.unload()
    assert torch.equal(answers(bare, inputs, by), first)
    merged = with_lora(bare).merge_and_unload()
    assert (answers(merged, inputs, by) - right).abs().max() < 1e-3
    assert kept(merged) == kept(expected)
    mm.uncompress(merged)
    assert not hooks_of(merged)


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [
        ["multi_modal_projector"],
        ["vision_tower"],
        ["language_model"],
        ["mlp", "layer_norm2"],
        ["self_attn"],
        ["k_proj"],
        ["layers.1"],
    ],
)
@pytest.mark.parametrize("plan", [*PLANS[:3], "fastv(layer=2, keep=0.5)"])
def test_modules_to_save_are_hooked_and_their_copies_are_not(plan: str, copied: list[str]) -> None:
    """PEFT copies modules with their hooks: nothing of engine and model may come along, and the copy is what runs."""
    inputs = prompts(build(), TURN)

    targets = ["o_proj", "out_proj"] if "mlp" in copied else ["fc1", "down_proj"]

    def put(model: Any) -> Any:
        return with_lora(model, targets=targets, modules_to_save=copied)

    expected = mm.compress(put(build()), plan)
    right = expected(**inputs).logits
    model = mm.compress(build(), plan)
    first, count = model(**inputs).logits, sum(1 for _ in put(build()).modules())
    adapted = put(model)
    assert sum(1 for _ in adapted.modules()) == count
    assert torch.equal(adapted(**inputs).logits, right) and kept(adapted) == kept(expected)
    assert (right - first).abs().max() > 0.1
    with adapted.disable_adapter():  # the originals run again
        assert torch.equal(adapted(**inputs).logits, first)
    mm.uncompress(adapted)
    assert not hooks_of(adapted)


class Swapped(nn.Module):
    """A Linear by another class, as quantisation puts it in, with other weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.mul(8).round() / 8), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def swap_linears(model: Any) -> None:
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Swapped(child))


def other_layer(model: Any) -> None:
    model.model.language_model.layers[1] = copy.deepcopy(model.model.language_model.layers[1])
    spread(model.model.language_model.layers[1], "proj")


def other_tower(model: Any) -> None:
    model.model.vision_tower = build(seed=9).model.vision_tower


def other_language_model(model: Any) -> None:
    model.model.language_model = build(seed=9).model.language_model


def other_layers(model: Any) -> None:
    model.model.vision_tower.encoder.layers = build(seed=9).model.vision_tower.encoder.layers


def other_attention(model: Any) -> None:
    model.model.vision_tower.encoder.layers[2].self_attn = build(seed=9).model.vision_tower.encoder.layers[2].self_attn


def other_body(model: Any) -> None:
    model.model = build(seed=9).model


SWAPS = (swap_linears, other_layer, other_tower, other_language_model, other_layers, other_attention, other_body)


@torch.no_grad()
@pytest.mark.parametrize("by", ["forward", "generate"])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    "plan", ["tome(keep=0.5) >> visionzip(keep=0.5) >> fastv(layer=2, keep=0.5)", "downsample(keep=0.25)"]
)
def test_replaced_modules_are_found(plan: str, swap: Callable[[Any], None], by: str) -> None:
    if swap is other_body and by == "generate":
        pytest.skip("the features are encoded before the model is called: see the next test")
    inputs = prompts(build(), TURN)
    expected = build()
    swap(expected)
    right = answers(mm.compress(expected, plan), inputs, by)
    model = mm.compress(build(), plan)
    if swap is not other_layers:  # transformers records hidden states by hooks of its own on the first layers
        answers(model, inputs, by)
    swap(model)
    assert torch.equal(answers(model, inputs, by), right)
    assert kept(model) == kept(expected)
    mm.uncompress(model)
    assert not hooks_of(model) and "get_image_features" not in model.model.__dict__


@torch.no_grad()
@pytest.mark.skipif(tiny.OLDEST, reason="transformers 5.17 encodes in the forward pass")
def test_features_of_another_body_are_refused() -> None:
    model = mm.compress(build(), "uniform(keep=0.5)")
    other_body(model)
    with pytest.raises(NotImplementedError, match="not made by this compressed model"):
        model.generate(**prompts(model, TURN), **GREEDY)


@torch.no_grad()
def test_what_cannot_be_found_again_raises_until_it_is_compressed_again() -> None:
    model = mm.compress(build(), "tome(keep=0.5)")
    inputs = prompts(model, TURN)
    stock = build()
    text = tiny.text_config(num_hidden_layers=1)
    one_layer = build(text=text).model.language_model
    mm.compress(model, "fastv(layer=2, keep=0.5)")
    model(**inputs)
    model.model.language_model = one_layer  # too short for the cut
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"replaced after compress.*fastv.*compress\(model, plan\) again"):
            model(**inputs)
        with pytest.raises(RuntimeError, match="replaced after compress"):
            model.generate(**inputs, **GREEDY)
    mm.uncompress(model)
    assert not hooks_of(model)
    model.model.language_model = stock.model.language_model
    assert torch.equal(model(**inputs).logits, build()(**inputs).logits)


@torch.no_grad()
def test_a_later_turn_finds_replaced_layers() -> None:
    """A text-only turn on a pruned cache: the language model is another object, with the same weights."""
    model, other = (mm.compress(build(), "visionzip(keep=0.5)") for _ in range(2))
    inputs = prompts(model, TURN)
    found = []
    for m in (model, other):
        out = m.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        if m is other:
            m.model.language_model = copy.deepcopy(m.model.language_model)
        ids = torch.cat([out.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": out.past_key_values}
        found.append(m.generate(**turn, **GREEDY))
    assert torch.equal(*found)


def test_layers_that_come_beside_are_seen() -> None:
    """A layer more changes what a part of the depth means, though every layer that was there is there."""
    model = mm.compress(build(), "fastv(layer=0.5, keep=0.5)")
    engine = model._mmcompress_engine
    assert not engine.moved
    model.model.language_model.layers.append(copy.deepcopy(model.model.language_model.layers[0]))
    assert engine.moved


@torch.no_grad()
def test_steps_and_text_do_not_look() -> None:
    model = mm.compress(build(), "visionzip(keep=0.5)")
    places, looks = model._mmcompress_engine.places, []
    changed = places.changed
    places.changed = lambda: looks.append(1) or changed()
    model.generate(**prompts(model, TURN), do_sample=False, max_new_tokens=9)
    assert 1 <= len(looks) <= 2
    looks.clear()
    model.generate(**prompts(model, [[7]]), **GREEDY)
    assert not looks


@torch.no_grad()
def test_the_plan_from_before_is_put_back_on_the_modules_of_now() -> None:
    model = mm.compress(build(), "visionzip(keep=0.5)")
    inputs = prompts(model, TURN)
    with mm.compressed(model, "uniform(keep=0.25)"):
        other_tower(model)
    expected = build()
    other_tower(expected)
    assert torch.equal(model(**inputs).logits, mm.compress(expected, "visionzip(keep=0.5)")(**inputs).logits)


# ---------------------------------------------------------------------- nothing is skipped in silence
def by_weights(attention: Any) -> Callable[..., Any]:
    """The forward pass of an attention module that uses the weights of its projections, not the modules."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (
            nn.functional.linear(hidden_states, p.weight, p.bias)
            .unflatten(-1, (attention.num_heads, -1))
            .transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attention.out_proj(mixed), None

    return forward


@torch.no_grad()
@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("visionzip(keep=0.5)", "q 2 was not recorded"),
        ("prumerge(keep=0.5)", "q 3 was not recorded"),
        ("tome(keep=0.5)", "has to merge tokens in the vision encoder, but saw no keys in block 0"),
    ],
)
def test_what_was_asked_for_and_not_recorded_raises(plan: str, words: str) -> None:
    model = build()
    inputs = prompts(model, TURN)
    stock = model(**inputs).logits
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.forward = by_weights(layer.self_attn)
    assert (model(**inputs).logits - stock).abs().max() < 1e-3
    mm.compress(model, plan)
    with pytest.raises(RuntimeError, match=f"{words}.*again"):
        model(**inputs)
    mm.uncompress(model)
    assert (model(**inputs).logits - stock).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "downsample(keep=0.25)"])
def test_a_tower_that_runs_past_its_hooks_raises(plan: str) -> None:
    model = build()
    inputs = prompts(model, TURN)
    model(**inputs)
    mm.compress(model, plan)
    model.model.__dict__["vision_tower"] = (
        model.model.vision_tower.forward
    )  # found before the module, which keeps its place
    with pytest.raises(RuntimeError, match=r"again|as a whole"):
        model(**inputs)


@torch.no_grad()
def test_a_language_model_that_runs_past_its_hooks_raises() -> None:
    model = mm.compress(build(), "uniform(keep=0.5) >> fastv(layer=2, keep=0.5)")
    inputs = prompts(model, TURN)
    model.model.language_model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match=r"layer 2 of the language model ran past its hooks.*again"):
        model(**inputs)
    mm.compress(model, "uniform(keep=0.5)")
    model(**inputs)
    model.model.language_model._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match=r"uniform.*: the language model ran past its hooks"):
        model(**inputs)
    mm.compress(model, "uniform(keep=0.5)")
    model(**inputs)
    assert mm.trace(model).visuals[0].kept == 8


# ---------------------------------------------------------------------- copies
@torch.no_grad()
@pytest.mark.parametrize(
    "plan", ["tome(keep=0.5) >> visionzip(keep=0.5) >> fastv(layer=2, keep=0.5)", "uniform(keep=0.5)"]
)
def test_copies_of_a_compressed_model(plan: str) -> None:
    model = mm.compress(build(), plan)
    file = io.BytesIO()
    torch.save(model, file)  # before transformers puts in its own hooks, which do not pickle
    file.seek(0)
    inputs = prompts(model, TURN)
    right = model(**inputs).logits
    again = torch.load(file, weights_only=False)
    twice = copy.deepcopy(copy.deepcopy(model))
    for parameter in model.parameters():
        parameter.zero_()
    for other in (again, twice):
        assert (answers(other, inputs, "generate")[0] - right[:, -1]).abs().max() < 1e-4
        assert torch.equal(other(**inputs).logits, right)
        assert kept(other) == kept(model) and mm.report(other).plan == mm.report(model).plan
        mm.uncompress(other)
        assert not hooks_of(other) and "get_image_features" not in other.model.__dict__
    assert hooks_of(model)


@torch.no_grad()
def test_the_copy_of_a_part_has_nothing_of_the_engine() -> None:
    model = mm.compress(build(), "tome(keep=0.5) >> visionzip(keep=0.5)")
    inputs = prompts(model, TURN)
    pixels, stock = inputs["pixel_values"], build()
    tower = copy.deepcopy(model.model.vision_tower)
    assert torch.equal(tower(pixels).last_hidden_state, stock.model.vision_tower(pixels).last_hidden_state)
    body = copy.deepcopy(model.model)
    assert torch.equal(body(**inputs).last_hidden_state, stock.model(**inputs).last_hidden_state)
    with pytest.raises(ValueError, match="not compressed"):
        mm.trace(body)
    mm.compress(body, "uniform(keep=0.5)")
    body(**inputs)
    assert mm.trace(body).visuals[0].kept == 8
    with pytest.raises(ValueError, match="no call"):
        mm.trace(model)


# ---------------------------------------------------------------------- wrappers and bodies
def wrapped_by(name: str, model: Any) -> Any:
    if name == "compile":
        return torch.compile(model, backend="eager")
    if name == "data parallel":
        return nn.DataParallel(model)
    if name == "averaged":
        return torch.optim.swa_utils.AveragedModel(model)
    if name == "peft":
        return with_lora(model)
    return torch.compile(nn.DataParallel(with_lora(model)), backend="eager")


@torch.no_grad()
@pytest.mark.parametrize("name", ["compile", "data parallel", "averaged", "peft", "all"])
def test_one_engine_for_a_wrapper_and_what_is_inside(name: str) -> None:
    """Compressed by the wrapper, asked by what is inside and by its body, taken out by any of them."""
    inputs = prompts(build(), TURN)
    wrapper = wrapped_by(name, build())
    inside = (
        getattr(wrapper, "module", getattr(wrapper, "_orig_mod", wrapper))
        if name != "peft"
        else wrapper.get_base_model()
    )
    if name == "all":
        inside = wrapper._orig_mod.module.get_base_model()
    stock = inside(**inputs).logits
    mm.compress(wrapper, "uniform(keep=0.5)")
    right = inside(**inputs).logits
    assert (right - stock).abs().max() > 0.1
    for asked in (wrapper, inside, inside.model):
        assert mm.trace(asked).visuals[0].kept == 8
    mm.compress(inside.model, "uniform(keep=0.25)")  # instead of the plan from before, not on top
    inside(**inputs)
    assert mm.trace(wrapper).visuals[0].kept == 4
    with mm.compressed(wrapper, "uniform(keep=0.5)"):
        assert torch.equal(inside(**inputs).logits, right)
    inside(**inputs)
    assert mm.trace(inside).visuals[0].kept == 4
    mm.uncompress(inside)
    assert torch.equal(inside(**inputs).logits, stock) and not hooks_of(inside)
    with pytest.raises(ValueError, match="not compressed"):
        mm.trace(wrapper)


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_wrapper_runs_compressed() -> None:
    inputs = prompts(build(), TURN)
    right = mm.compress(build(), "visionzip(keep=0.5)")(**inputs).logits
    torch._dynamo.reset()
    wrapper = mm.compress(torch.compile(build(), backend="eager"), "visionzip(keep=0.5)")
    assert (wrapper(**inputs).logits - right).abs().max() < 1e-4
    assert mm.trace(wrapper).visuals[0].kept == 8


@torch.no_grad()
@pytest.mark.parametrize("plan", ["uniform(keep=0.5)", "tome(keep=0.5)", "fastv(layer=2, keep=0.5)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_is_compressed_as_the_model(family: str, plan: str) -> None:
    model = families.build(family)
    inputs = families.prompts(model, family, [[4, families.image(family), 3, families.image(family, True), 2]])
    with mm.compressed(model, plan):
        right = model(**inputs).logits
    stock = model.model(**inputs).last_hidden_state
    mm.compress(model.model, plan)
    assert torch.equal(model.lm_head(model.model(**inputs).last_hidden_state), right)
    mm.uncompress(model.model)
    assert torch.equal(model.model(**inputs).last_hidden_state, stock) and not hooks_of(model)


def test_what_needs_the_head_is_refused_on_a_body() -> None:
    model = build()
    with pytest.raises(NotImplementedError, match=r"explain_compress.*LlavaModel has no language model head"):
        mm.compress(model.model, "explain_compress(keep=0.5, mode='oracle')")
    mm.compress(model, "explain_compress(keep=0.5, mode='oracle')")


# ---------------------------------------------------------------------- arguments as wide as those of the stock model
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda sizes: sizes.tolist(),
    "tuples": lambda sizes: tuple(map(tuple, sizes.tolist())),
    "tensors": list,
    "array": lambda sizes: sizes.numpy(),
    "int32": lambda sizes: sizes.int(),
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
def test_image_sizes_in_every_form_of_the_stock_model(family: str, form: str) -> None:
    model = families.build(family)
    inputs = families.prompts(model, family, [[4, families.image(family), 3, families.image(family, True), 2]])
    given = {**inputs, "image_sizes": FORMS[form](inputs["image_sizes"])}
    stock = model(**inputs).logits
    assert torch.equal(mm.compress(model, "uniform(keep=1.0)")(**given).logits, stock)
    mm.compress(model, "tome(keep=0.5)")
    right = model(**inputs).logits
    assert torch.equal(model(**given).logits, right)
    by_position = model.model.get_image_features(given["pixel_values"], given["image_sizes"])
    assert by_position.mmcompress.left == [v.kept for v in mm.trace(model).visuals]


@torch.no_grad()
@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "downsample(keep=0.25)"])
def test_positional_arguments_of_a_tower(plan: str) -> None:
    model = families.build("qwen2_vl")
    inputs = families.prompts(model, "qwen2_vl", [[4, families.image("qwen2_vl"), 3]])
    mm.compress(model, plan)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    named = model.model.visual(pixels, grid_thw=grid).pooler_output
    assert torch.equal(model.model.visual(pixels, grid).pooler_output, named)
    assert torch.equal(model.model.get_image_features(pixels, grid).pooler_output[0], named)


@torch.no_grad()
def test_the_feature_layers_of_the_config_may_be_named_in_a_call() -> None:
    model = build(vision_feature_layer=[-2, -1])
    mm.compress(model, "visionzip(keep=0.5)")
    pixels = prompts(model, TURN)["pixel_values"]
    given = model.model.get_image_features(pixels, vision_feature_layer=(-2, -1))
    assert "mmcompress" in given.__dict__ or hasattr(given, "mmcompress")
    with pytest.raises(NotImplementedError, match="vision_feature_layer"):
        model.model.get_image_features(pixels, vision_feature_layer=[-2, -3])


# ---------------------------------------------------------------------- the state of a call of the encoder
ENCODERS = [
    ("llava", "tome(keep=0.5) >> visionzip(keep=0.5)"),
    ("llava_onevision", "tome(keep=0.5)"),
    ("qwen2_5_vl", "downsample(keep=0.25)"),
    ("internvl", "tome(keep=0.5)"),
    ("llava_next", "downsample(keep=0.25)"),
]


def shown(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All that one call of the encoder gives."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    output = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    found = output.mmcompress
    tensors = [
        *output.pooler_output,
        *(found.clusters or []),
        torch.tensor([found.left or [0], found.merged or [0]][0]),
    ]
    return tensors + [values for name in sorted(found.signals) for values in found.signals[name]]


@torch.no_grad()
@pytest.mark.parametrize(("family", "plan"), ENCODERS)
def test_eight_threads_on_one_encoder(family: str, plan: str) -> None:
    model = mm.compress(families.build(family), plan)
    samples = [[[4, families.image(family, bool(i % 2)), 3, *([families.image(family)] * (i // 2))]] for i in range(4)]
    cases = [families.prompts(model, family, sample, seed=i) for i, sample in enumerate(samples)]
    right = [shown(model, case) for case in cases]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn in range(8):
            i = (number + turn) % len(cases)
            try:
                with torch.no_grad():
                    found = shown(model, cases[i])
                if not all(torch.equal(a, b) for a, b in zip(found, right[i], strict=True)):
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradients(model: Any, batches: list[dict[str, Tensor]], order: list[int]) -> dict[str, Tensor]:
    """Forward passes of all batches, then their backward passes in an order."""
    model.zero_grad()
    losses = [model(**batch, use_cache=False).logits.square().mean() for batch in batches]
    for i in order:
        losses[i].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_replayed_blocks_merge_as_they_did(family: str, order: list[int], reentrant: bool) -> None:
    """Two batches of different pictures, both forward before any backward: each replay is of its own batch."""
    model = mm.compress(families.build(family), "tome(keep=0.5)").train()
    samples = [[[4, families.image(family), 3]], [[4, families.image(family, True), 2, families.image(family), 3]]]
    batches = [families.prompts(model, family, sample, seed=i) for i, sample in enumerate(samples)]
    expected = gradients(model, batches, order)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    tower = model._mmcompress_engine.adapter.tower
    tower.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    runs: list[int] = []
    block = model._mmcompress_engine.adapter.blocks[1]
    block.norm.register_forward_hook(lambda module, args, output: runs.append(output.shape[-2]))
    found = gradients(model, batches, order)
    merged = runs[:2]
    assert len(runs) == 4 and runs[2:] == [merged[i] for i in order]  # replayed, on as few tokens
    assert any("vis" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 + 1e-4 * expected[name].abs().max()
    with torch.no_grad():
        model.eval()(**batches[0])
    assert not model._mmcompress_engine.facade.inputs  # nothing is kept of graphs that are gone


def test_a_block_outside_of_a_call_raises() -> None:
    model = mm.compress(build(), "tome(keep=0.5)")
    layer = model.model.vision_tower.encoder.layers[1]
    with pytest.raises(RuntimeError, match="outside of a call of the encoder"):
        layer(torch.randn(1, 17, 32), None)
    model(**prompts(model, TURN))
    with pytest.raises(RuntimeError, match="outside of a call of the encoder"):
        layer(torch.randn(1, 17, 32), None)
