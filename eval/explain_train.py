# SPDX-License-Identifier: Apache-2.0
"""`mmcompress explain-train`: relevance labels of a checkpoint's own right answers, and the compressor that learns them.

Labels are kept on disk batch by batch, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from ..explain.compressor import KEEPS, Fitting, Pair, agreement, fit
from ..explain.relevance import owed
from ..records import read, replacing, write_json
from ..weights import TENSORS, base_of
from .data import Question, digest, read_questions
from .evaluator import Setup, evaluate, padded_left, shapes_questions
from .inputs import inputs_of, texts_of
from .making.loop import progress_of
from .prompts import new_tokens
from .synthetic.benchmark import takes_any_shape
from .synthetic.questions import KINDS, ask
from .synthetic.scenes import Scene, draw, scenes
from .tasks import task_of

FORMAT = 1
RIGHT = 0.5
"""What an answer must be worth to give a label."""
HELD_OUT = 0.1
"""Part of the labels that early stopping is decided by."""


@dataclass(frozen=True)
class Recipe:
    """What labels are made of. samples: how many questions are asked; new_tokens: of an answer at most, None: as the task has it;
    batch: questions at a time; mode: of the relevance."""

    task: str = "shapes"
    protocol: str = "official"
    samples: int = 10_000
    batch: int = 16
    new_tokens: int | None = None
    mode: str = "exact"

    def __post_init__(self) -> None:
        for name, least in (("samples", 20), ("batch", 1), ("new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least}")


def training_questions(count: int, model: Any) -> list[Question]:
    """Questions on the scenes that train the embedded models, the types in turn, one per scene."""
    kinds, found, start = list(KINDS), [], 0
    while len(found) < count:
        (scene,) = scenes("train", 1, start, takes_any_shape(model))
        start = scene.seed + 1
        kind = kinds[len(found) % len(kinds)]
        question = ask(scene, kind, np.random.default_rng((7019, scene.seed)))
        if question is not None:
            found.append(
                Question(str(scene.seed), question.text, (_Drawn(scene),), (question.answer,), kind=question.kind)
            )
    return found


class _Drawn:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __call__(self) -> Any:
        return draw(self.scene)


class Labels:
    """Labels of the right answers to `questions`, one file per batch in `folder`."""

    def __init__(self, folder: Path, model: Any, processor: Any, questions: Sequence[Question], recipe: Recipe) -> None:
        self.folder, self.model, self.processor = folder, model, processor
        self.questions, self.recipe, self.task = questions, recipe, task_of(recipe.task)
        self.setup = Setup(recipe.task, recipe.protocol)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        # more samples only add files; everything else would change those that are there
        fixed = {name: value for name, value in asdict(recipe).items() if name != "samples"}
        about = {"format": FORMAT, "base": base_of(model), **fixed}
        path = folder / "labels.json"
        known = read(path, "labels", lambda value: isinstance(value, dict))
        if known is not None and known != about:
            other = [name for name in about if known.get(name) != about[name]]
            raise ValueError(
                f"{folder} holds labels with another {', '.join(other)}: give another --out, or delete the folder"
            )
        write_json(path, about)

    @property
    def batches(self) -> list[list[Question]]:
        size = self.recipe.batch
        return [list(self.questions[first : first + size]) for first in range(0, len(self.questions), size)]

    def path(self, number: int, batch: Sequence[Question]) -> Path:
        return self.folder / f"{number:06d}-{digest(batch)}.safetensors"

    def make(self, show: Callable[[int, int, int], None] | None = None) -> tuple[list[Pair], int]:
        """All labels, and how many questions were answered right; show(batches done, of all, right answers so far)."""
        pairs: list[Pair] = []
        right, batches = 0, self.batches
        for number, batch in enumerate(batches):
            path = self.path(number, batch)
            if not path.exists():
                tensors = self._batch(batch)
                with replacing(path) as part:
                    save_file(tensors, part)
            found = load_file(path)
            counts = found["counts"].tolist()
            right += int(found["right"].sum())
            split = (found[name].split(counts) for name in ("attention", "relevance"))
            pairs += [Pair(a, r) for a, r in zip(*split, strict=True)] if counts else []
            if show is not None:
                show(number + 1, len(batches), right)
        if not right:
            raise ValueError(
                f"none of {len(self.questions)} answers is right, and wrong ones make misleading labels: look at the model, the "
                f"prompts and --task"
            )
        return pairs, right

    def _batch(self, batch: Sequence[Question]) -> dict[str, torch.Tensor]:
        texts, _ = texts_of(self.processor, self.task, batch, self.setup.protocol, None, "chat")
        shown = [i for i, question in enumerate(batch) if question.images and texts[i]]
        with padded_left(self.processor):
            numbers, inputs, wrong = inputs_of(self.model, self.processor, batch, texts, shown)
        for name, why in wrong.items():
            warnings.warn(f"question {name!r} is left out: {why}", stacklevel=2)
        asked = [batch[i] for i in numbers]
        right, attention, relevance = [], [], []
        if asked:
            most = self.recipe.new_tokens or new_tokens(self.task, self.setup.protocol)
            answers = self._answers(inputs, most)
            replies = self.processor.batch_decode(answers, skip_special_tokens=True)
            rows = [self.task.row(q, text, self.setup.protocol) for q, text in zip(asked, replies, strict=True)]
            right = [(row.value or 0.0) >= RIGHT for row in rows]
            if any(right):  # what is wrong gets no backward pass
                given = [answer if good else [] for answer, good in zip(answers, right, strict=True)]
                samples, _ = owed(self.model, inputs, given, mode=self.recipe.mode)
                for sample in samples:
                    for i in range(len(sample.spans) if sample is not None else 0):
                        attention.append(sample.attention[i])  # type: ignore[union-attr]
                        relevance.append(sample.of_visual(i))  # type: ignore[union-attr]
        none = torch.zeros(0)
        return {
            "right": torch.tensor(right, dtype=torch.uint8),
            "counts": torch.tensor([len(a) for a in attention], dtype=torch.int64),
            "attention": torch.cat([none, *attention]),
            "relevance": torch.cat([none, *relevance]),
        }

    @torch.no_grad()
    def _answers(self, inputs: Any, most: int) -> list[list[int]]:
        given = inputs.to(self.model.device, self.model.dtype)
        out = self.model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=most)
        return [row.tolist() for row in out[:, given["input_ids"].shape[1] :]]


def train(
    model: Any,
    processor: Any,
    out: Path,
    recipe: Recipe | None = None,
    fitting: Fitting | None = None,
    data: Path | None = None,
    images: Path | None = None,
    split: str | None = None,
    score: int = 350,
    compare: Sequence[str] = ("random", "proxy", "oracle"),
    console: Console | None = None,
) -> Path:
    """Make labels in OUT/labels, train a compressor into OUT/weights, and write what it is worth to OUT/report.json; returns the
    folder of the weights.

    data: a dataset that the evaluator reads (None: the synthetic benchmark); its last tenth, at most `score` questions, is held
    back for the accuracy at 50, 25 and 10 %. compare: what is measured beside it. Raises ValueError without right answers.
    """
    recipe, fitting, console = recipe or Recipe(), fitting or Fitting(), console or Console()
    if data is None and recipe.task != "shapes":
        raise ValueError(f"--task {recipe.task} needs --data")
    if data is None:
        asked, tested = training_questions(recipe.samples, model), shapes_questions(score, model) if score else []
    else:
        every = list(read_questions(recipe.task, data, images, split))
        last = min(score, len(every) // 10)
        asked, tested = every[: len(every) - last][: recipe.samples], every[len(every) - last :] if last else []
    model.eval().requires_grad_(False)
    labels = Labels(out / "labels", model, processor, asked, recipe)
    start = time.perf_counter()
    with progress_of(console) as progress:
        bar = progress.add_task("labels", total=len(labels.batches))

        def made(done: int, total: int, right: int) -> None:
            progress.update(bar, completed=done, description=f"labels, {right} right answers")

        pairs, right = labels.make(made)
    seconds = {"labels": time.perf_counter() - start}
    console.print(f"{right} of {len(asked)} answers are right; {len(pairs)} labels", highlight=False)
    back = max(1, round(HELD_OUT * len(pairs)))
    start = time.perf_counter()
    with progress_of(console) as progress:
        bar = progress.add_task("compressor", total=fitting.epochs)

        def trained(epoch: int, loss: float, now: float) -> None:
            progress.update(bar, completed=epoch, description=f"compressor {loss:.3f}, held out {now:.3f}")

        net = fit(pairs[:-back], pairs[-back:], fitting, str(model.device), trained)
    seconds["training"] = time.perf_counter() - start
    report: dict[str, Any] = {
        "recipe": asdict(recipe), "fitting": asdict(fitting), "right": right, "asked": len(asked), "labels": len(pairs),
        "questions": len(tested),
        "agreement": agreement(net, pairs[-back:]), "seconds": seconds, "accuracy": {},
    }  # fmt: skip
    weights = net.saved(model, report).save(out / "weights")
    if tested:
        start = time.perf_counter()
        report["accuracy"] = accuracies(model, processor, tested, recipe, weights, out / "eval", compare, console)
        seconds["accuracy"] = time.perf_counter() - start
        net.saved(model, report).save(weights)
    write_json(out / "report.json", report)
    console.print(table(report))
    return weights


def accuracies(
    model: Any, processor: Any, questions: Sequence[Question], recipe: Recipe, weights: Path, folder: Path,
    compare: Sequence[str], console: Console,
) -> dict[str, float]:  # fmt: skip
    """The task's score of the model as it is, with the compressor, and with what it is compared with, at every keep ratio."""
    setup = Setup(recipe.task, recipe.protocol, new_tokens=recipe.new_tokens, batch_size=recipe.batch)  # type: ignore[arg-type]
    task = task_of(recipe.task)
    most = setup.new_tokens or new_tokens(task, setup.protocol)
    rule = "exact" if recipe.mode == "fast" else recipe.mode
    kinds = {
        "learned": f"explain_compress(weights={str(weights)!r}, keep={{}})",
        "proxy": "explain_compress(keep={})",
        "oracle": f"explain_compress(mode='oracle', answer_tokens={most}, relevance={rule!r}, keep={{}})",
        **{name: f"{name}(keep={{}})" for name in compare if name not in ("learned", "proxy", "oracle")},
    }
    # answers are kept by plan: those with other weights of the same name must not be taken for ours
    made = hashlib.sha256((weights / TENSORS).read_bytes()).hexdigest()[:12]
    plans = {"full": "stock"}
    plans |= {f"{name} {100 * k:.0f} %": kinds[name].format(k) for k in KEEPS for name in ("learned", *compare)}
    found = {}
    for name, plan in plans.items():
        mine = folder / made if name.startswith("learned") else folder
        record = evaluate(model, processor, questions, setup, plan, mine)
        found[name] = record["scores"][task.headline(setup.protocol)]
        console.print(f"{name}: {100 * found[name]:.1f}", highlight=False)
    return found


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    shown = Table("", *(f"{100 * k:.0f} %" for k in KEEPS), title="explain_compress")
    agreed, scores = report["agreement"], report["accuracy"]
    for name in ("learned", "proxy", "chance"):
        shown.add_row(
            f"oracle's tokens kept: {name}", *(f"{100 * agreed[f'overlap {name} {100 * k:.0f} %']:.1f}" for k in KEEPS)
        )
    names = dict.fromkeys(name.split(" ")[0] for name in scores if name != "full")
    for name in names:
        shown.add_row(f"score: {name}", *(f"{100 * scores[f'{name} {100 * k:.0f} %']:.1f}" for k in KEEPS))
    if scores:
        shown.add_row("score: all tokens", *[f"{100 * scores['full']:.1f}"] * len(KEEPS))
    divergence = agreed["divergence"], agreed["divergence of a flat guess"]
    shown.caption = f"divergence from the labels {divergence[0]:.3f} (flat guess {divergence[1]:.3f})"
    return shown
