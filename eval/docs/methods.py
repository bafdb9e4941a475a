# SPDX-License-Identifier: Apache-2.0
"""A page per method from one template: docstring and options from the code, results from the records, a picture from a model."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import mmcompress as mm

from ...assets import model_path, weights_path
from ...stage import Stage
from ..sweep.retained import ACTS
from .docstrings import as_markdown, meaning, parts_of, sentences
from .markdown import table
from .tables import ROOT, _asks, _paper, _signals, accuracy_of, fresh_sweeps, sweeps

MODEL, KEEPS = "llava-shapes", (0.5, 0.25, 0.1)
CAPTION = (
    "*One picture, then what is left at 50, 25 and 10 %: kept cells bright, merged ones in the colour of their cluster, dropped "
    "ones dark.*"
)
PLACES = {
    **ACTS,
    "exit": "in the LLM, all or nothing",
}
WHEN = {
    "pixel": "The vision encoder gets less to do, too. What is lost there, nothing brings back.",
    "encoder": "Part of the vision encoder and all of the LLM get cheaper.",
    "input": "Every layer of the LLM gets fewer tokens, and so does the KV cache.",
    "layer": "The layers before the cut see all tokens, so accuracy holds longer and less is saved.",
    "exit": "Tokens leave the LLM when they are no longer needed; what that saves depends on the picture and the question.",
    "attention": "Nothing is dropped, so nothing gets faster: it changes answers, not cost.",
    "recipe": "Several stages under one name: it saves in all the places where they act.",
}


def ours() -> dict[str, type[Stage]]:
    """Methods of this package by name, registered by nobody else."""
    return {name: cls for name, cls in mm.methods().items() if cls.__module__.startswith("mmcompress.")}


def for_videos(cls: type[Stage]) -> bool:
    """Whether the idea of a method is about time."""
    idea = sentences(parts_of(cls.__doc__ or "").idea)[0]
    return cls.kind in ("input", "layer") and bool(re.search(r"\bframes?\b|\bvideos?\b|(of|over) time", idea))


def index() -> str:
    """The list of all methods, by place, one line each."""
    found = ours()
    lines = [
        "# Methods",
        "",
        "In the order in which an image meets them; all in one table in [results](../results.md).",
        "",
    ]
    groups = {
        place: [n for n, c in found.items() if c.kind == kind and not for_videos(c)] for kind, place in PLACES.items()
    }
    groups["made for videos"] = [name for name, cls in found.items() if for_videos(cls)]
    for place, names in groups.items():
        if names:
            lines += [f"## {place[0].upper()}{place[1:]}", ""]
            lines += [
                table(["method", "idea", "paper"], (_line(name, found[name]) for name in names), ("idea", "paper")),
                "",
            ]
    return "\n".join(lines)


def _line(name: str, cls: type[Stage]) -> list[str]:
    return [f"[`{name}`]({name}.md)", sentences(parts_of(cls.__doc__ or "").idea)[0], _paper(cls.paper)]


def page(name: str, picture: bool = False) -> str:
    """The page of a method, in Markdown. picture: there is one beside it, `NAME.png`."""
    cls = ours()[name]
    parts = parts_of(cls.__doc__ or "")
    lines = [f"# {name}", "", parts.idea, ""]
    if picture:
        lines += [f"![what {name} keeps]({name}.png)", "", CAPTION, ""]
    lines += ["## When to use it", "", *(f"* {line}" for line in _when(name, cls)), ""]
    lines += ["## Use", "", "```python", f'mm.compress(model, "{_example(name, cls)}")', "```", ""]
    lines += ["## Options", "", _options(cls, cls.__doc__ or ""), ""]
    lines += ["## Cost", "", _cost(cls, parts.cost), "", *_flops(name), ""]
    if parts.body:
        lines += ["## How it works", "", "\n\n".join(as_markdown(paragraph) for paragraph in parts.body), ""]
    lines += ["## Paper", "", *([parts.paper, ""] if parts.paper else []), _origin(cls), ""]
    lines += ["## What it departs from", "", _departs(name, cls, parts.departs), ""]
    lines += ["## Measured", "", *_measured(name), ""]
    path = Path(*cls.__module__.split(".")).with_suffix(".py")
    lines += [f"Code: `{path}`."]
    return "\n".join(lines)


def _example(name: str, cls: type[Stage]) -> str:
    names = [f.name for f in cls.fields()]
    return f"{name}(keep=0.25)" if "keep" in names else name


def _options(cls: type[Stage], doc: str) -> str:
    """A table: name, default, and what is said of the option, there or by the stages of a recipe."""
    rows = []
    docs = [doc, *(part.__doc__ or "" for part in _stages(cls))]
    for option in cls.fields():
        default = "required" if option.default is MISSING else f"`{option.default!r}`"
        said = meaning(option.name, docs)
        fixed = {
            "keep": "how many tokens are left: a ratio, or a count ([budgets](../plans.md#budgets))",
            "on": "[what it acts on](../plans.md#what-a-stage-acts-on)",
        }
        rows.append([f"`{option.name}`", default, fixed.get(option.name, said or "see below").replace("|", "\\|")])
    return table(["option", "default", "meaning"], rows, ("default", "meaning"))


def _stages(cls: type[Stage]) -> list[type[Stage]]:
    """The methods that a recipe stands for."""
    return [type(stage) for stage in mm.as_pipeline(cls.name).parts] if cls.kind == "recipe" else []


def _when(name: str, cls: type[Stage]) -> Iterator[str]:
    place = PLACES[cls.kind]
    yield f"It acts {place}. {WHEN[cls.kind]}"
    if _asks(name) == "yes":
        yield "It reads the question: the same image with another question is compressed anew, so nothing can be cached by image."
    elif cls.kind in ("pixel", "encoder", "input"):
        yield "It does not read the question: what it keeps of an image holds for every question and every turn."
    if mm.as_pipeline(name).weighs:
        yield "Merged tokens weigh in attention what they stand for ([masses](../mass.md))."
    names = [f.name for f in cls.fields()]
    if "weights" in names:
        yield "It has something to learn: [training](../training.md)."
    if "host" in names:
        yield "It completes or wraps another method, its `host`."
    if (signals := _signals(name)) != "its tokens":
        yield f"It reads {signals} ([signals](../plans.md#signals))."
    elif cls.kind != "attention":
        yield "It reads nothing but the visual tokens: no attention, no question."
    yield from _verdict(name)


def _accuracies(name: str) -> dict[str, dict[float | None, float]]:
    """Model -> ratio -> accuracy in percent, where it ran."""
    found: dict[str, dict[float | None, float]] = {}
    for model, content in sweeps().items():
        for point in content["points"]:
            if point["method"] == name and not math.isnan(value := accuracy_of(point)):
                found.setdefault(model, {})[point["keep"]] = 100 * value
    return found


def _verdict(name: str) -> Iterator[str]:
    mine, chance = _accuracies(name), _accuracies("random")
    both = [(rows[0.25], chance[model][0.25]) for model, rows in mine.items() if 0.25 in rows]
    if both and name != "random":
        gain = sum(a - b for a, b in both) / len(both)
        told = f"{abs(gain):.0f} points {'above' if gain > 0 else 'below'} `random`, mean over models."
        warn = "" if gain > 2 else " Measure before you take it."
        yield f"With a quarter of the tokens of the embedded models it is {told}{warn}"


def _measured(name: str) -> Iterator[str]:
    mine, stock = _accuracies(name), _accuracies("stock")
    if mine:
        keeps = sorted({k for rows in mine.values() for k in rows if k is not None}, reverse=True)
        heads = [*(f"{k:.0%}" for k in keeps), *(["as it is"] if any(None in r for r in mine.values()) else [])]
        keys = [*keeps, *([None] if len(heads) > len(keeps) else [])]
        rows = [
            [m, f"{stock[m][None]:.0f}" if m in stock else "-", *(f"{r[k]:.0f}" if k in r else "-" for k in keys)]
            for m, r in mine.items()
        ]
        yield "Accuracy (%) of the embedded models, 140 questions each; standard error about 3 points."
        yield ""
        yield table(["model", "stock", *heads], rows)
        yield ""
    fresh = {
        m: {
            p["keep"]: 100 * accuracy_of(p)
            for p in c["points"]
            if p["method"] == name and not math.isnan(accuracy_of(p))
        }
        for m, c in _fresh().items()
    }
    fresh = {m: {k: v for k, v in r.items() if k is not None} for m, r in fresh.items()}
    fresh = {m: r for m, r in fresh.items() if r}
    if fresh:
        keeps = sorted({k for r in fresh.values() for k in r}, reverse=True)
        yield "On questions that nothing was chosen by ([all methods](../mass.md)):"
        yield ""
        yield table(
            ["model", *(f"{k:.0%}" for k in keeps)],
            ([m, *(f"{r[k]:.1f}" if k in r else "-" for k in keeps)] for m, r in fresh.items()),
        )
    elif not mine:
        yield "Not measured yet."


@functools.cache
def _fresh() -> dict[str, dict[str, Any]]:
    return fresh_sweeps(sorted(path.parent.name for path in (ROOT / "results" / "fresh").glob("*/sweep.json")))


def _flops(name: str) -> Iterator[str]:
    shares = [
        point["cost"]["flops_ratio"]
        for content in sweeps().values()
        for point in content["points"]
        if point["method"] == name and point["keep"] in (0.25, None) and point["cost"] and not point["refused"]
    ]
    if shares:
        mean = 100 * sum(shares) / len(shares)
        yield (
            f"The whole prefill of the embedded models takes {mean:.0f} % of the stock model's FLOPs at 25 %; their vision "
            "encoders are large beside their LLMs."
        )
    rows = [
        r for r in json.loads((ROOT / "results" / "bench.json").read_text())["selection"]["rows"] if r["method"] == name
    ]
    if rows:
        yield ""
        took = rows[0]["milliseconds"]
        yield f"The choice of 288 of 2,880 tokens of 4,096 features takes {took:.1f} ms on two CPU cores, without its signals."


def _cost(cls: type[Stage], said: str) -> str:
    if not said:
        return "That of its stages." if cls.kind == "recipe" else "As the method that it wraps."
    text = re.sub(r"^Cost:? ", "", said)
    return text[0].upper() + text[1:]


def _origin(cls: type[Stage]) -> str:
    found = _paper(cls.paper)
    if found != "baseline":
        return f"{found}."
    return "This library's own." if "This library's own" in (cls.__doc__ or "") else "A baseline: no paper."


def _departs(name: str, cls: type[Stage], said: str) -> str:
    if said:
        return said
    if stages := _stages(cls):
        linked = " and ".join(f"[`{stage.name}`]({stage.name}.md)" for stage in stages)
        return f"It stands for {linked}, whose pages say it."
    if not re.search(r"\d{4}\.\d{5}", cls.paper):
        return "There is no reference."
    replayed = any((ROOT / "tests" / "golden").glob(f"{name}_*.npz"))
    told = " It is replayed against recorded outputs of its reference (`tests/golden`)." if replayed else ""
    return f"Nothing known.{told}"


def plan_of(name: str, keep: float) -> str | None:
    """A plan that shows the method at a ratio; None if it has no ratio or keeps everything."""
    cls = ours()[name]
    options = [f.name for f in cls.fields()]
    if "keep" not in options or cls.kind == "attention" or for_videos(cls):
        return None
    weights = ""
    if "weights" in options and (model_path(MODEL) / name).is_dir():
        weights = f", weights={str(weights_path(name, MODEL))!r}"
    before = "vflowopt_prune(keep=0.9) >> " if name == "vflowopt_cuts" else ""
    return f"{before}{name}(keep={keep}{weights})"


def draw(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Draw what methods keep of one picture, NAME.png in `folder`, where it is not there yet; returns the names that have one."""
    import torch
    from PIL import Image

    from ...visualize import contact_sheet, kept_overlay
    from ..synthetic import items
    from ..synthetic.benchmark import encode, load

    folder.mkdir(parents=True, exist_ok=True)
    wanted = sorted(names if names is not None else ours())
    missing = [name for name in wanted if plan_of(name, 0.5) and not (folder / f"{name}.png").exists()]
    if missing:
        model, processor = load(model_path(MODEL))
        item = items(7)[5]
        inputs = encode(processor, [item])
        for name in missing:
            panels, labels = [item.picture], ["the picture"]
            for keep in KEEPS:
                try:
                    with mm.compressed(model, str(plan_of(name, keep))), torch.no_grad():
                        model.generate(**inputs, do_sample=False, max_new_tokens=1)
                        visual = mm.trace(model).visuals[0]
                        panels.append(kept_overlay(item.picture, visual))
                        labels.append(f"keep={keep}: {len(visual.kept_cells(10**6))} of {visual.tokens} tokens left")
                except (ValueError, NotImplementedError):
                    continue
            if len(panels) > 1:
                small = [panel.convert("RGB").resize((240, 240)) for panel in panels]
                path = contact_sheet(small, folder / f"{name}.png", len(small), labels=labels, legend="fate")
                Image.open(path).quantize(128).save(path)
    return [name for name in wanted if (folder / f"{name}.png").exists()]


def site(folder: Path | None) -> dict[str, Any]:
    """All pages of methods by their path in docs/, and pictures as bytes; pictures are kept in `folder`, None: without pictures."""
    drawn = draw(folder) if folder else []
    found: dict[str, Any] = {"methods/index.md": index()}
    for name in ours():
        found[f"methods/{name}.md"] = page(name, name in drawn)
    if folder:
        found |= {f"methods/{name}.png": (folder / f"{name}.png").read_bytes() for name in drawn}
    return found
