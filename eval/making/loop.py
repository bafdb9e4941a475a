# SPDX-License-Identifier: Apache-2.0
"""The loop that all training stages share: AdamW, warm-up and cosine, checkpoints from which a stopped run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from ...records import replacing, write_json


def progress_of(console: Console) -> Progress:
    """A bar with counts and times."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}"), *columns, console=console)


class Loop:
    """Runs training stages in one folder; whatever the folder already holds is not done again."""

    def __init__(self, folder: Path, seed: int, save_every: int, device: str | None = None) -> None:
        self.folder, self.seed, self.save_every = folder, seed, save_every
        folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.console = Console()
        self.log = (folder / "log.jsonl").open("a")

    def precision(self) -> AbstractContextManager[Any]:
        """bfloat16 where it is fast."""
        fast = self.device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return torch.autocast(self.device.type, torch.bfloat16) if fast else nullcontext()

    def run_stage(
        self,
        stage: str,
        modules: list[nn.Module],
        steps: int,
        rate: float,
        loss_of: Callable[[int], Tensor],
        scores: Callable[[], dict[str, float]],
        horizon: int | None = None,
    ) -> None:
        """Train `modules` for `steps` steps with the loss `loss_of(step)`, a function of the step alone.

        The learning rate rises to `rate` over 200 steps and falls with a cosine that ends at `horizon` (`steps` by default).
        A checkpoint and `scores()` every `save_every` steps; from the last checkpoint a stopped run goes on.
        """
        path = self.folder / f"{stage}.pt"
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
        start = 0
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            for module, weights in zip(modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        with progress_of(self.console) as progress:
            bar = progress.add_task(stage, total=steps, completed=start)
            for step in range(start, steps):
                torch.manual_seed(self.seed * 1_000_003 + step)  # augmentation of this step, restarted or not
                for group in optimizer.param_groups:
                    warm = min(1.0, (step + 1) / 200)
                    cosine = 0.5 * (1 + math.cos(math.pi * step / (horizon or steps)))
                    group["lr"] = rate * warm * (0.02 + 0.98 * cosine)
                loss = loss_of(step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                progress.update(bar, advance=1, description=f"{stage} loss {loss.item():.3f}")
                done = step + 1
                if done % self.save_every == 0 or done == steps:
                    self.record(stage, done, loss.item(), scores())
                    state = {
                        "modules": [m.state_dict() for m in modules],
                        "optimizer": optimizer.state_dict(),
                        "step": done,
                    }
                    with replacing(path) as part:
                        torch.save(state, part)

    def save(self, model: Any, processor: Any, recipe: Any) -> Path:
        """Half-precision checkpoint in the ordinary Hugging Face form, with processor and the recipe; returns its folder."""
        target = self.folder / "checkpoint"
        model.generation_config.max_new_tokens = 8
        model.set_attn_implementation("sdpa")
        model.to(torch.float16).save_pretrained(target)
        processor.save_pretrained(target)
        write_json(target / "recipe.json", asdict(recipe))
        self.console.print(f"saved {target}")
        return target

    def record(self, stage: str, step: int, loss: float, scores: dict[str, float]) -> None:
        self.log.write(json.dumps({"stage": stage, "step": step, "loss": loss, **scores}) + "\n")
        self.log.flush()
        shown = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
        self.console.print(f"{stage} {step}: loss {loss:.3f}  {shown}")
