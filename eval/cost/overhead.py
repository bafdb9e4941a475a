# SPDX-License-Identifier: Apache-2.0
"""What a plan costs where there is next to nothing to compute: ATen calls and processor time that it adds to a prefill.

On a GPU each call is a launch, and all the Python in between runs while the device waits. Models are the embedded ones with random
weights and as many LLM layers as real ones have; the prompt is a drawn scene with a question.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmcompress as mm

from ...runtime import cuts, passage
from ...runtime.engine import Engine
from ...runtime.layers import Cut
from ..evaluator import STOCK
from .clock import Spread

LAYERS = 32
HOOKS = ("_model_pre", "_base_pre", "_language_pre", "_layer_pre", "_language_post", "_base_post")
"""Where the engine works during a prefill, but for what it hears of the vision encoder."""
METHOD: tuple[tuple[Any, str], ...] = ((cuts, "choose"), (passage, "choose"), (Cut, "signal"))
"""Where the method works inside of them: its choice, and the signals that it reads of layers."""


@dataclass(frozen=True)
class Overhead:
    """Of one plan on one model. calls: ATen calls of a prefill beyond those of stock, views included, on the CPU (Triton kernels
    make one launch of many); stock_calls: of stock. milliseconds: processor time of one thread in the hooks of the engine, with
    the selection, median of the repeats and width of the middle half; method: what of it is the method's own (see METHOD)."""

    model: str
    plan: str
    calls: int
    stock_calls: int
    milliseconds: float
    iqr: float
    method: float = 0.0

    HEADINGS: ClassVar = ("model", "plan", "ATen calls", "of stock", "hooks, ms", "of the method")

    def cells(self) -> list[str]:
        """A line of a table with these headings."""
        spread = Spread(self.milliseconds, self.iqr)
        added = f"{spread.median:.2f} ± {spread.iqr / 2:.2f}"
        return [self.model, self.plan, f"{self.calls:+d}", str(self.stock_calls), added, f"{self.method:.2f}"]


class Calls(TorchDispatchMode):
    """Counts ATen calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def aten_calls(model: Any, inputs: Mapping[str, Any]) -> int:
    """ATen calls of one forward pass, after one that does what is done once."""
    model(**inputs)
    with Calls() as counted:
        model(**inputs)
    return counted.names.total()


def deep(config: Any, layers: int = LAYERS) -> Any:
    """A random model of a config with another number of LLM layers."""
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    text.num_hidden_layers = layers
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def timed(owner: Any, names: Sequence[str], spent: list[int]) -> AbstractContextManager[Any]:
    """Within it, the functions `names` of `owner` add their nanoseconds to the last number of `spent`."""

    def of(original: Any) -> Any:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return original(*args, **kwargs)
            finally:
                spent[-1] += time.thread_time_ns() - start

        return run

    return mock.patch.multiple(owner, **{name: of(getattr(owner, name)) for name in names})


@torch.no_grad()
def overhead(
    name: str, model: Any, inputs: Mapping[str, Any], plans: Sequence[str], repeats: int = 12
) -> list[Overhead]:
    """Measure `plans` on a stock model, which is stock again afterwards. One thread; raises what `compress` raises."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stock, rows = aten_calls(model, inputs), []
        for plan in plans:
            spent, method = [0], [0]
            with ExitStack() as stack:
                stack.enter_context(timed(Engine, HOOKS, spent))  # before the engine takes its hooks from there
                for owner, part in METHOD:
                    stack.enter_context(timed(owner, [part], method))
                stack.enter_context(mm.compressed(model, plan))
                calls = aten_calls(model, inputs)
                for times in (spent, method):
                    times.clear()
                for _ in range(repeats):
                    spent.append(0)
                    method.append(0)
                    model(**inputs)
            found, own = (Spread.of([ns / 1e6 for ns in times]) for times in (spent, method))
            rows.append(Overhead(name, plan, calls - stock, stock, found.median, found.iqr, own.median))
        return rows
    finally:
        torch.set_num_threads(threads)


def embedded(picture: Any, repeats: int, plans: Sequence[str]) -> Iterator[Overhead]:
    """The same for every embedded model with LAYERS layers, asked about `picture`."""
    from transformers import AutoConfig, AutoProcessor

    from ...assets import MODELS, model_path
    from .record import prompt_inputs

    for name in MODELS:
        path = model_path(name)
        model = deep(AutoConfig.from_pretrained(path))
        processor = AutoProcessor.from_pretrained(path)
        inputs = prompt_inputs(model, processor, picture, "What is in the picture?")
        yield from overhead(name, model, inputs, [plan for plan in plans if plan != STOCK], repeats)
