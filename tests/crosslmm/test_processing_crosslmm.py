"""Messages with videos and images to inputs of CrossLMM: frames, pixels, placeholders, saving, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.crosslmm import CrossLMMImageProcessor, CrossLMMProcessor, CrossLMMVideoProcessor
from tests.processing_inputs import ask, frames_of, messages
from tests.tiny import tiny_tokenizer
from tests.tiny_crosslmm import tiny_crosslmm_config
from tests.tiny_crosslmm_processor import SIDE, tiny_crosslmm_processor
from tests.videos import frame_number, make_sound, make_video

VIDEO_ID, IMAGE_ID = 4, 3


@pytest.fixture(scope="module")
def processor() -> CrossLMMProcessor:
    return tiny_crosslmm_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven seconds at 8 frames per second."""
    return make_video(tmp_path_factory.mktemp("clips") / "numbered.mp4", num_frames=88, fps=8)


def numbers_of(pixels_FCHW: torch.Tensor) -> list[int]:
    """The numbers that the frames of `tests.videos` show, read back from pixels of -1 to 1."""
    bytes_FHWC = ((pixels_FCHW + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [frame_number(frame) for frame in bytes_FHWC]


# --- sources and sampling ----------------------------------------------------------------------------------------


def test_path_is_sampled_and_expanded(processor, clip):
    inputs = ask(processor, messages(path=clip))
    facts = inputs["video_metadata"][0]
    # 11 s give 11 frames, no clips to fill; the middle of eight source frames is the fourth.
    assert list(facts.frames_indices) == list(range(3, 88, 8))
    assert facts.fps == 8 and facts.duration == 11
    assert facts.timestamps == pytest.approx([index / 8 for index in range(3, 88, 8)])
    assert inputs["pixel_values_videos"].shape == (1, 11, 3, SIDE, SIDE)
    assert numbers_of(inputs["pixel_values_videos"][0]) == list(range(3, 88, 8))
    text = processor.decode(inputs["input_ids"][0])
    assert text.endswith(
        "<|im_start|>user\n" + "<|video_pad|>" * 44 + "What happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    names = {"input_ids", "attention_mask", "pixel_values_videos", "video_metadata"}
    assert set(inputs) - {"mm_token_type_ids"} == names


def test_frames_in_any_form_give_the_same_pixels(processor, tmp_path):
    frames = frames_of(5)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    expected = ask(processor, messages(video=frames))
    assert expected["pixel_values_videos"].shape[1] == 5
    for form in (frames.transpose(0, 3, 1, 2), torch.from_numpy(frames), [*frames], paths):
        inputs = ask(processor, messages(video=form))
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
    # A folder counts as one picture per second.
    folder = ask(processor, messages(path=tmp_path))
    assert torch.equal(folder["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize(
    ("wishes", "count"),
    [
        ({"num_frames": 7}, 7),
        ({"num_frames": 1}, 1),
        ({"fps": 2}, 22),
        ({"fps": 2, "max_frames": 15}, 15),
        ({"max_frames": 5}, 5),
        ({"min_frames": 13}, 13),
        ({"do_sample_frames": False}, 88),
    ],
)
def test_wishes_of_call_and_block(processor, clip, wishes, count):
    call = ask(processor, messages(path=clip), **wishes)
    assert call["pixel_values_videos"].shape[1] == count
    assert int((call["input_ids"] == VIDEO_ID).sum()) == 4 * count
    if "do_sample_frames" not in wishes:
        renamed = {"nframes" if name == "num_frames" else name: value for name, value in wishes.items()}
        block = ask(processor, messages(path=clip, **renamed))
        assert torch.equal(block["pixel_values_videos"], call["pixel_values_videos"])
    assert ask(processor, messages(path=clip, nframes=2), **wishes)["pixel_values_videos"].shape[1] in (2, 88)


def test_window(processor, clip):
    inputs = ask(processor, messages(path=clip, video_start=4.0, video_end=9.0))
    numbers = numbers_of(inputs["pixel_values_videos"][0])
    assert numbers == list(inputs["video_metadata"][0].frames_indices) == [35, 43, 51, 59, 67]


def test_defaults_and_limits():
    video_processor = CrossLMMVideoProcessor()
    assert video_processor.size == {"height": 384, "width": 384}
    assert list(video_processor.image_mean) == list(video_processor.image_std) == [0.5, 0.5, 0.5]
    hour = VideoMetadata(total_num_frames=90_000, fps=25.0)
    assert len(video_processor.sample_frames(hour)) == 512
    assert len(video_processor.sample_frames(VideoMetadata(total_num_frames=2500, fps=25.0))) == 100
    assert len(video_processor.sample_frames(VideoMetadata(total_num_frames=250, fps=25.0))) == 64
    # A film with fewer frames than the least number gives every frame once.
    assert list(video_processor.sample_frames(VideoMetadata(total_num_frames=5, fps=25.0))) == [0, 1, 2, 3, 4]
    assert len(video_processor.sample_frames(hour, max_frames=33)) == 33
    assert len(video_processor.sample_frames(hour, num_frames=129)) == 129
    with pytest.raises(ValueError, match="min_frames=16 is above max_frames=8"):
        video_processor.sample_frames(hour, min_frames=16, max_frames=8)
    with pytest.raises(ValueError, match="num_frames=12 frames were asked for, but the video has 8"):
        video_processor.sample_frames(VideoMetadata(total_num_frames=8, fps=1.0), num_frames=12)


def test_one_frame_films(processor, tmp_path):
    one = make_video(tmp_path / "one.mp4", num_frames=1, fps=8)
    assert ask(processor, messages(path=one))["pixel_values_videos"].shape == (1, 1, 3, SIDE, SIDE)


# --- batches, images ---------------------------------------------------------------------------------------------


def test_batch_of_equal_and_of_unequal_lengths(processor, clip):
    first, second = messages(path=clip, nframes=5), messages("And now?", video=frames_of(5))
    inputs = ask(processor, [first, second])
    assert inputs["pixel_values_videos"].shape == (2, 5, 3, SIDE, SIDE) and "video_num_frames" not in inputs
    shorter = ask(processor, [first, messages("And now?", video=frames_of(2))])
    assert shorter["pixel_values_videos"].shape == (7, 3, SIDE, SIDE)
    assert shorter["video_num_frames"].tolist() == [5, 2]
    assert (shorter["input_ids"] == VIDEO_ID).sum(1).tolist() == [20, 8]
    assert torch.equal(shorter["pixel_values_videos"][:5], inputs["pixel_values_videos"][0])
    assert shorter["attention_mask"][1, 0] == 0 and shorter["attention_mask"][:, -1].tolist() == [1, 1]


def test_videos_and_images_in_one_prompt(processor, clip):
    picture = Image.fromarray(frames_of(1)[0])
    content = [
        {"type": "video", "path": clip, "nframes": 3},
        {"type": "text", "text": "then "},
        {"type": "image", "image": picture},
        {"type": "image", "image": picture.resize((17, 90))},
        {"type": "video", "video": frames_of(2)},
        {"type": "text", "text": "Which?"},
    ]
    inputs = ask(processor, [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": content}]])
    assert inputs["video_num_frames"].tolist() == [3, 2]
    assert inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)
    row = inputs["input_ids"][1].tolist()
    runs = [token for token, previous in zip(row, [None, *row], strict=False) if token != previous]
    assert [token for token in runs if token in (VIDEO_ID, IMAGE_ID)] == [VIDEO_ID, IMAGE_ID, VIDEO_ID]
    assert (row.count(VIDEO_ID), row.count(IMAGE_ID)) == (5 * 4, 2 * 4)
    assert not set(inputs["input_ids"][0].tolist()) & {VIDEO_ID, IMAGE_ID}
    # An image has the pixels and the tokens of a frame.
    still = ask(processor, messages(video=frames_of(1)))
    assert torch.equal(still["pixel_values_videos"][0], inputs["pixel_values"][:1])


def test_pictures_are_stretched_to_minus_one_and_one():
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 30:] = 255
    pixels = CrossLMMImageProcessor(size={"height": SIDE, "width": SIDE})(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert pixels[..., :12].unique().tolist() == [-1.0] and pixels[..., 20:].unique().tolist() == [1.0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(processor, mode):
    picture = Image.fromarray(frames_of(1)[0]).convert(mode)
    expected = processor.image_processor(np.asarray(picture.convert("RGB")), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.image_processor(picture, return_tensors="pt")["pixel_values"], expected)


def test_prompts_without_template(processor, clip):
    inputs = processor(text=["<|video_pad|>Why?", "<|video_pad|>Who?"], videos=[clip, frames_of(9)], padding=True)
    assert [row.count(VIDEO_ID) for row in inputs["input_ids"]] == [44, 36]
    assert "video_metadata" not in inputs


def test_counting_helper_agrees_with_the_call(processor):
    counted = processor._get_num_multimodal_tokens(image_sizes=[(30, 70), (9, 9)], video_sizes=[(7, 20, 30)])
    assert counted["num_image_tokens"] == [4, 4] and counted["num_image_patches"] == [1, 1]
    inputs = processor(text="<|video_pad|>", videos=[frames_of(7)])
    assert counted["num_video_tokens"] == [inputs["input_ids"][0].count(VIDEO_ID)] == [28]


# --- template, times, saving -------------------------------------------------------------------------------------


def test_training_template_marks_answers(processor, clip):
    conversation = [*messages(path=clip, nframes=3), {"role": "assistant", "content": "A dog runs."}]
    other = [*messages(video=frames_of(2)), {"role": "assistant", "content": "Nothing."}]
    template = processor.training_chat_template
    assert processor.apply_chat_template(conversation, chat_template=template) == processor.apply_chat_template(
        conversation
    )
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            [conversation, other],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
        )
        masks = torch.as_tensor(inputs["assistant_masks"]).bool()
        answers = [processor.decode(row[mask]) for row, mask in zip(inputs["input_ids"], masks, strict=True)]
        assert answers == ["A dog runs.<|im_end|>", "Nothing.<|im_end|>"]


def test_times_on_request(clip):
    listing = tiny_crosslmm_processor(time_message="{num_frames} frames of {duration:.0f} s, at {times}.")
    text = listing.decode(ask(listing, messages(path=clip, nframes=2))["input_ids"][0])
    assert "<|video_pad|>\n2 frames of 11 s, at 2.6, 8.1. What happens?" in text
    with pytest.raises(ValueError, match="cannot be filled in"):
        ask(tiny_crosslmm_processor(time_message="{length} s"), messages(path=clip))


def test_save_and_load(clip, tmp_path):
    changed = tiny_crosslmm_processor(tokens_per_frame=1, time_message="{num_frames} frames", max_frames=6)
    changed.save_pretrained(tmp_path)
    tiny_crosslmm_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CrossLMMProcessor
    assert (loaded.tokens_per_frame, loaded.video_processor.max_frames) == (1, 6)
    before, after = ask(changed, messages(path=clip)), ask(loaded, messages(path=clip))
    assert int((after["input_ids"] == VIDEO_ID).sum()) == 6
    for name in ("input_ids", "pixel_values_videos"):
        assert torch.equal(before[name], after[name])
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is CrossLMMVideoProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CrossLMMImageProcessor


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -4, 3, 8])
def test_tokens_that_make_no_square(count):
    with pytest.raises(ValueError, match=rf"tokens_per_frame={count}, expected a square number"):
        tiny_crosslmm_processor(tokens_per_frame=count)


def test_tokenizer_without_placeholders():
    tokenizer = tiny_tokenizer()
    tokenizer.video_token = "<clip>"
    with pytest.raises(ValueError, match="does not know the placeholder '<clip>'"):
        tiny_crosslmm_processor(tokenizer=tokenizer)


def test_placeholders_and_items_that_differ(processor):
    with pytest.raises(ValueError, match=r"Found 2 <\|video_pad\|> tokens and 1 videos"):
        processor(text="<|video_pad|><|video_pad|>Why?", videos=[frames_of(4)])
    with pytest.raises(ValueError, match=r"Found 0 <\|image_pad\|> tokens and 1 images"):
        processor(text="Why?", images=[frames_of(1)[0]])
    with pytest.raises(ValueError, match="takes no sound"):
        processor(text="Why?", audio=np.zeros(10))


def test_prompts_that_are_too_long(processor):
    with pytest.raises(ValueError, match=r"Truncation to 30 tokens.*32 video tokens.*num_frames"):
        processor(text="<|video_pad|>Why?", videos=[frames_of(8)], truncation=True, max_length=30)
    small = tiny_crosslmm_processor()
    small.tokenizer.model_max_length = 100
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens \(64 of them visual\), but the model's limit is 100"):
        ask(small, messages(video=frames_of(16)))


def test_wishes_that_do_not_fit(processor, clip):
    with pytest.raises(ValueError, match="exclude each other"):
        ask(processor, messages(path=clip), fps=1, num_frames=4)
    with pytest.raises(ValueError, match="frame rate of the video is None"):
        ask(processor, messages(video=frames_of(8)), fps=1)
    with pytest.raises(ValueError, match="expected a positive number of frames per second"):
        ask(processor, messages(path=clip), fps=-1)
    with pytest.raises(ValueError, match="3 timestamps were given for 4 frames"):
        ask(processor, messages(video=frames_of(4), timestamps=[0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="must have one size"):
        ask(processor, [messages(video=frames_of(2)), messages(video=frames_of(2, 10, 10))], do_resize=False)
    with pytest.raises(ValueError, match="all images must have one size"):
        processor.image_processor([frames_of(1)[0], frames_of(1, 9, 9)[0]], do_resize=False)
    with pytest.raises(ValueError, match="question is empty"):
        ask(processor, messages(" ", video=frames_of(4)))


def test_files_that_are_not_videos(processor, tmp_path):
    empty, text = tmp_path / "empty.mp4", tmp_path / "notes.mp4"
    empty.touch()
    text.write_text("not a video")
    for path, error, words in (
        (tmp_path / "missing.mp4", FileNotFoundError, "No such video file"),
        (empty, ValueError, "is empty"),
        (text, ValueError, "not a video"),
        (make_sound(tmp_path / "sound.mp4"), ValueError, "no video stream"),
    ):
        with pytest.raises(error, match=words):
            ask(processor, messages(path=path))
