# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval as our command names them: a name, NAME=FOLDER or a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import MODEL


def task_manager(tasks: Sequence[str], include: Path | str | None) -> Any:
    """The tasks that lmms-eval knows, with those of our folders. (A task file that it is given itself it takes for one of
    models without chat format, and loses its name.)"""
    from lmms_eval.tasks import TaskManager

    files = [Path(task.partition("=")[0]) for task in tasks if _is_file(task)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"no task file {missing[0]!r} here")
    folders = [*([include] if include else []), *(file.parent for file in files)]
    return TaskManager("WARNING", include_path=list(dict.fromkeys(map(str, folders))), model_name=MODEL)


def _is_file(task: str) -> bool:
    return task.partition("=")[0].endswith((".yaml", ".yml"))


def resolved(manager: Any, task: str) -> Any:
    """What lmms-eval takes for one of our tasks: its name, or the task made with other data."""
    from lmms_eval.utils import load_yaml_config

    name, _, data = task.partition("=")
    if _is_file(task):
        name = load_yaml_config(name, mode="simple").get("task")
    if name not in manager.all_tasks:
        raise ValueError(f"lmms-eval has no task {name!r}: `lmms-eval tasks list` shows them; include= adds a folder")
    if not data:
        return name
    if not Path(data).is_dir():
        raise ValueError(f"task {name}: no folder {data!r} here")
    if name not in manager.all_subtasks:
        raise ValueError(f"{name} is a group of tasks: say which of them has its data in {data}")
    (made,) = manager.load_task_or_group([{"task": name, "dataset_path": str(Path(data).resolve())}], "chat").values()
    return made


def task_key(task: str) -> str:
    """The name of a task, of a file with its content."""
    file = Path(task.partition("=")[0])
    return f"{task} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" if _is_file(task) else task
