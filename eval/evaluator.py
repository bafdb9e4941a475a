# SPDX-License-Identifier: Apache-2.0
"""Answers questions with a model, stock or compressed, and keeps every answer on disk as soon as it is there."""

from __future__ import annotations

import glob
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

import mmcompress as mm

from ..api import plan_for
from ..records import RecordError, write_text
from .data import Film, Question, digest
from .data.question import picture_size
from .inputs import AskError, beyond, context_of, inputs_of, is_refusal, texts_of, told
from .journal import Journal, answers_in, file_name, fingerprint
from .machine import machine, synchronize
from .metrics import Protocol, check_protocol
from .prompts import new_tokens
from .synthetic import items
from .synthetic.benchmark import takes_any_shape
from .synthetic.pages import page_items
from .synthetic.videos import video_items
from .tasks import Row, Task, by_kind, known, task_of
from .team import Team

STOCK = "stock"
FORMAT = 1


@dataclass(frozen=True)
class Setup:
    """How questions are asked. suffix: an instruction instead of the protocol's; new_tokens: instead of the protocol's limit;
    batch_size 1 gives the numbers to publish, since padding changes the last bits of logits."""

    task: str
    protocol: Protocol = "official"
    template: str = "chat"
    suffix: str | None = None
    new_tokens: int | None = None
    batch_size: int = 8
    strict: bool = False

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        if self.protocol not in (allowed := task_of(self.task).protocols):
            raise ValueError(f"{self.task} has no protocol {self.protocol!r}: choose one of {', '.join(allowed)}")
        for name in ("batch_size", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")


@dataclass(frozen=True)
class Progress:
    """How far a run is: questions done (with those of earlier runs) of all; new tokens per second of this run."""

    done: int
    total: int
    tokens_per_second: float


def shapes_questions(count: int, model: Any, start: int = 1_000_000) -> list[Question]:
    """`drawn_questions` of the benchmark of shapes."""
    return drawn_questions("shapes", count, model, start)


def drawn_questions(task: str, count: int, model: Any, start: int = 1_000_000) -> list[Question]:
    """An embedded benchmark as questions; pictures and videos are drawn when their turn comes. start: as of `items`."""
    kinds = len(task_of(task).drawn)
    if count < kinds:
        raise ValueError(f"{count} questions: at least {kinds}, one of each type")
    if task == "videos":
        return [
            Question(
                str(one.seed), one.question.text, (), (one.question.answer,), kind=one.question.kind, videos=(one.clip,)
            )
            for one in video_items(count, start)
        ]
    found: Sequence[Any] = (
        page_items(count, start) if task == "pages" else items(count, start, stretched=takes_any_shape(model))
    )
    return [
        Question(str(item.seed), item.question.text, (_Drawn(item),), (item.question.answer,), kind=item.question.kind)
        for item in found
    ]


class _Drawn:
    def __init__(self, item: Any) -> None:
        self.item = item

    @property
    def size(self) -> tuple[int, int]:
        return self.item.size  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        return self.item.picture


class Prepared:
    """Model inputs that several evaluations of the same questions share: pictures are read and processed once, not once per
    plan. most: bytes that may be held; what does not fit is made again each time."""

    def __init__(self, most: int = 2**30) -> None:
        self.most, self.held = most, 0
        self._found: dict[tuple[str, tuple[int, ...]], tuple[list[int], Any, dict[str, str]]] = {}

    def get(
        self, key: str, batch: Sequence[int], make: Callable[[], tuple[list[int], Any, dict[str, str]]]
    ) -> tuple[list[int], Any, dict[str, str]]:
        """What `make` gives for a batch: the questions whose pictures can be read, their inputs, and why the others cannot."""
        name = key, tuple(batch)
        if name in self._found:
            return self._found[name]
        found = make()
        size = sum(x.numel() * x.itemsize for x in (found[1] or {}).values() if isinstance(x, Tensor))
        if self.held + size <= self.most:
            self.held += size
            self._found[name] = found
        return found


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    setup: Setup,
    plan: str = STOCK,
    folder: Path | str = "eval_output",
    name: str | None = None,
    show: Callable[[Progress], None] | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Greedy answers to `questions` by the model with `plan`, judged by the rules of the task; returns the record.

    Answers go to FOLDER/task_protocol_plan_fingerprint.jsonl, the record beside it as .json. A run that was killed goes on
    where it was: no answer is lost or made twice, and other settings, other questions or another model get other files. In
    `accelerate launch` each process answers its part of the batches into a file of its own, and all return the whole record.
    Questions that cannot be asked are left out, counted and named: a picture that cannot be read, what processor or model refuse,
    a prompt longer than the context. If that is all of them, or with setup.strict, AskError is raised. prepared: inputs shared
    with evaluations of the same questions by other plans. Raises ValueError if the model is compressed already: say plan=.
    """
    if "_mmcompress_engine" in getattr(model, "__dict__", {}):
        raise ValueError("this model is compressed: call mmcompress.uncompress(model) and give plan= instead")
    task, folder = task_of(setup.task), Path(folder)
    task.check(questions, setup.protocol)  # what cannot be judged fails now, not at the end
    pipeline = None if plan == STOCK else plan_for(model, plan)
    settings = _settings(model, processor, questions, setup, repr(pipeline) if pipeline else STOCK, name)
    texts, failed = texts_of(processor, task, questions, setup.protocol, setup.suffix, setup.template)
    if failed and setup.strict:
        raise AskError(strictly(*next(iter(failed.items()))))
    path, team = folder / f"{file_name(settings)}.json", Team.here()
    answers = journals(path)
    team.wait()  # nobody writes before all know what is there
    plain: AbstractContextManager[Any] = nullcontext()
    mine = path.with_suffix(f".part{team.rank}.jsonl" if team.rank else ".jsonl")
    with Journal(mine, settings) as journal:
        with mm.compressed(model, pipeline) if pipeline else plain, padded_left(processor):
            _answer(
                model, processor, questions, texts, settings, setup.strict, journal, answers, failed, show,
                prepared or Prepared(0), team,
            )  # fmt: skip
        failed = team.together(failed)
        failed = {question.id: failed[question.id] for question in questions if question.id in failed}
        if len(failed) == len(questions):
            name_, reason = next(iter(failed.items()))
            raise AskError(f"none of the {len(questions)} questions can be asked; {name_!r}: {reason}")
        record = _record(task, setup.protocol, questions, settings, journals(path), failed, name)
    if not team.rank:
        write_record(path, record)
    team.wait()
    return record


def journals(path: Path) -> dict[str, dict[str, Any]]:
    """All answers of a record that is or will be at `path`: those of one process, and those of others launched beside it."""
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}.part*.jsonl"))
    return {name: answer for part in (path.with_suffix(".jsonl"), *parts) for name, answer in answers_in(part).items()}


def _settings(
    model: Any, processor: Any, questions: Sequence[Question], setup: Setup, plan: str, name: str | None
) -> dict[str, Any]:
    """Everything that changes answers."""
    pictures = getattr(processor, "image_processor", None)
    shown = json.dumps(pictures.to_dict() if pictures else {}, sort_keys=True, default=str)
    template = getattr(processor, "chat_template", None)
    return {
        "task": setup.task,
        "protocol": setup.protocol,
        "plan": plan,
        "model": Path(name or model.config.name_or_path or model.config.model_type).name,
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "processor": hashlib.sha256(f"{shown} {template}".encode()).hexdigest()[:12],
        "template": setup.template,
        "suffix": "" if setup.suffix is None and task_of(setup.task).own else setup.suffix,
        "new_tokens": setup.new_tokens or new_tokens(task_of(setup.task), setup.protocol),
        "batch_size": setup.batch_size,
        "questions": len(questions),
        "data": digest(questions),
    } | _shown(questions)


def _shown(questions: Sequence[Question]) -> dict[str, Any]:
    """How many frames of a video are shown, and whether with subtitles, where there are videos on disk."""
    films = [video for question in questions for video in question.videos if isinstance(video, Film)]
    if not films:
        return {}
    return {"frames": max(film.frames for film in films), "subtitles": any(film.subtitles for film in films)}


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits of the names, shapes and a few values of all parameters, wherever the checkpoint lies."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = torch.cat([flat[:16], flat[len(flat) // 2 :][:16], flat[-16:]]).float().cpu()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:12]


class padded_left:
    """The tokenizer pads on the left for a block: what generation needs."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer

    def __enter__(self) -> None:
        self.before = self.tokenizer.padding_side, self.tokenizer.pad_token
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __exit__(self, *_: object) -> None:
        self.tokenizer.padding_side, self.tokenizer.pad_token = self.before


def bucketed(questions: Sequence[Question], texts: Sequence[str], size: int, any_shape: bool) -> list[list[int]]:
    """Numbers of the questions in batches of like length, the longest first (what does not fit in memory fails at once).

    The batches depend on the questions alone, so a run that goes on makes the same ones.
    """

    def length(i: int) -> tuple[int, int, int, int]:
        pixels = sum(w * h for w, h in map(picture_size, questions[i].images)) if any_shape and size > 1 else 0
        return (-len(questions[i].visuals), -pixels, -len(texts[i]), i)

    order = sorted(range(len(questions)), key=length)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    parts = [[[i for i in b if questions[i].visuals], [i for i in b if not questions[i].visuals]] for b in batches]
    return [part for pair in parts for part in pair if part]  # text alone makes no mixed batch


@torch.no_grad()
def _answer(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    texts: Sequence[str],
    settings: dict[str, Any],
    strict: bool,
    journal: Journal,
    answers: dict[str, dict[str, Any]],
    failed: dict[str, str],
    show: Callable[[Progress], None] | None,
    prepared: Prepared,
    team: Team,
) -> None:
    """Ask what is not among the answers. A batch of which a part is there is asked as a whole again, so that its padding and
    with it every answer is that of an unbroken run; only the missing answers are written."""
    todo = [
        batch
        for batch in bucketed(questions, texts, settings["batch_size"], takes_any_shape(model))
        if any(questions[i].id not in answers for i in batch)
    ][team.rank :: team.size]
    before, made, spent, context = len(answers), 0, 0.0, context_of(model)
    key = fingerprint({name: value for name, value in settings.items() if name != "plan"})

    def leave_out(name: str, reason: str) -> None:
        if strict:
            raise AskError(strictly(name, reason))
        if name not in answers:
            failed[name] = reason

    def prepare(batch: Sequence[int]) -> tuple[list[int], Any]:
        batch = [i for i in batch if texts[i]]
        asked, inputs, wrong = prepared.get(key, batch, lambda: inputs_of(model, processor, questions, texts, batch))
        for name, reason in wrong.items():
            leave_out(name, reason)
        done = all(questions[i].id in answers for i in asked)
        return ([], None) if done else (asked, BatchFeature(dict(inputs)))  # a copy: .to changes it

    def answered(asked: list[int], inputs: Any) -> tuple[list[int], _Replies]:
        """The replies to those questions of a batch that the model does not refuse."""
        if not asked:
            return [], _Replies()
        try:
            return asked, _generate(model, processor, inputs.to(model.device, model.dtype), settings["new_tokens"])
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(asked) == 1:
                leave_out(questions[asked[0]].id, told("the model", error))
                return [], _Replies()
            good = [i for i in asked if questions[i].id in answers or answered(*prepare([i]))[0]]
            if good == asked:
                raise
            return answered(*prepare(good))

    if show:
        show(Progress(before, len(questions), 0.0))
    for asked, inputs in _ahead(todo, prepare):
        if asked:
            asked, found = answered(asked, inputs)
            made, spent = made + sum(found.counts), spent + found.seconds
            records = []
            rows = zip(asked, found.texts, found.counts, found.lengths, found.visual, strict=True)
            for i, reply, count, length, tokens in rows:
                if context is not None and length + count - 1 > context:  # the last token is not read
                    leave_out(questions[i].id, f"with its answer it has {length + count} tokens, {beyond(context)}")
                    continue
                record: dict[str, Any] = {"id": questions[i].id, "reply": reply, "new_tokens": count}
                record["seconds"] = found.seconds / len(asked)
                records.append(record | ({"visual": tokens} if tokens else {}))
            records = [record for record in records if record["id"] not in answers]
            journal.append(records)
            answers |= {record["id"]: record for record in records}
        if show:
            rate, new = made / spent if spent else 0.0, len(answers) - before + len(failed)
            show(Progress(min(len(questions), before + team.size * new), len(questions), team.size * rate))


def strictly(name: str, reason: str) -> str:
    """What --strict says of a question that cannot be asked."""
    return f"question {name}: {reason}; without --strict it is left out and counted"


def _ahead(batches: Sequence[list[int]], prepare: Callable[[list[int]], Any]) -> Iterator[Any]:
    """What `prepare` makes of each batch, the next one in a thread while the model is busy with this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prepare, batches[0]) if batches else None
        for number in range(len(batches)):
            assert waiting is not None
            ready = waiting.result()
            waiting = pool.submit(prepare, batches[number + 1]) if number + 1 < len(batches) else None
            yield ready


@dataclass(frozen=True)
class _Replies:
    """Of each row the reply, the number of its tokens, that of the prompt, and visual tokens: of the prompt, entering the LLM, mean
    over its layers; and the seconds of all."""

    texts: Sequence[str] = ()
    counts: Sequence[int] = ()
    lengths: Sequence[int] = ()
    visual: Sequence[list[float]] = ()
    seconds: float = 0.0


def _generate(model: Any, processor: Any, inputs: Any, most: int) -> _Replies:
    synchronize()
    start = time.perf_counter()
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    out = model.generate(**inputs, **greedy, max_new_tokens=most)[:, inputs["input_ids"].shape[1] :]
    synchronize()
    seconds = time.perf_counter() - start
    ends = model.generation_config.eos_token_id
    ended = torch.isin(out, torch.tensor([] if ends is None else ends, device=out.device, dtype=out.dtype))
    counts = torch.where(ended.any(1), ended.long().argmax(1) + 1, out.shape[1]).tolist()
    replies = processor.batch_decode(out, skip_special_tokens=True)
    lengths = inputs["attention_mask"].sum(1).tolist()
    return _Replies(replies, counts, lengths, _visual_tokens(model, inputs["input_ids"]), seconds)


def _visual_tokens(model: Any, ids: Tensor) -> list[list[float]]:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    tokens = [token for name in names if (token := getattr(model.config, name, None)) is not None]
    if not tokens:
        return [[] for _ in ids]
    full = torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(1).tolist()
    if "_mmcompress_engine" not in model.__dict__ or not any(full):
        return [[n, n, n] for n in full]
    last = mm.trace(model)
    found: list[list[float]] = []
    for row, n in enumerate(full):
        layers = [n - last.call.counts[row] + count for count in last.tokens_per_layer(row)]
        found.append([n, layers[0], round(statistics.mean(layers), 1)])
    return found


def _record(
    task: Task,
    protocol: Protocol,
    questions: Sequence[Question],
    settings: dict[str, Any],
    journal: dict[str, dict[str, Any]],
    failed: dict[str, str],
    name: str | None,
) -> dict[str, Any]:
    answers = [(q, journal[q.id]) for q in questions if q.id in journal]
    rows = [task.row(question, record["reply"], protocol) for question, record in answers]
    seconds = sum(record["seconds"] for _, record in answers)
    tokens = sum(record["new_tokens"] for _, record in answers)
    visual = [record["visual"] for _, record in answers if "visual" in record]
    scores, judged = task.scores(rows, protocol), known(rows)
    return {
        "mmcompress": "results",
        "format": FORMAT,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "checkpoint": name,
        "machine": machine(),
        "headline": task.headline(protocol),
        "scores": scores,
        "chance": task.guess(judged),
        "by_kind": {kind: {"value": value, "questions": n} for kind, (value, n) in by_kind(rows).items()},
        "answered": len(rows),
        "without_gold_answer": len(rows) - len(judged),
        "empty": sum(not row.reply.strip() for row in rows),
        "cut": sum(record["new_tokens"] >= settings["new_tokens"] for _, record in answers),
        "failed": failed,
        "visual_tokens": {
            what: {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
            for what, values in zip(("prompt", "entering", "mean_of_layers"), zip(*visual, strict=True), strict=False)
        },
        "seconds": seconds,
        "new_tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "rows": [asdict(row) | {"answers": list(row.answers)} for row in rows],
    }


def write_record(path: Path | str, record: dict[str, Any]) -> Path:
    """Write a record in one step, its rows one to a line; returns the path."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in record["rows"])
    return write_text(path, f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def record_path(folder: Path | str, record: dict[str, Any]) -> Path:
    """Where `evaluate` put a record."""
    return Path(folder) / f"{file_name(record['settings'])}.json"


def load_record(path: Path | str) -> dict[str, Any]:
    """A record that `evaluate` wrote; raises ValueError for anything else."""
    return read_record(Path(path), "results", FORMAT, "", "is no record of `mmcompress eval` of this version")


def read_record(path: Path, kind: str, version: int, missing: str, other: str) -> dict[str, Any]:
    """The JSON record of this kind and version in a file; raises ValueError with `missing` or `other` for anything else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file{missing}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("mmcompress") != kind or record.get("format") != version:
        raise RecordError(f"{path} {other}")
    return record


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a record."""
    return [Row(**{**row, "answers": tuple(row["answers"])}) for row in record["rows"]]
