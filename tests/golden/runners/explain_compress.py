# SPDX-License-Identifier: Apache-2.0
"""explain_compress: relevance of an answer, what the compressor reads, what it learns, and the choice."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import mmcompress as mm
from mmcompress.ops.explained import relevance_target, target_divergence
from mmcompress.runtime.call import Call
from mmcompress.runtime.probe import Forms
from mmcompress.runtime.prompt import first_heads, mean_text_attention
from mmcompress.runtime.relevance import Prompt, answer_relevance, greedy_answers

from ..form import Arrays, Results, runner, visuals


@runner("explain_compress")
def explain_compress(arrays: Arrays, params: dict[str, Any]) -> Results:
    config = Qwen2Config(
        vocab_size=params["vocab"], hidden_size=params["hidden"], intermediate_size=params["intermediate"],
        num_hidden_layers=params["layers"], num_attention_heads=params["heads"],
        num_key_value_heads=params["kv_heads"], rms_norm_eps=params["rms_norm_eps"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    weights = {key[3:].replace("__", "."): value for key, value in arrays.items() if key.startswith("sd_")}
    model.load_state_dict(weights)
    embeds, answer = arrays["inputs_embeds"][None], arrays["answer_ids"].tolist()
    first, count = params["n_system"], params["n_visual"]
    forms = Forms(model.model)
    prompt, here = Prompt(embeds), slice(first, first + count)
    made = greedy_answers(model.model, model.lm_head, prompt, len(answer), [])
    yield "answer_ids", torch.tensor(made[0])
    exact = answer_relevance(forms, model.lm_head, prompt, [answer])[0, :, here]
    yield "relevance_per_step", exact
    relevance = exact.mean(0)
    yield "relevance", relevance
    fast = answer_relevance(forms, model.lm_head, prompt, [answer], mode="fast")[0, 0, here]
    yield "relevance_single_backward", fast
    with torch.no_grad():
        heads = first_heads(forms, embeds, torch.arange(embeds.shape[1])[None], None, Call(None, None, []))
        every = torch.arange(embeds.shape[1])[None]
        rows = torch.zeros(1, 1, dtype=torch.int64)
        yield "first_layer_attention", heads.attention_of(rows, every)[0]
        yield "a0_v", mean_text_attention(heads, rows, every[:, here], every[:, first + count :])[0]
    target = relevance_target(relevance)
    yield "label", target
    yield "kl", target_divergence(target, arrays["pred"].log())
    for percent in (50, 25):
        stage = mm.ExplainCompress(keep=percent / 100, mode="oracle")
        k = stage.budget(count)
        seen = visuals(torch.zeros(1, count, 1), k, **{stage.signal: relevance[None]})
        yield f"keep_{percent}", stage.select(seen).keep[0]
