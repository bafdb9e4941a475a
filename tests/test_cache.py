# SPDX-License-Identifier: Apache-2.0
"""A cache stands on its own: files, other processes, models that are not compressed; cropping, rows of the batch, static ones."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils

import mmcompress as mm
from mmcompress.runtime import cache as caches
from mmcompress.runtime import layers, scope
from mmcompress.runtime.cache import CACHE, cache_of, held_bytes, is_pruned

from . import architectures, families, tiny
from .exactness import looks_back
from .tiny import OLDEST, build, prompts

ONE: list[list[int | str]] = [[5, "image", 4]]
EVEN: list[list[int | str]] = [[5, "image", 4], [2, "image", 7]]
SWALLOWED: list[list[int | str]] = [[9, "image", 8], [3, "image", 3, "image", 3]]
"""Row 0 is padded by as much as row 1 drops more: no padding is left."""
THREE: list[list[int | str]] = [[5, "image", 4], [3, "image", 2, "image", 6], [4, "image", 9]]
INPUT, MERGING, LAYER = "divprune(keep=0.5)", "visionzip(keep=0.5)", "fastv(layer=2, keep=0.5)"
BOTH, REWRITING = f"{INPUT} >> {LAYER}", "cmai"


def turn(model: Any, cache: Any, mask: Tensor | None, words: int = 3, seed: int = 1, **more: Any) -> Tensor:
    """Logits of the next turn: so many words behind what `mask` [B, S] describes."""
    rows = len(mask) if mask is not None else 1
    ids = torch.randint(5, 140, (rows, words), generator=torch.Generator().manual_seed(seed))
    if mask is not None:
        more["attention_mask"] = torch.cat([mask, torch.ones_like(ids)], 1)
    return model(input_ids=ids, **{CACHE: cache}, **more).logits


def cache_in(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    return cache_of(model(**inputs, use_cache=True, **{CACHE: cache}))


def filed(cache: Any) -> Any:
    """A cache through a file, in a process that has not made its classes yet."""
    file = io.BytesIO()
    torch.save(cache, file)
    caches._pruned_class.cache_clear()
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def static(model: Any, columns: int = 96) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=columns)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    off = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
    assert a.shape == b.shape and off < tolerance, off


# ---------------------------------------------------------------------- without its engine
CASES: list[tuple[str, str, list[list[int | str]], dict[str, Any], str]] = [
    ("input", INPUT, ONE, {}, ""),
    ("merging", MERGING, ONE, {}, ""),
    ("encoder", "tome(keep=0.5)", ONE, {}, ""),
    ("pixels", "downsample(keep=0.25)", ONE, {}, ""),
    ("even rows", INPUT, EVEN, {}, ""),
    ("padding gone", INPUT, SWALLOWED, {}, ""),
    ("nothing dropped", "uniform(keep=1.0)", tiny.RAGGED, {}, ""),
    ("layers", LAYER, ONE, {}, "its layers hold different tokens"),
    ("input and layers", BOTH, ONE, {}, "its layers hold different tokens"),
    ("padded", INPUT, tiny.RAGGED, {}, "there is padding among its tokens"),
    ("padded right", INPUT, [*EVEN[:1], [2, "image", 5]], {"side": "right"}, "there is padding among its tokens"),
    ("reindexed", INPUT, ONE, {"positions": "reindex"}, "its position ids are numbered anew"),
    ("rewritten", REWRITING, ONE, {}, "its attention is rewritten"),
    ("rewritten, padded", REWRITING, tiny.RAGGED, {}, "its attention is rewritten"),
]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("plan", "samples", "options", "why"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_without_its_engine_a_cache_is_right_or_says_what_to_do(
    plan: str, samples: Any, options: dict[str, Any], why: str, attention: str
) -> None:
    """The next turn of a model that is not compressed, on a cache from a file: as that of the compressed one."""
    model = build(attention=attention)
    inputs = prompts(model, samples, side=options.get("side", "left"))
    mask = inputs["attention_mask"]
    for words in (1, 3):
        mm.compress(model, plan, positions=options.get("positions", "keep"))
        expected, cache = turn(model, cache_in(model, inputs), mask, words), filed(cache_in(model, inputs))
        mm.uncompress(model)
        if not why:
            close(turn(model, cache, mask, words), expected, 1e-5)
            continue
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(RuntimeError, match=f"{why}.*compress.*start again from the prompt"):
            turn(model, cache, mask, words)
        mm.compress(model, plan if plan == REWRITING else "uniform(keep=1.0)")  # the error left it as it was
        assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
        close(turn(model, cache, mask, words), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", [*families.QWEN, "llava_next", "internvl"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_family_and_a_static_cache(family: str, kind: str) -> None:
    model = families.build(family)
    inputs = families.prompts(model, family, [[5, families.image(family), 4]])
    mm.compress(model, INPUT, positions="keep")
    made = [cache_in(model, inputs, static(model) if kind == "static" else None) for _ in range(2)]
    expected = [turn(model, made[0], None), turn(model, made[0], None, 1)]
    mm.uncompress(model)
    cache = filed(made[1])
    assert type(cache) is type(made[1]) and is_pruned(cache)
    close(turn(model, cache, None), expected[0], 1e-5)
    close(turn(model, cache, None, 1), expected[1], 1e-5)
    mm.compress(model, LAYER)
    cache = cache_in(model, inputs, static(model) if kind == "static" else None)
    mm.uncompress(model)
    with pytest.raises(RuntimeError, match="different tokens"):
        turn(model, cache, None)


@torch.no_grad()
def test_turns_with_and_without_the_engine_go_on_from_each_other() -> None:
    """Compressed, stock, compressed with another picture, stock."""
    model = build()
    inputs, more = prompts(model, ONE), prompts(model, ONE, seed=7)

    def conversation(engine_all_along: bool) -> list[Tensor]:
        found, length = [], inputs["input_ids"].shape[1]
        mm.compress(model, INPUT, positions="keep")
        cache = cache_in(model, inputs)
        for number in range(3):
            mm.compress(model, INPUT, positions="keep") if engine_all_along or number == 1 else mm.uncompress(model)
            ones = torch.ones(1, length, dtype=torch.int64)
            if number == 1:
                given = more | {"attention_mask": torch.cat([ones, more["attention_mask"]], 1)}
                found.append(model(**given, **{CACHE: cache}).logits)
            else:
                found.append(turn(model, cache, ones, 2))
            length += found[-1].shape[1]
        return found

    for one, other in zip(conversation(True), conversation(False), strict=True):
        close(one, other, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER])
def test_beams_reorder_what_the_next_model_reads(plan: str) -> None:
    model = build()
    inputs = prompts(model, EVEN)
    mm.compress(model, plan, positions="keep")
    order, mask = torch.tensor([1, 1, 0]), inputs["attention_mask"][[1, 1, 0]]
    made = [cache_in(model, inputs) for _ in range(2)]
    for cache in made:
        cache.reorder_cache(order)
    expected = turn(model, made[0], mask)
    mm.uncompress(model)
    if plan == INPUT:
        close(turn(model, made[1], mask), expected, 1e-5)
    else:
        with pytest.raises(RuntimeError, match="different tokens"):
            turn(model, made[1], mask)


@torch.no_grad()
def test_an_interrupted_call_leaves_no_mark() -> None:
    """Torch runs no hooks behind a KeyboardInterrupt; afterwards a cache must still be refused."""
    model = mm.compress(build(), LAYER)
    inputs = prompts(model, ONE)
    cache = cache_in(model, inputs)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    mm.uncompress(model)
    assert not scope.running()
    with pytest.raises(RuntimeError, match="compress"):
        turn(model, cache, inputs["attention_mask"])


# ---------------------------------------------------------------------- files, copies, processes
@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, BOTH, REWRITING])
@pytest.mark.parametrize("way", ["torch", "pickle", "deepcopy"])
def test_a_copy_is_a_conversation_of_its_own(plan: str, way: str) -> None:
    model = mm.compress(build(), plan)
    inputs = prompts(model, tiny.RAGGED)
    mask = inputs["attention_mask"]
    cache = cache_in(model, inputs)
    copies: dict[str, Callable[[Any], Any]] = {
        "torch": filed, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    }  # fmt: skip
    other = copies[way](cache)
    ledgers = [{id(layer.ledger) for layer in c.layers} for c in (cache, other)]
    assert len(ledgers[0]) == len(ledgers[1]) and not ledgers[0] & ledgers[1]
    assert [layer.leads for layer in cache.layers] == [layer.leads for layer in other.layers]
    expected = turn(model, cache, mask)
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
    kept = copies[way](cache)
    turn(model, kept, longer, seed=2)
    kept.reorder_cache(torch.tensor([1, 0]))  # of no consequence for the others
    close(turn(model, other, mask), expected, 1e-5)
    close(turn(model, other, longer, seed=2), turn(model, cache, longer, seed=2), 1e-5)


@torch.no_grad()
def test_classes_of_other_libraries_and_of_hybrid_models() -> None:
    """A layer class of one's own; a cache whose layers are not all of one kind."""
    model = mm.compress(build(), INPUT, positions="keep")
    inputs = prompts(model, ONE)
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers[1] = Doubled()
    filled = filed(cache_in(model, inputs, cache))
    assert [type(layer).__name__ for layer in filled.layers] == [
        "PrunedDynamicLayer", "PrunedDoubled", "PrunedDynamicLayer", "PrunedDynamicLayer",
    ]  # fmt: skip
    assert filled.layers[1].calls == 1 and filled.layers[1].get_mask_sizes(3) == (17 + 3, 8)
    close(turn(model, filled, None), turn(model, cache_in(model, inputs), None), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "kimi_k25", "qwen3_5_moe"])
def test_hybrid_and_latent_caches_go_on_without_the_engine(name: str) -> None:
    """States of linear attention and convolution beside keys; latents in place of keys."""
    model = architectures.build(name)
    inputs = architectures.prompts(model, [[5, "0", 4]])
    mm.compress(model, "uniform(keep=0.5)", positions="keep")
    caches_ = [cache_in(model, inputs), filed(cache_in(model, inputs))]
    assert sum(map(is_pruned, caches_)) == 2
    expected = [turn(model, caches_[0], None), turn(model, caches_[0], None, 1)]
    mm.uncompress(model)
    for words, one in zip((3, 1), expected, strict=True):
        close(turn(model, caches_[1], None, words), one, 1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_every_architecture_goes_on_without_the_engine() -> None:
    """All those that an input plan compresses, tiny: the next two turns of the stock model on a cache from a file."""
    wrong, seen, refused = [], 0, 0
    for name in architectures.NAMES:
        try:
            model = architectures.build(name)
            inputs = architectures.prompts(model, [[5, "0", 4]])
            mm.compress(model, "uniform(keep=0.5)", positions="keep")
            one, other = cache_in(model, inputs), filed(cache_in(model, inputs))
            expected = [turn(model, one, None), turn(model, one, None, 1)]
        except Exception:  # another test's matter
            continue
        mm.uncompress(model)
        seen += is_pruned(other)
        try:
            found = [turn(model, other, None), turn(model, other, None, 1)]
        except RuntimeError as error:
            assert "its windows count tokens that were dropped" in str(error), name
            refused += looks_back(model.config.get_text_config())
            continue
        off = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        wrong += [(name, off)] if off > 1e-4 else []
    assert not wrong and seen > 50 and refused > 10


@torch.no_grad()
def test_a_hybrid_cache_is_refused_before_its_states_change() -> None:
    """Layers of linear attention come first; the model that is compressed again goes on as if nothing had been."""
    model = architectures.build("qwen3_5")
    inputs = architectures.prompts(model, [[5, "0", 4], [9, "1", 3]])
    mm.compress(model, "uniform(keep=0.5)", positions="keep")
    mask = inputs["attention_mask"]
    positions = {"position_ids": torch.arange(3)[None, None].expand(3, 2, -1) + mask.shape[1]}
    expected, cache = turn(model, cache_in(model, inputs), mask, **positions), cache_in(model, inputs)
    mm.uncompress(model)
    with pytest.raises(RuntimeError, match="there is padding"):
        turn(model, cache, mask, **positions)
    mm.compress(model, "uniform(keep=1.0)")
    close(turn(model, cache, mask, **positions), expected, 1e-5)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no quantised cache without other packages")
@pytest.mark.parametrize("plan", [INPUT, LAYER])
def test_a_quantised_cache_goes_through_a_file(plan: str) -> None:
    model = build()
    inputs = prompts(model, ONE)

    def made() -> Any:
        return cache_in(model, inputs, cache_utils.QuantizedCache("fp8", model.config.get_text_config()))

    mm.compress(model, plan, positions="keep")
    held = held_bytes(made())
    assert 4 * held.full == 25 * 4 * 2 * 2 * 16 * 4 and held.now < held.full  # one byte a value
    expected, cache = turn(model, made(), None), filed(made())
    close(turn(model, copy.deepcopy(cache), None), expected, 1e-5)
    mm.uncompress(model)
    if plan == INPUT:
        close(turn(model, cache, None), expected, 1e-5)
    else:
        with pytest.raises(RuntimeError, match="different tokens"):
            turn(model, cache, None)


class Doubled(caches.DynamicLayer):
    """Counts how often it was updated."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.calls = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().update(*args, **kwargs)


@torch.no_grad()
@pytest.mark.slow
def test_another_process_reads_it(tmp_path: Path) -> None:
    """A stock model goes on with an input plan, a compressed one with a layer plan, on files of this process."""
    model = build()
    inputs = prompts(model, ONE)
    expected = []
    for name, plan in (("input", INPUT), ("layer", LAYER)):
        mm.compress(model, plan, positions="keep")
        torch.save(cache_in(model, inputs), tmp_path / f"{name}.pt")
        expected.append(turn(model, cache_in(model, inputs), inputs["attention_mask"]))
    torch.save(inputs["attention_mask"], tmp_path / "mask.pt")
    code = f"""
import torch
caches = [torch.load(r"{tmp_path}/" + name, weights_only=False) for name in ("input.pt", "layer.pt")]
import mmcompress as mm
from tests.test_cache import build, turn
torch.set_grad_enabled(False)
model, mask = build(), torch.load(r"{tmp_path}/mask.pt")
found = [turn(model, caches[0], mask)]
try:
    turn(model, caches[1], mask)
except RuntimeError as error:
    assert "mmcompress.compress(model, plan)" in str(error)
else:
    raise SystemExit("not refused")
mm.compress(model, "uniform(keep=1.0)")
torch.save([*found, turn(model, caches[1], mask)], r"{tmp_path}/found.pt")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parent.parent)
    for one, other in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        close(one, other, 1e-5)


# ---------------------------------------------------------------------- cropping
@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, BOTH, REWRITING])
@pytest.mark.parametrize("later", [0, 3])
def test_a_cache_is_cropped_to_its_floor_and_no_further(plan: str, later: int) -> None:
    """Left padding: the text behind the last image of any row, and all of later turns. What was cut off can be fed again."""
    model = mm.compress(build(), plan)
    inputs = prompts(model, tiny.RAGGED)
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    whole = model(**inputs, use_cache=True)
    for cut in (4, 3, 0):
        cache = cache_in(model, inputs)
        if later:
            turn(model, cache, mask, later)
        cache.crop(-(later + cut)) if later + cut else None
        assert cache.get_seq_length() == length - cut
        if cut:
            again = inputs["input_ids"][:, length - cut :]
            out = model(input_ids=again, attention_mask=mask, **{CACHE: cache}).logits
            close(out, whole.logits[:, length - cut :], 1e-4)
        close(turn(model, cache, mask, seed=5), turn(model, cache_in(model, inputs), mask, seed=5), 1e-4)
    if plan == REWRITING:
        return  # nothing dropped: no floor
    cache = cache_in(model, inputs)
    if later:
        turn(model, cache, mask, later)
    with pytest.raises(ValueError, match=f"cannot crop a compressed cache to {length - 5} tokens"):
        cache.crop(-(later + 5))


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER])
def test_right_padding_leaves_nothing_to_crop_but_later_turns(plan: str) -> None:
    model = mm.compress(build(), plan)
    inputs = prompts(model, tiny.RAGGED, side="right")
    mask = inputs["attention_mask"]
    cache = cache_in(model, inputs)
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(-1)
    expected = turn(model, cache, mask)
    cache.crop(-3)
    close(turn(model, cache, mask), expected, 1e-5)
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(-4)


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER])
def test_a_padded_later_turn_can_be_cropped(plan: str) -> None:
    """Padding of a later turn is known for each column: what is cropped is forgotten."""
    model = mm.compress(build(), plan)
    inputs = prompts(model, EVEN)
    ids = torch.tensor([[7, 8, 9], [7, 0, 0]])
    mask = torch.cat([inputs["attention_mask"], (ids > 0).long()], 1)
    cache = cache_in(model, inputs)
    model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
    expected = turn(model, copy.deepcopy(cache), mask)
    cache.crop(-2)
    model(input_ids=ids[:, 1:], attention_mask=mask, **{CACHE: cache})
    close(turn(model, cache, mask), expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_later_turn_on_a_static_cache(plan: str, side: str) -> None:
    """Its columns stand right behind what is stored, not at the end of the tensors."""
    model = mm.compress(build(), plan)
    inputs = prompts(model, tiny.RAGGED)
    ids = torch.tensor([[7, 8, 9], [0, 0, 7] if side == "left" else [7, 0, 0]])
    mask = torch.cat([inputs["attention_mask"], (ids > 0).long()], 1)
    for words in (1, 2):
        found = []
        for cache in (cache_in(model, inputs), cache_in(model, inputs, static(model))):
            logits = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
            found.append([logits[mask[:, -3:] > 0], turn(model, cache, mask, words)])
        for one, other in zip(*found, strict=True):
            close(one, other)
    even = prompts(model, EVEN)
    past = even["input_ids"].shape[1]
    mask = torch.cat([even["attention_mask"], (ids > 0).long()], 1)
    together = model(input_ids=ids, attention_mask=mask, **{CACHE: cache_in(model, even)}).logits
    for row in (0, 1):
        alone = {name: values[row : row + 1] for name, values in even.items()}
        real = ids[row] > 0
        more = {"input_ids": ids[row : row + 1, real], "position_ids": past + real.nonzero()[:, 0][None]}
        close(model(**more, **{CACHE: cache_in(model, alone)}).logits[0], together[row, real])


@torch.no_grad()
@pytest.mark.parametrize("structural", ["keep", "drop"])
def test_the_floor_lies_behind_newlines_that_may_be_dropped(structural: str) -> None:
    """LLaVA-NeXT ends an image with a newline; text of four tokens follows."""
    model = families.build("llava_next")
    inputs = families.prompts(model, "llava_next", [[5, families.image("llava_next"), 4]])
    mm.compress(model, INPUT, structural=structural)
    for plan in (INPUT, f"{INPUT} >> {LAYER}"):
        mm.compress(model, plan, structural=structural)
        cache, whole = cache_in(model, inputs), model(**inputs).logits
        cache.crop(-4)
        out = model(input_ids=inputs["input_ids"][:, -4:], **{CACHE: cache}).logits
        close(out, whole[:, -4:], 1e-4)
        with pytest.raises(ValueError, match="cannot crop"):
            cache_in(model, inputs).crop(-5)


# ---------------------------------------------------------------------- rows of the batch
@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, BOTH, REWRITING])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_rows_of_a_cache_are_permuted_repeated_and_selected(plan: str, positions: str) -> None:
    """A cycle of three is not its own inverse; layers share a ledger, which must change once."""
    model = mm.compress(build(), plan, positions=positions)
    inputs = prompts(model, THREE)
    mask, ids = inputs["attention_mask"], torch.tensor([[7, 8], [9, 10], [11, 12]])

    def after(change: Callable[[Any], None], rows: list[int]) -> None:
        cache = cache_in(model, inputs)
        change(cache)
        longer = torch.cat([mask, torch.ones_like(ids)], 1)
        expected = model(input_ids=ids, attention_mask=longer, **{CACHE: cache_in(model, inputs)}).logits
        found = model(input_ids=ids[rows], attention_mask=longer[rows], **{CACHE: cache}).logits
        close(found, expected[rows])

    after(lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
    shared = cache_in(model, inputs).layers
    assert sum(layer.leads for layer in shared) == len({id(layer.ledger) for layer in shared})


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, REWRITING])
@pytest.mark.parametrize(
    "kind", ["static", pytest.param("dynamic", marks=pytest.mark.skipif(OLDEST, reason="kept rows"))]
)
def test_a_cache_that_was_reset_is_new(plan: str, kind: str) -> None:
    model = mm.compress(build(), plan)
    inputs, other = prompts(model, tiny.RAGGED), prompts(model, tiny.ALIKE, seed=3)
    cache = cache_in(model, inputs, static(model) if kind == "static" else None)
    cache.reset()
    assert all(layer.ledger == layer.ledger and not layer.ledger.dropped and not layer.state for layer in cache.layers)
    assert cache.get_seq_length() == 0
    found = model(**other, **{CACHE: cache}).logits
    close(found, model(**other).logits)
    close(turn(model, cache, other["attention_mask"]), turn(model, cache_in(model, other), other["attention_mask"]))


# ---------------------------------------------------------------------- signals on other caches
def values_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What signals of cuts find, in order."""
    seen: list[Tensor] = []
    whole = layers.Cut.signal

    def note(cut: Any, name: str) -> Tensor:
        value = whole(cut, name)
        seen.append(value.clone())
        return value

    monkeypatch.setattr(layers.Cut, "signal", note)
    return seen


SIGNALLED = ("fastv(layer=2, keep=0.5)", "dart(layer=2, keep=0.5)", "sparsevlm", "aim_prune(l1=1, l2=3)")


@torch.no_grad()
@pytest.mark.parametrize("plan", SIGNALLED)
def test_signals_read_a_static_cache(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of its columns are empty; attention and keys are those of a cache that grows."""
    model = mm.compress(build(), plan)
    inputs, seen = prompts(model, tiny.RAGGED), values_seen(monkeypatch)
    one, expected = cache_in(model, inputs), list(seen)
    seen.clear()
    other = cache_in(model, inputs, static(model))
    assert expected and len(seen) == len(expected)
    for a, b in zip(seen, expected, strict=True):
        close(a, b, 1e-5)
    mask = inputs["attention_mask"]
    close(turn(model, other, mask), turn(model, one, mask), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, BOTH])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_tokens_on_a_pruned_static_cache_with_a_ready_made_mask(plan: str, attention: str) -> None:
    """As generate() prepares it: one mask for all layers, of the width of the first."""
    from transformers.masking_utils import create_causal_mask

    model = mm.compress(build(attention=attention), plan)
    inputs = prompts(model, tiny.RAGGED)
    mask, ids = inputs["attention_mask"], torch.tensor([[7, 8, 9], [10, 11, 12]])
    longer = torch.cat([mask, torch.ones_like(ids)], 1)
    expected = model(input_ids=ids, attention_mask=longer, **{CACHE: cache_in(model, inputs)}).logits
    cache = cache_in(model, inputs, static(model))
    made = create_causal_mask(
        config=model.config.get_text_config(), inputs_embeds=model.get_input_embeddings()(ids), attention_mask=longer,
        position_ids=None, **{CACHE: cache},
    )  # fmt: skip
    assert made.dim() == 4 and made.shape[-2:] == (3, 96)
    close(model(input_ids=ids, attention_mask=made, **{CACHE: cache}).logits, expected, 1e-4)


@torch.no_grad()
def test_padding_that_reaches_one_place_beyond_what_was_dropped_binds_a_cache() -> None:
    """Behind one token, a row with eight of padding beside one that drops eight: all physical rows are real, and a mask of logical
    width would hide one of them."""
    model = mm.compress(build(), "divprune(keep=0.5)", positions="keep")
    cache = model(input_ids=torch.tensor([[5], [6]]), use_cache=True)[CACHE]
    inputs = prompts(model, [[14], [2, "image", 4]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (1, 0), value=1)
    cache = model(**{**inputs, "attention_mask": mask, CACHE: cache})[CACHE]
    assert cache.layers[0].ledger.valid is None and cache.layers[0].ledger.dropped == 8
    mm.uncompress(model)
    with pytest.raises(RuntimeError, match="there is padding among its tokens"):
        model(
            input_ids=torch.tensor([[7], [8]]),
            attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
            **{CACHE: cache},
        )


def after_text(model: Any, samples: list[list[int]], rows: slice = slice(None)) -> tuple[Tensor, Any]:
    """A turn of text alone, padded, then one with an image: the logits of the second, and its cache."""
    first = prompts(model, samples)
    ids = prompts(model, [[3, "image", 4]] * len(samples), seed=4)
    mask = torch.cat([first["attention_mask"], ids["attention_mask"]], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    border = first["input_ids"].shape[1]
    if rows != slice(None):  # the row by itself, without padding
        row = rows.start
        real = first["attention_mask"][row].bool()
        cache = cache_in(model, {"input_ids": first["input_ids"][row : row + 1, real]})
        alone = {name: ids[name][row : row + 1] for name in ("input_ids", "pixel_values")}
        out = model(**alone, **{CACHE: cache})
        return out.logits, cache
    cache = cache_in(model, first | {"position_ids": places[:, :border]})
    out = model(**ids | {"attention_mask": mask, "position_ids": places[:, border:]}, **{CACHE: cache})
    return out.logits, cache


@torch.no_grad()
@pytest.mark.parametrize("plan", ["fastv(layer=2, keep=0.5)", "dart(layer=2, keep=0.5)", "sparsevlm"])
def test_padding_in_an_earlier_turn_of_text_takes_no_attention(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values themselves: kept sets may agree by chance."""
    model = mm.compress(build(), plan)
    seen = values_seen(monkeypatch)
    together, _ = after_text(model, [[9], [4]])
    batch = list(seen)
    for row in (0, 1):
        seen.clear()
        alone, _ = after_text(model, [[9], [4]], slice(row, row + 1))
        assert len(seen) == len(batch) > 0
        for a, b in zip(seen, batch, strict=True):
            close(a[0], b[row], 1e-5)
        close(alone[0, -4:], together[row, -4:])


@torch.no_grad()
@pytest.mark.parametrize("plan", [REWRITING, "var_attention_sink(dims=(3, 7))"])
def test_padding_in_an_earlier_turn_of_text_is_not_rewritten(plan: str) -> None:
    model = mm.compress(build(), plan)
    together, cache = after_text(model, [[9], [4]])
    longer = torch.ones(1, 9 + 23, dtype=torch.int64)
    mask = torch.cat([longer, longer])
    mask[1, :5] = 0
    places = (torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1).cumsum(1) - 1)[:, -2:]
    later = turn(model, cache, mask, 2, position_ids=places)
    words = torch.randint(5, 140, (2, 2), generator=torch.Generator().manual_seed(1))
    for row in (0, 1):
        alone, mine = after_text(model, [[9], [4]], slice(row, row + 1))
        close(alone[0], together[row])
        close(model(input_ids=words[row : row + 1], **{CACHE: mine}).logits[0], later[row])


@torch.no_grad()
@pytest.mark.parametrize("plan", ["fastv(layer=2, keep=0.5, query='all')", "aim_prune(l1=1, l2=3)"])
@pytest.mark.parametrize("first", [[[9]], ONE])
def test_attention_of_all_rows_is_refused_in_a_later_turn(plan: str, first: Any) -> None:
    model = mm.compress(build(), plan)
    one, two = prompts(model, first, mask=False), prompts(model, ONE, seed=4, mask=False)
    cache = cache_in(model, one)
    with pytest.raises(NotImplementedError, match="in a later turn on a cache: start again from the whole prompt"):
        model(**two, **{CACHE: cache})


# ---------------------------------------------------------------------- what a cache holds
@torch.no_grad()
@pytest.mark.parametrize("plan", [INPUT, LAYER, BOTH])
def test_bytes_are_those_of_the_tensors(plan: str) -> None:
    model = build()
    inputs = prompts(model, tiny.RAGGED)
    stock = held_bytes(cache_in(model, inputs))
    assert (
        stock.now == stock.full == 4 * 2 * (2 * 2 * 43 * 16) * 4 and stock.states == 0
    )  # layers, k and v, tensor, float32
    mm.compress(model, plan)
    cache = cache_in(model, inputs)
    found = held_bytes(cache)
    assert found.now == sum(x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values)) < stock.now
    assert found.full == stock.full
    assert held_bytes(cache_in(model, inputs, static(model))) == found  # the part in use
    turn(model, cache, inputs["attention_mask"])
    later = held_bytes(cache)
    assert later.now - found.now == later.full - found.full == 4 * 2 * (2 * 2 * 3 * 16) * 4


def test_bytes_of_packed_tensors_windows_and_states() -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = DynamicCache()
    layer = DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.zeros(1, 2, 20, 4), torch.zeros(1, 2, 20, 4))
    plain = caches.DynamicLayer()
    plain.update(torch.zeros(1, 2, 20, 4, dtype=torch.bfloat16), torch.zeros(1, 2, 20, 6, dtype=torch.bfloat16))
    plain.packed = (torch.zeros(20, dtype=torch.uint8), {"scale": torch.zeros(20, 1)})
    cache.layers = [layer, plain]
    assert held_bytes(cache).now == 2 * 2 * 7 * 4 * 4 + 2 * 20 * (4 + 6) * 2 + 20 + 20 * 4
    assert held_bytes(cache).full == held_bytes(cache).now
    assert held_bytes(None) == caches.Held()
