# SPDX-License-Identifier: Apache-2.0
"""Which reader a file or folder needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .files import Folder, Images, Part, choose
from .film import Showing
from .films import FILMS, read_films
from .layouts import HALLUSION_KEY, LAYOUTS, POPE_PARTS, all_parts
from .plain import table_questions
from .question import Question, check_questions
from .tables import TABLES, read_rows


def read_questions(
    task: str,
    data: Path | str,
    images: Path | str | None = None,
    split: str | None = None,
    showing: Showing | None = None,
) -> Sequence[Question]:
    """The questions of a benchmark in the layout of its site or of LLaVA's evaluation folder, or of a plain table.

    data: a folder with the files anywhere in it, or the file with the questions. A file that is none of the benchmark's own,
    and a folder that has one table (or its shards) instead, is read as a plain table and judged by the rules of `task`.
    images: the folder of the pictures or videos, if they do not lie where the layout has them. split: which of several tables.
    showing: how many frames of videos, and whether with subtitles.

    Raises ValueError that names file, row and column of what cannot be read, or says what was looked for and what is there:
    unknown layout, several splits, a missing shard or part, a missing picture, an id that is there twice.
    """
    given = Path(images) if images is not None else None
    if task in FILMS:
        return read_films(task, Path(data), given, split, showing)
    if showing is not None and showing.subtitles:
        raise ValueError(f"{task} has no subtitles: leave --subtitles out")
    folder = Folder(Path(data))
    patterns, reader = LAYOUTS.get(task, ((), None))
    own = folder.matching(*patterns) if patterns else []
    if reader is not None and own and (folder.file is None or folder.file in own):
        return check_questions(reader(folder, given, split), data)
    if not (tables := folder.tables(task)):
        if reader is not None:
            return reader(folder, given, split)  # raises: it says what it looked for
        raise ValueError(f"{data}: no table of questions ({', '.join(TABLES)}) in it; found {folder.inventory()}")
    rows = [row for part in _chosen(task, folder, tables, split) for path in part.paths for row in read_rows(path)]
    questions = table_questions(rows, Images(folder, given, "images", "image"), task)
    if task == "mmstar":  # its average is over the finer categories
        questions = [replace(q, kind=q.extra.get("l2_category", q.kind)) for q in questions]
    if task == "hallusionbench":
        questions = [replace(q, id="/".join(q.extra.get(name, "") for name in HALLUSION_KEY)) for q in questions]
    return check_questions(_distinct(questions) if task in REPEATED else questions, data)


REPEATED = ("mme", "pope")
"""Benchmarks whose hub files give one id to several questions."""


def _chosen(task: str, folder: Folder, tables: Sequence[Part], split: str | None) -> list[Part]:
    """The tables to read: one, but POPE's three splits, and of MMMU one for each subject."""
    if split and folder.file and not tables[0].of(split):
        raise ValueError(f"{folder.file}: --split {split} is not in its name; without --split it is read as it is")
    names = {part.name.lower() for part in tables}
    if task == "pope" and not split and len(tables) > 1 and names & set(POPE_PARTS):
        all_parts("POPE", POPE_PARTS, [part.name.lower() for part in tables], folder.root)
        return list(tables)
    if task == "mmmu" and len({part.folder for part in tables}) > 1:
        subjects = [part for part in tables if split is None or part.of(split)]
        if len({part.name for part in subjects}) == 1:
            return subjects
    return [choose(task, tables, split, folder.root)]


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
