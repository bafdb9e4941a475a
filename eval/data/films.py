# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of videos, as their sites and hub datasets have them on disk."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .files import Folder, Videos, choose
from .film import Film, Showing
from .plain import letter_of, options_of
from .question import Question, check_questions
from .rows import Row, canonical
from .tables import document, read_json, read_rows

KINDS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
MVBENCH = (
    "action_sequence", "action_prediction", "action_antonym", "fine_grained_action", "unexpected_action", "object_existence",
    "object_interaction", "object_shuffle", "moving_direction", "action_localization", "scene_transition", "action_count",
    "moving_count", "moving_attribute", "state_change", "fine_grained_pose", "character_order", "egocentric_navigation",
    "episodic_reasoning", "counterfactual_inference",
)  # fmt: skip
"""The tasks of MVBench, as their files are called; its score is the mean over them."""
_HOMES = {
    "star": ("action_sequence", "action_prediction", "object_interaction"), "ssv2_video": ("action_antonym",),
    "Moments_in_Time_Raw": ("fine_grained_action",), "FunQA_test": ("unexpected_action",), "scene_qa": ("scene_transition",),
    "clevrer": ("object_existence", "moving_direction", "moving_count", "moving_attribute", "counterfactual_inference"),
    "perception": ("object_shuffle", "action_count", "state_change", "character_order"), "sta": ("action_localization",),
    "nturgbd": ("fine_grained_pose",), "vlnqa": ("egocentric_navigation",), "tvqa": ("episodic_reasoning",),
}  # fmt: skip
"""Folder of MVBench -> the tasks whose videos are somewhere in it."""
MLVU = {
    "plotqa": "plotQA", "needle": "needle", "findneedle": "needle", "needleqa": "needle", "ego": "ego", "count": "count",
    "order": "order", "anomaly_reco": "anomaly_reco", "anomalyreco": "anomaly_reco", "topic_reasoning": "topic_reasoning",
    "topicreasoning": "topic_reasoning",
}  # fmt: skip
"""Names of the tasks of MLVU that have options, as its files and as the hub have them -> the one name."""
MLVU_TASKS = tuple(dict.fromkeys(MLVU.values()))


@dataclass
class _Reading:
    """What a reader needs: the files, where videos are looked for, and how they are shown."""

    folder: Folder
    given: Path | None
    split: str | None
    showing: Showing
    told: int = 0
    asked: int = 0

    def videos(self, *names: str) -> Videos:
        return Videos(self.folder, self.given, *names)

    def table(self, title: str, *own: str, inside: str = "") -> list[Row]:
        """The rows of the file that is called so, or else of the one table there is; of several, of that in the folder `inside`."""
        if self.folder.file is None and self.folder.matching(*own):
            return read_rows(self.folder.main(title, own, self.split))
        if not (tables := self.folder.tables(title)):
            self.folder.main(title, (*own, "*.parquet"))  # raises: it says what it looked for
        split = self.split
        if here := [part for part in tables if part.folder.name.lower() == (split or inside).lower()]:
            tables, split = here, None
        part = tables[0] if self.folder.file else choose(title, tables, split, self.folder.root)
        return [row for path in part.paths for row in read_rows(path)]

    def film(self, row: Row, finder: Videos, *names: str, subtitles: Sequence[str] = (), offset: float = 0.0) -> Film:
        """The video of a row, with its start and end where it has them."""
        start, end = _time(row, "start"), _time(row, "end")
        if start is not None and end is not None and end < start:
            raise row.wrong("end", end, f"but it starts at {start:g} s")
        path = finder.find(*names, place=row.place)
        rate = _time(row, "fps") or 3.0
        said: Path | None = None
        if self.showing.subtitles and subtitles:
            self.asked += 1
            said = next((file for name in subtitles for file in self.folder.matching(name)), None)
            self.told += said is not None
        return Film(path, self.showing.frames, start, end, rate, said, offset)


Reader: TypeAlias = Callable[[_Reading], list[Question]]
FILMS: dict[str, Reader] = {}
SUBTITLED = ("videomme", "longvideobench")
"""The benchmarks that have subtitles."""


def read_films(
    task: str, data: Path, videos: Path | None = None, split: str | None = None, showing: Showing | None = None
) -> Sequence[Question]:
    """The questions of a benchmark of videos. Raises ValueError that names file, row and column of what cannot be read, and says
    where a missing video was looked for."""
    showing = showing or Showing()
    if showing.subtitles and task not in SUBTITLED:
        raise ValueError(f"{task} has no subtitles ({', '.join(SUBTITLED)} have): leave --subtitles out")
    reading = _Reading(Folder(data), videos, split, showing)
    found = check_questions(FILMS[task](reading), data)
    if reading.asked and not reading.told:
        raise ValueError(f"{reading.folder.root}: no subtitles in it (.srt or .json); leave --subtitles out")
    if reading.told < reading.asked:
        warnings.warn(f"{reading.asked - reading.told} of {reading.asked} questions have no subtitles", stacklevel=2)
    return found


def _reader(name: str) -> Callable[[Reader], Reader]:
    def add(reader: Reader) -> Reader:
        FILMS[name] = reader
        return reader

    return add


@_reader("mvbench")
def _mvbench(reading: _Reading) -> list[Question]:
    """A file for each task in json/, and a folder of videos (or of frames) for each of its sources in video/."""
    paths = _task_files(reading, "MVBench", {name: name for name in MVBENCH})
    found = []
    for path, kind in paths:
        homes = [home for home, tasks in _HOMES.items() if kind in tasks]
        root = reading.folder.root
        known = [p for home in homes for p in reading.folder.folders if home in p.relative_to(root).parts]
        finder = reading.videos("video", "videos")
        if reading.given is None:
            finder.roots = [*known, *finder.roots]
        for number, row in enumerate(read_rows(path)):
            options = _texts(row, row.texts("candidates"))
            film = reading.film(row, finder, row.text("video"))
            found.append(
                Question(
                    f"{kind}/{number}", row.text("question"), (), _gold(row, options), options, kind=kind, place=row.place,
                    videos=(film,),
                )
            )  # fmt: skip
        finder.check()
    return found


@_reader("mlvu")
def _mlvu(reading: _Reading) -> list[Question]:
    """The files 1_plotQA.json ... 7_topic_reasoning.json (tasks without options need a judge and are left out) and their folders of
    videos; or the table of the hub, whose questions have their options inside."""
    names = {f"{i}_{name}": name for i in range(1, 10) for name in MLVU_TASKS}
    own = reading.folder.matching(*(f"{name}.json" for name in names))
    found: list[Question] = []
    if own and reading.folder.file in (None, *own):
        for path, kind in _task_files(reading, "MLVU", names):
            finder = reading.videos(path.stem, "video", "videos")
            for number, row in enumerate(read_rows(path)):
                options = _texts(row, row.texts("candidates"))
                film = reading.film(row, finder, row.text("video"))
                found.append(
                    Question(
                        f"{kind}/{number}", row.text("question"), (), _gold(row, options), options, kind=kind,
                        place=row.place, videos=(film,),
                    )
                )  # fmt: skip
            finder.check()
        return found
    places = [name for i in range(1, 10) for name in (f"{i}_{task}" for task in MLVU_TASKS)]
    finder = reading.videos("video", "videos", *places)
    for number, row in enumerate(reading.table("MLVU")):
        column = row.column("task_type", "question_type")
        kind = MLVU.get(re.sub(r"^\d+_", "", row.text("task_type", "question_type")).lower(), "")
        if not kind:
            raise row.wrong(
                column or "", row.text("task_type", "question_type"), f"one of {', '.join(MLVU_TASKS)} is needed"
            )
        text, options = _inside(row)
        film = reading.film(row, finder, row.text("video_name", "video"))
        found.append(
            Question(str(number), text, (), _gold(row, options), options, kind=kind, place=row.place, videos=(film,))
        )
    finder.check()
    return found


@_reader("videomme")
def _videomme(reading: _Reading) -> list[Question]:
    """The table of the hub, data/ID.mp4, subtitle/ID.srt. kind: short, medium, long; domain beside it."""
    finder, found = reading.videos("data", "videos", "video"), []
    for row in reading.table("Video-MME"):
        name = row.text("videoid")
        options = _texts(row, row.texts("options"))
        film = reading.film(row, finder, *_names(name), subtitles=(f"{name}.srt",))
        found.append(
            Question(
                row.text("question_id"), row.text("question"), (), _gold(row, options), options, kind=row.label("duration"),
                extra={"l2_category": row.label("domain"), "task_type": row.label("task_type")}, place=row.place, videos=(film,),
            )
        )  # fmt: skip
    finder.check()
    return found


@_reader("longvideobench")
def _longvideobench(reading: _Reading) -> list[Question]:
    """lvb_val.json (candidates) or the table of the hub (option0 ... option4), videos/, subtitles/. kind: seconds of the group of
    durations; the domain is the category of the question."""
    finder, found = reading.videos("videos", "video"), []
    for number, row in enumerate(reading.table("LongVideoBench", "lvb_val.json")):
        if row.column("candidates"):
            texts = row.texts("candidates")
        else:
            given = [row.fields.get(f"option{i}") for i in range(5)]
            texts = tuple(str(text) for text in given if text is not None and str(text) not in ("", "N/A"))
        options, said = _texts(row, texts), row.maybe("subtitle_path")
        film = reading.film(
            row, finder, row.text("video_path"), subtitles=(Path(said).name,) if said else (),
            offset=_time(row, "starting_timestamp_for_subtitles") or 0.0,
        )  # fmt: skip
        found.append(
            Question(
                row.text("id") if row.column("id") else str(number), row.text("question"), (),
                _numbered(row, options, "correct_choice"), options, kind=row.label("duration_group"),
                extra={"l2_category": row.label("question_category")}, place=row.place, videos=(film,),
            )
        )  # fmt: skip
    finder.check()
    return found


@_reader("egoschema")
def _egoschema(reading: _Reading) -> list[Question]:
    """questions.json and, of the 500 whose answers are public, subset_answers.json (these are asked, all by split "full"); or a
    table of the hub. Videos are called by the id of the question."""
    finder, found = reading.videos("videos", "video", "good_clips_git"), []
    own = reading.folder.file is None and reading.folder.matching("questions.json")
    if own:
        answers = reading.folder.matching("subset_answers.json")
        if not answers and reading.split != "full":
            raise ValueError(
                f"{reading.folder.root}: subset_answers.json is missing, which has the 500 public answers; --split full asks all "
                "without, for the agreement with the uncompressed model"
            )
        known = document(answers[0]).fields if answers else {}
        for row in read_rows(own[0]):
            name = row.text("q_uid")
            if canonical(name) not in known and reading.split != "full":
                continue
            options = _texts(row, [row.text(f"option_{i}") for i in range(5)])
            gold = known.get(canonical(name))
            answer = Row(f"{answers[0]}, {name}", {"answer": gold}) if gold is not None else None
            found.append(
                Question(
                    name, row.text("question"), (), _numbered(answer, options, "answer") if answer else (), options,
                    place=row.place, videos=(reading.film(row, finder, *_names(name)),),
                )
            )  # fmt: skip
    else:
        for number, row in enumerate(reading.table("EgoSchema", inside="subset")):
            options = _texts(row, row.texts("option"))
            found.append(
                Question(
                    row.text("question_idx") if row.column("question_idx") else str(number), row.text("question"), (),
                    _numbered(row, options, "answer"), options, place=row.place,
                    videos=(reading.film(row, finder, *_names(row.text("video_idx"))),),
                )
            )  # fmt: skip
    finder.check()
    return found


@_reader("nextqa")
def _nextqa(reading: _Reading) -> list[Question]:
    """Multiple choice: test.csv or val.csv, with map_vid_vidorID.json where videos are called as in VidOR; or the hub's table.
    kind: the type, as CW; domain: causal, temporal, descriptive."""
    finder, found = reading.videos("NExTVideo", "videos", "video"), []
    mapped = reading.folder.matching("map_vid_vidorID.json")
    known = read_json(mapped[0]) if mapped else {}
    if not isinstance(known, dict):
        raise ValueError(f"{mapped[0]}: an object with a path for each video is needed")
    domains = {"C": "causal", "T": "temporal", "D": "descriptive"}
    for row in reading.table("NExT-QA", "test.csv", "val.csv", inside="mc"):
        if not row.column("a0"):
            raise ValueError(
                f"{row.place}: no columns a0 ... a4: open answers are judged by WUPS, which needs WordNet: give the table of the "
                "multiple choice by --data FILE, or use --harness lmms"
            )
        name, kind = row.text("video"), row.label("type")
        if kind[:1] not in domains:
            raise row.wrong("type", kind, "a type as CW, TN or DL is needed")
        options = _texts(row, [row.text(f"a{i}") for i in range(5)])
        names = [*_names(str(known[name])), *_names(name)] if name in known else _names(name)
        found.append(
            Question(
                f"{name}/{row.text('qid')}", row.text("question"), (), _numbered(row, options, "answer"), options, kind=kind,
                extra={"l2_category": domains[kind[0]]}, place=row.place, videos=(reading.film(row, finder, *names),),
            )
        )  # fmt: skip
    finder.check()
    return found


def _task_files(reading: _Reading, title: str, names: dict[str, str]) -> list[tuple[Path, str]]:
    """The files of the tasks of a benchmark and the tasks: all, one by split, or the file that is given."""
    folder, split = reading.folder, reading.split
    if folder.file is not None:
        paths = [folder.file]
        if folder.file.stem not in names:
            raise ValueError(f"{folder.file}: no file of {title}: they are called {', '.join(names)} (.json)")
    else:
        paths = [path for name in names for path in folder.matching(f"{name}.json")]
    known = {
        path.stem.lower(): name for path in paths for stem, name in names.items() if stem.lower() == path.stem.lower()
    }
    if split is not None:
        paths = [path for path in paths if split in (path.stem, known[path.stem.lower()])]
    if not paths:
        wanted = f"--split {split} as one of " if split else ""
        raise ValueError(f"{folder.root}: no questions of {title}: looked for {wanted}{', '.join(names)} (.json), found "
                         f"{folder.inventory()}")  # fmt: skip
    twice = [path for path in paths if sum(other.name == path.name for other in paths) > 1]
    if twice:
        raise ValueError(f"{folder.root}: {twice[0].name} is there twice ({', '.join(map(str, twice))}): take one out")
    return [(path, known[path.stem.lower()]) for path in paths]


def _names(name: str) -> list[str]:
    """What the file of a video may be called."""
    return [name] if name.lower().endswith(KINDS) else [*(f"{name}{kind}" for kind in KINDS), name]


def _texts(row: Row, texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Options with letters; where every text begins with its own ("A. " or "(A) "), without it."""
    found = list(zip(string.ascii_uppercase, texts, strict=False))
    if len(found) < 2:
        raise ValueError(f"{row.place}: at least two options are needed, got {[text for _, text in found]}")
    heads = [re.match(rf"\s*(?:\({letter}\)|{letter}[.):])\s*", text) for letter, text in found]
    if all(heads):
        found = [(letter, text[head.end() :]) for (letter, text), head in zip(found, heads, strict=True) if head]
    return tuple((letter, text.strip()) for letter, text in found)


def _inside(row: Row) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A question without the options in its text, and these; or its own columns."""
    text = row.text("question")
    lines = list(re.finditer(r"^[ \t]*\(([A-Z])\)[ \t]*(.*)$", text, re.MULTILINE))
    if not lines:
        if options := options_of(row):
            return text, options
        raise row.wrong("question", text, "its options are needed in it, each on a line of its own as (A) text")
    if [line[1] for line in lines] != list(string.ascii_uppercase[: len(lines)]) or len(lines) < 2:
        raise row.wrong(
            "question", text, f"its options are called {', '.join(line[1] for line in lines)}: A, B, ... is needed"
        )
    return text[: lines[0].start()].strip(), tuple((line[1], line[2].strip()) for line in lines)


def _gold(row: Row, options: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The letter of the right option, which the file has as its text or as a letter; nothing if it does not say."""
    answer = row.maybe("answer").strip()
    if not answer:
        return ()
    same = tuple(letter for letter, text in options if text == answer)  # two of them may say the same
    return same or (letter_of(row, "answer", answer, options),)


def _numbered(row: Row, options: tuple[tuple[str, str], ...], column: str) -> tuple[str, ...]:
    """The letter of the right option, of which the file has the number from 0; nothing if it does not say."""
    if not row.maybe(column):
        return ()
    number = row.integer(column)
    if not 0 <= number < len(options):
        raise row.wrong(column, number, f"the number of an option from 0 to {len(options) - 1} is needed")
    return (options[number][0],)


def _time(row: Row, name: str) -> float | None:
    text = row.maybe(name) if name in row.fields else ""
    try:
        found = float(text) if text else None
    except ValueError:
        found = -1.0
    if found is not None and found < 0:
        raise row.wrong(name, text, "seconds are needed")
    return found
