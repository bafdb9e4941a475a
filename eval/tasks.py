# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: how a reply is read and judged, and how the answers of all questions make the score."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from . import metrics as vqa
from .data import Question
from .data.films import FILMS, MLVU_TASKS, MVBENCH
from .metrics import Protocol
from .synthetic.pages import CHANCE as PAGES_CHANCE
from .synthetic.questions import CHANCE as SHAPES_CHANCE
from .synthetic.videos import CHANCE as VIDEOS_CHANCE


@dataclass(frozen=True)
class Row:
    """One answered question. parsed: what the benchmark reads in the reply; value: what it gives, in [0, 1], None without gold
    answers; cluster: questions of one cluster (an image of MME, the rotations of one question) are drawn together; domain: a
    coarser type."""

    id: str
    kind: str
    cluster: str
    answers: tuple[str, ...]
    reply: str
    parsed: str
    value: float | None
    chance: float = 0.0
    domain: str = ""


Judge: TypeAlias = Callable[["Task", Question, str, Protocol], tuple[str, float]]
"""(what the reply says, what it is worth)"""
Terms: TypeAlias = "list[tuple[float, np.ndarray, np.ndarray]]"
"""A score as a sum of scale x total of numerators [n] / total of denominators [n]; so it can be drawn again and again."""


@dataclass(frozen=True)
class Task:
    """A benchmark. score: the name of its main score; percent: whether that is a part of 1; own: for the tables of users, who
    ask as they wish; drawn: of an embedded benchmark, which needs no data, the types of its questions and the chance of each."""

    name: str
    title: str
    judge: Judge
    score: str = "accuracy"
    percent: bool = True
    protocols: tuple[Protocol, ...] = vqa.PROTOCOLS
    own: bool = False
    drawn: Mapping[str, float] = field(default_factory=dict)

    def headline(self, protocol: Protocol) -> str:
        """The name of the score that tables show: POPE has its mean F1, but in lmms-eval the accuracy over all splits."""
        return "accuracy" if self.name == "pope" and protocol == "lmms" else self.score

    def row(self, question: Question, reply: str, protocol: Protocol) -> Row:
        """Judge a reply. lmms-eval takes it as it is; the others strip it first."""
        if protocol not in self.protocols:
            raise ValueError(f"{self.name} has no protocol {protocol!r}: choose one of {', '.join(self.protocols)}")
        said = reply if protocol == "lmms" else reply.strip()
        parsed, value = self.judge(self, question, said, protocol)
        return Row(
            question.id, question.kind, _cluster(self.name, question), question.answers, reply, parsed,
            float(value) if question.answers else None, _chance(self, question), question.extra.get("l2_category", ""),
        )  # fmt: skip

    def check(self, questions: Sequence[Question], protocol: Protocol) -> None:
        """What has to be known before anything is asked. Raises ValueError that names file and row of a question that the rules
        cannot judge; warns of golds outside the metric's domain: too few human answers, a gold answer that is worth nothing as
        a reply, an empty reply that counts as right."""
        few, never, always = [], [], []
        for question in questions:
            try:
                _domain(self.name, question)
                empty = self.row(question, "", protocol).value
                gold = self.row(question, _gold_reply(self.name, question), protocol).value
            except ValueError as error:
                raise ValueError(f"{question.place or f'question {question.id}'}: {error}") from error
            if question.answers:
                few += [question] * (self.judge is _soft and len(question.answers) < HUMANS)
                never += [question] * (not gold)
                always += [question] * (empty == 1 and self.judge not in (_pope, _hallusion))
        least = min((len(question.answers) for question in few), default=0)
        rules = f"by the rules of {self.name} ({protocol})"
        for found, what in (
            (
                few,
                f"have fewer than {HUMANS} human answers, as few as {least}; of fewer than four, a reply equal to all is worth 1",
            ),
            (never, f"are worth nothing {rules}, even if the reply is the gold answer"),
            (always, f"count an empty reply as right {rules}"),
        ):
            if found:
                first = f"{found[0].place or found[0].id}, gold {found[0].answers[0]!r}"
                warnings.warn(f"{len(found)} of {len(questions)} questions {what}; the first: {first}", stacklevel=2)

        there = {question.kind for question in questions}
        whole = {"mvbench": MVBENCH, "mlvu": MLVU_TASKS}.get(self.name, ())
        if gone := [kind for kind in whole if kind not in there]:
            warnings.warn(
                f"the score of {self.title} is the mean over {len(whole)} tasks; missing: {', '.join(gone)}",
                stacklevel=2,
            )
        if self.name == "mme" and (gone := [kind for kind in (*vqa.PERCEPTION, *vqa.COGNITION) if kind not in there]):
            warnings.warn(f"MME's sums are over 14 categories; missing: {', '.join(gone)}", stacklevel=2)

    def terms(self, rows: Sequence[Row], protocol: Protocol) -> Terms:
        """The headline score as sums over the rows."""
        values = np.array([row.value or 0.0 for row in rows])
        ones = np.ones(len(rows))
        if self.name == "mvbench" and protocol == "lmms":  # it leaves empty replies out
            ones = np.array([float(bool(row.reply.strip())) for row in rows])
        kinds = np.array([row.kind for row in rows])
        if self.name == "pope" and protocol != "lmms":
            yes = np.array([row.parsed == "yes" for row in rows], float)
            meant = np.array([row.answers[0].lower() == "yes" for row in rows], float)
            parts = [kinds == kind for kind in dict.fromkeys(kinds)]
            return [(1 / len(parts), 2 * yes * meant * part, (yes + meant) * part) for part in parts]
        if self.drawn or self.name in MEANS:
            parts = [kinds == kind for kind in dict.fromkeys(kinds)]
            return [(1 / len(parts), values * part, ones * part) for part in parts]
        first, whole = _groups(rows, values)
        if self.name == "mme":
            parts = [kinds == kind for kind in dict.fromkeys(kinds) if kind in (*vqa.PERCEPTION, *vqa.COGNITION)]
            return [
                term
                for part in parts
                for term in ((100.0, values * part, ones * part), (100.0, whole * part, first * part))
            ]
        if self.name == "mmbench":
            return [(1.0, whole, first)]
        return [(1.0, values, ones)]

    def scores(self, rows: Sequence[Row], protocol: Protocol) -> dict[str, float]:
        """All scores of rows with gold answers, the headline first."""
        rows = known(rows)
        if not rows:
            return {}
        found = {self.headline(protocol): evaluate_terms(self.terms(rows, protocol))}
        right = [(row.value or 0.0) >= 1 for row in rows]
        if self.name == "pope":
            split = {
                kind: [row for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)
            }
            for kind, part in {"": rows, **split}.items():
                labels = [row.answers[0].lower() for row in part]
                one = vqa.pope_scores([row.parsed for row in part], labels, protocol)
                found |= {f"{kind}/{name}" if kind else name: value for name, value in one.items()}
            found["accuracy_mean"] = float(
                np.mean([np.mean([row.value or 0.0 for row in part]) for part in split.values()])
            )
        elif self.name == "mme":
            found |= vqa.mme_scores([row.kind for row in rows], [row.cluster for row in rows], right)
        elif self.name == "mmbench":
            labels = {"category": [row.kind for row in rows], "l2_category": [row.domain for row in rows]}
            found |= vqa.circular_scores([int(row.id) for row in rows], right, labels)
        elif self.name == "hallusionbench":
            keys = [tuple(row.id.split("/")[:5]) for row in rows]
            if all(len(key) == 5 for key in keys):
                found |= vqa.hallusion_scores(keys, right)  # type: ignore[arg-type]
        elif self.name in DOMAINS:
            found |= _by_domain(rows)
        elif self.name in MEANS:
            found["accuracy"] = float(np.mean([row.value or 0.0 for row in rows]))
        elif self.name == "mmstar":
            found["average"] = float(np.mean([value for value, _ in by_kind(rows).values()]))
        elif self.name == "ocrbench":
            found["total"] = float(sum(row.value or 0.0 for row in rows))
        return found

    def guess(self, rows: Sequence[Row]) -> float:
        """The headline score of a uniform guess; 0 where answers are open."""
        if self.name == "mme":
            kinds = {row.kind for row in rows} & {*vqa.PERCEPTION, *vqa.COGNITION}
            return 75.0 * len(kinds)  # half of the questions, a quarter of the pairs
        if self.name == "mmbench":
            odds: dict[str, float] = {}
            for row in rows:
                odds[row.cluster] = odds.get(row.cluster, 1.0) * row.chance
            return float(np.mean(list(odds.values()))) if odds else 0.0
        if self.name in MEANS:
            kinds = dict.fromkeys(row.kind for row in rows)
            means = [np.mean([row.chance for row in rows if row.kind == kind]) for kind in kinds]
            return float(np.mean(means)) if rows else 0.0
        return float(np.mean([row.chance for row in rows])) if rows else 0.0


MEANS = ("mvbench", "mlvu")
"""Benchmarks whose score is the mean over their tasks."""
DOMAINS = ("videomme", "longvideobench", "nextqa")
"""Benchmarks that are told by types and by domains too."""


def _by_domain(rows: Sequence[Row]) -> dict[str, float]:
    """ "kind/NAME" and "domain/NAME": mean value of the questions of each."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in (f"kind/{row.kind}", f"domain/{row.domain}"):
            found.setdefault(name, []).append(row.value or 0.0)
    return {name: float(np.mean(values)) for name, values in sorted(found.items()) if not name.endswith("/")}


def known(rows: Sequence[Row]) -> list[Row]:
    """The rows whose gold answers are known."""
    return [row for row in rows if row.value is not None]


def evaluate_terms(terms: Terms) -> float:
    return sum(scale * float(top.sum() / bottom.sum()) for scale, top, bottom in terms if bottom.sum())


def by_kind(rows: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Mean value and number of the questions of each type."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.value is not None:
            found.setdefault(row.kind, []).append(row.value)
    return {kind: (float(np.mean(values)), len(values)) for kind, values in sorted(found.items())}


def _groups(rows: Sequence[Row], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row: whether it is the first of its cluster; and, there, whether all of the cluster is right."""
    whole = vqa.all_right((row.cluster, value >= 1) for row, value in zip(rows, values, strict=True))
    seen: set[str] = set()
    first, right = np.zeros(len(rows)), np.zeros(len(rows))
    for i, row in enumerate(rows):
        if row.cluster not in seen:
            seen.add(row.cluster)
            first[i], right[i] = 1.0, float(whole[row.cluster])
    return first, right


def _cluster(task: str, question: Question) -> str:
    if task == "mmbench":
        if not question.id.isdigit():
            raise ValueError(f"MMBench counts rotations by the column 'index', a number; there is {question.id!r}")
        return str(int(question.id) % vqa.ROTATIONS)
    return question.group or question.id


def _chance(task: Task, question: Question) -> float:
    if question.options:
        return 1 / len(question.options)
    if task.name in ("pope", "mme", "hallusionbench", "yesno"):
        return 0.5
    return task.drawn[question.kind] if task.drawn else 0.25 if task.name == "mmstar" else 0.0


LETTERS = "ABCDEFGHIJ"
"""The letters of options that a table does not list: the first four, or up to the gold answer."""
HUMANS = 10
"""Answers to a question that soft accuracy is made for."""
_NEED_OPTIONS = ("mmbench", "scienceqa", "seedbench", "ai2d")


def _domain(task: str, question: Question) -> None:
    """Raises ValueError for a question that the benchmark's rules are not made for."""
    letters = [letter for letter, _ in question.options]
    if (task in _NEED_OPTIONS or task in FILMS) and not letters:
        raise ValueError(f"{task} is multiple choice, and there are no options")
    if letters and (others := [answer for answer in question.answers if answer not in letters]):
        raise ValueError(f"the gold answer {others[0]!r} is none of the letters {', '.join(letters)}")
    allowed = {"hallusionbench": ("0", "1")}.get(task, ("yes", "no") if task in ("pope", "mme", "yesno") else ())
    if allowed and (others := [answer for answer in question.answers if answer.lower() not in allowed]):
        raise ValueError(f"the gold answer {others[0]!r} is neither {' nor '.join(allowed)}")
    if task == "mme" and question.kind not in (*vqa.PERCEPTION, *vqa.COGNITION):
        raise ValueError(f"MME has no category {question.kind!r}, only {', '.join((*vqa.PERCEPTION, *vqa.COGNITION))}")


def _gold_reply(task: str, question: Question) -> str:
    """The reply that should count most."""
    if not question.answers:
        return ""
    best = Counter(question.answers).most_common(1)[0][0]
    return {"1": "yes", "0": "no"}.get(best, best) if task == "hallusionbench" else best


def _soft(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    """Soft accuracy; of fewer than four answers the share of the others that agree with one, so that full marks can be had."""
    benchmark = "vqav2" if task.name == "soft" else task.name
    style = "evalai" if benchmark in ("textvqa", "vizwiz") or protocol == "llava" else "official"
    if not question.answers:
        return vqa.normalize_answer(reply, style), 0.0  # type: ignore[arg-type]
    said, count = vqa.normalize_answer(reply, style), len(question.answers)  # type: ignore[arg-type]
    if count > 3 or (benchmark, protocol) == ("textvqa", "llava"):  # that one takes ten and nothing else
        return said, vqa.vqa_accuracy(reply, question.answers, benchmark, protocol)
    meant = [vqa.normalize_answer(answer, style) for answer in question.answers]  # type: ignore[arg-type]
    return said, float(said == meant[0]) if count == 1 else vqa.soft_accuracy(said, meant) * 3 / (count - 1)


def _gqa(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    gold = any(vqa.gqa_correct(reply, answer, protocol) for answer in question.answers)
    return vqa.gqa_answer(reply, protocol), gold


def _exact(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    """Equal to any gold answer after the VQA normaliser, for tables of users."""

    def plain(text: str) -> str:
        return vqa.normalize_answer(text) or text.strip().rstrip(".").lower()  # "A" and "?" are more than nothing

    return plain(reply), plain(reply) in map(plain, question.answers)


def _pope(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.pope_label(reply, protocol)
    return said, [said] == [answer.lower() for answer in question.answers[:1]]


def _mme(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.mme_label(reply, protocol)
    return said, [said] == [answer.lower() for answer in question.answers[:1]]


def _mmbench(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.mmbench_letter(reply, dict(question.options), protocol) or ""
    return said, said in question.answers


def _scienceqa(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.scienceqa_letter(reply, protocol)
    return said, said in question.answers


def _seed(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.seed_letter(reply, protocol)
    return said, (said.upper() if protocol == "lmms" else said) in question.answers


def _letter(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    """The generic extractor; open questions (RealWorldQA) by equality."""
    if not question.options and not all(answer in tuple(LETTERS) for answer in question.answers):
        said = reply.lower().strip().rstrip(".")
        return said, said in [answer.lower().strip() for answer in question.answers]
    most = max((LETTERS.index(answer) for answer in question.answers if not question.options), default=0)
    said = vqa.extract_letter(
        reply, tuple(letter for letter, _ in question.options) or tuple(LETTERS[: max(4, most + 1)])
    )
    return said, said in question.answers


def _mvbench(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.mvbench_letter(reply)
    return said, said in question.answers


def _longvideobench(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.longvideobench_letter(reply)
    return said, said in question.answers


def _ai2d(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.gqa_answer(vqa.ai2d_answer(reply), "lmms")
    return said, said in [answer.lower() for answer in question.answers]


def _mmmu(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    if question.options:
        said = vqa.mmmu_letter(reply, dict(question.options), protocol) or ""
        return said, said in question.answers
    said = " | ".join(sorted(map(str, vqa.mmmu_candidates(reply))))
    return said, bool(question.answers) and vqa.mmmu_open_correct(reply, question.answers)


def _relaxed(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    right = any(vqa.relaxed_correct(reply, answer, strip=protocol != "lmms") for answer in question.answers)
    return reply.strip().lower(), right


def _anls(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    return " ".join(reply.lower().split()), vqa.anls(reply, question.answers)


def _ocrbench(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    right = vqa.ocrbench_correct(reply, question.answers, question.extra.get("dataset", ""), protocol)
    return " ".join(reply.lower().split()), right


def _hallusion(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    said = vqa.hallusion_label(reply)
    return said, said in question.answers


def _words(task: Task, question: Question, reply: str, protocol: Protocol) -> tuple[str, float]:
    """The words in order, whatever the case: the embedded benchmark."""
    said = " ".join(reply.lower().split())
    return said, said in [" ".join(answer.lower().split()) for answer in question.answers]


VIDEO: tuple[Protocol, ...] = ("official", "lmms")

TASKS = {
    task.name: task
    for task in (
        Task("vqav2", "VQAv2", _soft),
        Task("okvqa", "OK-VQA", _soft),
        Task("vizwiz", "VizWiz", _soft),
        Task("textvqa", "TextVQA", _soft),
        Task("gqa", "GQA", _gqa),
        Task("pope", "POPE", _pope, "f1_mean"),
        Task("mme", "MME", _mme, "total", percent=False),
        Task("mmbench", "MMBench", _mmbench, "circular"),
        Task("scienceqa", "ScienceQA-IMG", _scienceqa),
        Task("seedbench", "SEED-Bench (images)", _seed),
        Task("mmstar", "MMStar", _letter),
        Task("ai2d", "AI2D", _ai2d),
        Task("realworldqa", "RealWorldQA", _letter),
        Task("mmmu", "MMMU (a reply without a letter is wrong, not drawn at random)", _mmmu),
        Task("chartqa", "ChartQA", _relaxed, "relaxed_accuracy"),
        Task("docvqa", "DocVQA", _anls, "anls"),
        Task("infovqa", "InfoVQA", _anls, "anls"),
        Task("ocrbench", "OCRBench", _ocrbench),
        Task("hallusionbench", "HallusionBench by rule, without a judge", _hallusion, "aAcc", protocols=("lmms",)),
        Task("mvbench", "MVBench", _mvbench, "task_mean", protocols=VIDEO),
        Task("videomme", "Video-MME", _letter, protocols=VIDEO),
        Task("mlvu", "MLVU (multiple choice)", _letter, "m_avg", protocols=VIDEO),
        Task("longvideobench", "LongVideoBench (a reply without a letter is wrong)", _longvideobench, protocols=VIDEO),
        Task("egoschema", "EgoSchema (subset with public answers)", _letter, protocols=VIDEO),
        Task("nextqa", "NExT-QA (multiple choice)", _mmmu, protocols=VIDEO),
        Task("shapes", "the embedded synthetic benchmark", _words, drawn=SHAPES_CHANCE),
        Task("pages", "the embedded benchmark of pages of text", _words, drawn=PAGES_CHANCE),
        Task("videos", "the embedded benchmark of moving scenes", _words, drawn=VIDEOS_CHANCE),
        Task("exact", "a table: equal to a gold answer after normalisation", _exact, own=True),
        Task("soft", "a table: soft accuracy over several human answers", _soft, own=True),
        Task("anls", "a table: edit similarity", _anls, "anls", own=True),
        Task("relaxed", "a table: numbers within 5 %", _relaxed, "relaxed_accuracy", own=True),
        Task("letter", "a table: multiple choice", _letter, own=True),
        Task("yesno", "a table: yes or no", _pope, own=True),
        Task("contains", "a table: a gold answer is contained in the reply", _ocrbench, own=True),
    )
}


def task_of(name: str) -> Task:
    """The task of a name; raises ValueError that lists them."""
    if name not in TASKS:
        raise ValueError(f"--task {name}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
