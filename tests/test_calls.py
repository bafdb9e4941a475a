# SPDX-License-Identifier: Apache-2.0
"""Few calls, one wait: how many ATen calls a plan adds to a prefill, and what it waits for, on every family.

Calls are counted on the CPU, views included; kernels count as what they are there, of which Triton makes one launch each. Waits are
counted on a device that is none (see `device`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from mmcompress.eval.cost.overhead import aten_calls
from torch import Tensor
from transformers import StaticCache

import mmcompress as mm
from mmcompress.runtime.cache import CACHE, cache_of

from .device import OnDevice, Watching, a_device, moved
from .families import FAMILIES, QWEN, build, image, prompts
from .test_crossed import METHODS, WRITTEN

LAYERS = 8
FRAME = ("uniform(keep=0.5)", "divprune(keep=0.5)", "visionzip(keep=0.5)", "fastv(layer=1, keep=0.5)", "dart")
"""Plans of the fast tests on every family."""
LIMITS = {"input": 200, "layer": 250}
"""Calls that a method may add to a prefill, the frame included."""
OVER: dict[str, int] = {
    "aim": 350, "cmai": 730, "fastvid": 350, "flashvid": 490, "flashvid_merge": 420, "framefusion": 370,
    "framefusion_layers": 280, "llava_scissor": 750, "prunesid": 350, "prunevid": 330, "prunevid_merge": 220,
    "pyramiddrop": 350, "recoverable_compression": 660, "restore": 230, "seats_layers": 290, "sparsevlm": 510,
    "token_correlation": 300, "tome": 530, "transprune": 510, "var_attention_sink": 820, "vmtc": 440,
}  # fmt: skip
"""Methods that add more on some family, and how many at most. To tighten: lower a number; a method that no longer needs its entry
has to leave the table."""
PLANS = {name: WRITTEN.get(name, name) for name in METHODS if name != "vflowopt_cuts"}
READS = 2
"""Reads of the device that a plan adds to a prefill: where the visuals lie, and the sizes, grids or pixels that tell how they lie
inside, where those came on the device (the model itself reads them too). LLaVA has none of the latter."""


def limit_of(name: str) -> int:
    stages = mm.as_pipeline(PLANS.get(name, name)).parts
    return max(LIMITS["input" if stage.kind == "input" else "layer"] for stage in stages)


def one(family: str) -> tuple[Any, dict[str, Tensor]]:
    model = build(family, num_hidden_layers=LAYERS)
    return model, prompts(model, family, [[5, image(family), 4]], mask=False)


def added(model: Any, inputs: dict[str, Tensor], plans: Any) -> dict[str, int]:
    """Calls that each plan adds to those of stock."""
    stock, found = aten_calls(model, inputs), {}
    for plan in plans:
        with mm.compressed(model, PLANS.get(plan, plan)):
            found[plan] = aten_calls(model, inputs) - stock
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frame_makes_few_calls(family: str) -> None:
    model, inputs = one(family)
    found = added(model, inputs, FRAME)
    over = {plan: calls for plan, calls in found.items() if calls > OVER.get(plan.partition("(")[0], limit_of(plan))}
    assert not over


def test_every_method_makes_few_calls() -> None:
    model, inputs = one("llava")
    found = added(model, inputs, PLANS)
    assert not {name: calls for name, calls in found.items() if calls > OVER.get(name, limit_of(name))}


@pytest.mark.slow
def test_every_method_makes_few_calls_on_every_family() -> None:
    worst: Counter[str] = Counter()
    for family in FAMILIES:
        model, inputs = one(family)
        for name, calls in added(model, inputs, PLANS).items():
            worst[name] = max(worst[name], calls)
    assert not {name: calls for name, calls in worst.items() if calls > OVER.get(name, limit_of(name))}
    assert not [
        name for name in OVER if worst[name] < 0.9 * limit_of(name)
    ]  # these need no entry of their own any more


def test_calls_do_not_grow_with_the_layers() -> None:
    """What is the same in all layers is made once: masks, rotary tables, groups."""
    counts = []
    for layers in (6, 18):
        model = build("llava", num_hidden_layers=layers)
        inputs = prompts(model, "llava", [[5, image("llava"), 4]], mask=False)
        plans = ("uniform(keep=0.5)", "fastv(layer=2, keep=0.5)", "uniform(keep=0.5) >> fastv(layer=2, keep=0.5)")
        counts.append(added(model, inputs, plans))
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------- waiting
IN_TOWER = {"tome": 4, "downsample": 1}
"""Reads more in towers that take packed grids: what a stage in the tower asks about segments, and block by block where they end."""


IN_PROBES = {"llava_scissor": 18}
"""Reads more of methods that try thresholds: how many tokens each leaves, and they say so."""


class Waits:
    """Prefill and one decode step of a model on the device, and what they wait for."""

    def __init__(self, family: str, static: bool = False) -> None:
        self.family, self.static = family, static
        self.model, inputs = one(family)
        self.length = inputs["input_ids"].shape[1]
        moved(self.model)
        self.inputs = {name: OnDevice(x) for name, x in inputs.items()}
        self.stock = self.run()

    @torch.no_grad()
    def run(self) -> tuple[Watching, Watching]:
        with a_device(), Watching() as prefill:
            cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=64) if self.static else None
            output = self.model(**self.inputs, **{CACHE: cache})
        place = torch.full((3, 1, 1) if self.family in QWEN else (1, 1), self.length)
        step = {"input_ids": OnDevice(torch.tensor([[9]])), "position_ids": OnDevice(place), CACHE: cache_of(output)}
        with a_device(), Watching() as decode:
            self.model(**step)
        return prefill, decode

    def check(self, plan: str, reads: int) -> None:
        with a_device(), Watching():
            mm.compress(self.model, plan)
        try:
            prefill, decode = self.run()
        finally:
            mm.uncompress(self.model)
        assert len(prefill.reads) - len(self.stock[0].reads) <= reads, (plan, prefill.reads)
        assert len(prefill.waits) <= len(self.stock[0].waits), (plan, prefill.waits)
        assert len(decode.reads) <= len(self.stock[1].reads), (plan, decode.reads)
        assert len(decode.waits) <= len(self.stock[1].waits), (plan, decode.waits)


def allowed(family: str, name: str) -> int:
    return (
        (1 if family == "llava" else READS) + (IN_TOWER.get(name, 0) if family in QWEN else 0) + IN_PROBES.get(name, 0)
    )


def test_the_device_sees_what_waits() -> None:
    x, mask = OnDevice(torch.arange(6.0)), OnDevice(torch.arange(6) % 2 > 0)
    with a_device(), Watching() as seen:
        for ask in (
            lambda: x.sum().item(), lambda: x.tolist(), lambda: bool((x > 1).all()), lambda: x.cpu(), lambda: x[mask],
            lambda: mask.nonzero(), lambda: x.unique(), lambda: torch.repeat_interleave(x.long()), lambda: float(x[2]),
        ):  # fmt: skip
            before = len(seen.reads)
            ask()
            assert len(seen.reads) == before + 1
        for fill in (
            lambda: torch.tensor([1, 2], device=x.device), lambda: torch.arange(3).to(x.device), lambda: x[torch.tensor([1])],
            lambda: x.new_tensor([1.0, 2.0]),
        ):  # fmt: skip
            before = len(seen.waits)
            fill()
            assert len(seen.waits) == before + 1
        before = len(seen.reads), len(seen.waits)
        there = torch.arange(3).to(x.device, non_blocking=True) + torch.arange(3, device=x.device)
        assert (x[there] * 2).device == x.device and torch.full((), 3, device=x.device).device == x.device
        assert (len(seen.reads), len(seen.waits)) == before
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            x + torch.arange(6)
    assert torch.equal(there.held, torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    ("family", "plans"),
    [
        ("llava", ("divprune", "fastv", "visionzip >> pyramiddrop")), ("qwen2_5_vl", ("visionzip", "dart")),
        ("internvl", ("fastv",)),
    ],
)  # fmt: skip
def test_one_wait_in_a_prefill_and_none_in_a_step(family: str, plans: tuple[str, ...]) -> None:
    waits = Waits(family)
    for plan in plans:
        waits.check(plan, allowed(family, plan))


def test_one_wait_with_a_static_cache() -> None:
    Waits("llava", static=True).check("divprune >> fastv", 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl_qwen3"])
def test_one_wait_of_every_method(family: str) -> None:
    """Of families with packed towers the fast tests see some plans."""
    waits = Waits(family)
    for name, plan in PLANS.items():
        waits.check(plan, allowed(family, name))
