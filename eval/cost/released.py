# SPDX-License-Identifier: Apache-2.0
"""Released models at their real size, with random weights: what plans cost where arithmetic decides."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...assets import released
from ...plan import as_pipeline
from .counts import language_model
from .midsize import one_image_prompt
from .record import Cost, conditions, costs

NAMES = (
    "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct",
    "OpenGVLab/InternVL3-8B-hf",
)  # fmt: skip
"""What is measured if nobody says."""
PLANS = (
    "divprune(keep=0.25)", "divprune(keep=0.11)", "visionzip(keep=0.25)", "voronoi(keep=0.25)", "fastv(layer=2, keep=0.25)",
)  # fmt: skip
SPARE = 3 * 2**30
"""Bytes that are left to the prefill beside the weights."""
PERIOD = 2**24 + 43
"""Random values that are drawn; longer weights repeat them (a prime, so that no two rows of one are alike)."""


@dataclass(frozen=True)
class Measured:
    """A released model and what plans cost on it; `about` is what a record says of the run."""

    about: dict[str, Any]
    rows: list[Cost]

    def to_dict(self) -> dict[str, Any]:
        return {**self.about, "rows": [row.to_dict() for row in self.rows]}


def measure(
    name: str,
    plans: Sequence[str] = PLANS,
    *,
    batch: int = 1,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    layers: int | None = None,
    repeats: int = 3,
    warmup: int = 1,
    new_tokens: int = 8,
    text_tokens: int = 40,
    show: Callable[[int], None] | None = None,
    model: Any = None,
) -> Measured:
    """Prefill, decode, cache and peak memory of a released model, stock and with every plan, interleaved; see `clock`.

    A prompt is one picture of 576 to 1,752 tokens by family and `text_tokens` of text; counts are of one prompt, times and
    memory of `batch` of them. layers: of the language model, all that fit in memory if not given. model: that of `build`,
    for several measurements of one. Raises ValueError for a name that is not in `released()`, and what `compress` raises.
    """
    for plan in plans:
        as_pipeline(plan)
    if batch < 1:
        raise ValueError(f"batch={batch}: at least 1")
    model = build(name, dtype, device, layers) if model is None else model
    model.set_attn_implementation(attention)
    one = one_image_prompt(model, text_tokens)
    inputs = together([one, *(one_image_prompt(model, text_tokens, seed) for seed in range(1, batch))])
    rows = costs(model, inputs, plans, repeats, warmup, new_tokens, show, one=one)
    whole = released()[name]["config"]
    depth = len(language_model(model).layers)
    about = {
        **conditions(model, name, inputs, repeats, warmup, new_tokens), "batch": batch, "random_weights": True,
        "parameters": sum(p.numel() for p in model.parameters()), "layers": depth, "layers_released": depth_of(whole),
        "source": released()[name]["source"],
    }  # fmt: skip
    return Measured(about, rows)


def together(prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts of equal length as one batch."""
    return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}


def depth_of(config: dict[str, Any]) -> int:
    """Layers of the language model of a released config."""
    return int(_config(config).get_text_config().num_hidden_layers)


def _config(given: dict[str, Any]) -> Any:
    return transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)


def build(
    name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", layers: int | None = None, seed: int = 0
) -> Any:
    """The released model `name` with random weights of `dtype`: 15 GB of them take seconds, and no more memory than they have.

    layers: of the language model; None: all, or as many as fit (a warning says how many).
    """
    known = released()
    if name not in known:
        raise ValueError(f"no released model {name!r} is known here: there is {', '.join(known)}")
    config = _config(known[name]["config"])
    depth = config.get_text_config().num_hidden_layers
    if layers is not None and not 1 <= layers <= depth:
        raise ValueError(f"layers={layers}: {name} has 1 to {depth}")
    model = empty(config, dtype)
    each = sum(p.numel() for p in language_model(model).layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - depth * each
    free = free_bytes(device)
    fit = int((free - SPARE) / dtype.itemsize - rest) // each
    if (layers or depth) > fit:
        said = f"{free / 2**30:.1f} GiB of memory are free on {device}: {max(fit, 0)} of {depth} layers of {name} fit in {dtype}"
        if layers is not None or fit < 4:
            raise ValueError(f"{said}, not {layers or 4}")
        warnings.warn(f"{said}, and the others are cut off", UserWarning, stacklevel=2)
        layers = fit
    if layers not in (None, depth):
        config.get_text_config().num_hidden_layers = layers
        if kinds := getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = kinds[:layers]
        model = empty(config, dtype)
    return _filled(model, dtype, device, seed)


def free_bytes(device: str) -> int:
    """Memory that is free on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def empty(config: Any, dtype: torch.dtype) -> Any:
    """A model without weights (on meta); its tables of positions are there."""
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _filled(model: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
    """Give every weight a value: matrices normal ones that keep the size of what they multiply, biases 0, norms 1."""
    values = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    made: dict[int, nn.Parameter] = {}
    start = 0
    for module in model.modules():
        matrix = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                new = torch.empty(weight.shape, dtype=dtype, device=device)
                if weight.dim() > 1:
                    start = _fill(new, values, start, 1 / math.sqrt(new[0].numel()) if matrix else 1.0)
                else:
                    new.fill_(0.0 if name.endswith("bias") else 1.0)
                made[id(weight)] = nn.Parameter(new, requires_grad=False)
            setattr(module, name, made[id(weight)])
    model.generation_config.eos_token_id = None
    return model.to(device)


def _fill(new: Tensor, values: Tensor, start: int, scale: float) -> int:
    """Write `values` into a tensor from `start` on, again and again, times `scale`; returns where it stopped."""
    flat, done = new.view(-1), 0
    while done < len(flat):
        part = values[start : start + len(flat) - done]
        torch.mul(part, scale, out=flat[done : done + len(part)])
        done, start = done + len(part), (start + len(part)) % len(values)
    return start
