"""Messages with videos, images and coordinates to LLaVA-ST's inputs: frames, times, blocks, values, errors."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata

from longvideo.processing.llava_st import LlavaSTImageProcessor, LlavaSTProcessor, LlavaSTVideoProcessor
from longvideo.processing.llava_st.coordinate_text_llava_st import find_coordinates
from longvideo.processing.llava_st.tokenizer_llava_st import (
    TEMPLATE_TOKENS,
    VISUAL_TOKENS,
    add_coordinate_tokens,
    coordinate_token_fields,
)
from longvideo.processing.shared.frame_sampling import spread_indices
from tests.processing_inputs import ask, frames_of, messages
from tests.tiny import tiny_tokenizer
from tests.tiny_llava_st import FIRST_ID, tiny_llava_st_config, tiny_llava_st_ids
from tests.tiny_llava_st_processor import SIDE, tiny_llava_st_processor, tiny_llava_st_tokenizer
from tests.videos import frame_number, make_frame_folder, make_video

IMAGE_BLOCK = "<im_start>" + "<im_patch>" * 14 + "<im_end>"
VIDEO_BLOCK = "<vid_start>" + "<vid_patch>" * 4 + "<vid_end><slow_vid_start>" + "<vid_patch>" * 6 + "<slow_vid_end>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def processor() -> LlavaSTProcessor:
    return tiny_llava_st_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds at 8 frames per second, 64 x 48 pixels."""
    return make_video(tmp_path_factory.mktemp("clips") / "numbered.mp4", num_frames=96, fps=8)


def facts_of(inputs):
    return inputs["video_metadata"][0]


def numbers_of(pixels_FCHW: torch.Tensor) -> list[int]:
    """The numbers that the frames of `tests.videos` show, read back from normalised pixels."""
    frames = ((pixels_FCHW * 0.5 + 0.5) * 255).round().byte()
    return [frame_number(frame.permute(1, 2, 0).numpy()) for frame in frames]


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_tokens_follow_each_other_in_the_order_of_the_release():
    tokenizer = tiny_tokenizer()
    special = list(tokenizer.all_special_tokens)
    fields = add_coordinate_tokens(tokenizer, 6, 5)
    expected = {**tiny_llava_st_ids(), "coordinate_token_start": FIRST_ID + 14}
    assert fields == {**expected, "num_temporal_tokens": 6, "num_spatial_tokens": 5}
    config = tiny_llava_st_config()
    assert {name: getattr(config, name) for name in fields} == fields
    assert len(tokenizer) == config.num_logits
    assert tokenizer.convert_ids_to_tokens([275, 280, 281, 285, 286, 290]) == [
        "<TEMP-000>",
        "<TEMP-005>",
        "<HEIGHT-000>",
        "<HEIGHT-004>",
        "<WIDTH-000>",
        "<WIDTH-004>",
    ]
    assert tokenizer.all_special_tokens == special
    # Once more changes nothing, and each is one piece.
    assert add_coordinate_tokens(tokenizer, 6, 5) == fields and len(tokenizer) == config.num_logits
    tokens = [*VISUAL_TOKENS.values(), *TEMPLATE_TOKENS.values(), "<WIDTH-003>"]
    assert [tokenizer.encode(f"a{token}b")[1:-1] for token in tokens] == [
        [tokenizer.convert_tokens_to_ids(token)] for token in tokens
    ]


def test_released_sizes():
    tokenizer = tiny_tokenizer()
    fields = add_coordinate_tokens(tokenizer)
    assert len(tokenizer) == FIRST_ID + 8 + 6 + 300
    assert tokenizer.convert_tokens_to_ids("<WIDTH-099>") == fields["coordinate_token_start"] + 299


def test_tokenizer_of_stage_1():
    tokenizer = tiny_tokenizer()
    fields = add_coordinate_tokens(tokenizer, 0, 0)
    assert set(fields) == {*VISUAL_TOKENS, "num_temporal_tokens", "num_spatial_tokens"}
    assert len(tokenizer) == FIRST_ID + 8
    processor = tiny_llava_st_processor(tokenizer=tokenizer)
    assert processor.num_temporal_tokens == 0
    with pytest.raises(ValueError, match="the tokenizer has no coordinate tokens"):
        processor(text="from <t0.3> on")
    # Stage 2 adds the rest behind.
    assert add_coordinate_tokens(tokenizer, 6, 5)["coordinate_token_start"] == FIRST_ID + 14


def test_tokenizers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"does not know <im_start>, <im_end>.*add_coordinate_tokens"):
        tiny_llava_st_processor(tokenizer=tiny_tokenizer())
    stage_1 = tiny_tokenizer()
    add_coordinate_tokens(stage_1, 0, 0)
    with pytest.raises(ValueError, match="does not know <TEMP-INPUT>"):
        coordinate_token_fields(stage_1, 6, 5)
    with pytest.raises(ValueError, match="has 6 times and 5 heights and widths, but 100 and 100 are needed"):
        coordinate_token_fields(tiny_llava_st_tokenizer(), 100, 100)
    apart = tiny_tokenizer()
    apart.add_tokens(["<HEIGHT-000>"], special_tokens=True)
    with pytest.raises(ValueError, match="must follow each other"):
        add_coordinate_tokens(apart, 6, 5)
    uneven = tiny_llava_st_tokenizer()
    uneven.add_tokens(["<WIDTH-005>"], special_tokens=True)
    with pytest.raises(ValueError, match="5 heights and 6 widths"):
        tiny_llava_st_processor(tokenizer=uneven)
    for counts in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="both be positive, or both 0"):
            add_coordinate_tokens(tiny_tokenizer(), *counts)


# --- frames and times --------------------------------------------------------------------------------------------


def test_spread_indices():
    # Halves go to the even number: 2.5 and 7.5 to 2 and 8.
    assert spread_indices(0, 10, 5).tolist() == [0, 2, 5, 8, 10]
    assert spread_indices(3, 17, 10).tolist() == [3, 5, 6, 8, 9, 11, 12, 14, 15, 17]
    assert spread_indices(0, 2, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert spread_indices(4, 4, 3).tolist() == [4, 4, 4]
    assert spread_indices(4, 9, 1).tolist() == [4]
    for total in (1, 7, 99, 100, 101, 829):
        expected = [round(i / 99 * (total - 1)) for i in range(100)]
        assert spread_indices(0, total - 1, 100).tolist() == expected
    for wrong in ((5, 4, 3), (-1, 4, 3), (0, 4, 0)):
        with pytest.raises(ValueError, match="expected"):
            spread_indices(*wrong)


def test_path_gives_frames_from_the_first_to_the_last(processor, clip):
    inputs = ask(processor, messages(path=clip))
    facts = facts_of(inputs)
    assert facts.frames_indices == [0, 19, 38, 57, 76, 95]
    assert facts.timestamps == pytest.approx([index / 8 for index in facts.frames_indices])
    assert (facts.fps, facts.duration, facts.width, facts.height) == (8, 12, 64, 48)
    assert inputs["pixel_values_videos"].shape == (1, 6, 3, SIDE, SIDE)
    assert numbers_of(inputs["pixel_values_videos"][0]) == facts.frames_indices
    text = processor.decode(inputs["input_ids"][0])
    question = "What happens?<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{SYSTEM}<|im_start|>user\n{VIDEO_BLOCK}\n{question}"
    # What generate and forward take, and nothing else.
    assert set(inputs) - {"video_metadata"} == {
        "input_ids",
        "attention_mask",
        "coordinate_values",
        "pixel_values_videos",
    }


def test_split_in_frames_and_in_seconds(processor, clip):
    part = ask(processor, messages(path=clip, split=(16, 47)))
    facts = facts_of(part)
    assert facts.frames_indices == [16, 22, 28, 35, 41, 47] == numbers_of(part["pixel_values_videos"][0])
    assert (facts.start, facts.end, facts.duration, facts.total_num_frames) == (2.0, 6.0, 4.0, 32)
    assert (facts.source_num_frames, facts.source_duration) == (96, 12.0)
    seconds = ask(processor, messages(path=clip, video_start=2.0, video_end=6.0))
    assert torch.equal(seconds["pixel_values_videos"], part["pixel_values_videos"])
    assert (facts_of(seconds).start, facts_of(seconds).duration) == (2.0, 4.0)
    call = processor.video_processor(str(clip), split=(16, 47), return_tensors="pt")
    assert torch.equal(call["pixel_values_videos"], part["pixel_values_videos"])


def test_splits_of_arrays_and_of_several_videos(processor):
    frames = frames_of(20)
    known = {"fps": 4.0, "total_num_frames": 20}
    conversation = messages(video=frames, split=[4, 11], video_metadata=known)
    conversation[0]["content"].insert(0, {"type": "video", "video": frames})
    inputs = ask(processor, conversation)
    assert [facts.frames_indices for facts in inputs["video_metadata"]] == [
        [0, 4, 8, 11, 15, 19],
        [4, 5, 7, 8, 10, 11],
    ]
    facts = inputs["video_metadata"][1]
    assert (facts.start, facts.end, facts.duration) == (1.0, 3.0, 2.0)
    seconds = ask(processor, messages(video=frames, video_start=1.0, video_end=3.0, video_metadata=known))
    assert facts_of(seconds).frames_indices == facts.frames_indices
    assert facts_of(seconds).duration == 2.0


def test_messages_are_not_changed(processor, clip):
    conversation = messages("at <t0.5>?", path=clip, split=(16, 47))
    before = copy.deepcopy(conversation)
    ask(processor, conversation)
    assert conversation == before


def test_short_videos_repeat_frames_and_keep_a_linear_time(processor, tmp_path):
    for count in (1, 4):
        short = make_video(tmp_path / f"{count}.mp4", num_frames=count, fps=8)
        inputs = ask(processor, messages(path=short))
        assert inputs["pixel_values_videos"].shape[1] == 6
        assert facts_of(inputs).frames_indices == [round(i / 5 * (count - 1)) for i in range(6)]
        assert facts_of(inputs).duration == pytest.approx(count / 8)
        result = processor.post_process_grounding("{<TEMP-000>,<TEMP-005>}", metadata=facts_of(inputs))
        # The last token is the last frame, whatever was repeated; of one frame the time for which it is shown.
        assert (result.spans[0].start, result.spans[0].end) == (0.0, pytest.approx(max(count - 1, 1) / 8))


def test_frames_in_any_form_give_the_same_pixels(processor, tmp_path):
    frames = frames_of(9)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    forms = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "arrays": list(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "paths": [tmp_path / f"{index}.png" for index in range(9)],
    }
    results = {name: ask(processor, messages(video=form)) for name, form in forms.items()}
    for name, inputs in results.items():
        assert torch.equal(inputs["pixel_values_videos"], results["array"]["pixel_values_videos"]), name
        assert facts_of(inputs).frames_indices == [0, 2, 3, 5, 6, 8], name
        assert (facts_of(inputs).width, facts_of(inputs).height) == (40, 24), name


def test_folder_of_pictures(processor, tmp_path):
    folder = make_frame_folder(tmp_path / "frames", num_frames=11)
    inputs = ask(processor, messages(path=folder))
    assert facts_of(inputs).frames_indices == [0, 2, 4, 6, 8, 10] == numbers_of(inputs["pixel_values_videos"][0])


def test_frames_that_were_sampled_before(processor):
    sampled = VideoMetadata(total_num_frames=300, fps=30.0, frames_indices=[0, 100, 200, 299])
    facts = facts_of(ask(processor, messages(video=frames_of(4)), video_metadata=[sampled]))
    assert facts.frames_indices == [0, 100, 100, 200, 200, 299]
    assert facts.duration == 10.0 and processor.seen_period(facts) == (0.0, pytest.approx(299 / 30))
    facts = facts_of(ask(processor, messages(video=frames_of(4), timestamps=[1.0, 3.0, 5.0, 7.0])))
    assert facts.timestamps == [1.0, 3.0, 3.0, 5.0, 5.0, 7.0] and processor.seen_period(facts) == (1.0, 6.0)
    bare = VideoMetadata(total_num_frames=40, fps=None, duration=10.0)
    assert processor.seen_period(bare) == (0.0, pytest.approx(9.75))
    assert processor.seen_period(VideoMetadata(total_num_frames=40)) == (0.0, None)
    with pytest.raises(ValueError, match="need a file, or frames that were not sampled before"):
        ask(processor, messages(video=frames_of(4), timestamps=[1.0, 3.0, 5.0, 7.0], split=(0, 2)))


@pytest.mark.parametrize(
    ("wishes", "count"),
    [
        ({"num_frames": 9}, 9),
        ({"num_frames": 120}, 120),
        ({"fps": 1}, 12),
        ({"fps": 0.9}, 12),
        ({"fps": 2, "max_frames": 16}, 15),
        ({"max_frames": 4}, 3),
        ({"fps": 0.1, "min_frames": 7}, 9),
    ],
)
def test_other_numbers_of_frames(processor, clip, wishes, count):
    inputs = ask(processor, messages(path=clip), **wishes)
    assert inputs["pixel_values_videos"].shape[1] == count
    renamed = {"nframes" if name == "num_frames" else name: value for name, value in wishes.items()}
    block = ask(processor, messages(path=clip, **renamed))
    assert torch.equal(block["pixel_values_videos"], inputs["pixel_values_videos"])
    ids = inputs["input_ids"][0]
    visual = [processor.tokenizer.convert_tokens_to_ids(token) for name, token in VISUAL_TOKENS.items()]
    assert sum((ids == token_id).sum().item() for token_id in visual) == processor.get_num_video_tokens(count)


def test_rate_needs_the_rate_of_the_source(processor):
    with pytest.raises(ValueError, match="frame rate of the video is None"):
        processor.video_processor.sample_frames(VideoMetadata(total_num_frames=8), fps=3)
    assert len(processor.video_processor.sample_frames(VideoMetadata(total_num_frames=8))) == 6
    with pytest.raises(ValueError, match="exclude each other"):
        ask(processor, messages(video=frames_of(8)), fps=1, num_frames=6)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"num_frames": 7}, "has 7 frames, but 3 frames become one"),
        ({"do_sample_frames": False}, "has 8 frames, but 3 frames become one"),
        ({"split": (0, 8)}, r"split=\(0, 8\) leaves the video, which has the 8 frames 0 to 7"),
        ({"split": (5, 2)}, "no range of frames"),
        ({"split": (-1, 2)}, "no range of frames"),
        ({"split": (0.5, 2.5)}, "for seconds use video_start and video_end"),
        ({"split": [(0, 2), (3, 4)]}, "split has 2 entries for 1 videos"),
        ({"split": (0, 2), "do_sample_frames": False}, "but do_sample_frames is False"),
        ({"min_frames": 9, "max_frames": 6}, "min_frames=9 is above max_frames=6"),
        ({"fps": 0.0}, "expected a positive number of frames per second"),
        ({"size": {"height": 24, "width": 32}}, "needs equal height and width"),
        ({"size": {"height": 40, "width": 40}}, "A grid of 5 x 5 patches cannot be divided twice"),
    ],
)
def test_wishes_that_do_not_fit(processor, wishes, message):
    with pytest.raises(ValueError, match=message):
        ask(processor, messages(video=frames_of(8), video_metadata={"fps": 4.0}), **wishes)


def test_split_and_seconds_exclude_each_other(processor, clip):
    with pytest.raises(ValueError, match=r"split=\(0, 8\) \(frames\) and video_start"):
        ask(processor, messages(path=clip, split=(0, 8), video_start=1.0))


# --- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(48, 64), (31, 17), (200, 90), (32, 32)])
def test_pixels_are_those_of_pil(processor, height, width):
    frames = frames_of(6, height, width)
    resized = np.stack([Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for frame in frames])
    expected = (torch.from_numpy(resized).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    video = processor.video_processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    images = processor.image_processor(list(frames), return_tensors="pt")
    # The same bytes after PIL; what is left is the order of two float32 operations.
    torch.testing.assert_close(video, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(images["pixel_values"], expected, atol=1e-6, rtol=0)
    assert images["image_sizes"].tolist() == [[width, height]] * 6


def test_defaults_are_those_of_the_release():
    video, image = LlavaSTVideoProcessor(), LlavaSTImageProcessor()
    for part in (video, image):
        assert dict(part.size) == {"height": 384, "width": 384}
        assert list(part.image_mean) == list(part.image_std) == [0.5] * 3
    assert (video.num_frames, video.temporal_factor) == (100, 5)
    whole = LlavaSTProcessor(image, tiny_llava_st_tokenizer(), video)
    assert whole.get_num_image_tokens() == 729
    assert whole.video_positions(100) == (900, 1620)


def test_counts_are_those_of_the_configuration(processor):
    config = tiny_llava_st_config()
    assert processor.video_positions(6) == (config.num_fast_positions, config.num_slow_positions)
    assert processor.get_num_image_tokens() == config.num_image_positions
    small = copy.copy(processor)
    small.use_downsample_image = True
    assert small.get_num_image_tokens() == tiny_llava_st_config(use_downsample_image=True).num_image_positions == 4
    helper = processor._get_num_multimodal_tokens(image_sizes=[(9, 99)], video_sizes=[(6, 9, 99)])
    assert (helper["num_image_tokens"], helper["num_video_tokens"]) == ([16], [14])


def test_all_positions_of_blocks_are_marked(processor):
    picture = Image.fromarray(frames_of(1)[0])
    inputs = processor(
        text="<im_patch> <vid_patch> <t0.5>",
        images=[picture],
        videos=[frames_of(6)],
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    kinds = inputs["mm_token_type_ids"][0]
    assert [(kinds == kind).sum().item() for kind in (0, 1, 2)] == [3, 16, 14]


# --- text and coordinates ----------------------------------------------------------------------------------------


def values_in(processor: LlavaSTProcessor, inputs, row: int = 0) -> list[tuple[str, float]]:
    ids, values = inputs["input_ids"][row].tolist(), inputs["coordinate_values"][row].tolist()
    templates = set(TEMPLATE_TOKENS.values())
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert all(value == 0 for token, value in zip(tokens, values, strict=True) if token not in templates)
    return [(token, round(value, 6)) for token, value in zip(tokens, values, strict=True) if token in templates]


def test_short_and_long_forms(processor):
    text = "a <t0.12345> [<w.5>, <h1>] <TEMP-OUTPUT0.25> <WIDTH-INPUT1e-3> <HEIGHT-000>"
    inputs = processor(text=text, return_tensors="pt")
    assert values_in(processor, inputs) == [
        ("<TEMP-INPUT>", 0.123),
        ("<WIDTH-INPUT>", 0.5),
        ("<HEIGHT-INPUT>", 1.0),
        ("<TEMP-OUTPUT>", 0.25),
        ("<WIDTH-INPUT>", 0.001),
    ]
    assert processor.decode(inputs["input_ids"][0]) == (
        "a <TEMP-INPUT> [<WIDTH-INPUT>, <HEIGHT-INPUT>] <TEMP-OUTPUT> <WIDTH-INPUT> <HEIGHT-000>"
    )
    assert inputs["coordinate_values"].dtype == torch.float32
    assert inputs["coordinate_values"].shape == inputs["input_ids"].shape


@pytest.mark.parametrize("words", ["What does <h1> mean?", "<h2>Part</h2><h3>x</h3>", "</h1><h1>[x] <div><h1>"])
def test_headings_of_html_are_no_heights(processor, words):
    assert values_in(processor, processor(text=words, return_tensors="pt")) == []
    conversation = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    assert processor.apply_chat_template(conversation, tokenize=False).count(words) == 2


def test_values_stand_beside_their_tokens_on_either_side_of_padding(processor):
    texts = ["<t0.25>", "a much longer one: {<t0.25>,<t0.75>}", "none"]
    for side in ("left", "right"):
        inputs = processor(text=texts, padding=True, padding_side=side, return_tensors="pt")
        assert [len(values_in(processor, inputs, row)) for row in range(3)] == [1, 2, 0]
        assert values_in(processor, inputs, 1) == [("<TEMP-INPUT>", 0.25), ("<TEMP-INPUT>", 0.75)]
        place = inputs["coordinate_values"][0].nonzero().item()
        assert place == (inputs["input_ids"].shape[1] - 1 if side == "left" else 0)


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_form_of_values(processor, return_tensors):
    inputs = processor(text=["<t0.25> b"], return_tensors=return_tensors)
    kind = {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors]
    assert isinstance(inputs["coordinate_values"], kind) and isinstance(inputs["input_ids"], kind)
    assert [float(value) for value in inputs["coordinate_values"][0]] == [0.25, 0.0, 0.0]


def test_truncated_text_keeps_the_right_values(processor):
    text = "<t0.1>abc<t0.2>abc<t0.3>"
    cut = processor(text=text, truncation=True, max_length=6, return_tensors="pt")
    assert values_in(processor, cut) == [("<TEMP-INPUT>", 0.1), ("<TEMP-INPUT>", 0.2)]
    left = tiny_llava_st_processor()
    left.tokenizer.truncation_side = "left"
    cut = left(text=text, truncation=True, max_length=6, return_tensors="pt")
    assert values_in(left, cut) == [("<TEMP-INPUT>", 0.2), ("<TEMP-INPUT>", 0.3)]


def test_roles_decide_between_question_and_answer(processor):
    conversation = [
        {"role": "user", "content": "when, after <t0.2>?"},
        {"role": "assistant", "content": [{"type": "text", "text": "{<t0.1><t0.65>} <TEMP-030> <TEMP-INPUT0.5>"}]},
        {"role": "user", "content": [{"type": "text", "text": "and <TEMP-OUTPUT0.4>?"}]},
    ]
    text = processor.apply_chat_template(conversation)
    assert "after <TEMP-INPUT0.2>?" in text
    assert "{<TEMP-OUTPUT0.1><TEMP-OUTPUT0.65>} <TEMP-030> <TEMP-INPUT0.5><|im_end|>" in text
    inputs = ask(processor, conversation)
    expected = [
        ("<TEMP-INPUT>", 0.2),
        ("<TEMP-OUTPUT>", 0.1),
        ("<TEMP-OUTPUT>", 0.65),
        ("<TEMP-INPUT>", 0.5),
        ("<TEMP-OUTPUT>", 0.4),
    ]
    assert values_in(processor, inputs) == expected
    # The rendered text says the same.
    assert values_in(processor, processor(text=text, return_tensors="pt")) == expected


def test_assistant_mask_lies_on_the_answer(processor):
    conversation = messages("where, from <t0.25>?", video=frames_of(6))
    conversation.append({"role": "assistant", "content": "There: <t0.5>:[<w0.1><h0.2><w0.3><h0.4>]."})
    inputs = processor.apply_chat_template(
        conversation,
        chat_template=processor.training_chat_template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    taught = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]
    assert processor.decode(taught) == (
        "There: <TEMP-OUTPUT>:[<WIDTH-OUTPUT><HEIGHT-OUTPUT><WIDTH-OUTPUT><HEIGHT-OUTPUT>].<|im_end|>"
    )
    assert len(values_in(processor, inputs)) == 6


def test_lists_of_values_fill_template_tokens(processor):
    text = "<TEMP-INPUT> <t0.5> [<WIDTH-INPUT><HEIGHT-INPUT><WIDTH-INPUT><HEIGHT-INPUT>]"
    variables = {
        "temporal_input_locations": [0.591],
        "spatial_width_input_locations": [0.352, 0.505],
        "spatial_height_input_locations": [0.442, 0.827],
        "temporal_output_locations": [],
    }
    inputs = processor(text=text, variables=variables, return_tensors="pt")
    assert [value for _, value in values_in(processor, inputs)] == [0.591, 0.5, 0.352, 0.442, 0.505, 0.827]
    both = processor(text=[text, "none"], variables=[variables, None], padding=True, return_tensors="pt")
    assert len(values_in(processor, both)) == 6
    with pytest.raises(ValueError, match=r"values without a template token.*'temporal_input_locations': 1"):
        processor(text="<w0.5>", variables={"temporal_input_locations": [0.5]})
    with pytest.raises(ValueError, match="variables has 1 entries for 2 prompts"):
        processor(text=["a", "b"], variables=[variables])
    with pytest.raises(ValueError, match=r"unknown lists \['time'\]"):
        processor(text="a", variables={"time": [0.5]})
    with pytest.raises(ValueError, match=r"variables\['temporal_input_locations'\] has the value 2"):
        processor(text="<TEMP-INPUT>", variables={"temporal_input_locations": [2]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("at <TEMP-INPUT>", "has <TEMP-INPUT> without a value"),
        ("at <t1.5>", "1.5> has the value 1.5, which lies outside of 0 to 1"),
        ("at <w-0.1>", "has the value -0.1"),
        ("at <HEIGHT-OUTPUT1.01>", "has the value 1.01"),
        ("at <TEMP-INPUTnan>", "has no number behind <TEMP-INPUT"),
        ("at <TEMP-INPUT__import__('os')>", "has no number behind"),
        ("in {<t0.5>,<t0.2>}", "runs from 0.5 to 0.2; its end must lie after its start"),
        ("in {<t0.5><t0.5>}", "its end must lie after its start"),
        ("in [<w0.5>, <h0.1>, <w0.5>, <h0.4>]", "has no area"),
        ("in [<w0.5><h0.4><w0.6><h0.1>]", "has no area"),
    ],
)
def test_coordinates_that_cannot_be(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)
    with pytest.raises(ValueError, match=message):
        ask(processor, [{"role": "user", "content": text}])


def test_answers_may_hold_what_questions_may_not(processor):
    """Truth rounded to three digits may have no length."""
    conversation = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": "{<t0.5><t0.5>}: [<w0.5><h0.5><w0.5><h0.5>]"},
    ]
    assert len(values_in(processor, ask(processor, conversation))) == 6


def test_clipping(processor):
    inputs = processor(text="<t1.5> <WIDTH-INPUT-0.5>", clip_coordinates=True, return_tensors="pt")
    assert values_in(processor, inputs) == [("<TEMP-INPUT>", 1.0), ("<WIDTH-INPUT>", 0.0)]


def test_placeholders_of_the_release(processor):
    frames = frames_of(6)
    expected = ask(processor, messages("What?", video=frames))
    prompt = f"{SYSTEM}<|im_start|>user\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    plain = processor(text=prompt, videos=[frames], return_tensors="pt")
    assert torch.equal(plain["input_ids"], expected["input_ids"])
    # Beside a block the alias is the block; a single visual comes first wherever it was written.
    for question in ("<video>\nWhat?", "What?<video>"):
        assert torch.equal(ask(processor, messages(question, video=frames))["input_ids"], expected["input_ids"])
    behind = messages("What?", video=frames)
    behind[0]["content"].reverse()
    assert torch.equal(ask(processor, behind)["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="Found 1 <im_patch> tokens and 0 images"):
        processor(text="<image>\nWhat?")


def test_image_and_video_in_one_question(processor):
    picture = Image.fromarray(frames_of(1)[0])
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "Is this "},
        {"type": "video", "video": frames_of(6)},
        {"type": "text", "text": "in that?"},
    ]
    inputs = ask(processor, [{"role": "user", "content": content}])
    body = f"<|im_start|>user\n{IMAGE_BLOCK}\nIs this {VIDEO_BLOCK}\nin that?<|im_end|>"
    assert body in processor.decode(inputs["input_ids"][0])
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert inputs["image_sizes"] == [(40, 24)]
    assert "image_sizes" not in ask(processor, [{"role": "user", "content": content}], return_metadata=False)


@pytest.mark.skipif(
    "sanitize_control_tokens" not in ProcessorMixin.apply_chat_template.__code__.co_varnames,
    reason="this version of transformers marks no control tokens",
)
def test_marked_tokens_of_users_stand_for_nothing(processor):
    conversation = messages("a <TEMP-INPUT> <vid_patch> <video> <t0.5>", video=frames_of(6))
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
    )
    assert values_in(processor, inputs) == [("<TEMP-INPUT>", 0.5)]
    assert "a <TEMP-INPUT> <vid_patch> <video> " in processor.decode(inputs["input_ids"][0])


def test_truncation_must_not_cut_a_block(processor):
    inputs = {"text": "<vid_patch>", "videos": [frames_of(6)], "truncation": True}
    # Thirteen of fourteen positions: every patch, but not the end of the slow block.
    with pytest.raises(ValueError, match=r"Truncation to 13 tokens cuts into a video \(<slow_vid_end>\)"):
        processor(**inputs, max_length=13)
    assert len(processor(**inputs, max_length=14)["input_ids"][0]) == 14


def test_prompt_longer_than_the_model_allows(clip):
    processor = tiny_llava_st_processor()
    processor.tokenizer.model_max_length = 40
    with pytest.raises(ValueError, match="14 of them visual"):
        ask(processor, messages(path=clip))


def test_numbers_of_visuals(processor):
    for text, videos in (("no video", [frames_of(6)]), ("<vid_patch><vid_patch>", [frames_of(6)])):
        with pytest.raises(ValueError, match="should be the same as the number of videos passed"):
            processor(text=text, videos=videos)
    with pytest.raises(ValueError, match="LLaVA-ST takes no sound"):
        processor(text="a", audio=[np.zeros(8)])
    with pytest.raises(ValueError, match="question is empty"):
        ask(processor, messages("  ", video=frames_of(6)))


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_map_back_to_seconds_and_pixels(processor, clip):
    facts = facts_of(ask(processor, messages(path=clip, split=(16, 47))))
    answer = "{<TEMP-000><TEMP-005>} [<WIDTH-001><HEIGHT-000><WIDTH-004><HEIGHT-002>]"
    result = processor.post_process_grounding(answer, metadata=[facts])
    span, box = result.spans[0], result.boxes[0]
    assert (span.start, span.end) == (2.0, 5.875), "frames 16 and 47 at 8 per second"
    assert (box.x1, box.y1, box.x2, box.y2) == (16.0, 0.0, 64.0, 24.0)
    ids = processor.tokenizer(answer + "<|im_end|><|endoftext|>", return_tensors="pt")["input_ids"]
    for outputs in (ids[0], ids[0].tolist()):
        again = processor.post_process_grounding(outputs, (64, 48), 3.875, starts=2.0)
        assert (again.spans, again.boxes) == (result.spans, result.boxes)
    batch = processor.post_process_grounding(torch.cat([ids, ids]), [(64, 48), (128, 96)], [4.0, 8.0], starts=[2.0, 0])
    assert batch[0].boxes == result.boxes
    assert batch[1].boxes[0].x2 == 128.0 and (batch[1].spans[0].start, batch[1].spans[0].end) == (0.0, 8.0)
    assert processor.post_process_grounding([answer], torch.tensor([[64, 48]]))[0].boxes == result.boxes
    with pytest.raises(ValueError, match="durations has 2 entries for 1 answers"):
        processor.post_process_grounding([answer], (64, 48), [4.0, 8.0])


# --- saving ------------------------------------------------------------------------------------------------------


def test_saved_processor_is_the_same(processor, clip, tmp_path):
    processor.save_pretrained(tmp_path)
    tiny_llava_st_config().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, LlavaSTProcessor)
    assert isinstance(AutoVideoProcessor.from_pretrained(tmp_path), LlavaSTVideoProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), LlavaSTImageProcessor)
    conversation = messages("from <t0.25>?", path=clip)
    expected = ask(processor, conversation)
    for name, value in ask(again, conversation).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
    assert (again.temporal_factor, again.patch_size, again.num_temporal_tokens) == (3, 8, 6)


def test_saved_numbers_are_checked_against_the_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tiny_llava_st_tokenizer(7, 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 7 times and 5 heights and widths, but 6 and 5 are needed"):
        LlavaSTProcessor.from_pretrained(tmp_path)


def test_factors_that_disagree():
    parts = tiny_llava_st_processor()
    with pytest.raises(ValueError, match="temporal_factor is 5 in the processor and 3 in the video processor"):
        LlavaSTProcessor(parts.image_processor, parts.tokenizer, parts.video_processor, temporal_factor=5)


def test_reading_a_text_without_a_processor():
    found = find_coordinates("x <t0.3>, <WIDTH-OUTPUT0.512>")
    assert [(entry.token, entry.value, entry.is_input) for entry in found] == [
        ("<TEMP-INPUT>", 0.3, True),
        ("<WIDTH-OUTPUT>", 0.512, False),
    ]
