# SPDX-License-Identifier: Apache-2.0
"""What it costs that merged tokens weigh what they stand for: prefill and decode without a plan, without masses, and with them in
each way, all interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...api import plan_for
from ...runtime.mass import ways
from ..evaluator import STOCK
from .clock import Spread, Subject, Times, clock

PLAN = "voronoi(keep=0.25)"
ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class MassCost:
    """One way under one attention implementation; milliseconds, medians and width of the middle half.

    way    "stock" (no plan), "none" (the plan without masses), "mask" or "channel".

    prefill_percent, decode_percent  what is added to "none" under the same implementation: median over the rounds, each of which
    has run both; None for "stock" and "none". peak: bytes beyond what was held before, None without an accelerator.
    """

    attention: str
    way: str
    prefill_ms: float
    prefill_iqr_ms: float
    decode_ms: float
    decode_iqr_ms: float
    prefill_percent: float | None
    decode_percent: float | None
    peak: int | None

    HEADINGS: ClassVar = ("attention", "masses", "prefill ms", "added", "decode ms", "added", "peak MiB")

    def cells(self) -> list[str]:
        """A line of a table with these headings."""
        prefill, decode = Spread(self.prefill_ms, self.prefill_iqr_ms), Spread(self.decode_ms, self.decode_iqr_ms)
        added = ("-" if x is None else f"{x:+.1f} %" for x in (self.prefill_percent, self.decode_percent))
        peak = "-" if self.peak is None else f"{self.peak / 2**20:.0f}"
        return [self.attention, self.way, str(prefill), next(added), str(decode), next(added), peak]


def there(model: Any, attentions: Sequence[str] = ATTENTIONS) -> list[str]:
    """Those attention implementations that `model` can be given here."""
    own, found = model.config._attn_implementation, []
    for name in attentions:
        try:
            model.set_attn_implementation(name)
            found.append(name)
        except (ImportError, ValueError):
            continue
        finally:
            model.set_attn_implementation(own)
    return found


def mass_costs(
    model: Any,
    inputs: Mapping[str, Any],
    plan: str = PLAN,
    attentions: Sequence[str] = ("sdpa",),
    repeats: int = 12,
    warmup: int = 2,
    new_tokens: int = 32,
) -> list[MassCost]:
    """Time `plan` in every way under every implementation in `attentions`; prefill includes vision and selection, decode is per
    token. The model must be stock, and is stock again afterwards. Raises what `compress` and `clock` raise."""
    stages = " >> ".join(map(repr, plan_for(model, plan).stages))
    written = {way: f"plan({stages}, mass={way!r})" for way in (False, "mask", "channel")}
    subjects: dict[tuple[str, str], Subject] = {}
    for attention in attentions:
        subjects[attention, "stock"] = Subject(STOCK, attention)
        subjects[attention, "none"] = Subject(written[False], attention)
        subjects |= {(attention, way): Subject(written[way], attention) for way in ways(attention)}
    timed = {t.subject: t for t in clock(model, inputs, list(subjects.values()), repeats, warmup, new_tokens)}
    return [
        _cost(attention, way, timed[subject], timed[subjects[attention, "none"]])
        for (attention, way), subject in subjects.items()
    ]


def _cost(attention: str, way: str, times: Times, light: Times) -> MassCost:
    def added(part: str) -> float | None:
        if way in ("stock", "none"):
            return None
        pairs = zip(getattr(times, part), getattr(light, part), strict=True)
        return 100 * statistics.median(a / b - 1 for a, b in pairs)

    prefill, decode = times.spread("ttft"), times.spread("decode")
    return MassCost(
        attention, way, prefill.median, prefill.iqr, decode.median, decode.iqr, added("ttft"), added("decode"), times.peak
    )  # fmt: skip
