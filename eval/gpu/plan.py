# SPDX-License-Identifier: Apache-2.0
"""The steps of `make gpu`, in order, with the seconds that each may take: 540 in all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """seconds: on one H200; dry: on two CPU cores, tiny. module: `mmcompress.eval.gpu.<module>.<name>(bench)` gives its items."""

    name: str
    module: str
    seconds: int
    dry: int
    text: str


GROUPS: tuple[tuple[Step, ...], ...] = (
    (Step("device", "device", 15, 60, "what is there, and what it moves and multiplies per second"),),
    (Step("blocks", "blocks", 110, 60, "block sizes of the kernels, written into kernels/configs.py"),),
    (
        Step("native", "native", 75, 120, "the tests of the kernels, natively"),
        Step("waits", "waits", 75, 60, "what waits for the device in prefill and decode, by plan"),
        Step("graphs", "graphs", 75, 60, "kernels and decode steps as CUDA graphs"),
        Step("repeats", "repeats", 75, 60, "the same inputs twice give the same bits"),
    ),
    (Step("kernels", "kernels", 80, 60, "every kernel against naive torch and the roofline"),),
    (Step("selection", "selection", 60, 60, "every method's selection, alone and in eight streams"),),
    (Step("models", "models", 140, 60, "prefill, decode and memory of released shapes"),),
    (Step("mass", "mass", 25, 60, "what it costs that merged tokens weigh more"),),
    (Step("tome", "tome", 25, 60, "ToMe in a ViT-L, beside the official way"),),
)
"""Steps of a group run at the same time, each in a process of its own: none of those is timed."""

STEPS = {step.name: step for group in GROUPS for step in group}


def seconds(group: tuple[Step, ...], dry: bool) -> int:
    """What a group may take."""
    return max(step.dry if dry else step.seconds for step in group)
