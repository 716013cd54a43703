"""A picture or a clip of an answer with times and boxes: spans on a time line, boxes on frames.

What is drawn are the typed results of a processor's `post_process_grounding`: spans in seconds of the source video,
boxes in its pixels. Nothing here knows an architecture.

Shapes: F frames, H x W pixels.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLIP_SUFFIXES = (".mp4",)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_FRAMES = 12  # of a page
MAX_CLIP_FRAMES = 1800  # longer videos are thinned, at their own pace
MAX_SIDE = 960  # pixels of a clip's frame, and of a picture
PAGE_WIDTH, COLUMNS = 960, 4
MARGIN, GAP, LINE, ROW = 16, 6, 22, 20
AXIS_TICKS = 6
LABEL_LENGTH = 60
INK, PAPER, GREY, RAIL, CURSOR = (20, 20, 20), (255, 255, 255), (110, 110, 110), (232, 232, 232), (200, 0, 0)
COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Mark:
    """One thing of an answer that has a place in time or in the picture.

    Attributes:
        label: text beside it.
        span: (start, end) seconds, or None.
        box: (x1, y1, x2, y2) pixels that hold for the whole span, or for the whole video without one; or None.
        times: seconds of `boxes`, ascending.
        boxes: (x1, y1, x2, y2) pixels, one per time.
    """

    label: str
    span: Numbers | None = None
    box: Numbers | None = None
    times: Numbers = ()
    boxes: tuple[Numbers, ...] = ()

    def box_at(self, time: float) -> Numbers | None:
        """Return the box at a time.

        Args:
            time: seconds.

        Returns:
            The box nearest in time, not farther than half the usual distance between two boxes; None where there is
            none.
        """
        if self.box is not None:
            return self.box if self.span is None or self.span[0] <= time <= self.span[1] else None
        if not self.times:
            return None
        place = int(np.argmin(np.abs(np.asarray(self.times) - time)))
        # Rounding of times must not leave gaps between neighbours.
        reach = float(np.median(np.diff(self.times))) * 0.51 if len(self.times) > 1 else 0.5
        return self.boxes[place] if abs(self.times[place] - time) <= reach else None


def collect_marks(grounding: Any) -> list[Mark]:
    """List what an answer holds that can be drawn.

    Args:
        grounding: object with `spans` (`start`, `end`), `boxes` (`x1`, `y1`, `x2`, `y2`), `tubes` (`times`, `boxes`)
            and `captions` (`text`, `span`, `box`, `tube`).

    Returns:
        Marks; what belongs to a caption is labelled with it and listed once.
    """
    marks, told = [], []
    for caption in grounding.captions:
        parts = (caption.span, caption.box, caption.tube)
        told += [part for part in parts if part is not None]
        if caption.tube is not None:
            marks.append(_mark(_shorten(caption.text), span=caption.span, tube=caption.tube))
        elif caption.span is not None or caption.box is not None:
            marks.append(_mark(_shorten(caption.text), span=caption.span, box=caption.box))
    rest = {
        name: [part for part in getattr(grounding, f"{name}s" if name != "box" else "boxes") if part not in told]
        for name in ("span", "box", "tube")
    }
    for name, parts in rest.items():
        marks += [
            _mark(name if len(parts) == 1 else f"{name} {number}", **{name: part})
            for number, part in enumerate(parts, start=1)
        ]
    return marks


def _mark(label: str, *, span: Any = None, box: Any = None, tube: Any = None) -> Mark:
    pairs = [] if tube is None else sorted(zip(tube.times, map(_corners, tube.boxes), strict=True))
    return Mark(
        label,
        span=None if span is None else (float(span.start), float(span.end)),
        box=None if box is None else _corners(box),
        times=tuple(float(time) for time, _ in pairs),
        boxes=tuple(box for _, box in pairs),
    )


def _corners(box: Any) -> Numbers:
    return tuple(float(value) for value in (box.x1, box.y1, box.x2, box.y2))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 3]}..."


def check_target(path: str | os.PathLike, *, is_video: bool = True) -> Path:
    """Refuse a file that could not be written, before minutes of work.

    Args:
        path: file to write.
        is_video: whether a video is drawn on; a still picture makes no clip.

    Returns:
        The path.

    Raises:
        ValueError: the ending names no format that can be written.
        OSError: there is no such folder, or the path is a folder.
    """
    path, allowed = Path(path), (*CLIP_SUFFIXES, *PICTURE_SUFFIXES) if is_video else PICTURE_SUFFIXES
    if path.suffix.lower() not in allowed:
        what = "an answer about a video" if is_video else "an answer about a picture"
        raise ValueError(f"The drawing of {what} can be a {', '.join(allowed)} file; got '{path}'.")
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the name of a file to draw into.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of '{path}' does not exist; make it first.")
    return path


def draw_grounding(
    grounding: Any,
    path: str | os.PathLike,
    *,
    video: Any = None,
    image: Any = None,
    start: float | None = None,
    end: float | None = None,
    title: str = "",
) -> Path:
    """Draw the spans, boxes and tubes of an answer.

    Args:
        grounding: typed result of one answer, see `collect_marks`; seconds of the source, pixels of the source.
        path: `.png`, `.jpg` or `.webp` for a page with a time line and frames, `.mp4` for the video with boxes and a
            time line under it; written under another name and renamed when it is whole.
        video: path, address or folder of pictures the answer is about.
        image: path or PIL image, in place of `video`.
        start: seconds; what comes before is not drawn.
        end: seconds; what comes after is not drawn.
        title: text above a page, for example the question.

    Returns:
        The path that was written.

    Raises:
        ValueError: the answer holds nothing to draw, or the ending names no format that can be written.
        OSError: the source or the folder to write into cannot be found.
    """
    if (video is None) == (image is None):
        raise ValueError("Give either video= or image=, what the answer is about.")
    path, marks = check_target(path, is_video=video is not None), collect_marks(grounding)
    if image is not None:
        marks = [mark for mark in marks if mark.box is not None]
    if not marks:
        reasons = "; ".join(f"{part.text!r}: {part.reason}" for part in grounding.malformed)
        wanted = "box" if image is not None else "span, box or tube"
        raise ValueError(
            f"The answer holds nothing to draw: no {wanted} could be read from {grounding.text!r}"
            f"{f' ({reasons})' if reasons else ''}. Ask a question for times or places."
        )
    if image is not None:
        return _save(_draw_image(image, marks, title), path)
    if path.suffix.lower() in CLIP_SUFFIXES:
        return _write_clip(video, marks, path, start=start, end=end)
    return _save(_draw_page(video, marks, start=start, end=end, title=title), path)


# ---------------------------------------------------------------------- parts of a drawing


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _draw_boxes(picture: Image.Image, boxes: Sequence[tuple[int, Numbers]], scale: float) -> None:
    """Draw boxes in source pixels on a picture that is scaled; each with the colour of its mark."""
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 240))
    for number, box in boxes:
        x1, y1, x2, y2 = (value * scale for value in box)
        edges = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        pen.rectangle(edges, outline=COLOURS[number % len(COLOURS)], width=width)


def _boxes_at(marks: Sequence[Mark], time: float) -> list[tuple[int, Numbers]]:
    found = ((number, mark.box_at(time)) for number, mark in enumerate(marks))
    return [(number, box) for number, box in found if box is not None]


def _timeline(marks: Sequence[Mark], begin: float, end: float, width: int) -> tuple[Image.Image, Any]:
    """Draw one row per mark and an axis in seconds.

    Returns:
        The strip, and a function from seconds to its x in pixels.
    """
    strip = Image.new("RGB", (width, ROW * (len(marks) + 1) + 2 * GAP), PAPER)
    pen, small = ImageDraw.Draw(strip), _font(11)
    left, right = MARGIN + round(0.28 * width), width - 2 * MARGIN
    length = max(end - begin, 1e-9)

    def place(time: float) -> float:
        return left + (right - left) * min(max((time - begin) / length, 0.0), 1.0)

    for number, mark in enumerate(marks):
        top, colour = GAP + number * ROW, COLOURS[number % len(COLOURS)]
        pen.text((MARGIN, top + 2), _fit(pen, mark.label, small, left - 2 * MARGIN), fill=INK, font=small)
        pen.rectangle((left, top + 3, right, top + ROW - 4), fill=RAIL)
        if mark.span is not None:
            pen.rectangle((place(mark.span[0]), top + 3, place(mark.span[1]), top + ROW - 4), fill=colour)
        for time in mark.times:
            pen.line((place(time), top + 6, place(time), top + ROW - 7), fill=INK if mark.span else colour, width=2)
        if mark.span is None and mark.box is not None:
            pen.rectangle((left, top + 3, right, top + ROW - 4), outline=colour, width=2)
    top = GAP + len(marks) * ROW
    for tick in range(AXIS_TICKS):
        time = begin + length * tick / (AXIS_TICKS - 1)
        pen.line((place(time), top - 2, place(time), top + 2), fill=GREY)
        pen.text((place(time), top + 3), f"{time:.1f} s", fill=GREY, font=small, anchor="mt")
    return strip, place


def _fit(pen: ImageDraw.ImageDraw, text: str, font: Any, room: float) -> str:
    if pen.textlength(text, font=font) <= room:
        return text
    while text and pen.textlength(f"{text}...", font=font) > room:
        text = text[:-1]
    return f"{text}..."


def _shrunk(frame_HWC: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(frame_HWC)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------- a page


def _frame_times(marks: Sequence[Mark], begin: float, end: float) -> list[float]:
    """Choose the times of the frames on a page: where there are boxes, else begin, middle and end of the spans."""
    times = [time for mark in marks for time in mark.times]
    times += [
        time
        for mark in marks
        if mark.span is not None and not mark.times
        for time in (mark.span[0], sum(mark.span) / 2, mark.span[1])
    ]
    if not times:
        times = np.linspace(begin, end, MAX_FRAMES + 2)[1:-1].tolist()
    times = sorted({time for time in times if begin <= time <= end})
    chosen = np.unique(np.linspace(0, len(times) - 1, min(MAX_FRAMES, len(times))).round().astype(int))
    return [times[i] for i in chosen]


def _nearest_indices(metadata: Any, times: Sequence[float]) -> list[int]:
    offset = metadata.start or 0.0
    rate = metadata.fps or 1.0
    last = metadata.total_num_frames - 1
    return [min(max(round((time - offset) * rate), 0), last) for time in times]


def _draw_page(
    video: Any, marks: Sequence[Mark], *, start: float | None, end: float | None, title: str
) -> Image.Image:
    from longvideo.processing.shared.video_io import describe_video, opened_video

    about = describe_video(video, start=start, end=end)
    begin = start or 0.0
    stop = begin + about.duration
    wanted = sorted(set(_nearest_indices(about, _frame_times(marks, begin, stop))))
    if not wanted:
        wanted = [0]
    strip, _ = _timeline(marks, begin, stop, PAGE_WIDTH)
    cell = (PAGE_WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
    pictures = []
    opened = opened_video(video, sample_indices_fn=lambda _: wanted, start=start, end=end, progress=False)
    with opened as (metadata, frames):
        for frame_HWC, time in zip(frames, metadata.frame_times, strict=True):
            scale = cell / frame_HWC.shape[1]
            picture = _shrunk(frame_HWC, (cell, max(1, round(frame_HWC.shape[0] * scale))))
            _draw_boxes(picture, _boxes_at(marks, time), scale)
            pictures.append((picture, f"{time:.2f} s"))
    return _compose(strip, pictures, title)


def _compose(strip: Image.Image, pictures: Sequence[tuple[Image.Image, str]], title: str) -> Image.Image:
    width, pitch = pictures[0][0].width, pictures[0][0].height + LINE
    head = MARGIN + (LINE if title else 0)
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (PAGE_WIDTH, head + strip.height + rows * (pitch + GAP) + MARGIN), PAPER)
    pen, small = ImageDraw.Draw(page), _font(11)
    if title:
        text = " ".join(title.split())
        pen.text((MARGIN, MARGIN), _fit(pen, text, _font(15), PAGE_WIDTH - 2 * MARGIN), fill=INK, font=_font(15))
    page.paste(strip, (0, head))
    for number, (picture, label) in enumerate(pictures):
        x = MARGIN + number % COLUMNS * (width + GAP)
        y = head + strip.height + number // COLUMNS * (pitch + GAP)
        page.paste(picture, (x, y))
        pen.text((x, y + picture.height + 2), label, fill=GREY, font=small)
    return page


def _draw_image(image: Any, marks: Sequence[Mark], title: str) -> Image.Image:
    """Draw the boxes on a still picture, with their labels under it."""
    picture = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    scale = min(1.0, MAX_SIDE / max(picture.size))
    picture = picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.BICUBIC)
    _draw_boxes(picture, [(number, mark.box) for number, mark in enumerate(marks) if mark.box is not None], scale)
    texts = [(title, INK)] if title else []
    texts += [(mark.label, COLOURS[number % len(COLOURS)]) for number, mark in enumerate(marks)]
    page = Image.new("RGB", (max(picture.width, 320), picture.height + GAP + ROW * len(texts)), PAPER)
    page.paste(picture, (0, 0))
    pen, small = ImageDraw.Draw(page), _font(13)
    for number, (text, colour) in enumerate(texts):
        line = _fit(pen, " ".join(text.split()), small, page.width - 2 * GAP)
        pen.text((GAP, picture.height + GAP + number * ROW), line, fill=colour, font=small)
    return page


def _save(page: Image.Image, path: Path) -> Path:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        page.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------- a clip


def _write_clip(video: Any, marks: Sequence[Mark], path: Path, *, start: float | None, end: float | None) -> Path:
    from longvideo.processing.shared.video_io import opened_video

    chosen: list[int] = []

    def choose(metadata: Any) -> list[int]:
        total = metadata.total_num_frames
        chosen[:] = np.unique(np.linspace(0, total - 1, min(total, MAX_CLIP_FRAMES)).round().astype(int)).tolist()
        return chosen

    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with opened_video(video, sample_indices_fn=choose, start=start, end=end, progress=False) as (about, frames):
            begin = start or 0.0
            pictures = _clip_frames(frames, about.frame_times, marks, begin, begin + about.duration)
            rate = Fraction(len(chosen) / max(about.duration, 1e-3)).limit_denominator(1000)
            _encode(temporary, pictures, max(rate, Fraction(1, 1000)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _clip_frames(
    frames: Iterator[np.ndarray], times: Sequence[float], marks: Sequence[Mark], begin: float, end: float
) -> Iterator[Image.Image]:
    """Yield frames with boxes, the time line under them, and where in it they are."""
    strip = place = None
    for frame_HWC, time in zip(frames, times, strict=True):
        height, width = frame_HWC.shape[:2]
        scale = min(1.0, MAX_SIDE / max(height, width))
        # 4:2:0 video has even sides.
        size = tuple(max(2, round(side * scale) // 2 * 2) for side in (width, height))
        picture = _shrunk(frame_HWC, size)
        _draw_boxes(picture, _boxes_at(marks, time), size[0] / width)
        if strip is None:
            # A small frame would leave no room for the words of the time line.
            strip, place = _timeline(marks, begin, end, max(size[0], 480))
        canvas = Image.new("RGB", (strip.width, size[1] + strip.height // 2 * 2), PAPER)
        canvas.paste(picture, ((strip.width - size[0]) // 2, 0))
        canvas.paste(strip, (0, size[1]))
        x = place(time)
        ImageDraw.Draw(canvas).line((x, size[1] + 2, x, size[1] + strip.height - ROW), fill=CURSOR, width=2)
        yield canvas


def _encode(path: Path, pictures: Iterator[Image.Image], rate: Fraction) -> None:
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        if codec == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream.bit_rate = 4_000_000
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
