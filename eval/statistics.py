# SPDX-License-Identifier: Apache-2.0
"""What compression does to answers: retention, agreement, flips, and which differences are more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import Protocol
from .tasks import Row, Task, Terms, evaluate_terms

RIGHT = 0.5
"""From this value on an answer counts as right where answers can be partly right (flips)."""
FEWEST = 6
"""Of fewer changed answers the sign test is not below 5 %, even if all went one way."""
POINT = 0.01
"""The part of the full score that counts as no difference, and that a benchmark should be able to show."""
SAME, BETTER, WORSE, TOO_FEW = VERDICTS = ("same", "better", "worse", "too few questions to tell")


@dataclass(frozen=True)
class Difference:
    """The score of `other` minus that of `base` on the same questions, with a bootstrap interval (95 % by default) and standard
    error. changed: of the `clusters` those whose answers count differently; full: the highest score there is."""

    value: float
    low: float
    high: float
    error: float
    changed: int
    clusters: int
    full: float = 1.0

    @property
    def spread(self) -> float:
        """The standard error as if one cluster more had changed, by the full score: that none of a few changed shows little."""
        return math.hypot(self.error, self.full / self.clusters)

    @property
    def verdict(self) -> str:
        """same: interval and two spreads within one point; better, worse: the interval without 0, at least two errors, and at
        least six clusters changed; else too few questions to tell."""
        if max(-self.low, self.high, abs(self.value) + 2 * self.spread) <= POINT * self.full:
            return SAME
        clear = not self.low <= 0 <= self.high and abs(self.value) >= 2 * self.error
        return TOO_FEW if not clear or self.changed < FEWEST else BETTER if self.value > 0 else WORSE

    def needed(self, size: float) -> int:
        """About how many clusters show a difference of `size`: so many that it is two spreads."""
        return math.ceil(round(self.clusters * (2 * self.spread / size) ** 2, 6))

    def outlook(self, questions: int) -> str:
        """What is told where the `questions`, of one or more in a cluster, are too few: how many would do."""
        each = questions / self.clusters
        what = "answers" if self.clusters == questions else "groups of answers"
        sizes = {f"a difference of {points(self.full)}": self.needed(POINT * self.full)}
        if self.changed and abs(self.value) > POINT * self.full:
            most = max(self.needed(abs(self.value)), -(-self.clusters * FEWEST // self.changed), self.clusters + 1)
            sizes = {"a difference as large as this one": most, **sizes}
        shown = ", ".join(f"about {about(each * n)} for {size}" for size, n in sizes.items())
        return f"{self.changed} of {self.clusters} {what} count differently; questions needed: {shown}"


def unsettled(found: Sequence[Difference], questions: int) -> str:
    """Of several plans on the same questions, how many cannot be told from the stock model, and how many questions would show a
    point; nothing if all can."""
    few = [one for one in found if one.verdict == TOO_FEW]
    if not few:
        return ""
    needed = sorted(one.needed(POINT * one.full) * questions / one.clusters for one in few)
    return (
        f"{TOO_FEW} for {len(few)} of {len(found)} plans; needed for a difference of {points(few[0].full)}: about "
        f"{about(needed[0])} to {about(needed[-1])}, there are {questions}"
    )


def points(full: float) -> str:
    """One point of a full score, as scores are printed: in percent, or of more than 1 in its own unit."""
    return "1 point" if full <= 1 else f"{POINT * full:g} points"


def about(number: float) -> str:
    """A number of questions, rounded up to two digits."""
    step = 10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1)
    return f"{math.ceil(round(number / step, 6)) * step:,}"


@dataclass(frozen=True)
class Flips:
    """How many questions both runs answered, gave the same reading of, and flipped; p: McNemar's exact test of the flips."""

    questions: int
    same: int
    right_to_wrong: int
    wrong_to_right: int

    @property
    def agreement(self) -> float:
        return self.same / self.questions if self.questions else math.nan

    @property
    def p(self) -> float:
        return mcnemar(self.right_to_wrong, self.wrong_to_right)


def paired(base: Sequence[Row], other: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the questions that both have answered, in the order of `base`."""
    known = {row.id: row for row in other}
    pairs = [(row, known[row.id]) for row in base if row.id in known]
    return [row for row, _ in pairs], [row for _, row in pairs]


def flips(base: Sequence[Row], other: Sequence[Row]) -> Flips:
    """Agreement of what the benchmark's parser reads, and flips of right and wrong, over paired rows."""
    same = right_to_wrong = wrong_to_right = 0
    for before, after in zip(base, other, strict=True):
        same += before.parsed == after.parsed
        if before.value is not None and after.value is not None:
            was, is_ = before.value >= RIGHT, after.value >= RIGHT
            right_to_wrong += was and not is_
            wrong_to_right += is_ and not was
    return Flips(len(base), same, right_to_wrong, wrong_to_right)


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact probability of flips at least as uneven, if both kinds are as likely."""
    n = first + second

    def log_odds(k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)

    return min(1.0, 2 * sum(math.exp(log_odds(k)) for k in range(min(first, second) + 1)))


def difference(
    task: Task,
    protocol: Protocol,
    base: Sequence[Row],
    other: Sequence[Row],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The headline score of paired rows and its paired bootstrap over clusters. O(draws x rows), about 50 draws at a time."""
    clusters = [row.cluster for row in base]
    return bootstrap(task.terms(base, protocol), task.terms(other, protocol), clusters, draws, level, seed)


def bootstrap(
    base: Terms, other: Terms, clusters: Sequence[str], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Draws the clusters again and again, the same for both scores."""
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    at = np.array([names[name] for name in clusters], dtype=np.int64)

    def sums(terms: Terms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scales [J], numerators and denominators [C, J] of each cluster."""
        columns = [[np.bincount(at, part, len(names)) for part in (top, bottom)] for _, top, bottom in terms]
        pairs = np.array(columns).reshape(len(terms), 2, len(names))
        return np.array([scale for scale, _, _ in terms]), pairs[:, 0].T, pairs[:, 1].T

    (scales, top, bottom), (scales2, top2, bottom2) = sums(base), sums(other)
    rng = np.random.default_rng(seed)
    found = np.empty(draws)
    step = max(1, 2_000_000 // max(1, len(names)))
    for first in range(0, draws, step):
        last = min(draws, first + step)
        picked = rng.integers(len(names), size=(last - first, len(names)))
        weights = np.stack([np.bincount(row, minlength=len(names)) for row in picked]).astype(np.float64)
        found[first:last] = _ratio(scales2, weights @ top2, weights @ bottom2) - _ratio(
            scales, weights @ top, weights @ bottom
        )
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    value = evaluate_terms(other) - evaluate_terms(base)
    changed = int(((top != top2) | (bottom != bottom2)).any(1).sum())
    error = float(found.std(ddof=1)) if draws > 1 else 0.0
    return Difference(value, float(low), float(high), error, changed, len(names), float(scales.sum()))


def _ratio(scales: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), 0.0) @ scales


def corrected(score: float, base: float, chance: float) -> float:
    """What is left above guessing: (score - chance) / (base - chance); nan if the base is not above it."""
    return (score - chance) / (base - chance) if base > chance else math.nan


def relative_accuracy(scores: Mapping[str, float], bases: Mapping[str, float]) -> float:
    """RelAcc: the mean of score / base over benchmarks, in percent, not cut at 100."""
    return 100 * float(np.mean(_ratios(scores, bases)))


def overall_performance(scores: Mapping[str, float], bases: Mapping[str, float]) -> float:
    """OP of EffiVLM-Bench: sqrt(mean over benchmarks of (score / base)^2), in percent."""
    return 100 * float(np.sqrt(np.mean(np.square(_ratios(scores, bases)))))


def generalization(scores: Mapping[str, float], bases: Mapping[str, float]) -> float:
    """OG of EffiVLM-Bench: standard deviation of score / base over its mean; lower is more even."""
    ratios = _ratios(scores, bases)
    return float(ratios.std() / ratios.mean()) if ratios.mean() else math.nan


def _ratios(scores: Mapping[str, float], bases: Mapping[str, float]) -> np.ndarray:
    if not bases or set(scores) != set(bases):
        raise ValueError(f"scores of {sorted(scores)} cannot be set against a base of {sorted(bases)}")
    if zero := [name for name, value in bases.items() if value == 0]:
        raise ValueError(f"the base score of {zero[0]} is 0: there is nothing to retain")
    return np.array([scores[name] / bases[name] for name in bases])
