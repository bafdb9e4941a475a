# SPDX-License-Identifier: Apache-2.0
"""The measured tables of docs/, made from the records in `results/` and in the package: a function per table, and `parts`, all of
them by the name between the marks `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcompress as mm

from ...assets import MODELS, PAGES, VIDEO, weights_path
from ...explain.compressor import KEEPS
from ...flops import WHOLE
from ...runtime.needs import names_of
from ...weights import Saved
from ..cost.latency import Timing
from ..cost.midsize import FAMILIES
from ..evaluator import STOCK
from ..gpu import report
from ..kernel_bench.measure import Row, digits, read
from ..kernel_bench.operations import OPERATIONS
from ..machine import threads
from ..margins import Answers, against, completed, margin, over
from ..sweep.pareto import plot
from ..sweep.retained import ACTS, FLOORS, standings
from ..sweep.run import FILE, is_choice, load_sweep
from ..synthetic import CHANCE, KINDS
from . import speed
from .markdown import NOT_YET, conditions, table

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ("random", "downsample")
"""What a method has to beat."""


def accuracy(record: dict[str, Any]) -> str:
    """Accuracy of every embedded model at every ratio, and cost, one line per method."""
    models = list(record)
    first = record[models[0]]
    ratios = list(dict.fromkeys(row["keep"] for row in first["rows"] if row["plan"]))
    names = list(dict.fromkeys(row["method"] for row in first["rows"] if row["plan"]))
    found = {(m, row["method"], row["keep"]): row for m in models for row in record[m]["rows"]}
    stock = {m: record[m]["rows"][0] for m in models}

    def cell(model: str, name: str) -> str:
        rows = [found.get((model, name, keep)) for keep in ratios]
        return " / ".join("-" if row is None else f"{100 * row['accuracy']:.1f}" for row in rows)

    def cost(name: str) -> list[str]:
        row, full = found[models[0], name, 0.25], stock[models[0]]
        return [f"{row[key] / full[key]:.0%}" for key in ("visual_flops", "visual_kv_bytes")]

    order = sorted(names, key=lambda name: -sum(found[m, name, 0.25]["accuracy"] for m in models))
    body = [["stock model", *(f"{100 * stock[m]['accuracy']:.1f}" for m in models), "100%", "100%"]]
    body += [[f"`{name}`", *(cell(m, name) for m in models), *cost(name)] for name in order]
    shares = " / ".join(f"{keep:.0%}" for keep in ratios)
    headings = ["method", *models, "LLM layers: visual FLOPs at 25 %", "visual KV at 25 %"]
    errors = ", ".join(
        f"{m}: {record[m]['questions']} questions, standard error up to "
        f"{100 * max(row['standard_error'] for row in record[m]['rows']):.1f}"
        for m in models
    )
    return (
        f"Accuracy (%) of the embedded models on held-out questions with {shares} of the visual tokens kept, mean over seven "
        f"types ({errors}). FLOPs and KV bytes of the visual tokens in the LLM, computed, as parts of the stock model's. Sorted "
        f"by the mean at 25 %.\n\n{table(headings, body)}\n\nShown by `make results` ({conditions(first)})."
    )


def types(record: dict[str, Any]) -> str:
    """Accuracy by question type: every stock model, and the first model at a quarter."""
    models = list(record)
    body = [[f"{m}, all tokens", *(f"{100 * record[m]['rows'][0]['by_type'][k]:.0f}" for k in KINDS)] for m in models]
    for row in record[models[0]]["rows"]:
        if row["keep"] == 0.25:
            values = (f"{100 * row['by_type'][k]:.0f}" for k in KINDS)
            body.append([f"{models[0]}, `{row['method']}` 25 %", *values])
    body.append(["chance", *(f"{100 * CHANCE[k]:.1f}" for k in KINDS)])
    return table(["accuracy, %", *KINDS], body)


OF_QUESTION = ("text", "first_text", "last_attention", "mean_attention", "pagerank", "clip_", "rotary")
"""How the names of signals begin that depend on the question."""


def _signals(name: str) -> str:
    """What a method reads, in the words of `Visuals`; of signals that may stand for each other the first."""
    found: list[str] = []
    for stage in mm.as_pipeline(name).parts:
        for need in stage.needs:
            first = names_of([need])[0]
            found += [first] if first not in found else []
    short = [re.sub(r"(\.\d*?[1-9])0+$", r"\1", name) for name in found]
    return ", ".join(f"`{name}`" for name in short) or "its tokens"


def _asks(name: str) -> str:
    """Whether the choice depends on the question."""
    needs = [n for stage in mm.as_pipeline(name).parts for n in names_of(stage.needs)]
    return "yes" if any(n.startswith(OF_QUESTION) for n in needs) else "no"


def _paper(text: str) -> str:
    found = re.search(r"\d{4}\.\d{5}", text)
    return f"[{found[0]}](https://arxiv.org/abs/{found[0]})" if found else text or "baseline"


def accuracy_of(point: Mapping[str, Any]) -> float:
    """Of a plan of a sweep on the embedded benchmark: mean over question types; nan if it was refused."""
    answers = point["tasks"].get("shapes")
    return float(answers["scores"]["accuracy"]) if answers and not point["refused"] else math.nan


def difference(first: Sequence[str], second: Sequence[str]) -> tuple[float, float]:
    """How much better the marks of `first` are than those of `second`, question by question: mean, and its standard error."""
    pairs = [
        (a == "1") - (b == "1")
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    if len(pairs) < 2:
        return math.nan, math.nan
    return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5


def methods(sweeps: Mapping[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    """Every method: what it is, how right it is, how long it takes, and where it loses to a baseline. sweeps: model -> what
    `mmcompress sweep` found."""
    models = list(sweeps)
    found = {(m, p["method"], p["keep"]): p for m in models for p in sweeps[m]["points"]}
    names = [name for name in dict.fromkeys(name for _, name, _ in found) if name in mm.methods()]
    ratios = sorted({keep for _, _, keep in found if keep is not None}, reverse=True)
    middle = 0.25 if 0.25 in ratios else ratios[len(ratios) // 2]
    milliseconds: dict[str, list[str]] = {}
    for row in speed["selection"]["rows"]:
        twin = row["naive_ms"]
        took = f"{row['milliseconds']:.1f}" + ("" if twin is None else f" ({twin:.1f})")
        milliseconds.setdefault(row["method"], []).append(took)

    def at(name: str) -> dict[str, Any]:
        """Model -> the plan of a method at the ratio that is sorted by, or the only one; those that ran."""
        keys = {m: next((key for key in ((m, name, middle), (m, name, None)) if key in found), None) for m in models}
        return {m: found[key] for m, key in keys.items() if key and not found[key]["refused"]}

    def mean(values: Iterable[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else 0.0

    def cell(model: str, name: str) -> str:
        values = [accuracy_of(found[key]) for keep in (*ratios, None) if (key := (model, name, keep)) in found]
        return " / ".join("-" if math.isnan(value) else f"{100 * value:.0f}" for value in values) or "-"

    def flops(name: str) -> str:
        shares = [point["cost"]["flops_ratio"] for point in at(name).values() if point["cost"]]
        return f"{100 * mean(shares):.0f}" if shares else "-"

    def worse(name: str) -> str:
        """Question types on which a method is beaten by more than two standard errors."""
        lost = []
        for baseline in () if name in BASELINES or not is_choice(name) else BASELINES:
            pairs = [(at(baseline)[m], point) for m, point in at(name).items() if m in at(baseline)]
            marks = [[point["tasks"]["shapes"]["marks"] for point in side] for side in zip(*pairs, strict=True)]
            kinds = []
            for kind in KINDS if pairs else ():
                gain, error = difference(*([one.get(kind, "") for one in side] for side in marks))
                kinds += [kind] if gain > 2 * error > 0 else []
            lost += [f"`{baseline}`: {', '.join(kinds)}"] if kinds else []
        return "; ".join(lost)

    body = []
    for name in sorted(names, key=lambda n: -mean(map(accuracy_of, at(n).values()))):
        cls = mm.methods()[name]
        stages = mm.as_pipeline(name).parts
        took = " + ".join(t for stage in stages for t in milliseconds.get(stage.name, [])[:1]) or "-"
        positions = " + ".join(dict.fromkeys(getattr(stage, "positions", "keep") for stage in stages))
        body.append([
            f"`{name}`", _paper(cls.paper), ACTS[cls.kind], _signals(name), _asks(name), positions,
            *(cell(m, name) for m in models), flops(name), took, worse(name),
        ])  # fmt: skip
    stock = " / ".join(f"{m} {100 * accuracy_of(found[m, STOCK, None]):.0f}" for m in models)
    counts = {m: sweeps[m]["tasks"]["shapes"]["questions"] for m in models}
    asked = ", ".join(f"{count} questions on {m}" for m, count in counts.items())
    headings = [
        "method",
        "paper",
        "acts",
        "reads",
        "question",
        "positions",
        *models,
        "FLOPs",
        "ms",
        f"beaten at {100 * middle:.0f} % by",
    ]
    shares, quarter = " / ".join(f"{100 * keep:.0f}" for keep in ratios), f"{100 * middle:.0f} %"
    notes = (
        f"Asked: {asked}. The stock models: {stock}.",
        "One number: the method takes no `keep`. `-`: cannot be reached, or not possible with this model.",
        "`keep` counts tokens behind the last cut; for methods with several cuts it is the mean over all LLM layers.",
        f"FLOPs: {WHOLE} and compression too, at {quarter}, % of the stock model, mean over models.",
        "ms: selection of 288 of 2,880 tokens of 4,096 features, without its signals, float32; in brackets with the naive twins "
        "of our kernels.",
        "Last column: question types on which the baseline is better by more than two standard errors, all models together.",
    )
    return (
        f"Accuracy (%) with {shares} % of the visual tokens, mean over seven question types. Sorted by the mean over models at "
        f"{quarter}, baselines included. Every budget is exact.\n\n" + "\n".join(f"* {note}" for note in notes) + "\n\n"
        f"{table(headings, body, (*headings[:6], headings[-1]))}\n\n"
        f"Shown by `mmcompress sweep MODEL --plan all` and `mmcompress bench selection` ({conditions(sweeps[models[0]])})."
    )


def bench(record: dict[str, Any]) -> str:
    """Speed of the mid-size random models: LLaVA in full, the others as speed-up and what it reaches of the FLOPs ratio."""
    families = record["families"]
    llava = families["llava"]
    body = []
    for row in llava["rows"]:
        timing = Timing(**row)
        body.append([timing.plan if timing.plan == "stock" else f"`{timing.plan}`", *timing.cells()[1:]])
    plans = [row["plan"] for row in llava["rows"]]
    side = []
    for plan in plans:
        cells = []
        for found in families.values():
            row = next((r for r in found["rows"] if r["plan"] == plan), None)
            if row is None:
                cells.append("-")
            elif plan == "stock":
                cells.append(f"{row['prefill_ms']:.0f} ms")
            else:
                cells.append(f"{row['prefill_speedup']:.2f}x ({100 * row['speedup_over_flops_ratio']:.0f} %)")
        side.append([plan if plan == "stock" else f"`{plan}`", *cells])
    shapes = "; ".join(FAMILIES[name] for name in families)
    return (
        f"Speed on mid-size random models ({shapes}; language model of LLaMA shapes 1024 x 12 everywhere, 40 text tokens, float32, "
        f"sdpa, batch 1), medians of {llava['conditions']['repeats']} interleaved rounds, {WHOLE}. Reached: "
        f"measured speed-up over the FLOPs ratio (counted by torch). `uniform(keep=0.998)` drops a token or two: its decode step "
        f"shows what the hooks cost. The LLaVA in full:\n\n{table(Timing.HEADINGS, body)}\n\nSpeed-up of the prefill (and how "
        f"much of the FLOPs ratio that is) by family, as far as measured:\n\n{table(['plan', *families], side)}\n\n"
        f"Shown by `make bench` ({conditions(llava)})."
    )


def memory(record: dict[str, Any]) -> str:
    """Peak memory of a long video."""
    body = [
        [
            row["plan"] if row["plan"] == "stock" else f"`{row['plan']}`",
            str(row["kept"] or 20480),
            f"{row['before_mib']:.0f}",
            f"{row['peak_mib'] - row['before_mib']:.0f}",
        ]
        for row in record["memory"]["rows"]
    ]
    return (
        f"Prefill of a video of 20,480 tokens in a small random Qwen2.5-VL, one process each. One N x N float32 matrix would be "
        f"1600 MiB.\n\n{table(['plan', 'tokens in the LLM', 'MiB before the prefill', 'MiB added at the peak'], body)}\n\n"
        f"Shown by `mmcompress bench memory` ({conditions(record['memory'])})."
    )


def kernels(rows: Sequence[Row]) -> str:
    """Every kernel beside its naive twin, by N, for the narrowest and the widest tokens measured; a table per device."""
    parts = []
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device]
        types = list(dict.fromkeys(row.dtype for row in mine))
        dtype = "float32" if "float32" in types else types[0]
        mine = [row for row in mine if row.dtype == dtype]
        names = list(dict.fromkeys(row.provider for row in mine))
        ours = next((name for name in ("triton", "blocked") if name in names), names[-1])
        swept = [row for row in mine if OPERATIONS[row.op].d is None] or mine
        widths = {min(row.d for row in swept), max(row.d for row in swept)}
        counts = sorted({row.n for row in mine})
        body = []
        for op, d, k in dict.fromkeys((row.op, row.d, row.k) for row in mine):
            if OPERATIONS[op].d is None and d not in widths:
                continue
            found = {(row.provider, row.n): row for row in mine if (row.op, row.d, row.k) == (op, d, k)}
            body.append(_kernel_line(op, d, k, found, names, ours, counts))
        sizes = " / ".join(str(n) for n in counts)
        first = mine[0]
        faster = [f"{ours} over naive"] if "naive" in names else []
        held = [f"{name}, MiB" for name in ("naive", ours) if name in names]
        headings = ["kernel", "D", "k", *(f"{name}, ms" for name in names), *faster, *held, "roofline"]
        commits = ", ".join(dict.fromkeys(row.commit or "?" for row in mine if "@" not in row.provider))
        copy, matmul = first.copy_bytes_per_s / 1e9, first.matmul_flops_per_s / 1e12
        parts.append(
            f"N = {sizes} tokens of width D, {dtype}, one visual, medians of interleaved runs; `-`: would take too long "
            f"or too much memory. MiB: beyond inputs and outputs at the peak. Roofline: the time that the device would allow "
            f"by its copy bandwidth ({copy:.0f} GB/s) or matmul rate ({matmul:.2f} TFLOP/s), measured in the same run, over "
            f"the median of {ours}; it may exceed 100 % where greedy selection skips work.\n\n{table(headings, body)}\n\n"
            f"Shown by `mmcompress bench kernels` ({device}, {threads(first.threads)}, torch {first.torch}, commit {commits})."
        )
    return "\n\n".join(parts)


def _kernel_line(
    op: str, d: int, k: int, found: dict[tuple[str, int], Row], names: list[str], ours: str, counts: list[int]
) -> list[str]:
    def over(values: Iterable[float | None], form: Callable[[float], str]) -> str:
        return " / ".join("-" if value is None else form(value) for value in values)

    def ms(name: str, n: int) -> float | None:
        return found[name, n].q50_ms if (name, n) in found else None

    def mib(name: str, n: int) -> float | None:
        held = found[name, n].peak_bytes if (name, n) in found else None
        return None if held is None else held / 2**20

    cells = [f"`{op}`", str(d), str(k) if k else ""]
    cells += [over((ms(name, n) for n in counts), digits) for name in names]
    if "naive" in names:
        pairs = [(ms("naive", n), ms(ours, n)) for n in counts]
        cells.append(over((a / b if a and b else None for a, b in pairs), lambda x: f"{x:.1f}x"))
    cells += [over((mib(name, n) for n in counts), lambda x: f"{x:.1f}") for name in ("naive", ours) if name in names]
    bound = (found[ours, n].roofline if (ours, n) in found else None for n in counts)
    return [*cells, over(bound, lambda x: f"{100 * x:.0f}%")]


def explain(faithful: dict[str, Any], order: dict[str, Any], cost: dict[str, Any]) -> str:
    """How faithful each explanation is and what is more than chance; how maps of compressed models keep their order; their cost."""
    return "\n\n".join((_faithful(faithful), _rank_order(order), _explain_cost(cost)))


def _faithful(record: dict[str, Any]) -> str:
    rows = record["rows"]
    models, plans, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("model", "plan", "explanation"))
    found = {(r["explanation"], r["plan"], r["model"]): r for r in rows}
    lines = list(dict.fromkeys((r["explanation"], r["plan"]) for r in rows))
    first, others = names[0], names[1:3]

    def cell(row: dict[str, Any] | None, value: str) -> str:
        sign, error = ("+", "lead_error") if value == "lead" else ("", "f1_error")
        return "-" if row is None else f"{100 * row[value]:{sign}.1f} ± {100 * row[error]:.1f}"

    scores = [
        [name, _called(plan), *(cell(found.get((name, plan, m)), "f1_iou") for m in models)] for name, plan in lines
    ]
    leads = []
    for name in others:
        for plan in plans:
            mine = [found[name, plan, m] for m in models]
            marks = [" (too few)" if abs(r["lead"]) < 2 * r["lead_error"] else "" for r in mine]
            leads.append([name, _called(plan), *(cell(r, "lead") + mark for r, mark in zip(mine, marks, strict=True))])
    few = [max(r["samples"] for r in rows if (r["explanation"] in names[3:], r["plan"] != "") == key) for key in (
        (False, False), (False, True), (True, False))]  # fmt: skip
    options = " ".join(f"--plan {chr(39)}{plan}{chr(39)}" for plan in plans if plan)
    return (
        f"F1-IoU (%) of explanations, with standard errors by a bootstrap over questions; those answered rightly of 140 "
        f"questions, with compression of 70, explanations by gradients of 14 (up to {few[0]}, {few[1]} and {few[2]}). Objects are "
        f"the true boxes of the scenes, cells that some explanation cannot see do not count. Words of question and answer do.\n\n"
        f"{table(['explanation', 'model', *models], scores, ('model',))}\n\nF1-IoU of the {first} less that of attention, "
        f"paired; too few: questions to tell, it is less than two errors:\n\n"
        f"{table(['over', 'model', *models], leads, ('model',))}\n\n"
        f"Shown by `python -m mmcompress.eval.explained.faithful {options}` ({conditions(record)})."
    )


def _called(plan: str) -> str:
    return f"`{plan}`" if plan else "stock"


def _rank_order(record: dict[str, Any]) -> str:
    rows = record["rows"]
    models, plans = (list(dict.fromkeys(r[key] for r in rows)) for key in ("model", "plan"))
    found = {(r["plan"], r["model"]): r for r in rows}
    forms = ("maps", "activations")

    def cell(row: dict[str, Any] | None) -> str:
        return "-" if row is None else " / ".join(f"{row[f]['mean']:.2f} ± {row[f]['error']:.2f}" for f in forms)

    body = [[f"`{plan}`", *(cell(found.get((plan, m))) for m in models)] for plan in plans]
    return (
        f"Order of the cells that keep their tokens: Spearman correlation of token activation maps with those of the stock model "
        f"for the same answer, and that of the activations themselves, before interference and filter (maps / activations; means "
        f"of {rows[0]['questions']} questions and standard errors):\n\n{table(['half of the tokens', *models], body)}\n\n"
        f"Shown by `python -m mmcompress.eval.explained.rank_order` ({conditions(record)})."
    )


def _explain_cost(record: dict[str, Any]) -> str:
    plain, explained = (record["median_seconds"][way] for way in ("generate", "explain"))
    more = record["peak_mib"]["explain"] - record["peak_mib"]["generate"]
    return (
        f"A token activation map of {record['tokens']:,} tokens (mid-size random LLaVA-NeXT, language model of {record['layers']} "
        f"layers, {record['new_tokens']} new tokens) takes {explained:.1f} s where `generate` alone takes {plain:.1f} s, medians "
        f"of {record['rounds']} interleaved rounds, and {max(0, more):.0f} MiB more at the peak. Shown by `python -m "
        f"mmcompress.eval.cost.explain --layers {record['layers']} --rounds {record['rounds']}` ({conditions(record)})."
    )


def learned(found: dict[str, Saved]) -> str:
    """What the compressors in the package are worth beside what they learned from and what needs no training."""
    reports = {name: saved.training for name, saved in found.items()}
    first = next(iter(reports.values()))
    names = list(dict.fromkeys(key.split(" ")[0] for key in first["accuracy"] if key != "full"))

    def cell(model: str, name: str) -> str:
        return " / ".join(f"{100 * reports[model]['accuracy'][f'{name} {100 * k:.0f} %']:.1f}" for k in KEEPS)

    order = ["oracle", "learned", "proxy", *sorted(set(names) - {"oracle", "learned", "proxy"})]
    shown = {"learned": "learned", "oracle": "oracle (two passes)", "proxy": "proxy (no training)"}
    body = [["all tokens", *(f"{100 * report['accuracy']['full']:.1f}" for report in reports.values())]]
    body += [[shown.get(name, f"`{name}`"), *(cell(m, name) for m in reports)] for name in order if name in names]
    overlaps = [
        " / ".join(
            f"{100 * report['agreement'][f'overlap {name} 25 %']:.0f}" for name in ("learned", "proxy", "chance")
        )
        for report in reports.values()
    ]
    body.append(["of the oracle's 25 %: learned / proxy / chance, %", *overlaps])
    body.append(["right answers learned from", *(str(report["right"]) for report in reports.values())])
    shares = " / ".join(f"{100 * k:.0f}" for k in KEEPS)
    compared = " ".join(name for name in names if name != "learned")
    sizes = [
        ", ".join(str(value(report)) for report in reports.values())
        for value in (lambda r: r["asked"], lambda r: r["fitting"]["epochs"], lambda r: r["questions"])
    ]
    return (
        f"Accuracy (%) of `explain_compress` with {shares} % of the visual tokens.\n\n{table(['', *reports], body)}\n\nShown by "
        f"`mmcompress explain-train MODEL --samples N --epochs E --score Q --compare {compared}` (N = {sizes[0]}; E = {sizes[1]}; "
        f"Q = {sizes[2]})."
    )


def against_tables(answers: Answers, keeps: Sequence[float]) -> str:
    """`voronoi` beside every other method of a sweep, a table for each ratio."""
    parts = []
    for keep in keeps:
        headings, lines = against(answers, keep)
        parts.append(f"**{keep:.0%} of the visual tokens**\n\n{table(headings, lines)}")
    return "\n\n".join(parts)


def fresh_sweeps(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sweeps on questions that nothing was chosen by, of the models that have one."""
    paths = {name: ROOT / "results" / "fresh" / name / FILE for name in names}
    return {name: load_sweep(path) for name, path in paths.items() if path.exists()}


def mass_tables(sweeps: Mapping[str, dict[str, Any]], pages: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The measured parts of docs/mass.md. sweeps: of the models that answer questions on drawn scenes; pages: on drawn pages."""
    shapes, dense = Answers(sweeps, "shapes"), Answers(pages, "pages")
    keeps = (0.25, 0.1, 0.05)

    def asked(answers: Answers, found: Mapping[str, dict[str, Any]]) -> str:
        counts = ", ".join(f"{count} on {model}" for model, count in answers.questions.items())
        return f"({counts}; {conditions(next(iter(found.values())))})"

    how = (
        "Accuracy (%); in brackets `voronoi` less it, paired question by question, ± one standard error, * more than two; last all "
        "models together, where there are several. The same number of tokens enters the LLM, but for methods that cut inside it "
        "(`keep` is then the mean over layers, or what is left behind the cut)."
    )
    later = "; ".join(added_later(sweeps.values()))
    later = f" Added later: {later}." if later else ""
    gain = "Accuracy (%) over all models of the host alone and completed, and the difference, paired, * more than two errors."
    return {
        "against": f"{how} Questions from a seed on that nothing was chosen by {asked(shapes, sweeps)}.\n\n"
        + against_tables(shapes, keeps),
        "completed": f"{gain}{later}\n\n" + table(*completed(shapes, (0.25, 0.1))),
        "pages": f"{how} Fresh questions {asked(dense, pages)}.\n\n" + against_tables(dense, keeps)
        if pages
        else NOT_YET,
        "positions": "Positions of the full prompt (`keep`) less positions numbered without gaps (`reindex`), in points, paired, * "
        "more than two errors; `-`: positions with axes (M-RoPE) are always kept.\n\n" + orders(shapes, keeps),
    }


def orders(answers: Answers, keeps: Sequence[float]) -> str:
    """Kept positions of `voronoi` less those numbered anew, by model and all together, and the default."""

    def cell(models: Sequence[str], keep: float) -> str:
        kept, other = (answers.plans.get(plan, {}) for plan in (f"voronoi(keep={keep})", _reindexed(keep)))
        pairs = [(kept[model], other[model]) for model in models if model in kept and model in other]
        found = margin(iter(pairs)) if pairs else None
        return "-" if found is None else f"{found}" + (" *" if found.clear else "")

    lines = [
        [f"{keep:.0%}", *(cell([model], keep) for model in answers.models), cell(answers.models, keep)]
        for keep in keeps
    ]
    default = f"`{mm.methods()['voronoi'].positions}`"
    return table(["tokens", *answers.models, "all"], [*lines, ["default", *[default] * (len(answers.models) + 1)]])


def videos(sweep: Mapping[str, Any]) -> str:
    """The model of videos with every method, beside what needs no method."""
    answers = Answers({VIDEO: sweep}, "videos")
    headings, lines, beaten = over(answers, (0.5, 0.25, 0.1), FLOORS)
    names = ", ".join(f"`{name}`" for name in beaten)
    where = ", ".join((conditions(dict(sweep)), *added_later([sweep])))
    return (
        f"Accuracy (%) on {answers.questions[VIDEO]} fresh questions; in brackets what a method is above the best floor at the "
        "same number of visual tokens, paired, ± one standard error, * more than two errors. Floors: fewer frames (`keyframes` "
        "without a CLIP, evenly spread), smaller frames (`downsample`), `uniform`, `random`. For methods that cut inside the LLM "
        f"`keep` is the mean over layers, or what is left behind the cut. {where}.\n\n{table(headings, lines)}"
        f"\n\nAbove the best floor by two errors at no ratio: {names or 'none'}."
    )


def added_later(sweeps: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was measured behind the rest: "METHOD at RATIOS: COMMITS", and the processor where it was another one."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for point in (point for sweep in sweeps for point in sweep["points"] if "commit" in point):
        keeps, places = found.setdefault(point["method"].partition("(")[0], ({}, {}))
        keeps[f"{point['keep']:.0%}"] = None
        places[f"{point['commit']} on {point['device']}" if "device" in point else point["commit"]] = None
    return [f"`{method}` at {', '.join(keeps)}: {', '.join(places)}" for method, (keeps, places) in found.items()]


def _reindexed(keep: float) -> str:
    return f"plan(voronoi(keep={keep}), positions='reindex')"


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the marks of `name` replaced."""
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"the text has {count} places for {name!r}, expected one")
    return filled


@functools.cache
def sweeps() -> dict[str, dict[str, Any]]:
    """The sweeps that methods are compared by, of every embedded model of shapes."""
    return {name: load_sweep(ROOT / "results" / "sweep" / name / FILE) for name in MODELS}


def parts() -> dict[str, str]:
    """All tables by name."""

    def read_json(name: str) -> Any:
        return json.loads((ROOT / "results" / f"{name}.json").read_text())

    def recorded(name: str) -> Any:
        return read_json(name) if (ROOT / "results" / f"{name}.json").exists() else None

    shown, midsize = read_json("demo"), read_json("bench")
    demo = {name: shown[name] for name in MODELS if name in shown}
    return {
        "explain": explain(*(read_json(name) for name in ("explain", "rank_order", "explain_cost"))),
        "learned": learned({name: Saved.load(weights_path("explain_compress", name)) for name in MODELS}),
        "kernels": kernels(read(ROOT / "results" / "kernels.json")),
        "methods": methods(sweeps(), midsize),
        "accuracy": accuracy(demo),
        "types": types(demo),
        "bench": bench(midsize),
        "memory": memory(midsize),
        "real": speed.real(recorded("real")),
        "peers": speed.peers(recorded("peers")),
        "overhead": speed.overhead(recorded("overhead")),
        "film": speed.film(recorded("video_cost")),
        "ways": speed.masses(recorded("mass_cost")),
        "gpu": report.section(report.load(ROOT / "results" / "gpu" / "gpu.json")),
        **mass_tables(fresh_sweeps(MODELS), fresh_sweeps([PAGES])),
        "videos": videos(film[VIDEO]) if (film := fresh_sweeps([VIDEO])) else NOT_YET,
    }


def pages() -> dict[Path, str]:
    """The pages of docs/ that have tables, with all of them filled. Raises ValueError for a table without a place."""
    left = parts()
    found = {}
    for path in sorted((ROOT / "docs").glob("*.md")):
        before = text = path.read_text()
        for name in re.findall(r"<!-- begin (\w+) -->", text):
            if name not in left:
                raise ValueError(f"{path.name} wants {name!r}: there is no such table, or it stands in another page")
            text = fill(text, name, left.pop(name))
        if text != before or "<!-- begin " in text:
            found[path] = text
    if left:
        raise ValueError(f"no page has a place for {', '.join(left)}")
    return found


def pareto() -> None:
    """Draw results/pareto.png."""
    found = sweeps()
    count = min(content["tasks"]["shapes"]["questions"] for content in found.values())
    rows = {name: standings(content) for name, content in found.items()}
    title = f"what is retained of the stock model on {count} questions, against cost"
    plot(rows, title, ROOT / "results" / "pareto.png")
