# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint can do here, said before its weights are downloaded: `mmcompress check`.

The model is built from its config without weights (on the meta device), and everything is asked that `compress` asks: the adapter,
and for each method an engine. Where attention is made again, one layer of each kind is built at full width with random values, and
compared as `compress` compares it. There is no second opinion.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .adapters import adapter_for
from .architectures import facts
from .assets import checkpoint
from .plan import as_pipeline, methods
from .runtime.adapter import Adapter
from .runtime.engine import Engine
from .runtime.probe import Form, Forms, attention_name
from .runtime.tower import TowerEngine
from .stage import USUAL

PICTURES = ((336, 336), (1024, 768), (1920, 1080))
"""Width and height of the pictures whose tokens are counted."""
CONFIG, PIPELINE = "config.json", "model_index.json"
FIXED = re.compile(r"image_seq_length|num_image_tokens|mm_tokens_per_image|vision_soft_tokens_per_image")
"""What configs call the number of tokens of a picture, where it is always the same."""


@dataclass
class Checked:
    """What was found. `refused`: why no method works at all, in the words of `compress`; None if some may.

    stages      by kind ("input", "layer", ...): "ok", or why not.
    methods     by name (or plan): None, or why not.
    layers      of the language model, by type.
    attention   how each kind of attention module works, and in how many layers.
    tokens      lines on the tokens of a picture.
    parameters  their number.
    """

    name: str
    model_type: str
    model: str = ""
    refused: str | None = None
    family: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    signals: list[str] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    parameters: int = 0
    methods: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether stages before the language model work."""
        return self.stages.get("input") == "ok"


def check(name: str, plans: Sequence[str] = ()) -> Checked:
    """What can be done with a checkpoint: a folder, a config file, a hub name, or an embedded model. Its weights are not read.

    plans: what is asked, by plan strings; none: each method with its defaults. Takes seconds and below 2 GB, whatever the size.
    Raises ValueError where there is no checkpoint by that name, and for what is no plan.
    """
    for plan in plans:
        as_pipeline(plan)
    found = read_config(name)
    if isinstance(found, Checked):
        return found
    given, notes = found
    model_type = given["model_type"]
    result = Checked(name, model_type, notes=notes)
    cls = _class_of(given)
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(given)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = cls._from_config(config, dtype=torch.float32)
    except Exception as error:  # of transformers, for values that do not fit
        result.refused = (
            f"{cls.__name__} cannot be built from {CONFIG}: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
        return result
    examine(model, plans, result)
    if result.works:
        result.tokens = _tokens(name, config)
    return result


def examine(model: Any, plans: Sequence[str] = (), result: Checked | None = None) -> Checked:
    """As `check`, for a model that is there; one without values (meta) gets some where they are needed."""
    result = result or Checked(type(model).__name__, getattr(model.config, "model_type", ""))
    result.model, result.parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    try:
        adapter = adapter_for(model)
    except NotImplementedError as refusal:
        result.refused = str(refusal)
        return result
    result.family = adapter.family
    forms = None
    if isinstance(adapter, Adapter):
        told = facts(adapter)
        result.signals, result.positions = told["signals"], told["positions"]
        result.modalities = adapter.modalities
        language_model = adapter.language_model
        result.layers = dict(Counter(_types(language_model)))
        forms = _Sampled(language_model, model)
    for plan in plans or methods():
        reason = result.methods[plan] = _refusal(adapter, plan, forms)
        kinds = {part.kind for part in as_pipeline(plan).parts}
        if reason is None:
            result.stages |= dict.fromkeys(kinds, "ok")
        elif len(kinds) == 1:
            result.stages.setdefault(kinds.pop(), reason)
    if forms is not None:
        result.attention = forms.told()
    return result


def _refusal(adapter: Any, name: str, forms: Forms | None) -> str | None:
    """Why a method with its defaults cannot work, as `compress` says it; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(adapter, Adapter):
                sees = {*USUAL}.intersection(adapter.modalities) or not name.isidentifier()
                plan = as_pipeline(name) if sees else as_pipeline(name, on=tuple(adapter.modalities))
                Engine(adapter, plan, forms=forms)
            else:
                TowerEngine(adapter, as_pipeline(name))
    except (NotImplementedError, ValueError) as refusal:
        return str(refusal)
    return None


# ------------------------------------------------------------------ configs
def read_config(name: str) -> tuple[dict[str, Any], list[str]] | Checked:
    """The values of config.json of a checkpoint, and what is to be said of it; or what it is instead."""
    if Path(name).expanduser().is_file():
        return _read_file(name, Path(name).expanduser())
    place = checkpoint(name)
    folder = Path(place)
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    path = folder / CONFIG if there is not None else _download(place, CONFIG)
    if path is not None and path.is_file():
        return _read_file(name, path)
    if (there is not None and PIPELINE in there) or (there is None and _download(place, PIPELINE)):
        return _not(name, "a diffusion pipeline, which draws pictures and reads none: it has no visual tokens")
    adapter = folder / "adapter_config.json" if there is not None else _download(place, "adapter_config.json")
    if adapter is not None and adapter.is_file():
        base = _values(adapter).get("base_model_name_or_path", "its base model")
        return _not(name, f"an adapter of PEFT: check {base}, load that with the adapter, and compress it")
    if any(file.endswith(".gguf") for file in there or ()) or "gguf" in name.lower():
        return _not(name, GGUF)
    if there is not None and "params.json" in there:
        return _not(name, "a checkpoint in the form of Mistral's own code: take the one for transformers")
    raise ValueError(f"{name} has no {CONFIG}: it is no checkpoint of transformers")


GGUF = "a GGUF file of llama.cpp, which mmcompress does not reach: take the checkpoint that it was made from, for transformers"


def _not(name: str, what: str) -> Checked:
    return Checked(name, "", refused=f"{name} is {what}")


def _download(name: str, file: str) -> Path | None:
    """A file of a repository on the hub (or in its cache); None: it has none. Raises ValueError where the hub says no."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(
            f"{name}: no such folder here, and from the hub: {str(error).strip().splitlines()[0]}"
        ) from error
    return None if found is None else Path(found)


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no config: a JSON object with model_type is one")
    return values


def _read_file(name: str, path: Path) -> tuple[dict[str, Any], list[str]] | Checked:
    if path.suffix == ".gguf":
        return _not(name, GGUF)
    if path.suffix != ".json":
        raise ValueError(f"{name} is a file: give the folder of a checkpoint, or its {CONFIG}")
    values, notes = _values(path), list[str]()
    if "_diffusers_version" in values:
        return _not(name, "a diffusion model, which draws pictures and reads none: it has no visual tokens")
    if "architecture" in values and "model_type" not in values:
        return _not(
            name,
            "a vision transformer of timm, without language model: methods that act inside the encoder take it by "
            "compress(timm.create_model(...), 'tome')",
        )
    model_type = values.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        version = f"transformers {transformers.__version__}"
        if values.get("auto_map"):
            return Checked(name, str(model_type), refused=(
                f"the code of {name} lies in the checkpoint (auto_map) and not in {version}, which knows no model_type "
                f"{model_type!r}: take a checkpoint that was converted for transformers, such names often end with -hf or -HF"
            ))  # fmt: skip
        wanted = values.get("transformers_version")
        made = f"; it was written by {wanted}" if wanted else ""
        return Checked(
            name,
            str(model_type),
            refused=f"{version} knows no model_type {model_type!r}{made}: see `mmcompress models`",
        )
    if method := (values.pop("quantization_config", None) or {}).get("quant_method"):
        notes.append(f"quantised ({method}): what is said holds for the modules as they are without that")
    return values, notes


def _class_of(values: dict[str, Any]) -> Any:
    """The class that the checkpoint is loaded by."""
    from transformers.models.auto import modeling_auto

    for name in values.get("architectures") or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        known = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if values["model_type"] in known:
            return getattr(transformers, known[values["model_type"]])
    found = modeling_auto.MODEL_MAPPING_NAMES[values["model_type"]]
    return getattr(transformers, found if isinstance(found, str) else found[0])


# ------------------------------------------------------------------ layers
def _types(language_model: Any) -> list[str]:
    """The type of each layer of a language model, as its config says it."""
    config = language_model.config
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if window else "full_attention"] * len(language_model.layers)
    return list(types)[: len(language_model.layers)]


class _Sampled(Forms):
    """Forms of a model without values: one layer of each kind is made at full width with random ones, tried, and dropped."""

    def __init__(self, language_model: Any, root: nn.Module) -> None:
        super().__init__(language_model, root)
        self.kinds: dict[Any, Form | LookupError | ValueError] = {}
        self.generator = torch.Generator().manual_seed(0)  # one for all, else matrices of one shape are the same
        for module in language_model.modules():
            if not any(True for _ in module.parameters()) and any(b.is_meta for b in module.buffers(recurse=False)):
                self._fill(module)  # rotary embeddings

    def _probed(self, layer: Any) -> tuple[Form, bool]:
        key = self._kind(layer)
        if key not in self.kinds:
            try:
                self.kinds[key] = replace(super()._probed(self._real(layer))[0], layer=layer)
            except (LookupError, ValueError) as error:
                self.kinds[key] = error
        found = self.kinds[key]
        if not isinstance(found, Form):
            raise type(found)(*found.args)
        return replace(found, layer=layer), True

    def _kind(self, layer: Any) -> Any:
        """Equal for layers whose attention works alike."""
        attention = getattr(layer, attention_name(layer) or "", layer)
        index, types = getattr(attention, "layer_idx", 0), _types(self.language_model)
        plain = {
            n: v for n, v in vars(attention).items() if isinstance(v, int | float | str | None) and n != "layer_idx"
        }
        shapes = tuple((name, tuple(p.shape)) for name, p in attention.named_parameters())
        return type(layer), types[index : index + 1][0], tuple(sorted(plain.items(), key=str)), shapes

    def _real(self, layer: Any) -> Any:
        """A copy of `layer` with values in its attention and its norms; its MLP, which nothing runs, has none."""
        if not any(p.is_meta for p in layer.parameters()):
            return layer
        real, name = copy.deepcopy(layer), attention_name(layer)
        for path, module in real.named_modules():
            if path.split(".")[0] == name or all(p.dim() < 2 for p in module.parameters()):
                self._fill(module)
        return real

    @torch.no_grad()
    def _fill(self, module: nn.Module) -> None:
        """Values for a module: as transformers makes them, and noise in all parameters, so that none goes unseen."""
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        self.language_model._init_weights(module)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=self.generator)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=self.generator))

    def told(self) -> list[str]:
        """What was found, in words."""
        counts = Counter(self._kind(layer) for layer in self.language_model.layers)
        lines = []
        for key, found in self.kinds.items():
            said = f"not matched: {found}" if not isinstance(found, Form) else _words(found)
            lines.append(f"{counts[key]} x {key[1]}: {said}")
        return lines


def _words(form: Form) -> str:
    """A form of attention in words."""
    attention = form.attention
    turned = "no known rotation" if form.rotation is None else f"rotary {form.rotation.__name__.strip('_')}"
    parts = [type(attention).__name__, turned, *(["norms of queries and keys"] if hasattr(attention, "q_norm") else [])]
    parts += [f"logits capped at {form.softcap:g}"] if form.softcap else []
    parts += ["sinks"] if form.sinks else []
    parts += [] if form.cached else ["latent cache"]
    return ", ".join(parts)


# ------------------------------------------------------------------ tokens
def _tokens(name: str, config: Any) -> list[str]:
    """Tokens of a picture: as the processor says, where it can be had; else what the config fixes."""
    try:
        path = Path(name).expanduser()
        place = str(path.parent) if path.is_file() else checkpoint(name)
        there = (lambda f: (Path(place) / f).is_file()) if Path(place).is_dir() else (lambda f: _download(place, f))
        if not any(there(f) for f in ("processor_config.json", "preprocessor_config.json")):
            raise LookupError("no processor")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = transformers.AutoProcessor.from_pretrained(place)
        sizes = [(height, width) for width, height in PICTURES]
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        return [f"{w} x {h} pixels: {n} in the prompt" for (w, h), n in zip(PICTURES, counts, strict=True)]
    except Exception:  # of a processor that is not there, or does not tell
        pass
    parts = [config, getattr(config, "vision_config", None), getattr(config, "text_config", None)]
    for part in parts:
        for field_name, value in vars(part).items() if part is not None else ():
            if FIXED.fullmatch(field_name) and isinstance(value, int):
                return [f"{value} a picture or tile ({field_name})"]
    patch, merged = (next((getattr(p, n) for p in parts if isinstance(getattr(p, n, None), int)), None) for n in
                     ("patch_size", "spatial_merge_size"))  # fmt: skip
    return [f"one for {patch * merged} x {patch * merged} pixels"] if patch and merged else []
