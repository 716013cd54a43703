"""Reading frames from files that the tests write themselves."""

import functools
import http.server
import os
import shutil
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longvideo.processing.shared import video_decoding
from longvideo.processing.shared.frame_sampling import dynamic_fps1_indices, num_frames_indices
from longvideo.processing.shared.video_io import describe_video, opened_video, probe_video, read_video
from tests.videos import frame_number, make_frame_folder, make_gif, make_sound, make_video, numbered_frame

read_with_pyav = functools.partial(read_video, backend="pyav")


def numbers(frames: np.ndarray) -> list[int]:
    """Numbers painted on frames."""
    return [frame_number(frame) for frame in frames]


def every(metadata: object) -> range:
    """Sampler that takes all frames."""
    return range(metadata.total_num_frames)


def list_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times of all frames that the decoder gives from now on."""
    decoded = []
    original = video_decoding.decode_frames

    def counting(container: object, stream: object, needed: object = None) -> Iterator[av.VideoFrame]:
        for frame in original(container, stream, needed):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_decoding, "decode_frames", counting)
    return decoded


KINDS = {
    "mpeg4.mp4": {},
    "b_frames.mp4": {"codec": "libx264", "b_frames": 3},
    "b_frames.ts": {"codec": "libx264", "b_frames": 3},
    "b_frames.avi": {"codec": "libx264", "b_frames": 2},
    "plain.avi": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "lossless.mkv": {"codec": "ffv1"},
    "raw.h264": {"codec": "libx264", "b_frames": 2},
    "ten_bit.mp4": {"codec": "libx264", "pix_fmt": "yuv420p10le"},
    "odd.mp4": {"codec": "libx264", "pix_fmt": "yuv444p", "size": (71, 47)},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_right(tmp_path: Path, name: str) -> None:
    options = KINDS[name]
    path = make_video(tmp_path / name, 48, 8, **options)
    frames, metadata = read_with_pyav(path, sample_indices_fn=every)
    width, height = options.get("size", (64, 48))
    assert frames.shape == (48, height, width, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(48))
    rate = 25 if name == "raw.h264" else 8  # a raw stream states no rate; FFmpeg assumes 25
    assert metadata.fps == pytest.approx(rate, rel=1e-3)  # webm rounds times to milliseconds
    assert metadata.duration == pytest.approx(48 / rate, rel=1e-3)
    # Half a millisecond: the rounding of times in webm and mkv.
    assert metadata.timestamps == pytest.approx([index / rate for index in range(48)], abs=6e-4)
    assert metadata.total_num_frames == 48 and metadata.frames_indices == list(range(48))
    assert (metadata.width, metadata.height) == (width, height)


def test_colours_survive(tmp_path: Path) -> None:
    path = make_video(tmp_path / "colours.mp4", 4, 4, (64, 48), "libx264", pix_fmt="yuv444p")
    frames, _ = read_with_pyav(path, sample_indices_fn=every)
    # Lossy coding and the limited range of YUV move a colour by a few steps; swapped channels move it by 200.
    assert np.abs(frames[0, 40:46, 2:12].astype(int).mean(axis=(0, 1)) - (220, 20, 20)).max() < 12


def test_order_and_repeats_of_indices_are_kept(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    frames, metadata = read_with_pyav(path, sample_indices_fn=lambda metadata: [30, 2, 2, 47, 0])
    assert numbers(frames) == [30, 2, 2, 47, 0] == metadata.frames_indices
    assert metadata.frame_times == [30 / 8, 2 / 8, 2 / 8, 47 / 8, 0.0]


@pytest.mark.parametrize("name", ["long.mp4", "long.ts", "long.webm"])
def test_sparse_reading_decodes_little(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = "libvpx" if name.endswith("webm") else "libx264"
    path = make_video(tmp_path / name, 600, 25, (64, 48), codec, gop=50, b_frames=0 if codec == "libvpx" else 3)
    info = probe_video(path)
    assert info.num_frames == 600 and info.group_of_pictures == pytest.approx(50, rel=0.1)
    decoded = list_decoded(monkeypatch)
    wanted = [5, 203, 204, 449, 595]
    frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: wanted)
    assert numbers(frames) == wanted
    # At most one group of pictures for each of the four places; mpegts has no index and may need one more for each.
    assert len(decoded) <= 4 * 50 * (2 if name.endswith("ts") else 1) + 8

    decoded.clear()
    frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: range(0, 600, 5))
    assert numbers(frames) == list(range(0, 600, 5))
    # Dense sampling is one pass that ends at the last wanted frame; B frames that nothing refers to are left out.
    assert len(decoded) == 596 if codec == "libvpx" else 120 <= len(decoded) < 500


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 3), ("mpeg4", 2), ("libx265", 3), ("libvpx-vp9", 0)])
def test_left_out_frames_do_not_change_the_rest(tmp_path: Path, codec: str, b_frames: int) -> None:
    noise = np.random.default_rng(42).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    moving = [np.roll(noise, (index, 2 * index), (0, 1)) for index in range(90)]
    path = make_video(
        tmp_path / ("a.webm" if "vpx" in codec else "a.mp4"),
        fps=25,
        codec=codec,
        b_frames=b_frames,
        frames=moving,
        gop=40,
    )
    with av.open(str(path)) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for wanted in (range(0, 90, 7), [1, 2, 3, 41, 88], [89], range(3, 90)):
        frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata, wanted=wanted: wanted)
        assert np.array_equal(frames, plain[list(wanted)])


def test_a_jump_that_lands_too_late_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.webm", 300, 25, codec="libvpx", gop=50)
    info = probe_video(path)
    late = info.pts[200]

    class LateContainer:
        def __init__(self, container: object) -> None:
            self.container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self.container, name)

        def seek(self, offset: int, **options: object) -> None:
            self.container.seek(int(late), **options)

    real_walk = video_decoding.walk
    monkeypatch.setattr(
        video_decoding, "walk", lambda container, *args, **kw: real_walk(LateContainer(container), *args, **kw)
    )
    frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: [120, 190])
    assert numbers(frames) == [120, 190]


def test_variable_frame_rate_uses_the_times_of_the_stream(tmp_path: Path) -> None:
    times = np.round(np.cumsum([0.0] + [0.05, 0.3] * 20), 3)
    path = make_video(tmp_path / "vfr.mp4", len(times), 10, codec="libx264", times=times)
    info = probe_video(path)
    assert info.is_variable_frame_rate
    assert info.frame_times == pytest.approx(times, abs=1e-3)  # times are written in milliseconds
    frames, metadata = read_with_pyav(path, sample_indices_fn=lambda metadata: [3, 20, 40])
    assert numbers(frames) == [3, 20, 40]
    assert metadata.timestamps == pytest.approx(times[[3, 20, 40]], abs=1e-3)
    assert metadata.fps * metadata.duration == pytest.approx(len(times), rel=1e-6)

    frames, metadata = read_with_pyav(path, sample_indices_fn=every, start=2.0, end=3.0)
    shown = [index for index, time in enumerate(times) if time < 3.0 and (times[index + 1] > 2.0)]
    assert numbers(frames) == shown == metadata.frames_indices
    assert metadata.duration == pytest.approx(1.0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured(tmp_path: Path, degrees: int) -> None:
    path = make_video(tmp_path / "turned.mp4", 8, 8, (96, 48), rotation=degrees)
    info = probe_video(path)
    turned = degrees % 180 != 0
    assert (info.width, info.height) == ((48, 96) if turned else (96, 48))
    frames, metadata = read_with_pyav(path, sample_indices_fn=every)
    assert frames.shape[1:3] == (metadata.height, metadata.width) == ((96, 48) if turned else (48, 96))
    # Turning the shown picture back (anticlockwise) gives the stored one.
    stored = np.rot90(frames, degrees // 90, axes=(1, 2))
    assert numbers(stored) == list(range(8))


def test_resizing_is_that_of_pil(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 6, 6)
    full, _ = read_with_pyav(path, sample_indices_fn=every)
    small, metadata = read_with_pyav(path, sample_indices_fn=every, size=(20, 30))
    for whole, resized in zip(full, small, strict=True):
        expected = np.asarray(Image.fromarray(whole).resize((30, 20), Image.Resampling.BICUBIC))
        assert np.array_equal(resized, expected)
    assert (metadata.width, metadata.height) == (64, 48), "metadata describe the source"


def test_metadata_stay_a_video_metadata(tmp_path: Path) -> None:
    from transformers.video_utils import VideoMetadata

    _, metadata = read_with_pyav(make_video(tmp_path / "a.mp4"), sample_indices_fn=lambda metadata: [8, 16])
    assert isinstance(metadata, VideoMetadata)
    copy = VideoMetadata(**metadata)
    assert copy.frames_indices == [8, 16] and copy.timestamps == metadata.timestamps == [1.0, 2.0]


def test_windows_of_time(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 80, 8)
    seen = {}

    def sampler(metadata: object) -> list[int]:
        seen.update(metadata)
        return [0, metadata.total_num_frames - 1]

    frames, metadata = read_with_pyav(path, sample_indices_fn=sampler, start=2.0, end=4.0)
    assert seen["total_num_frames"] == 16 and seen["duration"] == 2.0
    assert numbers(frames) == [16, 31] == metadata.frames_indices
    assert metadata.frame_times == [2.0, 31 / 8]
    assert (metadata.source_num_frames, metadata.source_duration) == (80, 10.0)
    with pytest.raises(ValueError, match="empty"):
        read_with_pyav(path, sample_indices_fn=every, start=4.0, end=3.0)
    with pytest.raises(ValueError, match=r"beyond the end of the video, which lasts 10\.00 s"):
        read_with_pyav(path, sample_indices_fn=every, start=11.0)


def test_description_equals_what_reading_says(tmp_path: Path) -> None:
    path, folder = make_video(tmp_path / "a.mp4", 80, 8), make_frame_folder(tmp_path / "frames", 12)
    for source, window in ((path, {"start": 2.0, "end": 4.0}), (str(path), {}), (folder, {"fps": 2.0})):
        described = describe_video(source, **window)
        _, read = read_with_pyav(source, sample_indices_fn=lambda metadata: [0], **window)
        for name in ("total_num_frames", "fps", "duration", "width", "height", "source_num_frames"):
            assert getattr(described, name) == getattr(read, name), name
    with pytest.raises(ValueError, match="frame rate"):
        describe_video(folder, fps=0)


def test_one_frame_and_more_frames_than_exist(tmp_path: Path) -> None:
    path = make_video(tmp_path / "one.mp4", 1, 8)
    with pytest.warns(UserWarning, match="repeated"):
        frames, metadata = read_with_pyav(
            path,
            sample_indices_fn=lambda metadata: dynamic_fps1_indices(
                metadata.total_num_frames, metadata.fps, min_frames=64, max_frames=512
            ),
        )
    assert numbers(frames) == [0, 0, 0, 0] and metadata.total_num_frames == 1
    path = make_video(tmp_path / "short.mp4", 10, 8)
    with pytest.warns(UserWarning, match="more than the 10 frames"):
        frames, _ = read_with_pyav(
            path,
            sample_indices_fn=lambda metadata: num_frames_indices(metadata.total_num_frames, 64, local_num_frames=4),
        )
    assert len(frames) == 8
    with pytest.raises(ValueError, match=r"index 10 is outside .* 10 frames"):
        read_with_pyav(path, sample_indices_fn=lambda metadata: [10])
    with pytest.raises(ValueError, match="non-empty"):
        read_with_pyav(path, sample_indices_fn=lambda metadata: [])


def test_pictures_stand_for_frames(tmp_path: Path) -> None:
    folder = make_frame_folder(tmp_path / "frames", 12)
    frames, metadata = read_with_pyav(folder, sample_indices_fn=every)
    assert numbers(frames) == list(range(12)), "frame_2 comes before frame_10"
    assert metadata.fps == 1 and metadata.duration == 12 and metadata.timestamps == list(range(12))
    paths = [folder / "frame_5.png", str(folder / "frame_1.png")]
    frames, metadata = read_with_pyav(paths, sample_indices_fn=lambda metadata: [1, 0], fps=2)
    assert numbers(frames) == [0, 4] and metadata.timestamps == [0.5, 0.0]


def test_gif(tmp_path: Path) -> None:
    path = make_gif(tmp_path / "a.gif", 6)
    frames, metadata = read_with_pyav(path, sample_indices_fn=lambda metadata: [1, 4])
    assert numbers(frames) == [1, 4]
    assert metadata.fps == 1 and metadata.timestamps == [1.0, 4.0]


def test_addresses(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a clip.mp4")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        frames, _ = read_with_pyav(f"{base}/a%20clip.mp4", sample_indices_fn=lambda metadata: [7])
        assert numbers(frames) == [7]
        with pytest.raises(OSError, match="404"):
            read_with_pyav(f"{base}/none.mp4", sample_indices_fn=every)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(OSError, match="could not be downloaded"):
        read_with_pyav(f"{base}/a%20clip.mp4", sample_indices_fn=every)
    frames, _ = read_with_pyav(path.as_uri(), sample_indices_fn=lambda metadata: [7])
    assert numbers(frames) == [7]


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Make files that are no videos, with the words that the error must hold."""
    (folder / "empty.mp4").touch()
    whole = make_video(folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    whole = make_video(folder / "fast.mp4", container_options={"movflags": "faststart"}).read_bytes()
    (folder / "cut_fast.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.mp4").write_text("not a video\n" * 200)
    (folder / "text.txt").write_text("not a video\n" * 200)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(42).bytes(20000))
    Image.fromarray(numbered_frame(3)).save(folder / "picture.png")
    shutil.copy(folder / "picture.png", folder / "picture.mp4")
    make_sound(folder / "sound.m4a")
    (folder / "nothing").mkdir()
    return {
        "no such file": (folder / "absent.mp4", "No such video file"),
        "empty": (folder / "empty.mp4", "empty"),
        "truncated": (folder / "cut.mp4", "truncated"),
        "truncated after the index": (folder / "cut_fast.mp4", "promises 48 frames"),
        "text": (folder / "text.mp4", "not a video"),
        "text by suffix": (folder / "text.txt", "not a video"),
        "noise": (folder / "noise.mp4", "not a video"),
        "picture": (folder / "picture.png", "picture, not a video"),
        "picture as mp4": (folder / "picture.mp4", "picture, not a video"),
        "sound only": (folder / "sound.m4a", "no video stream"),
        "folder without pictures": (folder / "nothing", "no pictures"),
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    return broken_files(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize(
    "kind",
    [
        "no such file",
        "empty",
        "truncated",
        "truncated after the index",
        "text",
        "text by suffix",
        "noise",
        "picture",
        "picture as mp4",
        "sound only",
        "folder without pictures",
    ],
)
def test_files_that_are_no_videos(broken: dict[str, tuple[Path, str]], kind: str) -> None:
    path, words = broken[kind]
    expected = FileNotFoundError if kind == "no such file" else ValueError
    with pytest.raises(expected, match=words) as caught:
        read_with_pyav(path, sample_indices_fn=every)
    assert path.name in str(caught.value), "the message names the file"


def test_wrong_arguments(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 4)
    with pytest.raises(ValueError, match="backend 'opencv'"):
        read_video(path, sample_indices_fn=every, backend="opencv")
    with pytest.raises(ValueError, match="height, width"):
        read_video(path, sample_indices_fn=every, size=(0, 3))
    with pytest.raises(ValueError, match="leave fps out"):
        read_video(path, sample_indices_fn=every, fps=3)
    with pytest.raises(TypeError, match="got int"):
        read_video(3, sample_indices_fn=every)
    with pytest.raises(ValueError, match="list of frame pictures is empty"):
        read_video([], sample_indices_fn=every)
    with pytest.raises(FileNotFoundError, match="no_frame"):
        read_video([tmp_path / "no_frame.png"], sample_indices_fn=every)
    folder = make_frame_folder(tmp_path / "frames", 2)
    Image.fromarray(numbered_frame(2, (40, 30))).save(folder / "frame_3.png")
    with pytest.raises(ValueError, match="differ in size"):
        read_video(folder, sample_indices_fn=every)
    frames, _ = read_video(folder, sample_indices_fn=every, size=(30, 40))
    assert numbers(frames) == [0, 1, 2]


def test_a_damaged_middle_is_passed_over(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.ts", 100, 25, codec="libx264", gop=10)
    content = bytearray(path.read_bytes())
    begin = len(content) // 2
    content[begin : begin + 2000] = np.random.default_rng(42).bytes(2000)
    path.write_bytes(content)
    frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: [0, 10, metadata.total_num_frames - 1])
    assert numbers(frames)[:2] == [0, 10] and numbers(frames)[2] >= 95


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_and_progress_do_not_change_frames(
    tmp_path: Path, num_threads: int, capsys: pytest.CaptureFixture
) -> None:
    path = make_video(tmp_path / "a.mp4", codec="libx264", b_frames=2)
    frames, _ = read_with_pyav(path, sample_indices_fn=every, num_threads=num_threads, progress=True)
    assert numbers(frames) == list(range(48))
    assert "48/48" in capsys.readouterr().err
    read_with_pyav(path, sample_indices_fn=every)
    assert capsys.readouterr().err == "", "short videos show no progress bar"


class FakeTorchcodec:
    """Stands in for torchcodec.decoders: the same frames through PyAV, so that the route can be tested anywhere."""

    wrong_count = False

    class VideoDecoder:
        def __init__(self, path: str, *, dimension_order: str, num_ffmpeg_threads: int) -> None:
            assert dimension_order == "NHWC"
            with av.open(path) as container:
                self.frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

        def __len__(self) -> int:
            return len(self.frames) + FakeTorchcodec.wrong_count

        def get_frames_at(self, indices: list[int]) -> types.SimpleNamespace:
            return types.SimpleNamespace(data=torch.from_numpy(self.frames[indices]))


def test_torchcodec_is_used_when_it_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(video_decoding, "torchcodec_decoders", lambda: FakeTorchcodec)
    frames, metadata = read_video(path, sample_indices_fn=lambda metadata: range(0, 48, 2), size=(24, 32))
    expected, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: range(0, 48, 2), size=(24, 32))
    assert metadata.video_backend == "torchcodec" and np.array_equal(frames, expected)
    monkeypatch.setattr(FakeTorchcodec, "wrong_count", True)
    with pytest.warns(UserWarning, match="counts 49 frames"):
        frames, metadata = read_video(path, sample_indices_fn=every, backend="torchcodec")
    assert metadata.video_backend == "pyav" and numbers(frames) == list(range(48))


def test_torchcodec_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(video_decoding, "torchcodec_decoders", lambda: "no FFmpeg")
    with pytest.raises(ImportError, match=r"no FFmpeg.*pyav"):
        read_video(path, sample_indices_fn=every, backend="torchcodec")
    _, metadata = read_video(path, sample_indices_fn=every)
    assert metadata.video_backend == "pyav"


@pytest.mark.skipif(
    isinstance(video_decoding.torchcodec_decoders(), str), reason="torchcodec cannot be imported on this machine"
)
@pytest.mark.parametrize("name", ["mpeg4.mp4", "b_frames.mp4", "vp9.webm"])
def test_torchcodec_gives_the_same_frames(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, 48, 8, **KINDS[name])
    frames, metadata = read_video(path, sample_indices_fn=every, backend="torchcodec")
    assert metadata.video_backend == "torchcodec" and numbers(frames) == list(range(48))


def test_memory_holds_only_kept_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two kept frames nothing else is turned into RGB."""
    path = make_video(tmp_path / "a.mp4", 100, 25, codec="libx264")
    resized = []
    original = video_decoding.resize_rgb
    monkeypatch.setattr(
        video_decoding, "resize_rgb", lambda frame, size: resized.append(frame.shape) or original(frame, size)
    )
    frames, _ = read_with_pyav(path, sample_indices_fn=lambda metadata: range(0, 100, 10), size=(16, 16))
    assert frames.shape == (10, 16, 16, 3) and frames.flags.owndata
    assert len(resized) == 10


@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_opened_video_gives_the_frames_of_read_video_one_by_one(tmp_path: Path, kind: str) -> None:
    source = make_video(tmp_path / "a.mp4") if kind == "video" else make_frame_folder(tmp_path / "frames", 24)
    options = {"sample_indices_fn": lambda metadata: [3, 3, 9, 20], "backend": "pyav"}
    expected, facts = read_video(source, **options)
    with opened_video(source, **options) as (metadata, frames):
        assert metadata == facts
        assert numbers([next(frames)]) == [3]
        rest = list(frames)
    assert np.array_equal(np.stack(rest), expected[1:])


def test_opened_video_decodes_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 96)
    decoded = list_decoded(monkeypatch)
    with opened_video(path, sample_indices_fn=every, backend="pyav") as (_, frames):
        next(frames)
        next(frames)
    # The decoder may hold a few frames more than were asked for, the rest of the file is left alone.
    assert len(decoded) < 20
    with (
        pytest.raises(ValueError, match="run backwards"),
        opened_video(path, sample_indices_fn=lambda metadata: [4, 2]),
    ):
        pass


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    for source in ("a.mp4", Path("a.mp4"), os.path.join(str(tmp_path), "a.mp4")):
        frames, _ = read_with_pyav(source, sample_indices_fn=lambda metadata: [9])
        assert numbers(frames) == [9]
