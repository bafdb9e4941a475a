# SPDX-License-Identifier: Apache-2.0
"""Retrievers, bodies without a head, and heads that classify: what is kept scores as the stock model on what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor
from transformers import CONFIG_MAPPING

import mmcompress as mm
from mmcompress.runtime.around import Around

from .architectures import OLDEST, PAD, base_of, build, config, lengths_of, pictures, prompts, shrunk
from .exactness import shortened, watched

pytestmark = pytest.mark.skipif(OLDEST, reason="the tiny inputs are those of the newest transformers")

RETRIEVERS = {"colqwen2": ("qwen2_vl", "ColQwen2ForRetrieval"), "colpali": ("paligemma", "ColPaliForRetrieval")}
PLANS = ["divprune(keep=0.5)", "fastv(layer=1, keep=0.5)", "divprune(keep=0.6) >> fastv(layer=2, keep=0.5)"]


def retriever(name: str) -> tuple[Any, Any]:
    """A random retriever, and the generating model that it is made of."""
    inner, cls = RETRIEVERS[name]
    made = CONFIG_MAPPING[name](vlm_config=config(inner).to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    model, whole = getattr(transformers, cls)._from_config(made).eval(), build(inner)
    model.vlm.load_state_dict(whole.model.state_dict())
    with torch.no_grad():
        model.embedding_proj_layer.bias.normal_()
    return model, whole


def pages(model: Any, whole: Any, samples: list[list[int | str]]) -> dict[str, Any]:
    found = prompts(whole, samples)
    if "image_grid_thw" in found:  # as its processor gives them: a padded row for each page
        found["pixel_values"] = found["pixel_values"].unflatten(0, (len(found["image_grid_thw"]), -1))
        found = {n: x for n, x in found.items() if n != "mm_token_type_ids"}
    return {n: x for n, x in found.items() if n != "token_type_ids"}


def on_kept(model: Any, inputs: dict[str, Any], kept: Tensor, length: int, anew: bool) -> Tensor:
    """Embeddings of the stock model whose language model is given the kept tokens alone, [kept, E]. PaliGemma's positions count
    from 1; ColQwen2 gives none, so they are a count from 0."""
    positions = {} if anew else {"position_ids": torch.arange(length)[None] + (model.config.model_type == "colpali")}
    start = 1 if anew else None
    with shortened(model, kept, inputs["input_ids"], start, lambda embeds: embeds[:, : len(kept)], positions):
        return model(**inputs).embeddings[0, kept]


def maxsim(query: Tensor, page: Tensor) -> Tensor:
    return (query @ page.T).amax(1).sum()


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVERS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_page_scores_as_its_kept_rows(name: str, plan: str) -> None:
    """Rows of tokens that are gone are zero, as those of padding; a padded batch of pages does as each page alone."""
    model, whole = retriever(name)
    samples: list[list[int | str]] = [[5, "3", 4], [9, "1", 6]]
    query = model(input_ids=torch.randint(5, 120, (1, 7)), attention_mask=torch.ones(1, 7, dtype=torch.long)).embeddings
    alone = []
    for number, sample in enumerate(samples):
        inputs = pages(model, whole, [sample])
        inputs["input_ids"] = pages(model, whole, samples)["input_ids"][
            number : number + 1, -inputs["input_ids"].shape[1] :
        ]
        stock = model(**inputs).embeddings
        mm.compress(model, plan)
        got = model(**inputs).embeddings[0]
        trace = mm.trace(model)
        kept = trace.call.groups[-1].source[0]
        mm.uncompress(model)
        assert (
            0 < len(kept) < len(got)
            and (got.norm(dim=1) > 0.99).nonzero()[:, 0].tolist() == kept.sort().values.tolist()
        )
        assert not got[~torch.isin(torch.arange(len(got)), kept)].any()
        scores = maxsim(query[0], got), maxsim(query[0], got[kept]), maxsim(query[0], stock[0])
        assert scores[0] == scores[1] != scores[2]
        if "fastv" not in plan:
            wanted = on_kept(
                model, inputs, kept, len(got), name == "colpali" and trace.plan.position_policy() == "reindex"
            )
            assert torch.allclose(got[kept], wanted, atol=1e-5)
        assert torch.equal(model(**inputs).embeddings, stock)
        alone.append((stock[0], got))
    batch = pages(model, whole, samples)
    stock = model(**batch).embeddings
    if not all(torch.allclose(row[-len(page) :], page, atol=1e-4) for row, (page, _) in zip(stock, alone, strict=True)):
        return  # PaliGemma sees a prompt that is alone in both directions
    mm.compress(model, plan)
    together = model(**batch).embeddings
    for row, (_, page) in zip(together, alone, strict=True):
        assert torch.allclose(row[-len(page) :], page, atol=1e-5) and not row[: -len(page)].any()


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVERS)
def test_questions_and_whole_pages_are_untouched(name: str) -> None:
    model, whole = retriever(name)
    inputs = pages(model, whole, [[4, "1", 6]])
    text = {"input_ids": torch.randint(5, 120, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    stock = model(**inputs).embeddings, model(**text).embeddings
    mm.compress(model, "divprune(keep=1.0)")
    assert torch.equal(model(**inputs).embeddings, stock[0]) and torch.equal(model(**text).embeddings, stock[1])
    mm.compress(model, "divprune(keep=0.5)")
    assert not torch.equal(model(**inputs).embeddings, stock[0])
    assert torch.equal(model(**text).embeddings, stock[1])  # nothing is left of the page before
    mm.uncompress(model)
    assert torch.equal(model(**inputs).embeddings, stock[0]) and "forward" not in vars(adapter_for(model).tower)


@torch.no_grad()
def test_signals_and_encoder_stages_of_the_tower_work_around_it() -> None:
    model, whole = retriever("colqwen2")
    inputs = pages(model, whole, [[4, "1", 6]])
    kept = []
    for one in (model, whole):
        mm.compress(one, "visionzip(keep=0.5)")
        given = inputs if one is model else prompts(whole, [[4, "1", 6]])
        one(**given)
        kept.append(mm.trace(one).visuals[0].kept_cells().tolist())
    assert kept[0] == kept[1]
    mm.compress(model, "tome(keep=0.5)")
    assert int((model(**inputs).embeddings[0].norm(dim=1) > 0).sum()) == 10 + 8


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVERS)
def test_copies_do_the_same(name: str) -> None:
    model, whole = retriever(name)
    inputs = pages(model, whole, [[4, "1", 6]])
    mm.compress(model, "divprune(keep=0.5)")
    wanted = model(**inputs).embeddings
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs).embeddings, wanted) and torch.equal(model(**inputs).embeddings, wanted)
    mm.uncompress(other)
    assert other(**inputs).embeddings.norm(dim=-1).min() > 0.99
    assert torch.equal(model(**inputs).embeddings, wanted)


@torch.no_grad()
def test_pixels_that_no_known_method_encodes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = retriever("colqwen2")
    monkeypatch.setattr(Around, "_tower", lambda self, original, *args, **kwargs: original(*args, **kwargs))
    mm.compress(model, "divprune(keep=0.5)")
    with pytest.raises(NotImplementedError, match="pixel_values was given, but Qwen2VLModel did not encode it"):
        model(**pages(model, whole, [[4, "1", 6]]))


BODIES = [
    "llava",
    "llava_next",
    "qwen2_vl",
    "qwen3_vl",
    "internvl",
    "paligemma",
    "smolvlm",
    "glm4v",
    "deepseek_vl_hybrid",
    "apertus1p5",
]


@torch.no_grad()
@pytest.mark.parametrize("name", BODIES)
def test_a_body_does_what_the_model_with_its_head_does(name: str) -> None:
    model = build(name)
    body = adapter_for(model).base
    inputs = prompts(model, [[4, "1", 2, "2", 6]])
    for plan in ("divprune(keep=0.5)", "fastv(layer=1, keep=0.5)"):
        mm.compress(model, plan)
        logits = model(**inputs).logits
        mm.uncompress(model)
        mm.compress(body, plan)
        hidden = body(**inputs).last_hidden_state
        assert ([visual.kept for visual in mm.trace(body).visuals] and "divprune" in plan) or "fastv" in plan
        mm.uncompress(body)
        assert torch.equal(model.lm_head(hidden), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3_5ForSequenceClassification"])
def test_heads_that_classify_read_the_last_token(name: str) -> None:
    model = getattr(transformers, name)._from_config(config("qwen3_5")).eval()
    model.config.get_text_config().pad_token_id = PAD
    inputs = prompts(build("qwen3_5"), [[5, "3", 4], [4, "1", 2, "2", 6]])
    seen: list[dict[str, Any]] = []
    mm.compress(model, "divprune(keep=0.5)")
    handle = model.score.register_forward_hook(lambda module, args, output: seen.append({"x": args[0]}))
    got = model(**inputs).logits
    handle.remove()
    assert got.shape == (2, model.config.num_labels)
    assert torch.allclose(got, model.score(seen[0]["x"][:, -1]), atol=1e-6) and mm.trace(model).visuals[0].kept == 8


def encoder(name: str, cls: str) -> tuple[Any, dict[str, Any]]:
    """A model whose language model is an encoder with windows of 6 places to both sides, and a prompt that is longer."""
    made = CONFIG_MAPPING[name](**shrunk(CONFIG_MAPPING[name]()))
    setattr(
        made.text_config,
        *(("local_attention", 12) if hasattr(made.text_config, "local_attention") else ("sliding_window", 6)),
    )
    torch.manual_seed(0)
    model = getattr(transformers, cls)._from_config(made).eval()
    found = pictures(model, [[1]])
    ids = [*range(5, 25), *[made.image_token_id] * lengths_of(base_of(model), "image", found), *range(30, 50)]
    found |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return model, found


@torch.no_grad()
@pytest.mark.parametrize(("name", "cls"), [("modernvbert", "ModernVBertModel"), ("ultravbert", "UltraVBertModel")])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_encoders_see_to_both_sides_as_far_as_in_the_whole_prompt(name: str, cls: str, positions: str) -> None:
    model, inputs = encoder(name, cls)
    language_model = adapter_for(model).language_model
    kinds = language_model.config.layer_types
    seen: list[dict[str, Any]] = []
    with watched(language_model, seen), watched(language_model.layers[kinds.index("sliding_attention")], seen):
        model(**inputs)
    embeds, window = seen[0]["inputs_embeds"], seen[1]["attention_mask"]
    assert window is not None and not window.all()
    mm.compress(model, "divprune(keep=2)", positions=positions)
    got = model(**inputs).last_hidden_state
    kept = mm.trace(model).call.groups[-1].source[0]
    mm.uncompress(model)
    window = window[:, :, kept][..., kept]
    for kind, layer in zip(kinds, language_model.layers, strict=True):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(
                lambda _, args, given: (args, {**given, "attention_mask": window}), with_kwargs=True
            )
    numbers = kept if positions == "keep" else torch.arange(len(kept))
    wanted = language_model(inputs_embeds=embeds[:, kept], position_ids=numbers[None])
    assert len(kept) < embeds.shape[1]
    assert torch.allclose(got[0, kept], wanted.last_hidden_state[0], atol=1e-5)


@pytest.mark.parametrize("plan", ["fastv(layer=1)", "cmai", "sparsevlm"])
def test_what_presumes_a_decoder_is_refused_on_encoders(plan: str) -> None:
    model, _ = encoder("modernvbert", "ModernVBertModel")
    with pytest.raises(
        NotImplementedError, match="presumes that tokens see those before them only, but ModernBertModel is an"
    ):
        mm.compress(model, plan)


@torch.no_grad()
def test_a_page_of_an_encoder_scores_as_its_kept_rows() -> None:
    body, inputs = encoder("modernvbert", "ModernVBertModel")
    made = CONFIG_MAPPING["colmodernvbert"](vlm_config=body.config.to_dict(), embedding_dim=16)
    model = transformers.ColModernVBertForRetrieval._from_config(made).eval()
    mm.compress(model, "divprune(keep=2)")
    got = model(**inputs).embeddings[0]
    kept = mm.trace(model).call.groups[-1].source[0]
    assert (got.norm(dim=1) > 0.99).nonzero()[:, 0].tolist() == kept.tolist() and len(kept) == 42
