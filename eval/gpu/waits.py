# SPDX-License-Identifier: Apache-2.0
"""Step `waits`: what waits for the device in a prefill and in decode steps, by plan, and whose line it is.

On a GPU torch itself says so (`torch.cuda.set_sync_debug_mode`, which knows copies from and to the host, also of a Python number,
and everything that reads a value back). On the CPU the operations are watched that would, those on
tensors of the host too, so that a dry run cannot tell what is allowed. A prefill of ours may wait once more
than the stock one; a decode step may not wait at all, so that one runs under "error".
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmcompress as mm

from ...assets import MODELS
from ...plan import methods
from ...runtime.cache import CACHE, cache_of
from .bench import Bench, Item, Skip, sync_mode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero")
WORDS = "called a synchronizing CUDA operation"
WRITTEN = {"sink_correction": "sink_correction(dims=(3, 5))"}
"""Plans of methods that cannot do without an option."""
PACKAGE = str(Path(mm.__file__).parent)
FOLDERS = tuple(str(Path(mm.__file__).resolve().parent.parent / name) for name in ("mmcompress", "adapters", "kernels"))
STEPS = 3


def plans(bench: Bench) -> list[str]:
    names = [WRITTEN.get(name, name) for name, cls in methods().items()]
    return bench.pick(names, ["divprune", "fastv", "visionzip"])


def waits(bench: Bench) -> dict[str, Item]:
    models = bench.pick(MODELS, MODELS[:1])
    return {f"{name} {plan}": partial(_plan, bench, name, plan) for name in models for plan in ("stock", *plans(bench))}


# ---------------------------------------------------------------------- whose line it is
def place() -> tuple[str, bool]:
    """The innermost line of Python that is not torch's, and whether it is ours."""
    for frame in reversed(traceback.extract_stack()):
        file = frame.filename
        if not any(part in file for part in ("/torch/", "/warnings.py", "/contextlib.py")) and file != __file__:
            return f"{'/'.join(Path(file).parts[-3:])}:{frame.lineno}", file.startswith((PACKAGE, *FOLDERS))
    return "?", False


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in READS:
            self.found.append(place())
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(device: torch.device) -> Iterator[list[tuple[str, bool]]]:
    """Collects the places that wait for the device within the block."""
    found: list[tuple[str, bool]] = []
    if device.type != "cuda":
        with _Reads(found):
            yield found
        return

    def show(message: Any, *_: Any, **__: Any) -> None:
        if WORDS in str(message):
            found.append(place())

    with warnings.catch_warnings(), sync_mode("warn", device):
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield found


# ---------------------------------------------------------------------- models
LOADED: dict[str, tuple[Any, Any]] = {}


def loaded(bench: Bench, name: str) -> tuple[Any, Any]:
    """An embedded model on the device and the inputs of one question, there already."""
    from ...assets import checkpoint
    from ..cost.record import prompt_inputs
    from ..synthetic.benchmark import items, load

    if name not in LOADED:
        model, processor = load(checkpoint(name))
        model = model.to(bench.device)
        LOADED[name] = model, dict(prompt_inputs(model, processor, items(1)[0].picture, "What is in the picture?"))
    return LOADED[name]


@contextmanager
def as_plan(model: Any, plan: str) -> Iterator[None]:
    """The model with a plan, or as it is. Raises Skip where it is refused."""
    try:
        if plan != "stock":
            mm.compress(model, plan)
    except (NotImplementedError, ValueError, ImportError) as error:
        raise Skip(str(error).splitlines()[0][:300]) from None
    try:
        yield
    finally:
        mm.uncompress(model)


def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, use_cache=True, logits_to_keep=1)


def step(model: Any, out: Any, token: Any = None) -> Any:
    token = out.logits[:, -1].argmax(-1, keepdim=True) if token is None else token
    return model(input_ids=token, use_cache=True, **{CACHE: cache_of(out)})


def allowed(phase: str, mine: list[str], waited: bool, error: str | None) -> bool:
    """Whether a phase waits no more than it may. An error in a step where no place was told cannot be anyone else's."""
    return len(mine) <= 1 if phase == "prefill" else not mine and (error is None or waited)


def _plan(bench: Bench, name: str, plan: str) -> Iterator[dict[str, Any]]:
    model, inputs = loaded(bench, name)
    with as_plan(model, plan):
        step(model, prefill(model, inputs))  # compiles what there is to compile
        with watching(bench.device) as first:
            out = prefill(model, inputs)
        with watching(bench.device) as then:
            for _ in range(STEPS):
                out = step(model, out)
        error = None
        try:
            with sync_mode("error", bench.device):
                step(model, out)
        except RuntimeError as found:
            error = str(found).splitlines()[0]
    row = {"model": name, "plan": plan}
    for phase, found in (("prefill", first), ("decode", then)):
        mine = [place for place, ours in found if ours]
        yield {
            **row, "phase": phase, "waits": len(found), "ours": len(mine), "lines": sorted(set(mine)),
            "others": sorted({place for place, ours in found if not ours}),
            "allowed": None if bench.dry else allowed(phase, mine, bool(found), error),
            "error": error if phase == "decode" else None,
        }  # fmt: skip
