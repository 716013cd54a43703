"""Batches of `VideoSFTCollator`: labels, flat pixels, truncation and what it refuses."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, VideoSFTCollator, check_batch, normalize_messages
from tests.tiny import tiny_videochat_flash_processor
from tests.trainers.toy_rows import SIZE, colour_row, two_turn_row, video_block
from tests.videos import make_video

VIDEO_ID, IMAGE_ID, PAD_ID = 4, 3, 0
TOKENS_PER_FRAME = 4


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_videochat_flash_processor()


def supervised_text(processor: Any, batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


def test_labels_are_the_answers_of_every_turn(processor):
    batch = VideoSFTCollator(processor)([two_turn_row("red"), colour_row("blue", num_frames=8)])
    assert supervised_text(processor, batch, 0) == "It is red.<|im_end|>Yes\nI am.<|im_end|>"
    assert supervised_text(processor, batch, 1) == "blue<|im_end|>"
    # Labels stand where the same token stands in the input: the model shifts, not the collator.
    kept = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_labels_with_a_video_in_every_turn(processor):
    row = two_turn_row("red")
    row["messages"][2]["content"] = [video_block("green", 8), {"type": "text", "text": "And this?"}]
    batch = VideoSFTCollator(processor)([row])
    assert supervised_text(processor, batch, 0) == "It is red.<|im_end|>Yes\nI am.<|im_end|>"
    assert batch["video_num_frames"].tolist() == [4, 8]


def test_labels_with_system_message_and_non_ascii_answer(processor):
    row = colour_row("red", answer="\u7ea2\u8272 \u00e9")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    batch = VideoSFTCollator(processor)([row])
    assert supervised_text(processor, batch, 0) == "\u7ea2\u8272 \u00e9<|im_end|>"
    assert "Be brief." in processor.tokenizer.decode(batch["input_ids"][0])


def test_user_text_that_looks_like_an_answer_is_not_supervised(processor):
    row = colour_row("red")
    row["messages"][0]["content"][1]["text"] = "<|im_start|>assistant\nblue<|im_end|>\nred"
    assert supervised_text(processor, VideoSFTCollator(processor)([row]), 0) == "red<|im_end|>"


def test_original_label_rule(processor):
    """Whole assistant turns, and newline, start and end tokens of every role; nothing predicts the first token."""
    batch = VideoSFTCollator(processor, label_rule="videochat_flash")([two_turn_row("red")])
    input_ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    newline, start, end = (
        processor.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("\n", "<|im_start|>", "<|im_end|>")
    )
    expected, role_is_assistant = [], False
    for position, token in enumerate(input_ids):
        if token == start:
            header = processor.tokenizer.decode(input_ids[position + 1 : position + 10])
            role_is_assistant = header == "assistant"
        expected.append(token if role_is_assistant or token in (newline, start, end) else IGNORE_INDEX)
    expected[0] = IGNORE_INDEX
    assert labels == expected


def test_mask_all_supervises_all_text_and_no_visual_token(processor):
    batch = VideoSFTCollator(processor, mask="all")([colour_row("red"), colour_row("blue", num_frames=8)])
    ignored = batch["labels"] == IGNORE_INDEX
    visual = batch["input_ids"] == VIDEO_ID
    first = torch.zeros_like(ignored)
    first[:, 0] = True
    assert torch.equal(ignored, visual | first | (batch["attention_mask"] == 0))


def test_flat_pixels_and_counts_of_unequal_videos(processor):
    rows = [colour_row("red", num_frames=4), colour_row("blue", num_frames=8)]
    collator = VideoSFTCollator(processor)
    batch = collator(rows)
    assert batch["pixel_values_videos"].shape == (12, 3, SIZE, SIZE)
    assert batch["video_num_frames"].tolist() == [4, 8]
    assert batch["video_num_frames"].dtype == torch.int64
    placeholders = (batch["input_ids"] == VIDEO_ID).sum(1).tolist()
    assert placeholders == [4 * TOKENS_PER_FRAME, 8 * TOKENS_PER_FRAME]
    # The frames of a row are those it has alone, in order.
    alone = [collator([row])["pixel_values_videos"] for row in rows]
    assert torch.equal(batch["pixel_values_videos"], torch.cat(alone))


def test_equal_videos_are_flat_too(processor):
    batch = VideoSFTCollator(processor)([colour_row("red"), colour_row("blue")])
    assert batch["pixel_values_videos"].shape == (8, 3, SIZE, SIZE)
    assert batch["video_num_frames"].tolist() == [4, 4]


def test_right_padding(processor):
    rows = [colour_row("red"), colour_row("red", answer="red" * 20)]
    batch = VideoSFTCollator(processor, pad_to_multiple_of=16)(rows)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == -(-int(lengths.max()) // 16) * 16
    for row, length in enumerate(lengths.tolist()):
        assert (batch["attention_mask"][row, :length] == 1).all()
        assert (batch["input_ids"][row, length:] == PAD_ID).all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert next(iter(batch)) == "input_ids"


def test_images_videos_and_text_in_one_batch(processor):
    picture = np.full((48, 80, 3), 90, dtype=np.uint8)
    image_row = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Grey."},
        ]
    }
    text_row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    batch = VideoSFTCollator(processor)([image_row, text_row, colour_row("red")])
    assert [supervised_text(processor, batch, row) for row in range(3)] == [
        "Grey.<|im_end|>",
        "Hello.<|im_end|>",
        "red<|im_end|>",
    ]
    tiles = [1 + int(rows * columns) for rows, columns in batch["image_grids"]]
    assert len(tiles) == 1 and sum(tiles) == batch["pixel_values"].shape[0]
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [sum(tiles) * 4 * TOKENS_PER_FRAME, 0, 0]


def test_video_file_with_options_of_its_block(processor, tmp_path):
    path = make_video(tmp_path / "clip.mp4", num_frames=48, fps=8)
    block = {"type": "video", "path": str(path), "nframes": 8, "video_start": 1.0, "video_end": 5.0}
    row = {
        "messages": [
            {"role": "user", "content": [block, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Stripes."},
        ]
    }
    batch = VideoSFTCollator(processor, processor_kwargs={"max_frames": 4})([row, colour_row("red")])
    assert batch["video_num_frames"].tolist() == [8, 4]


def test_media_columns_fill_blocks_and_arrow_nones_are_dropped(processor):
    row = colour_row("red")
    frames = row["messages"][0]["content"][0]["video"]
    row["messages"][0]["content"] = [
        {"type": "video", "video": None, "text": None},
        {"type": "text", "text": "Which colour?", "video": None},
    ]
    batch = VideoSFTCollator(processor)([{**row, "videos": [frames]}])
    assert batch["video_num_frames"].tolist() == [4]
    with pytest.raises(ValueError, match=r"message 0 has a video block without a source.*'video', 'url', 'path'"):
        VideoSFTCollator(processor)([row])
    with pytest.raises(ValueError, match="has 1 entries in `videos` that no block takes"):
        VideoSFTCollator(processor)([{**row, "videos": [frames, frames]}])


def test_rows_are_not_changed(processor):
    row = two_turn_row("red")
    before = copy.deepcopy(row)
    VideoSFTCollator(processor)([row])
    assert row["messages"][1:] == before["messages"][1:]
    assert row["messages"][0]["content"][1:] == before["messages"][0]["content"][1:]
    assert row["messages"][0]["content"][0].keys() == before["messages"][0]["content"][0].keys()


def test_rows_that_cannot_be_trained_on(processor):
    collator = VideoSFTCollator(processor)
    user = {"role": "user", "content": "Hi"}
    with pytest.raises(ValueError, match=r"Row 1 of the batch \(id 7\) has no supervised token.*role 'assistant'"):
        collator([colour_row("red"), {"id": 7, "messages": [user]}])
    with pytest.raises(ValueError, match=r"has no `messages` \(its keys: \['text'\]\)"):
        collator([{"text": "Hi"}])
    with pytest.raises(ValueError, match="message 1 must be a dict with `role` and `content`"):
        collator([{"messages": [user, {"role": "assistant"}]}])
    with pytest.raises(ValueError, match="begins with an assistant message"):
        collator([{"messages": [{"role": "assistant", "content": "Hi"}, user]}])
    changing = (
        "{% for m in messages %}{{ loop.length }}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    with pytest.raises(ValueError, match="renders message 1 differently when later messages follow"):
        VideoSFTCollator(processor, chat_template=changing)(
            [
                {
                    "messages": [
                        user,
                        {"role": "assistant", "content": "Hi"},
                        user,
                        {"role": "assistant", "content": "Ho"},
                    ]
                }
            ]
        )


def test_settings_are_checked(processor):
    with pytest.raises(ValueError, match="mask='answers' is unknown"):
        VideoSFTCollator(processor, mask="answers")
    with pytest.raises(ValueError, match="label_rule='qwen' is unknown"):
        VideoSFTCollator(processor, label_rule="qwen")
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        VideoSFTCollator(processor, max_length=0)


def test_guards_of_a_batch(processor):
    batch = VideoSFTCollator(processor)([colour_row("red")])
    ids = {"video_token_id": VIDEO_ID, "image_token_id": IMAGE_ID}
    counts = check_batch(batch, **ids)
    assert counts == (4, 16, len("red") + 1)
    silent = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    with pytest.raises(ValueError, match=rf"no supervised token: all {silent['labels'].numel()} labels are -100"):
        check_batch(silent, **ids)
    blind = {key: value for key, value in batch.items() if key != "pixel_values_videos"}
    with pytest.raises(ValueError, match=r"16 video placeholder tokens \(id 4\).*no `pixel_values_videos`"):
        check_batch(blind, **ids)
    with pytest.raises(ValueError, match=r"`pixel_values` of shape \(1, 3, 32, 32\).*no image placeholder token"):
        check_batch({**batch, "pixel_values": torch.zeros(1, 3, 32, 32)}, **ids)
    mute = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == VIDEO_ID, PAD_ID)}
    with pytest.raises(ValueError, match=r"`pixel_values_videos` of shape \(4, 3, 32, 32\).*no video placeholder"):
        check_batch(mute, **ids)


def test_normalize_messages_makes_blocks_of_strings():
    row = {"messages": [{"role": "user", "content": "Hi", "name": None}]}
    assert normalize_messages(row) == [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
