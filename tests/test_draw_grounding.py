"""Pictures and clips of answers with times and boxes."""

from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from longvideo import draw_grounding as drawing
from tests.videos import make_video

SIZE, FRAMES, FPS = (64, 48), 40, 8
RED = drawing.COLOURS[0]


def span(start, end):
    return SimpleNamespace(start=start, end=end)


def box(x1=16, y1=8, x2=48, y2=40):
    return SimpleNamespace(x1=x1, y1=y1, x2=x2, y2=y2)


def grounding(**parts):
    """A result of `post_process_grounding` with the given parts."""
    empty = {"text": "the answer", "spans": (), "boxes": (), "tubes": (), "captions": (), "malformed": ()}
    return SimpleNamespace(**{**empty, **parts})


def tube(times=(1.0, 2.0, 3.0), boxes=None):
    return SimpleNamespace(times=times, boxes=boxes or [box(x1=8 * place) for place in range(len(times))])


def caption(text="a cat jumps", **parts):
    return SimpleNamespace(**{"text": text, "span": None, "box": None, "tube": None, **parts})


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=FRAMES, fps=FPS, size=SIZE))


def count(pixels, colour, tolerance=0):
    return int((np.abs(np.asarray(pixels).astype(int) - np.array(colour)).max(-1) <= tolerance).sum())


def test_marks_of_captions_are_listed_once():
    first, second, place = span(1.0, 2.0), span(3.0, 4.0), box()
    result = grounding(spans=(first, second), boxes=(place,), tubes=(tube(),), captions=(caption(span=first),))
    marks = drawing.collect_marks(result)
    assert [mark.label for mark in marks] == ["a cat jumps", "span", "box", "tube"]
    assert [mark.span for mark in marks] == [(1.0, 2.0), (3.0, 4.0), None, None]
    two = drawing.collect_marks(grounding(spans=(first, second), captions=(caption("said only"),)))
    assert [mark.label for mark in two] == ["span 1", "span 2"]
    whole = drawing.collect_marks(grounding(captions=(caption("x " * 90, span=first, tube=tube()),)))
    assert len(whole) == 1 and len(whole[0].label) == drawing.LABEL_LENGTH and whole[0].times == (1.0, 2.0, 3.0)


def test_boxes_at_times():
    mark = drawing.collect_marks(grounding(tubes=(tube((3.0, 1.0, 2.0)),)))[0]
    assert mark.times == (1.0, 2.0, 3.0) and mark.boxes[0][0] == 8.0, "sorted with their times"
    shown = [mark.box_at(time) is not None for time in (0.4, 0.6, 1.4, 1.6, 3.4, 3.6)]
    assert shown == [False, True, True, True, True, False]
    assert mark.box_at(1.6) == mark.boxes[1]
    held = drawing.Mark("x", span=(1.0, 2.0), box=(0.0, 0.0, 1.0, 1.0))
    assert held.box_at(1.5) and not held.box_at(2.5)
    assert drawing.Mark("x", box=(0.0, 0.0, 1.0, 1.0)).box_at(100.0)
    lone = drawing.Mark("x", times=(2.0,), boxes=((0.0, 0.0, 1.0, 1.0),))
    assert lone.box_at(2.2) and not lone.box_at(3.0)


def test_spans_lie_where_they_should_on_the_time_line():
    strip, place = drawing._timeline([drawing.Mark("half", span=(0.0, 5.0))], 0.0, 10.0, 960)
    pixels = np.asarray(strip)
    columns = np.nonzero((pixels == RED).all(-1).any(0))[0]
    assert columns.min() == round(place(0.0)) and abs(columns.max() - place(5.0)) <= 1
    assert place(10.0) - place(5.0) == pytest.approx(place(5.0) - place(0.0))
    assert place(-3.0) == place(0.0) and place(11.0) == place(10.0)


def test_page_shows_boxes_on_frames(video, tmp_path):
    target = tmp_path / "out.png"
    assert drawing.draw_grounding(grounding(tubes=(tube(),)), target, video=video, title="Where?") == target
    page = np.asarray(Image.open(target))
    assert page.shape[1] == drawing.PAGE_WIDTH and [path.name for path in tmp_path.iterdir()] == ["out.png"]
    cell = (drawing.PAGE_WIDTH - 2 * drawing.MARGIN - 3 * drawing.GAP) // 4
    top = drawing.MARGIN + drawing.LINE + drawing.ROW * 2 + 2 * drawing.GAP
    frames = [
        page[top : top + cell * 48 // 64, drawing.MARGIN + n * (cell + drawing.GAP) :][:, :cell] for n in range(4)
    ]
    # The left edge moves 8 source pixels per box; there is no fourth frame.
    edges = [int(np.nonzero((frame == RED).all(-1).sum(0) > 50)[0].min()) for frame in frames[:3]]
    # Rounding of corners to pixels.
    assert np.allclose(edges, [8 * n * cell / 64 for n in range(3)], atol=1)
    assert count(frames[3], (255, 255, 255)) == frames[3].size // 3


def test_page_without_boxes_shows_begin_middle_and_end(video, tmp_path):
    page = drawing._draw_page(video, drawing.collect_marks(grounding(spans=(span(1.0, 3.0),))), start=None, end=None,
                              title="")  # fmt: skip
    assert count(page, RED) > 1000
    times = drawing._frame_times([drawing.Mark("x", span=(1.0, 3.0))], 0.0, 5.0)
    assert times == [1.0, 2.0, 3.0]
    assert len(drawing._frame_times([drawing.Mark("x", box=(0, 0, 1, 1))], 0.0, 5.0)) == drawing.MAX_FRAMES
    many = drawing._frame_times([drawing.Mark("x", times=tuple(np.arange(0, 5, 0.01)))], 0.0, 5.0)
    assert len(many) == drawing.MAX_FRAMES and many[0] == 0.0 and many[-1] == pytest.approx(4.99)
    outside = drawing.Mark("x", span=(7.0, 9.0))
    drawing.draw_grounding(grounding(spans=(span(7.0, 9.0),)), tmp_path / "out.jpg", video=video)
    assert drawing._frame_times([outside], 0.0, 5.0) == []


def read_clip(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.average_rate)


def test_clip_has_boxes_and_a_moving_cursor(tmp_path):
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    make_video(source, fps=FPS, size=SIZE, frames=[np.full((48, 64, 3), 255, np.uint8)] * FRAMES)
    drawing.draw_grounding(grounding(tubes=(tube(),), spans=(span(1.0, 3.0),)), target, video=str(source))
    frames, rate = read_clip(target)
    assert len(frames) == FRAMES and rate == pytest.approx(FPS, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    # Lossy 4:2:0 video: what is not white is a box.
    shown = [count(frame[: SIZE[1]], (60, 60, 60), 120) for frame in frames]
    # Boxes from 0.5 to 3.5 s; the number of a frame is an eighth of a second.
    assert [n > 20 for n in shown] == [4 <= n <= 28 for n in range(FRAMES)]
    rows = [frame[SIZE[1] + 4 : SIZE[1] + 6].astype(int) for frame in frames]
    cursors = [np.nonzero((row[..., 0] - row[..., 1] > 60).all(0))[0].mean() for row in (rows[0], rows[-1])]
    assert cursors[1] - cursors[0] > 250


def test_clip_of_a_part_and_of_a_long_video(video, tmp_path, monkeypatch):
    target = tmp_path / "out.mp4"
    drawing.draw_grounding(grounding(spans=(span(1.0, 3.0),)), target, video=video, start=1.0, end=3.0)
    assert len(read_clip(target)[0]) == 2 * FPS
    monkeypatch.setattr(drawing, "MAX_CLIP_FRAMES", 10)
    drawing.draw_grounding(grounding(spans=(span(1.0, 3.0),)), target, video=video)
    frames, rate = read_clip(target)
    assert len(frames) == 10 and rate == pytest.approx(10 / (FRAMES / FPS), rel=0.01), "as long as the video"


def test_picture_with_boxes(tmp_path):
    source = tmp_path / "in.png"
    Image.new("RGB", (400, 300), (255, 255, 255)).save(source)
    result = grounding(boxes=(box(40, 30, 200, 150),), captions=(caption("the dog", box=box(10, 10, 30, 30)),))
    drawing.draw_grounding(result, tmp_path / "out.png", image=source, title="Where is it?")
    page = np.asarray(Image.open(tmp_path / "out.png"))[:300]
    rows, columns = np.nonzero((page == drawing.COLOURS[1]).all(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (40, 30, 200, 150)
    drawing.draw_grounding(result, tmp_path / "small.png", image=Image.new("RGB", (4000, 3000)))
    assert Image.open(tmp_path / "small.png").width == drawing.MAX_SIDE
    with pytest.raises(ValueError, match="no box could be read"):
        drawing.draw_grounding(grounding(spans=(span(0, 1),)), tmp_path / "none.png", image=source)


def test_what_cannot_be_drawn_is_said(video, tmp_path):
    bad = SimpleNamespace(text="{0.9,0.1}", reason="the end comes before the start")
    with pytest.raises(ValueError, match=r"nothing to draw.*the answer.*end comes before the start"):
        drawing.draw_grounding(grounding(malformed=(bad,)), tmp_path / "out.png", video=video)
    full = grounding(spans=(span(0, 1),))
    for name, error, text in (
        ("out.gif", ValueError, r"\.mp4, \.png"),
        ("out", ValueError, r"\.mp4"),
        ("no/out.png", FileNotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=text):
            drawing.draw_grounding(full, tmp_path / name, video=video)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        drawing.check_target(tmp_path / "folder.png")
    with pytest.raises(ValueError, match=r"about a picture can be a \.png"):
        drawing.draw_grounding(grounding(boxes=(box(),)), tmp_path / "out.mp4", image="in.png")
    with pytest.raises(ValueError, match="either video= or image="):
        drawing.draw_grounding(full, tmp_path / "out.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        drawing.draw_grounding(full, tmp_path / "out.mp4", video="missing.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
