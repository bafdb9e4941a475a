# SPDX-License-Identifier: Apache-2.0
"""What methods cost on a long video: the time to the first token in its parts, and what a selection takes of what it saves."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmcompress as mm

from ...plan import as_pipeline, methods
from ...runtime.needs import VISION_SIGNALS, names_of
from ...videos import read_video
from ..machine import commit, machine
from .counts import language_model
from .latency import milliseconds, video_memory
from .midsize import VIDEO, _ids, build

GRIDS = 20
"""Pairs of frames of the video."""
KEEPS = (0.25, 0.1)
VIDEO_PLANS = (
    "evs", "vidcom2", "timechat_dtd", "dycoke", "fastvid", "holitom", "framefusion", "llava_scissor", "prunevid", "flashvid",
    "vcast", "seats", "keyframes", "seats >> seats_layers",
)  # fmt: skip
IMAGE_PLANS = ("uniform", "divprune", "voronoi", "visionzip", "fastv(layer=2, keep=0.25)")
SHARE = 0.05
"""What part of the prefill that it saves a selection may take."""
HEADINGS = (
    "plan", "tokens", "decode ms", "vision ms", "signals ms", "selection ms", "prefill ms", "TTFT ms", "of saved", "peak MiB",
)  # fmt: skip


class _Enough(Exception):
    """The language model was entered: what is behind is of no interest."""


@dataclass(frozen=True)
class Long:
    """The measurement. side: tokens of a pair of frames each way; 20 pairs make 20 * side^2 visual tokens. repeats: of a selection
    and of decoding; a prefill is measured `prefills` times (medians). memory: peaks too, a process for each plan."""

    side: int = 32
    repeats: int = 3
    prefills: int = 1
    memory: bool = True

    @classmethod
    def of(cls, tokens: int, repeats: int = 3, memory: bool = True) -> Long:
        """With about so many visual tokens. Raises ValueError below 20 * 2 * 2, where a grid has no windows."""
        if tokens < GRIDS * 4:
            raise ValueError(f"tokens={tokens}: at least {GRIDS * 4}")
        return cls(round((tokens / GRIDS) ** 0.5), repeats, memory=memory)

    @property
    def tokens(self) -> int:
        return GRIDS * self.side**2


def usual() -> list[str]:
    """The methods that are timed if nobody says: every one for videos that is registered, and a few for images."""
    known = methods()
    return [plan for plan in (*VIDEO_PLANS, *IMAGE_PLANS) if all(_name(part) in known for part in plan.split(">>"))]


def _name(part: str) -> str:
    return part.strip().partition("(")[0]


def points(plans: Sequence[str]) -> list[tuple[str, float | None]]:
    """(plan, ratio): each plan at each ratio, where it takes one: a method with an option `keep`, or a text with {keep} in it.
    Those for which vision runs again are measured at the first ratio alone, where a selection has most to do and least is saved."""
    found: dict[str, float | None] = {}
    for plan in plans:
        cls = methods().get(plan)
        takes = cls is not None and "keep" in getattr(cls, "__dataclass_fields__", {})
        text = f"{plan}(keep={{keep}})" if takes else plan
        for keep in KEEPS if "{keep}" in text else (None,):
            pipeline = as_pipeline(text.replace("{keep}", str(keep)))
            if keep in (None, KEEPS[0]) or not _again(pipeline):
                found[repr(pipeline)] = keep
    return list(found.items())


def write_film(path: Path, side: int, frames: int = 2 * GRIDS) -> None:
    """A video in H.264: a square moves over a still background, 28 * `side` pixels each way, 8 frames a second."""
    import av

    pixels, rng = 28 * side, np.random.default_rng(0)
    back = np.kron(rng.integers(0, 255, (side, side, 3), np.uint8), np.ones((28, 28, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width = stream.height = pixels
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8)
        for number in range(frames):
            picture, at = back.copy(), number * (pixels - pixels // 4) // frames
            picture[at : at + pixels // 4, at : at + pixels // 4] = (250, 40, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def inputs_of(model: Any, clip: Any) -> dict[str, Tensor]:
    """The clip as the processor of Qwen2.5-VL cuts it, and 40 text tokens around it."""
    from transformers import Qwen2VLVideoProcessor

    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "cap_pixels_per_frame": False}
    cut = Qwen2VLVideoProcessor(**sizes, do_resize=False, do_sample_frames=False)
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    shown = cut(videos=[frames], return_tensors="pt")
    grid = shown["video_grid_thw"]
    ids = _ids(model, VIDEO, int(grid.prod()) // 4, 40, torch.Generator().manual_seed(0))
    step = 2 / clip.rate if clip.rate else 1.0
    return {**ids, "pixel_values_videos": shown["pixel_values_videos"], "video_grid_thw": grid,
            "second_per_grid_ts": torch.tensor([step])}  # fmt: skip


@torch.no_grad()
def measure_film(
    setup: Long,
    plans: Sequence[str],
    known: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda content: None,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The record: conditions, stock (decode, pixels, vision, prefill), prefill at each budget, a row for each plan.

    Vision and stock prefill are run once, and the prefill at a budget once with `uniform`: a prompt of so many tokens costs the
    same whoever chose them. Selections before the LLM are timed on the model's own features, up to the entry of the first layer;
    methods that read signals of the encoder, or act before or in it, run it again, and what it takes longer counts as
    `signals_ms`; methods with cuts in the LLM run their own prefill. Peak memory is of the small model of `bench memory` with as
    many tokens, in a process of its own for each plan.

    known: a record to go on with, if its conditions are the same (a row has the commit that it was measured at); save: is given
    the record after each step. Raises what building the plans raises, before anything is measured.
    """
    wanted = points(plans)
    here = machine()
    about = {
        "tokens": setup.tokens,
        "repeats": setup.repeats,
        "prefills": setup.prefills,
        "dtype": "float32",
        "machine": here,
    }
    goes_on = known and _but_commit(known.get("conditions")) == _but_commit(about)
    content: dict[str, Any] = known if known and goes_on else {"conditions": about, "rows": []}
    done = {row["plan"]: row for row in content["rows"]}
    if "stock" not in content or [plan for plan, _ in wanted if plan not in done]:
        _time(setup, wanted, content, done, save, show)
    if setup.memory:
        for row in (content["stock"], *content["rows"]):
            if row.get("keep") == KEEPS[1] or "peak_mib" in row or "refused" in row:
                continue  # the larger budget has the larger peak
            show(f"memory of {row['plan']}")
            try:
                found = video_memory(row["plan"], GRIDS, 2 * setup.side)
            except ChildProcessError as error:
                row["memory_refused"] = str(error)
            else:
                row |= {"peak_mib": found["peak_mib"], "before_mib": found["before_mib"]}
            save(content)
    return content


def _but_commit(conditions: Any) -> Any:
    """Conditions of a record, but for the commit."""
    if not isinstance(conditions, dict):
        return None
    return {**conditions, "machine": {name: value for name, value in conditions["machine"].items() if name != "commit"}}


def _time(
    setup: Long, wanted: Sequence[tuple[str, float | None]], content: dict[str, Any], done: dict[str, Any],
    save: Callable[[dict[str, Any]], None], show: Callable[[str], None],
) -> None:  # fmt: skip
    """Everything but memory."""
    show("a video, and a model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_film(path, setup.side)
        clips: list[Any] = []
        decode = [milliseconds(lambda: clips.append(read_video(path))) for _ in range(setup.repeats)]
    model = build("qwen2_5_vl")
    made: list[dict[str, Tensor]] = []
    pixels = milliseconds(lambda: made.append(inputs_of(model, clips[0])))
    inputs = made[0]
    model(**inputs_of(model, replace(clips[0], frames=clips[0].frames[:2])), logits_to_keep=1)  # to warm up
    show("vision")
    features: list[Any] = []
    plain = model.model.get_video_features

    def kept(*args: Any, **more: Any) -> Any:
        features.append(plain(*args, **more))
        return features[-1]

    with _instead(model, kept):
        vision = _entered(model, inputs)
    shown = features[-1]
    if "stock" not in content:
        show("stock prefill")
        with _given(model, shown):
            times = [_prefill(model, inputs) for _ in range(setup.prefills)]
        content["stock"] = {
            "plan": "stock", "kept": setup.tokens, "decode_ms": statistics.median(decode), "pixels_ms": pixels,
            "vision_ms": vision, "prefill_ms": statistics.median(times),
        }  # fmt: skip
        save(content)
    stock = content["stock"]
    budgets = content.setdefault("budgets", {})
    for plan, keep in wanted:
        if plan in done:
            continue
        show(plan)
        pipeline = as_pipeline(plan)
        row: dict[str, Any] = {"plan": plan, "keep": keep, "commit": commit()}
        try:
            row |= _one(model, inputs, pipeline, setup, shown, stock)
        except (NotImplementedError, ValueError, ImportError) as error:
            row["refused"] = str(error)
        else:
            if "prefill_ms" not in row:
                kept = str(row["kept"])
                if kept not in budgets:
                    show(f"prefill of {kept} tokens")
                    with _given(model, shown), mm.compressed(model, f"uniform(keep={kept})"):
                        budgets[kept] = statistics.median(_prefill(model, inputs) for _ in range(setup.prefills))
                row["prefill_ms"] = budgets[kept]
            row["saved_ms"] = stock["prefill_ms"] - row["prefill_ms"]
        content["rows"].append(row)
        save(content)


def _one(model: Any, inputs: Any, pipeline: Any, setup: Long, shown: Any, stock: dict[str, Any]) -> dict[str, Any]:
    """Tokens that enter, selection, signals, and the vision and prefill where they are the plan's own."""
    again = _again(pipeline)
    found: dict[str, Any] = {"signals_ms": 0.0, "vision_ms": stock["vision_ms"]}
    with nullcontext() if again else _given(model, shown), mm.compressed(model, pipeline):
        selects: list[float] = []
        if again:
            vision = _entered(model, inputs) - _selected(model)
            selects.append(_selected(model))
            if pipeline.pixel_stages or pipeline.encoder_stages:
                found["vision_ms"] = min(vision, stock["vision_ms"])
            found["signals_ms"] = max(0.0, vision - stock["vision_ms"])
        else:
            for _ in range(setup.repeats):
                _entered(model, inputs)
                selects.append(_selected(model))
        found["kept"] = sum(visual.kept for visual in mm.trace(model).visuals)
        if pipeline.layer_stages:
            whole = _prefill(model, inputs)
            selects, layers = [_selected(model)], mm.trace(model).tokens_per_layer(0)
            found |= {"prefill_ms": whole - selects[0], "mean_kept": statistics.mean(layers) - 40}
    return {**found, "select_ms": statistics.median(selects)}


def _again(pipeline: Any) -> bool:
    """Whether a plan acts before or in the vision encoder, or reads signals of it."""
    signals = {name.partition("@")[0] for stage in pipeline.parts for name in names_of(getattr(stage, "needs", ()))}
    return bool(pipeline.pixel_stages or pipeline.encoder_stages or signals & VISION_SIGNALS)


def _selected(model: Any) -> float:
    """Milliseconds of the selections of the last call, those between layers too."""
    return 1000 * float(mm.trace(model).call.seconds["select"])


def _entered(model: Any, inputs: Any) -> float:
    """Milliseconds from the inputs to the first layer of the LLM, where the call ends."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = language_model(model).layers[0].register_forward_pre_hook(stop)
    start = time.perf_counter()
    try:
        model(**inputs, use_cache=True, logits_to_keep=1)
    except _Enough:
        pass
    finally:
        handle.remove()
    return 1000 * (time.perf_counter() - start)


def _prefill(model: Any, inputs: Any) -> float:
    """Milliseconds from the entry of the LLM to the logits."""
    begun = 0.0

    def enter(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    handle = language_model(model).register_forward_pre_hook(enter, prepend=True)
    try:
        model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    spent = 1000 * (time.perf_counter() - begun)
    compressed = "_mmcompress_engine" in model.__dict__ and not mm.trace(model).plan.layer_stages
    return spent - _selected(model) if compressed else spent


@contextmanager
def _instead(model: Any, encode: Callable[..., Any]) -> Iterator[None]:
    """Videos are encoded by `encode` for a block; the model has to be stock where it begins and ends."""
    model.model.get_video_features = functools.wraps(model.model.get_video_features)(
        encode
    )  # the engine reads its signature
    try:
        yield
    finally:
        del model.model.get_video_features


def _given(model: Any, shown: Any) -> AbstractContextManager[None]:
    """The vision encoder gives what it gave before, at no cost."""
    return _instead(model, lambda *_, **__: shown)


def added(row: dict[str, Any]) -> float | None:
    """MiB that the prefill adds at its peak to what the process held; None: not measured."""
    return row["peak_mib"] - row["before_mib"] if "peak_mib" in row else None


def share(row: dict[str, Any]) -> float | None:
    """What part of the prefill that it saves a plan's selection takes, signals apart; None where it saves none or was refused."""
    return row["select_ms"] / row["saved_ms"] if row.get("saved_ms", 0) > 0 else None


def cells(row: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """A line of a table with HEADINGS."""
    if "refused" in row:
        return [row["plan"], "-", *["-"] * 6, "refused", "-"]
    peak = added(row)
    parts = [
        stock["decode_ms"] + stock["pixels_ms"],
        row["vision_ms"],
        row.get("signals_ms", 0.0),
        row.get("select_ms", 0.0),
    ]
    parts.append(row["prefill_ms"])
    taken = share(row)
    return [
        row["plan"], str(round(row.get("mean_kept", row["kept"]))), *(f"{part:.0f}" for part in (*parts, sum(parts))),
        "-" if taken is None else f"{taken:.1%}", "-" if peak is None else f"{peak:.0f}",
    ]  # fmt: skip
