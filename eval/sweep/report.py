# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: one HTML file with tables, plots and the worst examples, nothing outside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...flops import WHOLE
from ...records import write_text
from .examples import Example
from .retained import HEADINGS, Standing, cells, task_lines, undecided

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #ddd; font-size: 13px; }
.right { color: #1a7f37; } .wrong { color: #b42318; } .note { color: #666; font-size: 13px; }
"""


def write_report(
    content: dict[str, Any], rows: Sequence[Standing], examples: Sequence[Example], plot: Path | None, path: Path
) -> Path:
    """Write the report of a sweep."""
    title = f"{content['model']} on {', '.join(content['tasks'])}"
    parts = [f"<h1>{escape(title)}</h1>", _conditions(content)]
    if plot is not None:
        parts.append(_image(plot.read_bytes(), "retained accuracy against cost"))
    parts += [
        "<h2>Retention</h2>",
        _table(HEADINGS, [cells(row) for row in rows]),
        '<p class="note">RelAcc: mean over tasks of score / stock score in %, with one standard error of a paired bootstrap; OP: '
        "root mean square of it; OG: its spread over tasks; agreement: the benchmark's parser reads the same in both replies; "
        f"verdict: against the stock model (95 %), same: within one point; FLOPs: {WHOLE}, % of the stock model, "
        f"counted; TTFT: measured, interleaved. {escape('. '.join(undecided(rows)))}</p>",
        "<h2>Tasks and question types</h2>",
        _table(
            ("plan", "task", "stock", "score", "above chance", "verdict", "by type: stock > plan, %"), task_lines(rows)
        ),
    ]
    if refused := [point for point in content["points"] if point["refused"]]:
        items = "".join(f"<li>{escape(point['plan'])}: {escape(point['refused'])}</li>" for point in refused)
        parts.append(f"<h2>Plans that this model does not run</h2><ul>{items}</ul>")
    if examples:
        parts.append(
            "<h2>Right before, wrong now</h2><p class='note'>Bright: patches whose tokens the last layer sees.</p>"
        )
        for plan in dict.fromkeys(example.plan for example in examples):
            shown = "".join(_example(example) for example in examples if example.plan == plan)
            parts.append(f"<h3>{escape(plan)}</h3><div class='examples'>{shown}</div>")
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return write_text(path, f"{page}<body>{''.join(parts)}</body></html>\n")


def _conditions(content: dict[str, Any]) -> str:
    about = content["cost"]
    if not about:
        return '<p class="note">Costs were not measured.</p>'
    here = about["machine"]
    text = (
        f"Costs: one prompt of {about['prompt_tokens']} tokens, {about['dtype']}, attention {about['attention']}, medians of "
        f"{about['repeats']} interleaved rounds after {about['warmup']}; {here['device']}, {here['threads']} threads, torch "
        f"{here['torch']}, transformers {here['transformers']}, commit {here['commit']}."
    )
    return f'<p class="note">{escape(text)}</p>'


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _example(example: Example) -> str:
    pictures = ""
    for picture in example.pictures:
        held = io.BytesIO()
        picture.save(held, "PNG")
        pictures += _image(held.getvalue(), "kept tokens")
    row = example.row
    return (
        f"<figure>{pictures}<figcaption>{escape(example.question)}<br>"
        f"<span class='right'>{escape(example.before.strip())}</span> became "
        f"<span class='wrong'>{escape(row.reply.strip() or '(nothing)')}</span><br>"
        f"<span class='note'>right: {escape(', '.join(row.answers[:3]))}; {escape(example.task)} {escape(row.id)} "
        f"{escape(row.kind)}; {escape(example.tokens)} tokens</span></figcaption></figure>"
    )


def _image(data: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
