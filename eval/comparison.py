# SPDX-License-Identifier: Apache-2.0
"""Two records of one benchmark side by side, and retention over several benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from .data import Question
from .evaluator import STOCK, rows_of
from .prompts import conversation, question_text, unknown_words
from .statistics import (
    TOO_FEW,
    Difference,
    Flips,
    bootstrap,
    corrected,
    difference,
    flips,
    generalization,
    overall_performance,
    paired,
    relative_accuracy,
)
from .tasks import Row, known, task_of


@dataclass(frozen=True)
class Comparison:
    """`other` against `base` on the questions that both answered. retention: score over base score; above_chance: the same
    above guessing; by_kind: type -> (questions, base, other, difference). Without gold answers only the agreement is known."""

    task: str
    base: str
    other: str
    questions: int
    base_score: float
    score: float
    retention: float
    above_chance: float
    change: Difference | None
    flips: Flips
    by_kind: dict[str, tuple[int, float, float, Difference]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record; what cannot be told is None."""
        made = asdict(self)
        made["flips"] |= {"agreement": self.flips.agreement, "p": self.flips.p}
        made["verdict"] = self.change.verdict if self.change else None
        made["by_kind"] = {
            kind: {"questions": n, "base": a, "score": b, "change": asdict(d), "verdict": d.verdict}
            for kind, (n, a, b, d) in self.by_kind.items()
        }
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in made.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` made plain."""
        made = {field.name: values[field.name] for field in fields(Comparison)}
        for name in ("base_score", "score", "retention", "above_chance"):
            made[name] = math.nan if made[name] is None else made[name]
        flips_ = made["flips"]
        made["flips"] = Flips(*(flips_[field.name] for field in fields(Flips)))
        # records from before there were verdicts of sameness do not say of how many clusters they are
        made["change"] = made["change"] and Difference(**{"clusters": made["questions"], **made["change"]})
        made["by_kind"] = {
            kind: (n := one["questions"], one["base"], one["score"], Difference(**{"clusters": n, **one["change"]}))
            for kind, one in made["by_kind"].items()
        }
        return Comparison(**{**made, "notes": tuple(made["notes"])})


def compare(base: dict[str, Any], other: dict[str, Any], draws: int = 2000, force: bool = False) -> Comparison:
    """Compare two records of `evaluate`. Raises ValueError if they are of different tasks or protocols, have no question in
    common, or differ in another setting than the plan; the last, with `force`, is noted instead."""
    one, two = base["settings"], other["settings"]
    for what in ("task", "protocol"):
        if one[what] != two[what]:
            raise ValueError(
                f"the records are of different {what}s, {one[what]} and {two[what]}: they cannot be compared"
            )
    task, protocol = task_of(one["task"]), one["protocol"]
    first, second = paired(rows_of(base), rows_of(other))
    if not first:
        raise ValueError(f"the two records of {one['task']} have no question in common")
    asked = [what for what in {**one, **two} if what != "plan" and one.get(what) != two.get(what)]
    notes = [f"{what}: {one.get(what)!r} and {two.get(what)!r}" for what in asked]
    if notes and not force:
        raise ValueError(
            f"{one['plan']} and {two['plan']} were asked with different settings, so that what differs may be due to these; "
            f"{'; '.join(notes)}: with --force they are compared all the same"
        )
    most = max(base["answered"], other["answered"])
    if len(first) < most:
        notes.append(f"{len(first)} of {most} questions are in both")
    judged, judged_other = known(first), known(second)
    change, kinds = None, {}
    score = base_score = math.nan
    if judged:
        change = difference(task, protocol, judged, judged_other, draws)
        headline = task.headline(protocol)
        base_score = task.scores(judged, protocol)[headline]
        score = task.scores(judged_other, protocol)[headline]
        for kind in sorted({row.kind for row in judged}):
            pairs = [(a, b) for a, b in zip(judged, judged_other, strict=True) if a.kind == kind]
            before, after = _values([a for a, _ in pairs]), _values([b for _, b in pairs])
            ones = np.ones(len(pairs))
            drawn = bootstrap([(1.0, before, ones)], [(1.0, after, ones)], [a.cluster for a, _ in pairs], draws)
            kinds[kind] = (len(pairs), float(before.mean()), float(after.mean()), drawn)
    return Comparison(
        task.name, one["plan"], _label(other, base), len(first), base_score, score,
        score / base_score if base_score else math.nan, corrected(score, base_score, task.guess(judged)),
        change, flips(first, second), kinds, tuple(notes),
    )  # fmt: skip


def _values(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.value or 0.0 for row in rows])


def retention(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], force: bool = False) -> dict[str, float]:
    """RelAcc, OP, OG and OL of (base, other) records, one pair for each benchmark; force: as of `compare`."""
    found = {other["settings"]["task"]: compare(base, other, 2, force) for base, other in pairs}
    if len(found) < len(pairs):
        raise ValueError("give one pair of records for each benchmark")
    return retained(found)


def retained(found: Mapping[str, Comparison]) -> dict[str, float]:
    """RelAcc, OP, OG and OL of one comparison for each benchmark; raises ValueError if a base score is 0."""
    bases = {name: one.base_score for name, one in found.items() if not math.isnan(one.base_score)}
    scores = {name: found[name].score for name in bases}
    same, asked = (sum(getattr(one.flips, what) for one in found.values()) for what in ("same", "questions"))
    return {
        **({"RelAcc": relative_accuracy(scores, bases)} if bases else {}),
        **({"OP": overall_performance(scores, bases), "OG": generalization(scores, bases)} if bases else {}),
        "OL": 100 * same / asked,
    }


def shown(value: float, percent: bool) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %" if percent else f"{value:.1f}"


def stock_first(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with the first of the stock model, what plans are compared with, before the others; as they are without one."""
    return sorted(records, key=lambda record: record["settings"]["plan"] != STOCK)


def by_chance(record: Mapping[str, Any]) -> str:
    """What is to be said of a score that guessing would give too: not two standard errors above it, or less than a tenth of the
    way to the full score; nothing of others."""
    task, judged = task_of(record["settings"]["task"]), known(rows_of(dict(record)))
    if not judged:
        return ""
    full = sum(scale for scale, _, _ in task.terms(judged, record["settings"]["protocol"]))
    score, chance = record["scores"][record["headline"]], record["chance"]
    error = full * math.sqrt(chance / full * (1 - chance / full) / len(judged))
    if score - chance > max(2 * error, 0.1 * (full - chance)):
        return ""
    return (
        f"{record['settings']['plan']}: {shown(score, task.percent)} of {len(judged)} questions is hardly more than guessing "
        f"({shown(chance, task.percent)}): look at the prompt and the reply above, and whether --task reads such replies"
    )


def remarks(processor: Any, questions: Sequence[Question], records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a look at a run of the stock model, or of the first plan, may show: one whole prompt as the model gets it, what each
    of the records has as reply, and what is right; then what is suspicious."""
    settings = records[0]["settings"]
    task, how = task_of(settings["task"]), (settings["protocol"], settings["suffix"])
    texts = {question.id: question_text(task, question, *how) for question in questions}
    for row in rows_of(records[0])[:1]:
        images = next(len(question.images) for question in questions if question.id == row.id)
        yield f"question {row.id} of {task.name} as it was asked (--suffix changes that):"
        yield conversation(processor, texts[row.id], images, settings["template"])
        for record in records:
            replies = [other.reply for other in rows_of(record) if other.id == row.id]
            yield from (f"{record['settings']['plan']} replied {reply!r}" for reply in replies)
        yield f"right: {', '.join(map(repr, row.answers[:3])) or 'not known'}"
    yield from filter(None, (by_chance(records[0]), unknown_words(processor, texts.values())))


def summary_table(base: dict[str, Any], others: Sequence[dict[str, Any]], force: bool = False) -> Table:
    """One line for the base and one for each other record of the same questions; force: as of `compare`."""
    task = task_of(base["settings"]["task"])
    scale = 100 if task.percent else 1
    settings = base["settings"]
    table = Table(
        title=f"{settings['model']} on {task.title}: {base['answered']} questions, protocol {settings['protocol']}",
        caption="tokens: visual tokens of a prompt, mean over the LLM layers; agreement: the parser reads the same in both "
        "replies; difference: with the 95 % interval of a paired bootstrap; same: surely within one point either way",
    )
    gains = ("of base", "above chance", "agreement", "right>wrong", "wrong>right", "difference")
    for heading in ("plan", "tokens", base["headline"], *gains):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    score = base["scores"].get(base["headline"], math.nan)
    table.add_row(escape(settings["plan"]), _tokens(base), shown(score, task.percent), *[""] * 6)
    for record in others:
        found = compare(base, record, force=force)
        change = found.change
        table.add_row(
            escape(_label(record, base)),
            _tokens(record),
            shown(found.score, task.percent),
            shown(found.retention, True),
            shown(found.above_chance, True),
            shown(found.flips.agreement, True),
            str(found.flips.right_to_wrong),
            str(found.flips.wrong_to_right),
            _change(change, scale) if change else "-",
        )
    return table


def outlook(found: Comparison) -> str:
    """Of a comparison that tells nothing, how many questions would; nothing of others."""
    change = found.change
    if change is None or change.verdict != TOO_FEW:
        return ""
    return f"{found.other}: {TOO_FEW}: {change.outlook(found.questions)}"


def _label(record: dict[str, Any], base: dict[str, Any]) -> str:
    """The plan, with the model if that is another one."""
    one, other = record["settings"], base["settings"]
    same = (one["model"], one["weights"]) == (other["model"], other["weights"])
    return one["plan"] if same else f"{one['model']}: {one['plan']}"


def _tokens(record: dict[str, Any]) -> str:
    tokens = record["visual_tokens"].get("mean_of_layers")
    return f"{tokens['mean']:.1f}" if tokens else "-"


def _change(change: Difference, scale: float) -> str:
    return f"{scale * change.value:+.1f} [{scale * change.low:+.1f}, {scale * change.high:+.1f}] {change.verdict}"


def kind_table(found: Comparison) -> Table:
    """Question types of a comparison, mean value of a question."""
    table = Table(title="by question type, mean value of a question in %")
    for heading in ("type", "questions", "base", "other", "difference"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, (n, before, after, change) in found.by_kind.items():
        table.add_row(kind or "-", str(n), f"{100 * before:.1f}", f"{100 * after:.1f}", _change(change, 100))
    return table
