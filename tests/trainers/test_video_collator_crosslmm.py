"""Batches of `VideoSFTCollator` for CrossLMM: labels, flat frames of any number, images, truncation."""

from typing import Any

import numpy as np
import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, VideoSFTCollator
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.trainers.toy_rows import SIZE, colour_row, two_turn_row, video_block

VIDEO_ID, IMAGE_ID = 4, 3
TEXT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_crosslmm_processor()


def image_row(num_images: int = 1) -> dict[str, Any]:
    picture = np.full((48, 80, 3), 90, dtype=np.uint8)
    user = [{"type": "image", "image": picture}] * num_images + [{"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "Grey."}]}


def supervised_text(processor: Any, batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


def test_labels_are_the_answers_and_no_visual_token(processor):
    row = two_turn_row("red", num_frames=3)
    row["messages"][2]["content"] = [video_block("green", 5), {"type": "text", "text": "And this?"}]
    batch = VideoSFTCollator(processor)([row, colour_row("blue", num_frames=1)])
    assert supervised_text(processor, batch, 0) == "It is red.<|im_end|>Yes\nI am.<|im_end|>"
    assert supervised_text(processor, batch, 1) == "blue<|im_end|>"
    kept = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert batch["video_num_frames"].tolist() == [3, 5, 1]
    assert (batch["input_ids"] == VIDEO_ID).sum(1).tolist() == [32, 4]
    everything = VideoSFTCollator(processor, mask="all")([row, image_row()])
    assert not torch.isin(everything["labels"], torch.tensor([VIDEO_ID, IMAGE_ID])).any()


def test_images_videos_and_text_in_one_batch(processor):
    rows = [image_row(2), TEXT_ROW, colour_row("red", num_frames=2), colour_row("blue", num_frames=2)]
    collator = VideoSFTCollator(processor)
    batch = collator(rows)
    # Flat with counts, whether or not the videos have one length.
    assert batch["pixel_values_videos"].shape == (4, 3, SIZE, SIZE)
    assert batch["video_num_frames"].tolist() == [2, 2] and batch["video_num_frames"].dtype == torch.int64
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [8, 0, 0, 0]
    assert (batch["input_ids"] == VIDEO_ID).sum(1).tolist() == [0, 0, 8, 8]
    names = {"input_ids", "attention_mask", "labels", "pixel_values", "pixel_values_videos", "video_num_frames"}
    assert set(batch) - {"mm_token_type_ids"} == names
    alone = [collator([row])["pixel_values_videos"] for row in rows[2:]]
    assert torch.equal(batch["pixel_values_videos"], torch.cat(alone))
