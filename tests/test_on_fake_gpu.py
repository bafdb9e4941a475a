# SPDX-License-Identifier: Apache-2.0
"""Every selection on a GPU that is not there: torch's fake tensors say "cuda" and hold nothing.

What runs is what would run on a GPU up to the kernels: "auto" takes Triton, tensors of the host among those of the device raise,
and so does everything that reads a value back. Copies from the host must be ones that it need not wait for.
"""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.eval.gpu.bench import Bench
from mmcompress.eval.gpu.selection import inputs_of, select
from mmcompress.kernels.dispatch import has_triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmcompress as mm
from mmcompress.runtime.cache import CACHE, cache_of
from mmcompress.stage import InputStage, LayerStage

from .families import build, image, prompts

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs Triton: on a GPU it would be there")
WRITTEN = {"sink_correction": "sink_correction(dims=(3, 5))"}
OURS = {name: cls for name, cls in mm.methods().items() if cls.__module__.startswith("mmcompress.")}
"""Without those that other tests register."""
READING = ("llava_scissor",)
"""Methods that read how many tokens something leaves, and say so."""
PLANS = [
    name
    for name, cls in OURS.items()
    if cls.kind != "recipe"
    and name not in READING
    and any(isinstance(part, InputStage | LayerStage) for part in mm.as_pipeline(WRITTEN.get(name, name)).parts)
]


def _kind(x: Any) -> str | None:
    return x.device.type if isinstance(x, Tensor) else None


class Host(TorchDispatchMode):
    """What has nothing to do with the device runs as it is; copies from the host to the device that it waits for are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        to = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in given) and (to is None or torch.device(to).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out, name = func(*args, **kwargs), func.__name__.partition(".")[0]
        copied = {"_to_copy": args[:1], "copy_": args[1:2]}.get(name, ())
        there = args[0] if name == "copy_" else out
        crossed = any(_kind(x) != _kind(there) and x.numel() for x in copied)
        if crossed and not (kwargs.get("non_blocking") or True in args[2:3]):
            self.waited.append(self._line())
        if name.startswith("index") and _kind(args[0]) == "cuda" and isinstance(args[1], list | tuple):
            self.waited += [self._line() for x in args[1] if _kind(x) == "cpu"]
        return out

    def _line(self) -> str:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def on_fake_gpu(stage: Any, visuals: mm.Visuals) -> tuple[Tensor, list[str]]:
    def there(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True), Host() as host:
        signals = {name: there(x) for name, x in visuals.signals.items()}
        return select(
            stage, dataclasses.replace(visuals, features=there(visuals.features), signals=signals)
        ), host.waited


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_selections_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.eval.gpu.selection.WRITTEN", WRITTEN)
    for stage, visuals in inputs_of(Bench(True, Path(), 0.0), name):
        found, waited = on_fake_gpu(stage, visuals)
        assert found.device.type == "cuda" and found.shape == select(stage, visuals).shape
        assert not waited


@dataclasses.dataclass(frozen=True, repr=False)
class Careless(InputStage):
    """A selection that does what the test is about."""

    keep: float | int = 0.5
    how: str = ""

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        score = visuals.features.sum(-1)
        if self.how == "mixes":
            score = score + torch.arange(visuals.n)
        if self.how == "reads" and score.sum().item() > 0:
            score = -score
        if self.how == "waits":
            score = score + torch.arange(visuals.n).to(score.device)
        if self.how == "sends":
            score = score + torch.arange(visuals.n).to(score.device, non_blocking=True)
        return mm.Selection.top(score, visuals.k)


@pytest.mark.parametrize("how", ["", "sends", "waits", "mixes", "reads"])
def test_the_fake_gpu_sees_what_a_real_one_would(how: str) -> None:
    visuals = mm.Visuals(torch.randn(1, 12, 4), mm.Layout.raster(1, 3, 4), 5)
    if how in ("mixes", "reads"):
        with pytest.raises(RuntimeError):
            on_fake_gpu(Careless(how=how), visuals)
        return
    found, waited = on_fake_gpu(Careless(how=how), visuals)
    assert found.device.type == "cuda" and bool(waited) == (how == "waits")


# ---------------------------------------------------------------------- decode steps
DECODED = ["stock", *(WRITTEN.get(name, name) for name, cls in OURS.items())]


def moved(value: Any, seen: set[int]) -> Any:
    """`value` with all tensors in it on the device, in place where it is an object: a cache, its layers, what they know."""
    if isinstance(value, Tensor):
        return value.to("cuda")
    if isinstance(value, dict):
        for key in value:
            value[key] = moved(value[key], seen)
    elif isinstance(value, list | tuple):
        return type(value)(moved(part, seen) for part in value)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        seen.add(id(value))
        for name, part in vars(value).items():
            object.__setattr__(value, name, moved(part, seen))
        if isinstance(getattr(value, "device", None), torch.device):
            value.device = torch.device("cuda")
    return value


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("plan", DECODED)
def test_decode_steps_neither_wait_nor_mix(plan: str) -> None:
    """A prompt on the host, then everything is moved to the device that is not there, and decoding goes on."""
    model = build("llava")
    inputs = prompts(model, "llava", [[5, image("llava"), 4]], mask=False)
    try:
        if plan != "stock":
            mm.compress(model, plan)
    except (NotImplementedError, ValueError) as refusal:
        pytest.skip(str(refusal).splitlines()[0])
    out = model(**inputs, use_cache=True)
    for _ in range(2):  # what a first step makes once belongs to the prompt
        out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **{CACHE: cache_of(out)})
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Host() as host:
            model.to("cuda")
            cache = moved(cache_of(out), set())
            token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
            host.waited.clear()
            for _ in range(2):
                found = model(input_ids=token, use_cache=True, **{CACHE: cache})
                token = found.logits[:, -1:].argmax(-1)
            assert found.logits.device.type == "cuda" and not host.waited
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
