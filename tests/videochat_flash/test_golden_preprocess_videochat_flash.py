"""Frame indices, pixels, tiles and prompts against recordings of the original code; sizes are read from each case."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared.pixels import best_resolution
from longvideo.processing.shared.timestamps import TIME_MESSAGE, format_time_message
from longvideo.processing.videochat_flash import VideoChatFlashImageProcessor, VideoChatFlashVideoProcessor
from longvideo.processing.videochat_flash.image_processing_videochat_flash import default_pinpoints
from tests.tiny import tiny_videochat_flash_processor

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
CASES = sorted(path.parent for path in (GOLDEN / "videochat_flash").rglob("expected.json"))
# fp32 on CPU: the same bytes after PIL, so that only the order of two float operations differs.
PIXEL_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES or [None], ids=lambda path: path.name if path else "absent")
def case(request: pytest.FixtureRequest) -> dict:
    if request.param is None:
        pytest.skip(f"no expected.json below {GOLDEN / 'videochat_flash'}; set LONGVIDEO_GOLDEN to the recordings")
    tensors = {name: load_file(request.param / f"{name}.safetensors") for name in ("inputs", "expected")}
    return {**tensors, "strings": json.loads((request.param / "expected.json").read_text())}


def part(container: dict, key: str) -> object:
    if key not in container:
        pytest.skip(f"the case has no {key}")
    return container[key]


def test_frame_indices(case):
    checked = 0
    for entry in part(case["strings"], "frame_indices"):
        # What is not a multiple of the clip length is followed by the sampler alone; the processor rounds it.
        if entry["sample"] != "dynamic_fps1" or entry["max_num_frames"] % entry["local_num_frames"]:
            continue
        video_processor = VideoChatFlashVideoProcessor(
            mm_local_num_frames=entry["local_num_frames"],
            min_frames=entry["min_num_frames"],
            max_frames=entry["max_num_frames"],
        )
        if entry["min_num_frames"] > entry["max_num_frames"]:
            continue
        indices = video_processor.sample_frames(
            VideoMetadata(total_num_frames=entry["total_frames"], fps=entry["fps"])
        )
        first, last = entry.get("first", []), entry.get("last", [])
        assert (len(indices), int(indices.sum())) == (entry["n"], entry["sum"]), entry
        assert indices[: len(first)].tolist() == first and indices[len(indices) - len(last) :].tolist() == last, entry
        checked += 1
    assert checked


def test_video_pixels(case):
    frames, expected = part(case["inputs"], "frames_uint8"), part(case["expected"], "pixel_values")
    video_processor = VideoChatFlashVideoProcessor(
        size={"height": expected.shape[-2], "width": expected.shape[-1]}, mm_local_num_frames=1
    )
    pixels = video_processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    torch.testing.assert_close(pixels, expected, atol=PIXEL_TOLERANCE, rtol=0)


def test_grid_of_image_tiles(case):
    for entry in part(case["strings"], "anyres_grid"):
        (full_width, full_height), (cols, rows) = entry["best_resolution_wh"], entry["grid_wh"]
        height, width = full_height // rows, full_width // cols
        chosen = best_resolution(*entry["image_size_wh"], default_pinpoints(height, width))
        assert chosen == (full_width, full_height), entry
        image_processor = VideoChatFlashImageProcessor(size={"height": height, "width": width})
        assert image_processor.get_number_of_tiles(*entry["image_size_wh"][::-1]) == 1 + rows * cols, entry


def test_image_tiles(case):
    image, means = part(case["inputs"], "anyres_image_uint8"), part(case["expected"], "anyres_tiles_mean")
    corners = part(case["expected"], "anyres_tiles_corner8")
    entry = part(case["strings"], "anyres_grid")[0]
    width, height = (full // count for full, count in zip(entry["best_resolution_wh"], entry["grid_wh"], strict=True))
    image_processor = VideoChatFlashImageProcessor(size={"height": height, "width": width})
    inputs = image_processor([image.numpy()], return_tensors="pt")
    tiles = inputs["pixel_values"]
    assert len(tiles) == len(means) == 1 + int(inputs["image_grids"][0].prod())
    torch.testing.assert_close(tiles.mean((2, 3)), means, atol=PIXEL_TOLERANCE, rtol=0)
    rows, cols = corners.shape[-2:]
    torch.testing.assert_close(tiles[:, :, :rows, :cols], corners, atol=PIXEL_TOLERANCE, rtol=0)


def test_time_messages(case):
    for entry in part(case["strings"], "time_messages"):
        message = format_time_message(TIME_MESSAGE, duration=entry["duration"], num_frames=entry["n_frames"])
        assert message == entry["message"]


def test_prompts(case):
    recorded = part(case["strings"], "chat")
    spoken = recorded["second_turn_prompt"].removeprefix(recorded["prompt"])
    answer, rest = spoken.split("<|im_end|>\n<|im_start|>user\n")
    second_question = rest.split("<|im_end|>")[0]
    message = next(
        entry for entry in case["strings"]["time_messages"] if entry["message"] in recorded["first_turn_user_text"]
    )
    question = recorded["first_turn_user_text"].split(message["message"] + " ")[1]
    processor = tiny_videochat_flash_processor()
    first = [{"role": "user", "content": [{"type": "video", "path": "unread"}, {"type": "text", "text": question}]}]
    second = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [{"type": "text", "text": second_question}]},
    ]
    # The originals write one marker for a video and put the message into the text; here the processor expands both.
    video = {
        "pixel_values_videos": [[None] * message["n_frames"]],
        "video_metadata": [VideoMetadata(total_num_frames=1, duration=message["duration"])],
    }
    expanded = processor.replace_video_token(video, video_idx=0)
    placeholders = processor.video_token * processor.get_num_video_tokens(message["n_frames"])
    assert expanded.startswith(placeholders)
    for conversation, expected in ((first, recorded["prompt"]), (second, recorded["second_turn_prompt"])):
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert text.replace(processor.video_token, expanded).replace(placeholders, "<image>") == expected
