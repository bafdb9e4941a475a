# SPDX-License-Identifier: Apache-2.0
"""Parameters in shards (FSDP2, one gloo rank): what is made outside the forward pass of their owner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import mmcompress as mm

from . import tiny

PLANS = (
    "visionzip(keep=0.5)", "fastv(layer=2, keep=0.5)", "fastv(layer=2, keep=0.5, query='all')", "sparsevlm", "dart", "transprune",
    "explain_compress(keep=0.5)", "cmai(layer=1)",
)  # fmt: skip


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if dist.is_initialized():
        pytest.skip("another test has processes")
    place: Path = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model: Any, mesh: Any, parts: bool = False) -> None:
    """Every decoder layer is a unit, with `parts` its attention and its MLP too; the rest is another."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp) if parts else ():
            fully_shard(part, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name."""
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


@pytest.mark.parametrize("plan", PLANS)
def test_trains_as_the_whole_model_does(plan: str, mesh: Any) -> None:
    """Sharded before compress, after it, or in smaller parts: the same logits and gradients; then once more."""
    model = tiny.build()
    inputs = tiny.prompts(model, tiny.RAGGED)
    inputs["input_ids"].masked_fill_(inputs["input_ids"] == 0, 3)
    wanted, gradients = trained(mm.compress(model, plan), inputs)
    for when in ("before", "after", "parts"):
        model = tiny.build()
        if when == "after":
            mm.compress(model, plan)
        shard(model, mesh, when == "parts")
        if when == "parts" and plan.startswith("cmai"):
            with pytest.raises(NotImplementedError, match="Attention is a unit of fully_shard by itself"):
                mm.compress(model, plan)
            continue
        if when != "after":
            mm.compress(model, plan)
        for _ in range(2):
            model.zero_grad()
            logits, found = trained(model, inputs)
            assert torch.equal(logits, wanted) and found.keys() == gradients.keys()
            assert all(torch.allclose(found[name], gradients[name], atol=1e-6) for name in found)


def test_the_oracle_is_refused_in_shards(mesh: Any) -> None:
    model = tiny.build()
    shard(model, mesh)
    with pytest.raises(NotImplementedError, match="within a call of it, which fully_shard does not allow"):
        mm.compress(model, "explain_compress(mode='oracle')")
