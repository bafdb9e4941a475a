# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval from our own command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mmcompress as mm

from ...plan import as_pipeline
from ...records import read
from ...stage import Pipeline, Stage
from ..evaluator import STOCK, weights_digest
from ..journal import file_name
from ..team import Team
from .base import MODEL, load, require
from .model import CompressedModel
from .plans import model_arguments, read_plan
from .records import save
from .tasks import resolved, task_key, task_manager

KIND = "`mmcompress eval --harness lmms`"
_REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


def run_lmms(
    model: str,
    plans: Sequence[str | Stage | Pipeline],
    tasks: Sequence[str],
    out: Path | str,
    *,
    include: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    max_new_tokens: int = 1024,
    frames: int = 8,
    generation: str | None = None,
    cache: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run tasks of lmms-eval with each plan ("stock": none) on a checkpoint; returns one record per plan, in their order.

    tasks: names that lmms-eval knows (groups too), NAME=FOLDER for a task whose data lie in FOLDER in the hub's format, or
    .yaml files of tasks. include: a folder with more of them. generation: as --gen_kwargs. cache: a folder for the response
    cache of lmms-eval.

    OUT gets lmms_PLAN_fingerprint.json for each plan with all that lmms-eval reports, and for each task a record that
    `mmcompress compare` reads (for the tasks that it knows). A plan whose record is there, of the same settings and weights, is
    not run again. In `accelerate launch` the first process writes and returns the records, the others return none. Raises
    what the harness raises; an answer that could not be made is never taken for an empty one.
    """
    require()
    from lmms_eval.evaluator import simple_evaluate

    pipelines = [
        read_plan(plan) if isinstance(plan, str) and not plan.endswith(".json") else as_pipeline(plan) for plan in plans
    ]
    if not pipelines or not tasks:
        raise ValueError("nothing to evaluate: give at least one plan ('stock' for none) and one task")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least 1")
    manager = task_manager(tasks, include)
    for task in tasks:
        resolved(manager, task)  # what is not there fails before the model is loaded
    from accelerate import Accelerator

    Team.here()  # raises if accelerate does not know what was launched
    accelerator = Accelerator()
    where = device if accelerator.num_processes == 1 else accelerator.device
    loaded = load(model, dtype, attn_implementation, None, where)
    common = {
        "pretrained": model, "batch_size": batch_size, "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "attn_implementation": getattr(loaded[0].config, "_attn_implementation", None), "max_new_tokens": max_new_tokens,
        "frames": frames,
    }  # fmt: skip
    settings = {
        **common, "harness": f"lmms-eval {version('lmms-eval')}", "weights": weights_digest(loaded[0]),
        "tasks": [task_key(task) for task in tasks], "limit": limit, "generation": generation,
    }  # fmt: skip
    folder, todo = Path(out), []
    for pipeline in pipelines:
        named = {**settings, "task": "lmms", "protocol": "run", "plan": STOCK if pipeline is None else repr(pipeline)}
        path = folder / f"{file_name(named)}.json"
        todo.append((named, path, read(path, KIND, lambda value: isinstance(value, dict) and "scores" in value)))
    records = []
    for named, path, done in todo:
        if done is not None:
            records.append(done)
            continue
        if show:
            show(f"{named['plan']}: {', '.join(tasks)}")
        arguments = model_arguments({**common, "plan": named["plan"]})
        subject = CompressedModel.create_from_arg_string(arguments, {"loaded": loaded})
        try:
            results = simple_evaluate(
                model=subject, model_args=arguments, tasks=[resolved(manager, task) for task in tasks],
                limit=limit, batch_size=batch_size, gen_kwargs=generation, task_manager=manager, verbosity="WARNING",
                use_cache=str(cache) if cache else None, log_samples=True,
                cli_args=argparse.Namespace(
                    model=MODEL, model_args=arguments, tasks=",".join(tasks), output_path=str(folder), batch_size=batch_size,
                    limit=limit, gen_kwargs=generation or "", log_samples=True, log_samples_suffix=MODEL, predict_only=False,
                    process_with_media=False, reasoning_tags=_REASONING, agentic_trace_mode="basic", timezone="UTC",
                ),
            )  # fmt: skip
        finally:
            mm.uncompress(loaded[0])
        if results is not None:
            records.append(save(results, named, path))
    return records
