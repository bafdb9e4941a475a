# SPDX-License-Identifier: Apache-2.0
"""Which reader a file or folder needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .files import TABLES, Folder, Images, load_table
from .layouts import LAYOUTS
from .plain import table_questions
from .question import Question, check_questions


def read_questions(
    task: str, data: Path | str, images: Path | str | None = None, split: str | None = None
) -> Sequence[Question]:
    """The questions of a benchmark in the layout of its site or of LLaVA's evaluation folder, or of a plain table.

    data: a folder with the files anywhere in it, or the file with the questions. A file that is none of the benchmark's own,
    and a folder that has one table (or Parquet shards) instead, is read as a plain table and judged by the rules of `task`.
    images: the folder of the pictures, if they do not lie where the layout has them. Raises ValueError that says what was
    looked for and what is there: unknown layout, empty file, missing picture, an id that is there twice.
    """
    folder = Folder(Path(data))
    given = Path(images) if images is not None else None
    patterns, reader = LAYOUTS.get(task, ((), None))
    known = folder.matching(*patterns) if patterns else []
    ours = bool(known) and (folder.file is None or folder.file in known)
    if reader is not None and (ours or not _tables(folder, split)):
        return check_questions(reader(folder, given, split), data)
    paths = _tables(folder, split)
    if not paths:
        raise ValueError(f"{data}: no table of questions ({', '.join(TABLES)}) in it; found {folder.inventory()}")
    if len(paths) > 1 and any(path.suffix != ".parquet" for path in paths):
        raise ValueError(
            f"{data}: several tables, say which by --data FILE: {', '.join(path.name for path in paths[:8])}"
        )
    rows = [(path, row) for path in paths for row in load_table(path)]
    finder = Images(folder, given, "images", "image")
    questions = table_questions([row for _, row in rows], rows[0][0], finder, numbered=task in ("ai2d", "scienceqa"))
    if task == "mmstar":  # its average is over the finer categories
        questions = [replace(q, kind=q.extra.get("l2_category", q.kind)) for q in questions]
    if task == "hallusionbench":
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        questions = [replace(q, id="/".join(q.extra.get(name, "") for name in names)) for q in questions]
    return check_questions(_distinct(questions) if task in REPEATED else questions, data)


REPEATED = ("mme", "pope")
"""Benchmarks whose hub files give one id to several questions."""


def _distinct(questions: Sequence[Question]) -> list[Question]:
    """Ids made of kind, id and a running number, where ids repeat; the questions of one id and kind become a group."""
    ids = Counter(question.id for question in questions)
    if max(ids.values(), default=1) == 1:
        return list(questions)
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        group = f"{question.kind}/{question.id}" if question.kind else question.id
        found.append(replace(question, id=f"{group}/{seen[group]}", group=group))
        seen[group] += 1
    return found


def _tables(folder: Folder, split: str | None) -> list[Path]:
    """The file that was given; else Parquet shards, else tables in the folder itself."""
    if folder.file:
        return [folder.file] if folder.file.suffix in TABLES else []
    shards = [path for path in folder.matching("*.parquet") if not split or path.name.startswith(split)]
    if shards:
        return shards
    near = [path for path in folder.files if path.parent == folder.root and path.suffix in TABLES]
    return [path for path in near if not split or split in path.name]
