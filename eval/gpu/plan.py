# SPDX-License-Identifier: Apache-2.0
"""The steps of `make gpu`, in order, with the seconds that each may take: nine minutes in all, less what it takes to begin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """seconds: on one H200; dry: on a CPU, however busy. module: `mmcompress.eval.gpu.<module>.<name>(bench)` gives its items."""

    name: str
    module: str
    seconds: int
    dry: int
    text: str


GROUPS: tuple[tuple[Step, ...], ...] = (
    (Step("device", "device", 25, 400, "what is there, and what it moves and multiplies per second"),),
    (Step("blocks", "blocks", 110, 400, "block sizes of the kernels, written into kernels/configs.py"),),
    (
        Step("native", "native", 75, 400, "the tests of the kernels, natively"),
        Step("waits", "waits", 75, 400, "what waits for the device in prefill and decode, by plan"),
        Step("graphs", "graphs", 75, 400, "kernels and decode steps as CUDA graphs"),
        Step("repeats", "repeats", 75, 400, "the same inputs twice give the same bits"),
    ),
    (Step("kernels", "kernels", 80, 400, "every kernel against naive torch and the roofline"),),
    (Step("selection", "selection", 60, 400, "every method's selection, alone and in eight streams"),),
    (Step("models", "models", 130, 400, "prefill, decode and memory of released shapes"),),
    (Step("mass", "mass", 25, 400, "what it costs that merged tokens weigh more"),),
    (Step("tome", "tome", 25, 400, "ToMe in a ViT-L, beside the official way"),),
)
"""Steps of a group run at the same time, each in a process of its own: none of those is timed."""

STEPS = {step.name: step for group in GROUPS for step in group}


def seconds(group: tuple[Step, ...], dry: bool) -> int:
    """What a group may take."""
    return max(step.dry if dry else step.seconds for step in group)
