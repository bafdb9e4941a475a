# SPDX-License-Identifier: Apache-2.0
"""Reading videos: every decoder that is installed, against PyAV itself, frame by frame and bit by bit."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcompress import decoders
from mmcompress.cli import main
from mmcompress.videos import Clip, VideoError, choose, read_video, video_arguments

av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'mmcompress[video]')")

STEADY = [n / 25 for n in range(40)]
VARIED = (np.cumsum(np.random.default_rng(0).integers(20, 200, 40)) / 1000).tolist()
TURNED = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""By how much a player turns the picture clockwise: the matrix in the file."""
FILES = {
    "h264.mp4": ("libx264", STEADY, 96, 64, {"bf": "2", "g": "12"}),
    "vp9.webm": ("libvpx-vp9", STEADY, 96, 64, {}),
    "varied.mp4": ("libx264", VARIED, 96, 64, {"bf": "2", "g": "12"}),
    "varied.mkv": ("libx264", VARIED, 96, 64, {}),
    "late.mkv": ("libx264", [5 + t for t in STEADY], 96, 64, {}),
    "one.mp4": ("libx264", [0.0], 96, 64, {}),
    "odd.mkv": ("ffv1", STEADY[:10], 97, 65, {}),
}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """The number in bits above, colours below."""
    frame = np.full((height, width, 3), 60, np.uint8)
    for bit in range(6):
        if number >> bit & 1:
            frame[: height // 2, bit * width // 6 : (bit + 1) * width // 6] = 230
    frame[height // 2 :, : width // 2] = (200, 30, 30)
    frame[height // 2 :, width // 2 :] = (20, 60, 100 + number)
    return frame


def number_in(frame: np.ndarray) -> int:
    """The number that is drawn in a frame."""
    height, width = frame.shape[:2]
    return sum(1 << bit for bit in range(6) if frame[height // 4, int((bit + 0.5) * width / 6)].mean() > 145)


def write(path: Path, codec: str, times: list[float], width: int, height: int, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def turned(data: bytes, degrees: int) -> bytes:
    """An MP4 file whose header says that it is to be turned."""
    at = data.index(b"tkhd")
    at += 8 + (32 if data[at + 4] else 20) + 16
    a, b, c, d = (x << 16 for x in TURNED[degrees])
    assert data[at : at + 36] == struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    for name, (codec, times, width, height, options) in FILES.items():
        write(made / name, codec, times, width, height, options)
    whole = (made / "h264.mp4").read_bytes()
    for degrees in TURNED:
        (made / f"turned{degrees}.mp4").write_bytes(turned(whole, degrees))
    (made / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (made / "text.mp4").write_text("no video")
    (made / "empty.mp4").touch()
    with av.open(str(made / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return made


def loads(name: str, path: Path) -> bool:
    try:
        read_video(path, 1, decoder=name)
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module", params=list(decoders.DECODERS))
def decoder(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if not loads(request.param, folder / "h264.mp4"):
        pytest.skip(f"{request.param} is not installed, or lacks FFmpeg on this machine")
    yield request.param


def by_pyav(path: Path, degrees: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames and times of a whole file by PyAV alone, in the order of decoding."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    rows = np.stack([np.rot90(frame.to_ndarray(format="rgb24"), -degrees // 90) for frame in frames])
    return rows, np.array([frame.time - frames[0].time for frame in frames])


@pytest.mark.parametrize("name", [*FILES, *(f"turned{degrees}.mp4" for degrees in TURNED)])
def test_frames_are_exact(folder: Path, decoder: str, name: str) -> None:
    """All frames, and a few with large gaps; colours of odd sizes are scaled up differently."""
    degrees = int(name.removeprefix("turned").split(".")[0]) if name.startswith("turned") else 0
    frames, times = by_pyav(folder / name, degrees)
    clip = read_video(folder / name, decoder=decoder)
    assert clip.frames.shape == frames.shape and clip.total == len(frames)
    assert np.abs(clip.times - times).max() < 2e-6
    apart = np.abs(clip.frames.astype(int) - frames)
    if name == "odd.mkv" and decoder != "av":
        assert apart.mean() < 1.5
    else:
        assert not apart.any()
    few = read_video(folder / name, most=4, decoder=decoder)
    assert np.array_equal(few.frames, clip.frames[list(few.indices)])
    assert np.array_equal(few.times, clip.times[list(few.indices)])
    if not degrees:
        assert [number_in(frame) for frame in few.frames] == list(few.indices)


def test_times_are_true(folder: Path) -> None:
    """What transformers makes of the metadata (index / fps) is when a frame is shown, whether the rate varies or not."""
    for name in ("h264.mp4", "varied.mp4", "late.mkv"):
        times = np.array(FILES[name][1])
        clip = read_video(folder / name, 7)
        said = clip.metadata()
        assert said is not None and said["total_num_frames"] == 40
        shown = np.array(said["frames_indices"]) / said["fps"]
        assert np.abs(shown - (times - times[0])[list(clip.indices)]).max() < 1e-3
    assert read_video(folder / "h264.mp4", 7).metadata()["frames_indices"] == [0, 6, 13, 20, 26, 32, 39]  # type: ignore[index]
    assert read_video(folder / "one.mp4").metadata()["fps"] == 25  # type: ignore[index]


def test_which_frames() -> None:
    steady, varied = np.arange(100) / 10, np.array([0, 0.1, 0.2, 0.3, 5.0, 10.0])

    def chosen(times: np.ndarray, frames: Any = None, **more: Any) -> list[int]:
        names = ("fps", "most", "start", "end")
        return choose(times, frames, *(more.get(name) for name in names)).tolist()

    assert chosen(steady, 4) == [0, 33, 66, 99]
    assert chosen(steady, most=4, start=5.0, end=7.0) == [50, 57, 63, 70]
    assert chosen(steady, fps=0.5, most=40) == [0, 25, 50, 74, 99]
    assert chosen(steady, fps=1000) == list(range(100))
    assert chosen(steady, fps=0.001) == [0]
    assert chosen(steady, most=4, start=99.0) == [99]
    assert chosen(steady, start=9.85) == [98, 99]
    assert chosen(varied, 3) == [0, 4, 5]  # by time, not by number
    assert chosen(varied, 5) == [0, 2, 3, 4, 5] and chosen(varied, 6) == list(range(6))  # each once
    with pytest.raises(ValueError, match=r"frames=101: the video has 100; ask for at most so many"):
        chosen(steady, 101)
    with pytest.raises(ValueError, match="frames=30: the video has 11 there"):
        chosen(steady, 30, start=3, end=4)


def test_only_what_is_asked_for_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = decoders._upright

    def upright(frame: Any) -> np.ndarray:
        made.append(frame.pts)
        return whole(frame)

    monkeypatch.setattr(decoders, "_upright", upright)
    clip = read_video(folder / "varied.mp4", 3)
    assert len(made) == 3 and [number_in(frame) for frame in clip.frames] == list(clip.indices)


def test_whatever_a_video_comes_as(folder: Path, decoder: str) -> None:
    path = folder / "h264.mp4"
    wanted = read_video(path, 3, decoder=decoder)
    with path.open("rb") as file:
        for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            assert np.array_equal(read_video(source, 3, decoder=decoder).frames, wanted.frames)


def test_frames_that_are_there_already() -> None:
    import torch

    frames = np.stack([picture(number, 24, 16) for number in range(5)])
    sources = [frames, torch.from_numpy(frames).permute(0, 3, 1, 2), list(frames), [Image.fromarray(f) for f in frames]]
    for source in sources:
        clip = read_video(source)
        assert np.array_equal(clip.frames, frames) and clip.times is None and clip.metadata() is None
        assert read_video(source, 3).indices == (0, 2, 4)


def test_what_cannot_be_read(folder: Path, decoder: str) -> None:
    for name, said in (
        ("none.mp4", "none.mp4: no such file"), ("", "a folder; give a video in it"), ("empty.mp4", "the file is empty"),
        ("text.mp4", "text.mp4 is not a readable video"), ("half.mp4", "half.mp4 is not a readable video"),
        ("sound.wav", "sound.wav has no video stream"),
    ):  # fmt: skip
        with pytest.raises(VideoError, match=said) as error:
            read_video(folder / name, decoder=decoder)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"frames=41: .*h264.mp4 has 40; ask for at most so many"):
        read_video(folder / "h264.mp4", 41, decoder=decoder)


def test_a_damaged_middle(folder: Path) -> None:
    """What can be decoded is right; where a frame that is asked for cannot, the error says when it is."""
    data = bytearray((folder / "varied.mkv").read_bytes())
    start = data.index(b"\x1f\x43\xb6\x75")  # the first cluster
    data[start + 400 : start + 1200] = bytes(800)
    try:
        clip = read_video(bytes(data))
    except VideoError as error:
        assert "damaged" in str(error) or "not a readable video" in str(error)
    else:
        assert [number_in(frame) for frame in clip.frames] == sorted({number_in(frame) for frame in clip.frames})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"frames": 0}, "frames=0: give a count of at least 1"),
        ({"frames": 2.5}, "frames=2.5: give a count"),
        ({"fps": 0}, "fps=0: give frames per second above 0"),
        ({"frames": 2, "fps": 1}, "frames=2 is an exact count"),
        ({"decoder": "gstreamer"}, "choose one of av, torchcodec, decord"),
    ],
)
def test_wishes_that_mean_nothing(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_video("nowhere.mp4", **more)


def test_sources_that_are_no_video() -> None:
    for source, error, said in (
        ("https://example.org/a.mp4", VideoError, "videos are not fetched"), (3, TypeError, "a video of type int"),
        ([], VideoError, "an empty list"), (np.zeros((2, 8, 8, 3)), VideoError, "and type float64: give uint8"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], VideoError, "frames of different sizes"),
        (b"", VideoError, "it is empty"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            read_video(source)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have no times: choose by frames= or most="):
        read_video(np.zeros((2, 8, 8, 3), np.uint8), fps=1)


def test_without_a_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.videos.installed", lambda: [])
    with pytest.raises(ImportError, match=r"no decoder of videos is installed; pip install 'mmcompress\[video\]'"):
        read_video(folder / "h264.mp4")
    with pytest.raises(ImportError, match="decoder='decord' is not installed"):
        read_video(folder / "h264.mp4", decoder="decord")


# ---------------------------------------------------------------------- to a model
def test_a_file_becomes_inputs(folder: Path, watcher: Path) -> None:
    """True times reach the prompt, and a video of one frame is shown to an encoder of pairs."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(watcher)
    clip = read_video(folder / "varied.mp4", 4)
    inputs = processor(text=["USER: <|video_pad|>"], return_tensors="pt", **video_arguments(processor, [clip]))
    assert inputs["video_grid_thw"][0, 0] == 2
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    pairs = [(clip.times[i] + clip.times[i + 1]) / 2 for i in (0, 2)]
    assert all(f"<{pair:.1f}seconds>" in text for pair in pairs)
    one = read_video(folder / "one.mp4")
    arguments = video_arguments(processor, [one])
    assert len(arguments["videos"][0]) == 2 and arguments["video_metadata"][0]["frames_indices"] == [0, 0]
    assert processor(text=["<|video_pad|>"], return_tensors="pt", **arguments)["video_grid_thw"][0, 0] == 1
    with pytest.raises(NotImplementedError, match="takes no videos: choose another checkpoint"):
        video_arguments(object(), [clip])


def test_run_from_a_file(folder: Path, watcher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "run",
        str(watcher),
        "--video",
        str(folder / "h264.mp4"),
        "--question",
        "what comes first ?",
        "--max-new-tokens",
        "2",
    ]
    assert main([*line, "--frames", "8", "--plan", "divprune(keep=0.5)"]) == 0
    shown = capsys.readouterr().out
    assert "8 of 40 frames, from 0.0 to 1.6 s" in shown and "compressed" in shown
    assert main(line) == 0 and "16 of 40 frames" in capsys.readouterr().out
    assert main([*line, "--fps", "2"]) == 0 and "3 of 40 frames" in capsys.readouterr().out
    for more, said in (
        (["--frames", "0"], "frames=0: give a count of at least 1"),
        (["--frames", "41"], "frames=41: --video"),
        (["--frames", "8", "--plan", "divprune(keep=3)"], "leaves 3 of"),
        (["--out", str(folder / "kept.png")], "--out draws what is kept of pictures"),
    ):
        assert main([*line, *more]) == 2
        assert said in capsys.readouterr().err
    for name, said in (
        ("none.mp4", "no such file"),
        ("sound.wav", "no video stream"),
        ("text.mp4", "not a readable video"),
    ):
        line[3] = str(folder / name)
        assert main(line) == 2
        found = capsys.readouterr().err
        assert said in found and found.count("\n") == 1
    assert main(["run", str(watcher), "--frames", "3", "--question", "what comes first ?"]) == 2
    assert "--frames chooses frames of a video: give --video FILE" in capsys.readouterr().err


def test_explanations_read_the_same_frames(folder: Path, watcher: Path) -> None:
    from mmcompress.eval.synthetic.benchmark import load

    from mmcompress.explain import token_activation_map

    model, processor = load(watcher)
    clip = read_video(folder / "varied.mp4", 4)
    found = [
        token_activation_map(model, processor, source, "what comes first ?", video=True, max_new_tokens=1)
        for source in (clip, list(clip.frames))
    ]
    assert [len(one.visuals[0].panes) for one in found] == [2, 2]
    assert isinstance(clip, Clip)
