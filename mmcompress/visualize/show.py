# SPDX-License-Identifier: Apache-2.0
"""`mm.show`: what happened, as a page that a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..explain import Explanation, Seen
from ..explain.fates import KEPT, steps
from ..pictures import is_picture, open_picture, to_rgb
from ..trace import Trace
from ..videos import Clip
from .page import Page, page


def show(what: Trace | Explanation | Sequence[Explanation], pictures: Any = (), *, row: int = 0) -> Page:
    """A page about a trace (`mm.trace(model)`), an explanation, or several of the same prompt side by side.

    The result shows itself at the end of a notebook cell (an HTML frame that needs no network), and `save(path)` writes it.

    pictures  for a trace: of each visual the picture (path, bytes, PIL or array), a list of frames, or a `Clip`; grey without.
    row       which row of the batch.
    """
    if isinstance(what, Trace):
        return page([of_trace(what, pictures, row)], title=repr(what.plan))
    found = [what] if isinstance(what, Explanation) else list(what)
    for one in found:
        if not isinstance(one, Explanation):
            raise TypeError(f"cannot show {type(one).__name__}: give mm.trace(model), or one or several explanations")
    return page(found)


def of_trace(trace: Trace, pictures: Any = (), row: int = 0) -> Explanation:
    """A trace as an explanation of no words."""
    visuals = [v for v in trace.visuals if v.row == row]
    if not visuals:
        raise ValueError(
            f"row={row}: this batch row has no visuals; rows with visuals: {sorted({v.row for v in trace.visuals})}"
        )
    given = [pictures] if is_picture(pictures) or isinstance(pictures, Clip) else list(pictures)
    visible = sum(visual.modality != "audio" for visual in visuals)
    if given and len(given) != visible:
        raise ValueError(f"{len(given)} pictures for {visible} visuals: give one (or a list of frames) for each")
    last, rest = steps(trace, row)[-1], iter(given)
    seen, first = [], 0
    for visual in visuals:
        mine = slice(first, first + visual.tokens)
        shown, times = _frames(next(rest)) if given and visual.modality != "audio" else ((), ())
        kept = last.fate[mine] == KEPT
        seen.append(Seen(visual.modality, visual.layout, last.stands[mine] >= 0, kept, shown, times))
        first += visual.tokens
    return Explanation(
        "trace", {"row": row}, repr(trace.plan), (), (), torch.zeros(0, first), torch.zeros(0, 0), tuple(seen), trace
    )


def _frames(given: Any) -> tuple[tuple[Image.Image, ...], tuple[float, ...]]:
    """Files are opened upright; images and arrays are shown as they are, which is how a processor takes them. A clip has times."""
    if isinstance(given, Clip):
        return tuple(given.pictures), () if given.times is None else tuple(given.times.tolist())
    frames = [given] if is_picture(given) else list(given)
    return tuple(to_rgb(one) if isinstance(one, Image.Image) else open_picture(one) for one in frames), ()
