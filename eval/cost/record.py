# SPDX-License-Identifier: Apache-2.0
"""Counts and times of a prompt together: the table and the record of `mmcompress bench MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...api import plan_for
from ...trace import CONVENTIONS
from ..evaluator import STOCK, weights_digest
from ..machine import machine
from .clock import PARTS, Subject, Times, clock
from .counts import Counts, count

FASTEST = "sdpa"
"""The attention implementation of the second baseline, where the checkpoint has another."""
HEADINGS = (
    "plan", "visual tokens", "FLOPs", "of stock", "vision", "overhead", "KV MiB", "TTFT ms", "speed-up", "reached", "behind vision",
    "vision ms", "compress ms", "prefill ms", "decode ms", "peak MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One plan on one prompt; `stock` is the first baseline."""

    counts: Counts
    times: Times
    stock: tuple[Counts, Times] | None = None

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the whole prefill, part of the stock model's: computed."""
        return self.counts.total / self.stock[0].total if self.stock else 1.0

    @property
    def speedup(self) -> float:
        """Of the time to the first token: measured."""
        return self.stock[1].spread("ttft").median / self.times.spread("ttft").median if self.stock else 1.0

    @property
    def reached(self) -> float:
        """The speed-up, part of what the FLOPs promise; of all of the prefill."""
        return self.speedup * self.flops_ratio

    @property
    def reached_behind_vision(self) -> float:
        """The same of what is behind tower and projector: compression, layers, logits."""
        if not self.stock:
            return 1.0
        counts, times = self.stock
        promised = (counts.total - counts.vision) / (self.counts.total - self.counts.vision)
        return _behind(times) / _behind(self.times) / promised

    @property
    def label(self) -> str:
        other = self.times.subject.attention
        return f"{self.counts.plan} ({other})" if other else self.counts.plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values: counts, and median and spread of each time, with all repeats."""
        times = {part: asdict(self.times.spread(part)) | {"all": getattr(self.times, part)} for part in PARTS}
        more = {"peak_bytes": self.times.peak, "reserved_bytes": self.times.reserved, "speedup": self.speedup}
        more |= {"reached": self.reached, "reached_behind_vision": self.reached_behind_vision}
        counted = {"total_flops": self.counts.total, "vision_share": self.counts.vision_share}
        return {
            "label": self.label, "attention": self.times.subject.attention, **asdict(self.counts), **counted,
            "flops_ratio": self.flops_ratio, "milliseconds": times, **more,
        }  # fmt: skip

    def cells(self) -> list[str]:
        """A line of a table with HEADINGS."""
        spread, peak = self.times.spread, self.times.peak
        return [
            self.label, f"{self.counts.visual_mean:.1f}", giga(self.counts.total), f"{self.flops_ratio:.1%}",
            f"{self.counts.vision_share:.1%}", f"{self.counts.overhead / self.counts.total:.1%}",
            f"{self.counts.kv_bytes / 2**20:.2f}", str(spread("ttft")), f"{self.speedup:.2f}x", f"{self.reached:.0%}",
            f"{self.reached_behind_vision:.0%}", f"{spread('vision').median:.1f}",
            f"{spread('compress').median:.1f}", f"{spread('prefill').median:.1f}", str(spread("decode")),
            "-" if peak is None else f"{peak / 2**20:.0f}",
        ]  # fmt: skip


def _behind(times: Times) -> float:
    return times.spread("compress").median + times.spread("prefill").median


def costs(
    model: Any,
    inputs: Mapping[str, Any],
    plans: Sequence[str],
    repeats: int = 20,
    warmup: int = 3,
    new_tokens: int = 32,
    show: Callable[[int], None] | None = None,
    one: Mapping[str, Any] | None = None,
) -> list[Cost]:
    """Count and time the stock model and every plan on one prompt; the stock model first.

    A checkpoint with another attention implementation than sdpa gets a second baseline that has it: what a plan gains by tokens
    it may lose by the slower attention that it needs. Raises what `compress` raises, before anything is timed.

    one: where `inputs` are a batch, one prompt of it: counts are of that one, by shapes alone; times and memory of the batch.
    """
    given, shapes = (inputs, False) if one is None else (one, True)
    written = list(dict.fromkeys(repr(plan_for(model, plan)) for plan in plans if plan != STOCK))
    own = getattr(model.config, "_attn_implementation", None)
    foreign = own not in (None, "eager", FASTEST)  # with kernels that torch does not count
    if foreign:
        model.set_attn_implementation(FASTEST)
    try:
        stock = count(model, given, shapes=shapes)
        counted = {STOCK: stock} | {plan: count(model, given, plan, stock, shapes) for plan in written}
    finally:
        if foreign:
            model.set_attn_implementation(own)
    subjects = [Subject(STOCK), *([Subject(STOCK, FASTEST)] if own not in (None, FASTEST) else [])]
    timed = clock(
        model, inputs, [*subjects, *map(Subject, written)], repeats, warmup, new_tokens, show=show, memory=shapes
    )
    base = stock, timed[0]
    return [Cost(counted[times.subject.plan], times, base) for times in timed]


def conditions(model: Any, name: str, inputs: Mapping[str, Any], repeats: int, warmup: int, new_tokens: int) -> Any:
    """What a record says of a run beside its rows."""
    return {
        "model": name, "weights": weights_digest(model), "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None), "batch": 1, "repeats": repeats, "warmup": warmup,
        "new_tokens": new_tokens, "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "shapes": {key: list(value.shape) for key, value in inputs.items() if hasattr(value, "shape")}, "machine": machine(),
    }  # fmt: skip


def conventions(rows: Sequence[Cost]) -> list[list[str]]:
    """For each plan: the decoder layers in the named conventions, of all tokens and of visual tokens alone."""
    kinds = [(name, which) for which in ("full", "visual_only") for name in CONVENTIONS]
    found = []
    for row in rows:
        if not row.times.subject.attention:
            told = row.counts.flops
            found.append([row.label, *(giga(told[name][which]) if name in told else "-" for name, which in kinds)])
    return found


def giga(value: float) -> str:
    """FLOPs or multiply-adds with a prefix."""
    return (
        f"{value / 1e12:.3f} T" if value >= 1e11 else f"{value / 1e9:.3f} G" if value >= 1e8 else f"{value / 1e6:.3f} M"
    )


def prompt_text(processor: Any, question: str, pictures: int = 1, videos: int = 0) -> str:
    """The prompt of a question about pictures and videos, in the checkpoint's chat format."""
    from ..synthetic.benchmark import prompt

    if getattr(processor, "chat_template", None) is None:
        raise ValueError("the checkpoint has no chat template, so there is no way to know its prompt format")
    return prompt(processor, question, pictures, videos)


def prompt_inputs(model: Any, processor: Any, picture: Any, question: str) -> Any:
    """One picture and a question as inputs on the model's device."""
    inputs = processor(images=[picture], text=[prompt_text(processor, question)], return_tensors="pt")
    return inputs.to(model.device, model.dtype)
