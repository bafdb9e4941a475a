# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench video` on a video of a few tokens: what it measures, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.eval.cost import film
from mmcompress.eval.cost.film import KEEPS, Long, measure_film, points, usual, write_film

from mmcompress.cli import main
from mmcompress.videos import read_video

pytest.importorskip("av", reason="PyAV is not installed (pip install 'mmcompress[video]')")


def tiny(family: str) -> Any:
    """The model of `build`, far smaller."""
    from mmcompress.eval.cost.midsize import long_video

    model, _ = long_video(1, 4)
    config = model.config
    config.vision_config.patch_size = 14
    torch.manual_seed(0)
    return type(model)(config).eval()


def test_which_plans() -> None:
    assert {"evs", "vidcom2", "vcast", "divprune", "seats >> seats_layers"} <= {*usual()}
    found = dict(points(["uniform", "visionzip", "fastv(layer=2, keep={keep})", "random(keep=64)"]))
    assert [*found.values()] == [*KEEPS, KEEPS[0], *KEEPS, None]  # visionzip reads signals: once
    assert Long.of(20_480).side == 32 and Long.of(320).tokens == 320
    with pytest.raises(ValueError, match="tokens=79: at least 80"):
        Long.of(79)


def test_the_video(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", 2)
    clip = read_video(tmp_path / "a.mp4")
    assert clip.frames.shape == (40, 56, 56, 3) and clip.rate == 8


def test_parts_and_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "build", tiny)
    saved: list[dict[str, Any]] = []
    setup = Long.of(320, repeats=1, memory=False)
    plans = ["vidcom2", "visionzip", "fastv(layer=1, keep=0.25)", "keyframes"]
    record = measure_film(setup, plans[:1], save=lambda content: saved.append(json.loads(json.dumps(content))))
    assert [len(one["rows"]) for one in saved] == [0, 1, 2] and record["stock"]["kept"] == 320
    assert [(row["keep"], row["kept"]) for row in record["rows"]] == [(0.25, 80), (0.1, 32)]
    assert {*record["budgets"]} == {"80", "32"}
    before = json.dumps(record["rows"])
    record = measure_film(setup, plans, record)
    assert json.dumps(record["rows"][:2]) == before  # measured once
    rows = {row["plan"].partition("(")[0]: row for row in record["rows"]}
    assert rows["fastv"]["mean_kept"] == pytest.approx((320 + 80 + 80) / 3) and rows["fastv"]["kept"] == 320
    assert rows["keyframes"]["kept"] == 80 and all(row["select_ms"] >= 0 for row in rows.values())
    for row in record["rows"]:
        assert film.share(row) == (row["select_ms"] / row["saved_ms"] if row["saved_ms"] > 0 else None)
    dear = {
        "plan": "a",
        "kept": 9,
        "select_ms": 3.0,
        "signals_ms": 50.0,
        "vision_ms": 1.0,
        "prefill_ms": 40.0,
        "saved_ms": 60.0,
    }
    assert film.cells(dear, record["stock"])[-2] == "5.0%"  # signals have a column of their own
    assert film.share({"plan": "a", "refused": "no"}) is None
    other = measure_film(Long.of(320, repeats=2, memory=False), [], json.loads(json.dumps(record)))
    assert not other["rows"]  # other conditions: anew


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(film, "build", tiny)
    monkeypatch.setattr(film, "video_memory", lambda plan, *_: {"peak_mib": 10.0 + len(plan), "before_mib": 5.0})
    out = tmp_path / "video.json"
    line = ["bench", "video", "--tokens", "80", "--repeats", "1", "--out", str(out), "--plan", "uniform(keep={keep})"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "80 visual tokens" in shown and "selections above 5% of the prefill that they save, signals apart" in shown
    assert "peak memory above the stock prefill's: uniform(keep=0.25)" in shown
    assert [row.get("peak_mib") for row in json.loads(out.read_text())["rows"]] == [28.0, None]
    for more, said in (
        (["bench", "video", "llava"], "bench video: by itself"),
        (["bench", "llava", "--tokens", "80"], "--tokens belongs to `mmcompress bench video`"),
        (["bench", "video", "--tokens", "8"], "--tokens 8: at least 80"),
        (["bench", "video", "--image", "a"], "--image means nothing"), (["bench", "video", "--plan", "nothing"], "nothing"),
    ):  # fmt: skip
        assert main(more) == 2
        assert said in capsys.readouterr().err
