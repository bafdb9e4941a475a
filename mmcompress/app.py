# SPDX-License-Identifier: Apache-2.0
"""The page of `mmcompress app`, made with gradio."""

from __future__ import annotations

import html
import os
import tempfile
from pathlib import Path
from typing import Any

from .assets import MODELS, split
from .playground import Playground, Shown

LEGEND = "framed: kept · coloured: merged with others of that colour · dark: dropped"
STYLE = """
.gradio-container { max-width: min(1200px, 100vw) !important; margin: auto; }
.gradio-container .main { max-width: 100%; min-width: 0; }
#numbers { overflow-x: auto; }
#numbers table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
#numbers td, #numbers th { padding: 4px 8px; text-align: right; border: 0; border-bottom: 1px solid var(--border-color-primary); }
#numbers td:first-child, #numbers th:first-child { text-align: left; }
#code { overflow-x: auto; }
footer { display: none !important; }
"""


def need_gradio() -> Any:
    """gradio; raises ImportError that says how to get it."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the playground needs gradio: pip install 'mmcompress[app]'") from error
    return gradio


def build(ground: Playground) -> Any:
    """The page of a playground, a `gradio.Blocks`."""
    gr = need_gradio()
    first = ground.choices()[1]
    folder = Path(tempfile.mkdtemp(prefix="mmcompress-app-"))
    drawn = split(ground.name)[0] in MODELS
    examples = []
    for number, (picture, question) in enumerate(ground.samples() if drawn else ()):
        picture.save(folder / f"{number}.png")
        examples.append([str(folder / f"{number}.png"), question])
    with gr.Blocks(title=f"mmcompress: {ground.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# mmcompress\n{ground.about(MODELS)}")
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    type="pil", label="picture", height=300, elem_id="picture", sources=["upload", "clipboard"]
                )
                question = gr.Textbox(label="question", elem_id="question", value=examples[0][1] if examples else "")
                choice = gr.Dropdown(
                    ground.choices(), value=first, label="preset or method", elem_id="choice", filterable=True
                )
                keep = gr.Slider(
                    2, 100, value=25, step=1, label="keep, % of the visual tokens (methods)", elem_id="keep"
                )
                plan = gr.Textbox(
                    value=ground.plan_of(first, 25),
                    elem_id="plan",
                    label="plan: what is done; edit it, a(...) >> b(...)",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                if examples:
                    gr.Examples(examples, [picture, question], label="samples", elem_id="samples")
            with gr.Column(min_width=300):
                with gr.Row():
                    stock = gr.Textbox(label="stock model", elem_id="stock", interactive=False, min_width=140)
                    compressed = gr.Textbox(label="compressed", elem_id="compressed", interactive=False, min_width=140)
                numbers = gr.HTML(elem_id="numbers")
                overlay = gr.Image(
                    label="what was kept", elem_id="overlay", interactive=False, height=360, buttons=["fullscreen"]
                )
                gr.HTML(f"<small>{LEGEND}</small>")
                maps = gr.Gallery(
                    label="where each word of the answer came from", elem_id="maps", height=260, columns=3, fit_columns=False,
                    object_fit="contain", buttons=["fullscreen"],
                )  # fmt: skip
                code = gr.Code(label="Python", language="python", elem_id="code", interactive=False)

        def asked(*given: Any) -> tuple[Any, ...]:
            try:
                found = ground.ask(*given)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise gr.Error(str(error), print_exception=False) from error
            return found.stock, found.compressed, table(found), found.overlay, found.maps, found.code

        for one in (choice.change, keep.release):
            one(ground.plan_of, [choice, keep], plan, show_progress="hidden", api_visibility="private")
        outputs = [stock, compressed, numbers, overlay, maps, code]
        gr.on([ask.click, question.submit, plan.submit], asked, [picture, question, plan], outputs, concurrency_limit=1)
    return page


def table(found: Shown) -> str:
    """The numbers, stock and compressed, as HTML."""
    (before, after), kept = found.milliseconds, found.cells
    stock, now = found.stock_cost.counts, found.cost.counts
    mean, flops = "visual tokens, mean over the layers", "FLOPs of the prefill, vision included"
    rows = [
        ("", "stock", "compressed", ""),
        ("visual tokens at the end", str(kept[1]), str(kept[0]), f"{kept[0] / kept[1]:.0%}"),
        (mean, f"{stock.visual_mean:.0f}", f"{now.visual_mean:.0f}", f"{now.visual_mean / stock.visual_mean:.0%}"),
        (flops, f"{stock.total / 1e9:.3g} G", f"{now.total / 1e9:.3g} G", f"{found.cost.flops_ratio:.0%}"),
        ("first token after, speed-up", f"{before:.1f} ms", f"{after:.1f} ms", f"{found.cost.speedup:.2f}x"),
    ]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
    ]
    note = f"<p>{html.escape(found.note)}</p>" if found.note else ""
    return f"<table>{''.join(lines)}</table>{note}"


def launch(ground: Playground, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> tuple[Any, str]:
    """Serve the page; its server and address. Fonts and scripts come from here: nothing is asked of the network."""
    gr = need_gradio()
    page = build(ground)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False, theme=theme,
        css=STYLE,
    )  # fmt: skip
    if wait:
        print(f"page: {url}  (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page, url
