# SPDX-License-Identifier: Apache-2.0
"""LLaVA on many language models: what cuts read of attention is what the model's own eager attention says, whatever its form."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mmcompress as mm
from mmcompress.runtime.probe import Forms, recorded

from . import tiny

LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 4,
}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 4}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Llama wide": {"head_dim": 24}, "Gemma": {}, "Gemma2": FULL, "Granite": {"attention_multiplier": 0.3},
    "Cohere": {"use_qk_norm": True}, "Cohere2": FULL, "Helium": {}, "Ernie4_5": {}, "Phi": {"qk_layernorm": True},
    "Phi3": {"sliding_window": None}, "Glm": {}, "Glm4": {}, "Olmo2": {}, "StableLm": {"qk_layernorm": True}, "Nemotron": {},
    "GptOss": FULL, "SmolLM3": {"no_rope_layers": [1, 0, 0, 1]}, "Qwen3": {}, "DeepseekV3": LATENT, "Persimmon": {},
    "Starcoder2": {"sliding_window": None}, "HunYuanDenseV1": {}, "Mistral": {"sliding_window": None}, "Exaone4": FULL,
    "Ministral3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 2.0,
        },
    },
}  # fmt: skip
SIMPLE = [kind for kind in KINDS if kind not in ("Gemma2", "GptOss")]
"""Those without soft-capped logits or sinks."""


SEEN: dict[str, Tensor] = {}


@mm.register("looking")
class Looking(mm.FastV):
    """Notes what it is shown."""

    needs = ("text_attention_heads", "text_attention@next", "key_norms")

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN.update(visuals.signals)
        return mm.Selection.top(visuals["key_norms"], visuals.k)


@mm.register("redoing")
class Redoing(mm.CMAI):
    """Puts computed rows in the place of the kernel's, and changes nothing else."""

    def rewriting(self, rows: Any) -> Any:
        return lambda weights, part: (weights, torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool))


def build(kind: str, attention: str = "eager", **options: Any) -> Any:
    """A tiny LLaVA on a language model, with norms that are not all one, so that a forgotten one shows."""
    changes = KINDS[kind]
    made = getattr(transformers, kind.partition(" ")[0] + "Config")
    sizes = {**tiny.text_config().to_diff_dict(), "head_dim": 16} | changes
    for name in ("model_type", "transformers_version", "architectures"):
        sizes.pop(name, None)
    if kind == "DeepseekV3":
        sizes.pop("head_dim")
    model = tiny.build(text=made(**sizes), attention=attention, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.model.language_model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.data *= torch.rand(parameter.shape, generator=generator).to(parameter) + 0.5
        elif parameter.dim() == 1:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def chosen(model: Any, plan: str, layer: int, inputs: dict[str, Tensor], **more: Any) -> list[Tensor]:
    """Cells that each visual keeps at a cut."""
    mm.compress(model, plan)
    model(**inputs, **more)
    found = [visual.kept_cells(layer) for visual in mm.trace(model).visuals]
    mm.uncompress(model)
    return found


def best(scores: Tensor, ids: Tensor, k: int) -> Tensor:
    """The k visual tokens with the highest scores [S], as cells."""
    return scores[ids == tiny.IMAGE].topk(k).indices.sort().values


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cuts_keep_what_the_models_own_attention_names(kind: str) -> None:
    """A padded batch, by fastv, pyramiddrop and dart, with a cache and without."""
    model = build(kind)
    inputs = tiny.prompts(model, [[5, "image", 4], [3, "image", 9]], seed=1)
    out = model(**inputs, output_attentions=True, use_cache=True)
    for row, ids in enumerate(inputs["input_ids"]):
        one = tiny.single(inputs, row, [1, 1])
        for cached in (True, False):
            wanted = best(out.attentions[1][row].float().mean(0)[-1], ids, 8)
            assert torch.equal(chosen(model, "fastv(layer=2, keep=0.5)", 2, inputs, use_cache=cached)[row], wanted)
            assert torch.equal(chosen(model, "fastv(layer=2, keep=0.5)", 2, one, use_cache=cached)[0], wanted)
            plan = "pyramiddrop(layers=(1, 3), ratios=(0.5, 0.25))"  # reads the layer behind the cut
            wanted = best(out.attentions[1][row].float().mean(0)[-1], ids, 8)
            assert torch.equal(chosen(model, plan, 1, inputs, use_cache=cached)[row], wanted)
    lengths = {
        len(cells) for cached in (True, False) for cells in chosen(model, "dart(keep=0.5)", 2, inputs, use_cache=cached)
    }
    assert lengths == {8}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_and_keys_equal_those_of_the_module(kind: str) -> None:
    """sparsevlm's words, the first attention, and the norms of keys, in a later turn too."""
    model = build(kind)
    language = model.model.language_model
    inputs = tiny.prompts(model, [[5, "image", 4]], seed=1)
    ids = inputs["input_ids"][0]
    maps = model(**inputs, output_attentions=True).attentions
    text = torch.arange(len(ids) - 4, len(ids))
    mm.compress(model, Looking(layer=2, keep=0.5))
    model(**inputs)
    seen = dict(SEEN)
    at = (ids == tiny.IMAGE).nonzero()[:, 0]
    torch.testing.assert_close(
        seen["text_attention_heads"][0], maps[1][0][:, text][..., at].float(), rtol=1e-4, atol=1e-6
    )
    wanted = maps[2][0][:, text][..., at].float().mean(0)
    torch.testing.assert_close(seen["text_attention@next"][0], wanted, rtol=1e-4, atol=1e-6)
    mm.uncompress(model)
    states = {}
    attention = language.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda m, a, k: states.update(k), with_kwargs=True)
    model(**inputs)
    handle.remove()
    keys = recorded(attention, states["hidden_states"], states["position_embeddings"], states.get("position_ids")).k
    torch.testing.assert_close(seen["key_norms"][0], keys.float().abs().sum((1, 3))[0, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_second_turn_reads_cached_keys_as_the_module_does(kind: str) -> None:
    """A text turn first, then a picture: nothing of the cache is pruned, so the whole is what stock makes of it."""
    model = build(kind)
    inputs = tiny.prompts(model, [[6, 5, "image", 4]], seed=2)
    first, ids = inputs["input_ids"][:, :6], inputs["input_ids"]
    maps = model(**inputs, output_attentions=True).attentions
    mm.compress(model, "fastv(layer=2, keep=0.5)")
    cache = model(input_ids=first, use_cache=True).past_key_values
    later = {
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
        "past_key_values": cache,
    }
    model(input_ids=ids[:, 6:], use_cache=True, **later)
    wanted = best(maps[1][0].float().mean(0)[-1], ids[0], 8)
    assert torch.equal(mm.trace(model).visuals[0].kept_cells(2), wanted)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_signals_of_all_rows(kind: str) -> None:
    """fastv(query='all') means over all rows: right, or refused by name where logits are no plain products."""
    model = build(kind)
    inputs = tiny.prompts(model, [[5, "image", 4]], seed=1)
    plan = "fastv(layer=2, keep=0.5, query='all')"
    if kind not in SIMPLE:
        with pytest.raises(
            NotImplementedError, match=rf"fastv.*layer 1.*{kind}Attention.*caps its logits or has sinks"
        ):
            mm.compress(model, plan)
        return
    weights = model(**inputs, output_attentions=True).attentions[1][0].float().mean((0, 1))
    assert torch.equal(chosen(model, plan, 2, inputs)[0], best(weights, inputs["input_ids"][0], 8))


@pytest.mark.parametrize("kind", ["Cohere", "Helium", "Phi", "Nemotron", "Glm4", "GptOss", "Olmo2", "Phi3", "SmolLM3"])
@torch.no_grad()
def test_rotary_gain_is_that_of_ones(kind: str) -> None:
    """What sparsevlm 2.0 divides by: the logits that queries and keys of ones would have."""
    model = build(kind)
    language = model.model.language_model
    forms = Forms(language)
    hidden = torch.randn(1, 7, 64)
    tables = language.rotary_emb(hidden, torch.arange(7)[None])
    attention = language.layers[2].self_attn
    rotation = forms.of(2, "a test").rotation
    handed = recorded(attention, hidden, tables)
    straight = recorded(attention, hidden, (torch.ones_like(tables[0]), torch.zeros_like(tables[1])))
    assert rotation is not None
    torch.testing.assert_close(rotation(straight.q, *tables), handed.q)
    mm.compress(model, "sparsevlm(version='2.0')")
    model(**tiny.prompts(model, [[5, "image", 4]]))


@pytest.mark.parametrize("kind", ["Phi3", "Gemma2", "GptOss", "Olmo2", "Cohere", "DeepseekV3", "Ministral3"])
@torch.no_grad()
def test_attention_is_rewritten_in_every_form_or_refused(kind: str) -> None:
    """A stage that changes nothing but computes its rows gives the output of the module."""
    model = build(kind)
    inputs = tiny.prompts(model, tiny.RAGGED, seed=1)
    expected = model(**inputs).logits

    if kind == "DeepseekV3":
        with pytest.raises(NotImplementedError, match="latent attention"):
            mm.compress(model, Redoing(layer=1))
        return
    mm.compress(model, Redoing(layer=1))
    found = model(**inputs).logits
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-3)


def test_what_differs_is_named() -> None:
    """Modules that add something of their own are refused at compress, and the model stays as it was."""
    reasons = {
        "a window": ({"sliding_window": 8}, r"fastv.*layer 1 .*sliding window of 8 tokens"),
        "a bias": ({"position_bias": torch.zeros(1)}, "position_bias"),
    }
    for more, match in reasons.values():
        model = tiny.build()
        tiny.handing(model.model.language_model.layers[1].self_attn, **more)
        with pytest.raises(NotImplementedError, match=match):
            mm.compress(model, "fastv(layer=2, keep=0.5)")
        mm.compress(model, "fastv(layer=1, keep=0.5)")

    model = tiny.build()
    attention = model.model.language_model.layers[1].self_attn
    kind = type(attention)

    class Sharper(kind):
        """Its eager attention is not what it says."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out, None if weights is None else weights.square()

    class Own(kind):
        """Knows no attention functions."""

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return self.o_proj(self.q_proj(hidden_states)), None

    class Gated(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out.sigmoid() * out, weights

    for changed, plan, match in (
        (Sharper, "fastv(layer=2, keep=0.5)", "weights differ from softmax"),
        (Own, "fastv(layer=2, keep=0.5)", "does not call an attention function"),
        (Gated, "cmai(layer=1)", "not a projection of its heads"),
    ):
        attention.__class__ = changed
        with pytest.raises(NotImplementedError, match=match):
            mm.compress(model, plan)
    mm.compress(model, "fastv(layer=2, keep=0.5)")  # reads rows, no output
    attention.__class__ = kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Llama", "Glm4", "GptOss", "Phi3", "Gemma2"])
def test_a_probe_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    """Not the generator, the mode, hooks, gradients or the config; in every type."""
    model = build(kind, dtype=dtype).train()
    model.model.language_model.layers[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), repr(model.config)
    grads, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    implementations = [layer.self_attn.config._attn_implementation for layer in model.model.language_model.layers]
    forms = Forms(model.model.language_model, model)
    for layer in range(4):
        assert forms.of(layer, "a test").norm == "input_layernorm"
    assert torch.equal(torch.get_rng_state(), before[1]) and repr(model.config) == before[2]
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads and [m.training for m in model.modules()] == modes
    assert [p.grad for p in model.parameters() if p.grad is not None] == []
    assert [
        layer.self_attn.config._attn_implementation for layer in model.model.language_model.layers
    ] == implementations
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_meta_parameters_are_probed_when_they_are_there() -> None:
    forms = Forms(tiny.build().to("meta").model.language_model)
    assert forms.of(1, "a test").plain and not forms.found


@torch.no_grad()
def test_threads_do_not_meet_in_a_recording() -> None:
    """Four threads on one model whose queries and keys are recorded: each keeps what one alone keeps."""
    model = build("Phi3")
    prompts = [tiny.prompts(model, [[5, "image", 4]], seed=seed) for seed in range(4)]
    forms = Forms(model.model.language_model)
    hidden = [torch.randn(1, 30 + i, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    tables = [model.model.language_model.rotary_emb(h, torch.arange(h.shape[1])[None]) for h in hidden]
    attention = forms.of(1, "a test").attention
    wanted = [recorded(attention, h, t).q for h, t in zip(hidden, tables, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(recorded(attention, hidden[i], tables[i]).q, wanted[i]):
                wrong.append(i)
            model(**prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["Falcon", "OPT", "Bloom"])
@pytest.mark.parametrize("plan", ["fastv", "divprune(keep=0.5)"])
@torch.no_grad()
def test_a_language_model_without_a_list_of_layers_is_refused(kind: str, plan: str) -> None:
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = tiny.build(text=getattr(transformers, f"{kind}Config")(**sizes), attention="eager")
    inputs = tiny.prompts(model, [[5, "image", 4]])
    stock = model(**inputs).logits
    with pytest.raises(NotImplementedError, match=rf"LlavaForConditionalGeneration on {kind}Model .*layers"):
        mm.compress(model, plan)
    assert torch.equal(model(**inputs).logits, stock)
