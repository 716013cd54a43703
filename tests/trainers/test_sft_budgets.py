"""Frame and token budget of a row: fewer frames, evenly spread, and never a cut through text or a video."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, VideoSFTCollator, VideoSFTConfig
from longvideo.trainers.budgets import frame_unit, planned_frames, share_frames
from tests.tiny import tiny_videochat_flash_processor
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.toy_rows import colour_row, two_turn_row, video_block
from tests.videos import make_video

VIDEO_ID = 4
UNITS = {
    "videochat_flash": (tiny_videochat_flash_processor, 4),
    "longvu": (tiny_longvu_processor, 1),
    "llava_st": (tiny_llava_st_processor, 3),
    "crosslmm": (tiny_crosslmm_processor, 1),
}


@pytest.fixture(scope="module")
def crosslmm() -> Any:
    return tiny_crosslmm_processor()


def file_row(path: Any, answer: str = "Stripes.", **options: Any) -> dict[str, Any]:
    block = {"type": "video", "path": str(path), **options}
    user = [block, {"type": "text", "text": "What?"}]
    return {"id": "film", "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("name", UNITS)
def test_unit_of_frames_of_every_architecture(name):
    make, unit = UNITS[name]
    assert frame_unit(make()) == unit


def test_shares_are_the_largest_that_fit():
    assert share_frames([8, 4], 12) == [8, 4]
    assert share_frames([8, 4], 6) == [4, 2]
    assert share_frames([100, 100], 33, size_of=lambda frames: frames // 4 * 2, unit=4) == [32, 32]
    assert share_frames([16, 1], 3) == [2, 1]
    assert share_frames([8, 8], 7, unit=4) is None
    assert share_frames([3], -5) is None


def test_long_video_keeps_text_and_loses_frames(crosslmm):
    row = two_turn_row("red", num_frames=12)
    full = VideoSFTCollator(crosslmm)([row])
    length, tokens = full["input_ids"].shape[1], crosslmm.get_num_video_tokens(1)
    cut = VideoSFTCollator(crosslmm, max_length=length - 5 * tokens - 1)([row])
    assert cut["video_num_frames"].tolist() == [6]  # with seven there is no room for one token
    assert cut["input_ids"].shape[1] == length - 6 * tokens
    for key in ("input_ids", "labels"):
        text = [batch[key][0][batch["input_ids"][0] != VIDEO_ID] for batch in (full, cut)]
        assert torch.equal(*text), key
    # Evenly spread: one frame of each pair.
    before, after = full["pixel_values_videos"], cut["pixel_values_videos"]
    frames = [place for place in range(12) for kept in after if before[place].equal(kept)]
    assert len(frames) == 6 and {b - a for a, b in pairwise(frames)} == {2}


def test_file_is_read_once_with_the_frames_that_fit(crosslmm, tmp_path, monkeypatch):
    path = make_video(tmp_path / "clip.mp4", num_frames=96, fps=8)
    row, reads = file_row(path), []
    plain = VideoSFTCollator(crosslmm)([row])
    assert plain["video_num_frames"].tolist() == [12]
    block = row["messages"][0]["content"][0]
    assert planned_frames(block, crosslmm, {}) == 12
    assert planned_frames({**block, "nframes": 5}, crosslmm, {}) == 5
    assert planned_frames({**block, "video_start": 2.0, "video_end": 8.0}, crosslmm, {}) == 6
    assert planned_frames({"type": "video", "path": "absent.mp4"}, crosslmm, {}) is None
    original = type(crosslmm.video_processor).preprocess

    def count(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(type(crosslmm.video_processor), "preprocess", count)
    limit = plain["input_ids"].shape[1] - 7 * crosslmm.get_num_video_tokens(1)
    cut = VideoSFTCollator(crosslmm, max_length=limit)([row])
    assert cut["video_num_frames"].tolist() == [5] and cut["input_ids"].shape[1] == limit
    assert len(reads) == 1


@pytest.mark.parametrize("name", UNITS)
def test_frames_in_memory_are_foretold(name, crosslmm):
    """As many as the processor makes of them: kept, filled up to a clip, or sampled by their rate."""
    processor = UNITS[name][0]()
    frames = np.zeros((25, 32, 32, 3), dtype=np.uint8)
    rated = {"video_metadata": {"fps": 5.0}}
    blocks = [{}, rated, {"nframes": 9, **rated}, {"timestamps": [float(i) for i in range(25)]}]
    for options in blocks:
        block = {"type": "video", "video": frames, **options}
        messages = [{"role": "user", "content": [block]}, {"role": "assistant", "content": "Black."}]
        batch = VideoSFTCollator(processor)([{"messages": messages}])
        pixels = batch["pixel_values_videos"]
        read = int(batch["video_num_frames"][0]) if "video_num_frames" in batch else pixels.shape[1]
        assert planned_frames(block, processor, {}) == read, options
        # A budget that is wide enough changes nothing.
        again = VideoSFTCollator(processor, max_length=10**5, max_frames_per_row=28)([{"messages": messages}])
        assert torch.equal(again["pixel_values_videos"], pixels), options


def test_frames_of_all_videos_of_a_row_share_the_room(crosslmm):
    row = colour_row("red", num_frames=12)
    row["messages"][0]["content"].insert(0, video_block("blue", 6))
    batch = VideoSFTCollator(crosslmm, max_frames_per_row=9)([row])
    assert batch["video_num_frames"].tolist() == [3, 6]
    with pytest.raises(ValueError, match=r"'red-12'\) has 2 videos, which need at least 1 frames .*row=1"):
        VideoSFTCollator(crosslmm, max_frames_per_row=1)([row])


@pytest.mark.parametrize("name", UNITS)
def test_frame_budget_of_every_architecture(name):
    processor = UNITS[name][0]()
    rows = [colour_row("red", num_frames=12), colour_row("blue", num_frames=4)]
    expected = {"videochat_flash": [4, 4], "longvu": [5, 4], "crosslmm": [5, 4]}.get(name)
    if expected is None:
        with pytest.raises(ValueError, match=r"'red-12'\) is too large .*row=5 with \[6\] frames .* takes no fewer"):
            VideoSFTCollator(processor, max_frames_per_row=5)(rows)
        return
    batch = VideoSFTCollator(processor, max_frames_per_row=5)(rows)
    assert batch["video_num_frames"].tolist() == expected
    assert (batch["labels"] != IGNORE_INDEX).any(1).all()


def test_a_model_with_one_number_of_frames_takes_no_fewer():
    """Thinned out, the model would refuse them: LLaVA-ST takes `num_frames` of every video."""
    processor = tiny_llava_st_processor()
    rows = [colour_row("red", answer="red" * 12), colour_row("blue")]
    full = VideoSFTCollator(processor)(rows)
    assert full["pixel_values_videos"].shape[:2] == (2, 6)
    length = full["input_ids"].shape[1]
    assert VideoSFTCollator(processor, max_length=length)(rows)["pixel_values_videos"].shape[:2] == (2, 6)
    with pytest.raises(ValueError, match=rf"'red-\d+'\) is too large for max_length={length - 1} .*takes no fewer"):
        VideoSFTCollator(processor, max_length=length - 1)(rows)


def test_clips_stay_whole():
    processor = tiny_videochat_flash_processor()
    full = VideoSFTCollator(processor)([colour_row("red", num_frames=16)])
    batch = VideoSFTCollator(processor, max_length=full["input_ids"].shape[1] - 20)([colour_row("red", num_frames=16)])
    assert batch["video_num_frames"].tolist() == [8]


def test_text_that_is_too_long_is_an_error(crosslmm):
    row = colour_row("red", num_frames=2, answer="red" * 40)
    length = VideoSFTCollator(crosslmm)([row])["input_ids"].shape[1]
    least = length - crosslmm.get_num_video_tokens(1)
    assert VideoSFTCollator(crosslmm, max_length=least)([row])["video_num_frames"].tolist() == [1]
    with pytest.raises(ValueError, match=rf"'red-2'\) has .* over max_length={least - 1}\. Text is never cut"):
        VideoSFTCollator(crosslmm, max_length=least - 1)([row])
    text = {"id": 3, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho" * 50}]}
    with pytest.raises(ValueError, match=r"\(id 3\) has \d+ tokens of text and images, more than max_length=60"):
        VideoSFTCollator(crosslmm, max_length=60)([text])
    # Where the model inserts visual tokens, only text is counted.
    with pytest.raises(ValueError, match=r"'red-2'\) has \d+ tokens of text and images, more than max_length=60"):
        VideoSFTCollator(tiny_longvu_processor(), max_length=60)([row])


def test_frames_that_must_all_be_kept_are_an_error(crosslmm, tmp_path):
    path = make_video(tmp_path / "clip.mp4", num_frames=24, fps=8)
    collator = VideoSFTCollator(crosslmm, max_frames_per_row=8, processor_kwargs={"do_sample_frames": False})
    with pytest.raises(ValueError, match=r"'film'\) has \d+ tokens with \[24\] frames .*do_sample_frames=False"):
        collator([file_row(path)])


def test_frames_with_metadata_and_lists_of_pictures_are_thinned_out(crosslmm, tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    paths = []
    for number, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(frame).save(paths[-1])
    known = {"frames_indices": list(range(0, 18, 2)), "fps": 2.0, "total_num_frames": 18}
    blocks = [
        {"type": "video", "video": paths},
        {"type": "video", "video": frames, "video_metadata": known},
        {"type": "video", "video": list(frames)},
    ]
    collator, whole = VideoSFTCollator(crosslmm, max_frames_per_row=3), VideoSFTCollator(crosslmm)
    for block in blocks:
        messages = [{"role": "user", "content": [block]}, {"role": "assistant", "content": "Noise."}]
        batch = collator([{"messages": messages}])
        assert batch["video_num_frames"].tolist() == [3]
        all_frames = whole([{"messages": messages}])["pixel_values_videos"]
        assert torch.equal(batch["pixel_values_videos"], all_frames[[1, 4, 7]])


def test_settings_are_checked(crosslmm):
    with pytest.raises(ValueError, match="max_length=0 must be at least 1 token"):
        VideoSFTCollator(crosslmm, max_length=0)
    with pytest.raises(ValueError, match="max_frames_per_row=0 must be at least 1 frame"):
        VideoSFTCollator(crosslmm, max_frames_per_row=0)
    with pytest.raises(ValueError, match="on_bad_video='ignore' is unknown"):
        VideoSFTConfig(output_dir="unused", on_bad_video="ignore")
