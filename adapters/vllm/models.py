# SPDX-License-Identifier: Apache-2.0
"""The workers: models of vLLM whose images enter the language model with fewer tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_mrope
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...runtime.passage import Passage
from ...runtime.scope import ENCODE, Scope, enter, leave
from ...visuals import Layout, Visuals
from . import Settings
from .limits import check_engine, check_version
from .memo import Kept, Memo
from .mrope import Positions, marked
from .plugin import ARCHITECTURES, PREFIX
from .processing import IDENTITY, QUESTION, factories
from .signals import ServedTap
from .twin import Twin, sliced

PIXELS = ("pixel_values", "image_embeds")


class Compressor:
    """Compresses what the encoder of one model gives.

    model     as vLLM built it. twin: the plan, and what transformers knows of the model.
    capacity  how many tokens the encoder is to make at once: pictures of more are encoded one part after the other, since the
              scheduler counts them with what is kept.
    """

    def __init__(self, model: Any, twin: Twin, capacity: int) -> None:
        self.model, self.twin, self.capacity = model, twin, capacity
        self.memo = Memo()
        self.width = model.config.get_text_config().hidden_size
        self._graft(twin.adapter.projector)
        self.adapter = twin.found()
        tower = model.get_submodule(self._path(self.adapter.tower))
        self.tap = ServedTap(self, self.adapter, twin.signals, tower) if twin.signals else None
        if self.tap is not None:
            self.tap.install()

    def _path(self, module: Any) -> str:
        """Where a module of the twin is in vLLM's model."""
        return next(n for n, m in self.twin.model.named_modules() if m is module).removeprefix("model.")

    def _graft(self, projector: Any) -> None:
        """Put the projector that vLLM runs into the twin, so that methods that make tokens anew send them down that road."""
        path = next(n for n, m in self.twin.model.named_modules() if m is projector)
        parent, _, name = path.rpartition(".")
        setattr(self.twin.model.get_submodule(parent), name, self.model.get_submodule(path.removeprefix("model.")))

    # ------------------------------------------------------------------ pictures, as many at once as may be
    def parts(self, arguments: dict[str, Any], pictures: int) -> Iterator[tuple[int, int]]:
        """Neighbouring pictures that are encoded together."""
        first, sum_ = 0, 0
        for i, tokens in enumerate(self._tokens(arguments, pictures)):
            if i > first and sum_ + tokens > self.capacity:
                yield first, i
                first, sum_ = i, 0
            sum_ += tokens
        yield first, pictures

    def _tokens(self, arguments: dict[str, Any], pictures: int) -> list[int]:
        """How many tokens the encoder makes of each picture, before anything is dropped."""
        grids, pixels, adapter = arguments.get("image_grid_thw"), arguments["pixel_values"], self.adapter
        if grids is not None:
            return [int(n) // adapter.unit for n in grids.prod(-1).tolist()]
        each = adapter.side**2 // adapter.unit  # type: ignore[attr-defined]
        views = arguments.get("image_num_patches")
        if views is not None:
            return [int(v) * each for v in views]
        return [(len(picture) if picture.dim() == 4 else 1) * each for picture in pixels]

    @torch.no_grad()
    def embed(self, encode: Any, arguments: dict[str, Any]) -> list[tuple[Tensor, Kept | None, Layout]]:
        """Of each picture: what enters the language model, [m, D]; what was kept, None for all; and how it lies."""
        identities, questions = arguments.pop(IDENTITY).tolist(), arguments.pop(QUESTION, None)
        found: list[tuple[Tensor, Kept | None, Layout]] = []
        for first, last in self.parts(arguments, len(identities)):
            part = sliced(arguments, first, last, len(identities))
            enter(Scope(self, ENCODE))
            try:
                rows = list(encode(**part))
                counts = [len(x) for x in rows]
                encoded = self.twin.encoded(part, counts)
                if self.tap is not None:
                    encoded.signals = self.tap.collect(encoded, part)
                encoded = self.twin.assembled(encoded, counts)
            finally:
                leave(self, ENCODE)
            for i, (x, layout) in enumerate(zip(rows, encoded.layouts, strict=True)):
                signals = {name: values[i][None] for name, values in encoded.signals.items()}
                if questions is not None:
                    ids = torch.as_tensor(questions[first + i], device=x.device)
                    signals["text_embeddings"] = self.model.get_language_model().embed_input_ids(ids)[None]
                found.append((*self._kept(x, layout, signals, tuple(identities[first + i])), layout))
        return found

    def _kept(
        self, x: Tensor, layout: Layout, signals: dict[str, Tensor], identity: tuple[int, ...]
    ) -> tuple[Tensor, Kept | None]:
        """What is kept of one picture, of its tokens x [N, D]. Behind the embedding, D holds the levels of DeepStack."""
        if self.twin.whole(layout):
            return x, None
        kept = self.memo.get(identity)
        if kept is None:
            kept, rows = self._chosen(x, layout, signals)
            self.memo.put(identity, kept)
            return (x[kept.source] if rows is None else rows), kept
        return (x[kept.source] if kept.rows is None else kept.rows.to(x)), kept

    def _chosen(self, x: Tensor, layout: Layout, signals: dict[str, Tensor]) -> tuple[Kept, Tensor | None]:
        """The decision of the plan, and the rows [m, D] where a stage makes tokens anew."""
        cells = torch.tensor(layout.patch_tokens(), device=x.device)
        beside = torch.tensor(
            layout.structural[: self.twin.structural(len(layout.structural))], device=x.device, dtype=torch.int64
        )
        tokens = x[cells][None]
        visuals = Visuals(tokens[..., : self.width], layout, 0, signals, road=self.adapter.project)
        passage = Passage(visuals, tokens[..., self.width :] if tokens.shape[-1] > self.width else None)
        passage.through(self.twin.stages)
        source = cells[passage.total.keep[0]]
        order = torch.cat([source.sort().values, beside]).argsort()
        source = torch.cat([source, beside])[order]
        if not passage.remade:
            return Kept(source), None
        made, levels = passage.features, passage.levels
        made = (made if levels is None else torch.cat([made, levels], -1))[0].to(x.dtype)
        rows = torch.cat([made, x[beside]])[order]
        return Kept(source, rows.cpu()), rows


class Compressed:
    """In front of a model of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        settings = Settings.of(config)
        if settings is None:
            raise ValueError(
                f'{", ".join(config.architectures)} without settings: give both by --hf-overrides "$(mmcompress vllm-overrides '
                f"MODEL --plan 'divprune(keep=0.25)')\""
            )
        twin = Twin(config, settings)  # of its own: parts of the model are put into it
        check_engine(vllm_config, twin, supports_mrope(type(self)))
        self._opened(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._started()
        scheduler = vllm_config.scheduler_config
        self.compressor = Compressor(self, twin, scheduler.max_num_encoder_input_tokens)

    def _opened(self, vllm_config: Any) -> None:
        """What has to be said before the model is built."""

    def _started(self) -> None:
        """And behind that."""

    def _placed(self, rows: Tensor, kept: Kept | None, layout: Layout | None) -> Tensor:
        """Rows with what the language model has to know of their places."""
        return rows

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if not any(name in kwargs for name in PIXELS):  # videos, which stay as they are
            found = super().embed_multimodal(**kwargs)  # type: ignore[misc]
            return found if found is None else tuple(self._placed(x, None, None) for x in found)
        found = self.compressor.embed(super().embed_multimodal, kwargs)  # type: ignore[misc]
        return tuple(self._placed(*one) for one in found)


class CompressedGrid(Compressed):
    """The same, where positions have several axes (M-RoPE): time, rows and columns."""

    supports_multimodal_pruning = True

    def _opened(self, vllm_config: Any) -> None:
        Positions.open(vllm_config)

    def _started(self) -> None:
        self.is_multimodal_pruning_enabled = False  # what the model would do with videos by itself

    def _placed(self, rows: Tensor, kept: Kept | None, layout: Layout | None) -> Tensor:
        return marked(rows, kept, layout)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        return Positions(self).given(super().get_mrope_input_positions, input_tokens, mm_features)  # type: ignore[misc]

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Any, Tensor, int]:
        return Positions(self).repaired(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)


def _built(architecture: str) -> type:
    """The class for an architecture: in front of vLLM's own, by whose name it goes, since vLLM looks at names."""
    import vllm

    check_version(vllm.__version__)
    base: Any = ModelRegistry.models[architecture].load_model_cls()
    front = CompressedGrid if supports_mrope(base) else Compressed
    made = type(base.__name__, (front, base), {"__module__": __name__})
    return MULTIMODAL_REGISTRY.register_processor(**factories(base))(made)


@functools.cache
def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in ARCHITECTURES:
        return _built(name.removeprefix(PREFIX))
    raise AttributeError(name)
