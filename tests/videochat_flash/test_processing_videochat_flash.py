"""Messages with videos and images to model inputs: frames, times, pixels, placeholders, errors."""

import copy
import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from longvideo.processing.shared import stretched_videos
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.video_io import read_video
from longvideo.processing.videochat_flash import (
    VideoChatFlashImageProcessor,
    VideoChatFlashProcessor,
    VideoChatFlashVideoProcessor,
)
from tests.processing_inputs import ask, frames_of, messages
from tests.tiny import tiny_tokenizer, tiny_videochat_flash_config, tiny_videochat_flash_processor
from tests.videos import frame_number, make_sound, make_video

SIDE = 32
VIDEO_ID, IMAGE_ID = 4, 3


@pytest.fixture(scope="module")
def processor() -> VideoChatFlashProcessor:
    return tiny_videochat_flash_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds at 8 frames per second."""
    return make_video(tmp_path_factory.mktemp("clips") / "numbered.mp4", num_frames=96, fps=8)


def numbers_of(processor: VideoChatFlashProcessor, pixels_FCHW: torch.Tensor) -> list[int]:
    """The numbers that the frames of `tests.videos` show, read back from normalised pixels."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.video_processor.image_mean, processor.video_processor.image_std)
    )
    return [
        frame_number(((frame * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()) for frame in pixels_FCHW
    ]


# --- sources -----------------------------------------------------------------------------------------------------


def test_path_is_sampled_and_expanded(processor, clip):
    inputs = ask(processor, messages(path=clip))
    facts = inputs["video_metadata"][0]
    # 12 s give three clips of four frames; eight source frames per segment, the midpoint is the fourth.
    assert list(facts.frames_indices) == list(range(3, 96, 8))
    assert facts.fps == 8 and facts.duration == 12
    assert facts.timestamps == pytest.approx([index / 8 for index in range(3, 96, 8)])
    assert inputs["pixel_values_videos"].shape == (1, 12, 3, SIDE, SIDE)
    assert numbers_of(processor, inputs["pixel_values_videos"][0]) == list(range(3, 96, 8))
    assert int((inputs["input_ids"] == VIDEO_ID).sum()) == 12 * processor.tokens_per_frame
    text = processor.decode(inputs["input_ids"][0])
    message = "The video lasts for 12.00 seconds, and 12 frames are uniformly sampled from it."
    assert text.endswith(
        "<|im_start|>user\n" + "<|video_pad|>" * 48 + f"\n{message} What happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "video_num_frames" not in inputs


@pytest.mark.parametrize("key", ["video", "url", "path"])
def test_source_key_and_text_path_give_the_same(processor, clip, key):
    expected = ask(processor, messages(path=clip))
    inputs = ask(processor, messages(**{key: str(clip)}))
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_address_is_downloaded(processor, clip):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(clip.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        inputs = ask(processor, messages(url=f"http://127.0.0.1:{server.server_port}/{clip.name}"))
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(inputs["pixel_values_videos"], ask(processor, messages(path=clip))["pixel_values_videos"])


def test_frames_in_any_form_give_the_same_pixels(processor, tmp_path):
    frames = frames_of(8)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    forms = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "arrays": list(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "paths": [tmp_path / f"{index}.png" for index in range(8)],
    }
    results = {name: ask(processor, messages(video=form)) for name, form in forms.items()}
    for name, inputs in results.items():
        assert torch.equal(inputs["pixel_values_videos"], results["array"]["pixel_values_videos"]), name
        assert torch.equal(inputs["input_ids"], results["array"]["input_ids"]), name


def test_array_without_rate_counts_as_one_frame_per_second(processor):
    inputs = ask(processor, messages(video=frames_of(8)))
    assert "lasts for 8.00 seconds, and 8 frames" in processor.decode(inputs["input_ids"][0])


def test_array_with_rate_is_sampled(processor):
    inputs = ask(processor, messages(video=frames_of(48)), video_metadata=[{"fps": 4.0, "total_num_frames": 48}])
    assert list(inputs["video_metadata"][0].frames_indices) == list(range(1, 48, 4))
    assert "lasts for 12.00 seconds, and 12 frames" in processor.decode(inputs["input_ids"][0])
    # The same through the block, in a tensor.
    block = messages(video=torch.from_numpy(frames_of(48)), video_metadata={"fps": 4.0})
    assert torch.equal(ask(processor, block)["pixel_values_videos"], inputs["pixel_values_videos"])


def test_frames_with_their_times_are_kept(processor):
    inputs = ask(processor, messages(video=frames_of(4), timestamps=[1.0, 3.0, 5.0, 7.0]))
    assert inputs["video_metadata"][0].timestamps == [1.0, 3.0, 5.0, 7.0]
    # Four frames two seconds apart stand for eight seconds.
    assert "lasts for 8.00 seconds, and 4 frames" in processor.decode(inputs["input_ids"][0])
    known = ask(processor, messages(video=frames_of(4), timestamps=[1.0, 3.0, 5.0, 7.0], duration=9.5))
    assert "lasts for 9.50 seconds" in processor.decode(known["input_ids"][0])
    sampled = VideoMetadata(total_num_frames=300, fps=30.0, frames_indices=[0, 100, 200, 299])
    inputs = ask(processor, messages(video=frames_of(4)), video_metadata=[sampled])
    assert inputs["pixel_values_videos"].shape[1] == 4
    assert "lasts for 10.00 seconds, and 4 frames" in processor.decode(inputs["input_ids"][0])


# --- sampling wishes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "count"),
    [
        ({"num_frames": 8}, 8),
        ({"fps": 2}, 24),
        ({"fps": 2, "max_frames": 16}, 16),
        ({"max_frames": 8}, 8),
        ({"min_frames": 16}, 16),
        ({"min_frames": 20, "max_frames": 24}, 20),
    ],
)
def test_wishes_of_call_and_block(processor, clip, wishes, count):
    call = ask(processor, messages(path=clip), **wishes)
    assert call["pixel_values_videos"].shape[1] == count
    renamed = {"nframes" if name == "num_frames" else name: value for name, value in wishes.items()}
    block = ask(processor, messages(path=clip, **renamed))
    assert torch.equal(block["pixel_values_videos"], call["pixel_values_videos"])
    assert f"and {count} frames are" in processor.decode(block["input_ids"][0])


def test_block_wins_over_call(processor, clip):
    inputs = ask(processor, messages(path=clip, nframes=4), fps=2)
    assert inputs["pixel_values_videos"].shape[1] == 4


def test_window_is_read_and_named(processor, clip):
    inputs = ask(processor, messages(path=clip, video_start=4.0, video_end=8.0))
    assert "lasts for 4.00 seconds, and 4 frames" in processor.decode(inputs["input_ids"][0])
    numbers = numbers_of(processor, inputs["pixel_values_videos"][0])
    assert numbers == list(inputs["video_metadata"][0].frames_indices) == [35, 43, 51, 59]
    array = ask(processor, messages(video=frames_of(48), video_metadata={"fps": 4.0}, video_start=4.0, video_end=8.0))
    assert list(array["video_metadata"][0].frames_indices) == [17, 21, 25, 29]
    assert "lasts for 4.00 seconds, and 4 frames" in processor.decode(array["input_ids"][0])


def test_count_is_rounded_to_clips_with_a_warning(processor, clip):
    with pytest.warns(UserWarning, match="num_frames=6 is not a multiple of the 4 frames"):
        inputs = ask(processor, messages(path=clip), num_frames=6)
    assert inputs["pixel_values_videos"].shape[1] == 4


def test_more_frames_than_there_are(processor, clip):
    with pytest.warns(UserWarning, match="num_frames=400 is more than the 96 frames"):
        inputs = ask(processor, messages(path=clip), num_frames=400)
    assert inputs["pixel_values_videos"].shape[1] == 96
    with pytest.raises(ValueError, match=r"num_frames=12 frames were asked for, but the video has 8"):
        ask(processor, messages(video=frames_of(8)), num_frames=12)


def test_fewer_frames_than_a_clip_repeat_the_last(processor, tmp_path):
    for count in (1, 3):
        short = make_video(tmp_path / f"{count}.mp4", num_frames=count, fps=8)
        with pytest.warns(UserWarning, match=f"the video has only {count}; the last one is repeated"):
            pixels = ask(processor, messages(path=short))["pixel_values_videos"]
        assert pixels.shape[1] == 4
        assert torch.equal(pixels[0, 3], pixels[0, count - 1])
    inputs = ask(processor, messages(video=frames_of(6)))
    assert inputs["pixel_values_videos"].shape[1] == 8
    assert torch.equal(inputs["pixel_values_videos"][0, 7], inputs["pixel_values_videos"][0, 5])
    assert list(inputs["video_metadata"][0].frames_indices) == [0, 1, 2, 3, 4, 5, 5, 5]


def test_all_frames_without_sampling(processor, clip):
    inputs = ask(processor, messages(path=clip), do_sample_frames=False)
    assert inputs["pixel_values_videos"].shape[1] == 96


def test_defaults_are_those_of_the_original():
    video_processor = VideoChatFlashVideoProcessor()
    assert (video_processor.min_frames, video_processor.max_frames, video_processor.mm_local_num_frames) == (
        64,
        512,
        4,
    )
    hour = VideoMetadata(total_num_frames=90_000, fps=25.0)
    assert len(video_processor.sample_frames(hour)) == 512
    assert len(video_processor.sample_frames(VideoMetadata(total_num_frames=250, fps=25.0))) == 64
    # A default gives way to a wish that contradicts it; two wishes must agree.
    assert len(video_processor.sample_frames(hour, max_frames=32)) == 32
    assert len(video_processor.sample_frames(hour, min_frames=600)) == 600
    assert len(VideoChatFlashVideoProcessor(max_frames=16).sample_frames(hour)) == 16
    with pytest.raises(ValueError, match="min_frames=16 is above max_frames=8"):
        video_processor.sample_frames(hour, min_frames=16, max_frames=8)
    with pytest.raises(ValueError, match="min_frames=16 is above max_frames=8"):
        video_processor.sample_frames(hour, fps=1, min_frames=16, max_frames=8)


# --- batches -----------------------------------------------------------------------------------------------------


def test_batch_of_equal_and_of_unequal_lengths(processor, clip):
    first, second = messages(path=clip, nframes=8), messages("And now?", video=frames_of(8))
    inputs = ask(processor, [first, second])
    assert inputs["pixel_values_videos"].shape == (2, 8, 3, SIDE, SIDE)
    assert "video_num_frames" not in inputs
    shorter = ask(processor, [first, messages("And now?", video=frames_of(4))])
    assert shorter["pixel_values_videos"].shape == (12, 3, SIDE, SIDE)
    assert shorter["video_num_frames"].tolist() == [8, 4]
    assert (shorter["input_ids"] == VIDEO_ID).sum(1).tolist() == [32, 16]
    assert torch.equal(shorter["pixel_values_videos"][:8], inputs["pixel_values_videos"][0])
    # Left padding, as generation needs it.
    assert shorter["attention_mask"][1, 0] == 0 and shorter["attention_mask"][:, -1].tolist() == [1, 1]


def test_two_videos_and_an_image_in_one_prompt(processor, clip):
    content = [
        {"type": "video", "path": clip, "nframes": 4},
        {"type": "text", "text": "then "},
        {"type": "image", "image": Image.fromarray(frames_of(1)[0])},
        {"type": "video", "video": frames_of(8)},
        {"type": "text", "text": "Which?"},
    ]
    text_only = [{"role": "user", "content": "Hello"}]
    inputs = ask(processor, [text_only, [{"role": "user", "content": content}]])
    assert inputs["video_num_frames"].tolist() == [4, 8]
    tiles = 1 + int(inputs["image_grids"][0].prod())
    assert inputs["pixel_values"].shape == (tiles, 3, SIDE, SIDE)
    row = inputs["input_ids"][1].tolist()
    assert (row.count(VIDEO_ID), row.count(IMAGE_ID)) == (12 * 4, tiles * 16)
    assert not set(inputs["input_ids"][0].tolist()) & {VIDEO_ID, IMAGE_ID}
    # Each item stands where its block stood.
    kinds = [token for token, previous in zip(row, [None, *row], strict=False) if token != previous]
    assert [token for token in kinds if token in (VIDEO_ID, IMAGE_ID)] == [VIDEO_ID, IMAGE_ID, VIDEO_ID]


def test_frame_pictures_in_a_batch_with_text_and_arrays(processor, tmp_path):
    frames = frames_of(4)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    batch = [[{"role": "user", "content": "Hello"}], messages(video=frames), messages(video=paths)]
    inputs = ask(processor, batch)
    assert torch.equal(inputs["pixel_values_videos"][0], inputs["pixel_values_videos"][1])
    # A folder is sampled like a file, one picture per second.
    folder = ask(processor, messages(path=tmp_path))
    assert torch.equal(folder["pixel_values_videos"][0], inputs["pixel_values_videos"][0])
    with pytest.raises(ValueError, match="Sampling frames from a list of images is not supported"):
        ask(processor, messages(video=paths), do_sample_frames=True)


def test_prompts_and_videos_without_template(processor, clip):
    inputs = processor(text=["<|video_pad|>Why?", "<|video_pad|>Who?"], videos=[clip, frames_of(12)], padding=True)
    assert len(inputs["pixel_values_videos"]) == 2
    assert [row.count(VIDEO_ID) for row in inputs["input_ids"]] == [48, 48]
    assert "video_metadata" not in inputs


def test_decoder_settings_are_passed_on(processor, clip):
    expected = ask(processor, messages(path=clip))["pixel_values_videos"]
    chosen = ask(processor, messages(path=clip), video_backend="pyav", num_threads=1, progress=False)
    assert torch.equal(chosen["pixel_values_videos"], expected)
    with pytest.raises(ValueError, match="Unknown video backend 'vhs'"):
        ask(processor, messages(path=clip), video_backend="vhs")


def test_options_beside_processor_kwargs(processor, clip):
    inputs = processor.apply_chat_template(
        messages(path=clip), tokenize=True, return_dict=True, num_frames=8, processor_kwargs={"return_tensors": "pt"}
    )
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, SIDE, SIDE)


def test_messages_are_not_changed(processor, clip):
    conversation = messages(path=clip, nframes=4)
    ask(processor, conversation)
    assert conversation == messages(path=clip, nframes=4)


# --- pixels ------------------------------------------------------------------------------------------------------


def test_frames_at_size_are_not_touched():
    frames = frames_of(4, SIDE, SIDE)
    video_processor = VideoChatFlashVideoProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    pixels = video_processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(frames).permute(0, 3, 1, 2))


def test_frames_of_files_are_resized_while_reading(processor, clip, monkeypatch):
    sizes = []

    def spy(source, **kwargs):
        sizes.append(kwargs["size"])
        return read_video(source, **kwargs)

    monkeypatch.setattr(stretched_videos, "read_video", spy)
    ask(processor, messages(path=clip))
    ask(processor, messages(path=clip), resample=2)
    # Only the filter that the reader has may be applied there.
    assert sizes == [(SIDE, SIDE), None]


def test_float_frames_and_other_sizes():
    frames = torch.rand(4, 3, 40, 60)
    video_processor = VideoChatFlashVideoProcessor(
        size={"height": 20, "width": 30}, do_normalize=False, do_rescale=False
    )
    pixels = video_processor(frames, return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == (1, 4, 3, 20, 30)
    assert 0.3 < float(pixels.mean()) < 0.7
    short = VideoChatFlashVideoProcessor(size={"shortest_edge": 20}, do_center_crop=True, crop_size=18)
    assert short(frames_of(4), return_tensors="pt")["pixel_values_videos"].shape == (1, 4, 3, 18, 18)


def test_image_tiles_are_the_picture_and_its_grid():
    image = np.zeros((2 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            image[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE] = 40 * (row * 3 + col)
    image_processor = VideoChatFlashImageProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    inputs = image_processor([image], return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[2, 3]]
    assert inputs["pixel_values"].shape == (7, 3, SIDE, SIDE)
    grid = (inputs["pixel_values"][1:] * 255).round()
    # The picture has exactly the size of its grid, so that every tile keeps its grey.
    assert [tile.unique().tolist() for tile in grid] == [[40.0 * index] for index in range(6)]


@pytest.mark.parametrize("mean", [[0.0, 0.0, 0.0], 0.0])
def test_bars_have_the_mean_colour_of_the_call(mean):
    options = {"image_aspect_ratio": "pad", "image_mean": mean, "image_std": [1.0, 1.0, 1.0]}
    processor = VideoChatFlashImageProcessor(size={"height": SIDE, "width": SIDE})
    pixels = processor(Image.new("RGB", (64, 32), (255, 255, 255)), return_tensors="pt", **options)["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == [0.0, 0.0, 0.0]
    # White up to the rounding of 255 / 255.
    assert torch.allclose(pixels[0, :, SIDE // 2, 0], torch.ones(3), atol=1e-6)


def test_a_grid_of_tiles_without_squares_is_refused_before_the_model(processor):
    tiled = copy.deepcopy(processor)
    tiled.tokens_per_frame = 2
    image = Image.new("RGB", (3 * SIDE, 2 * SIDE))
    with pytest.raises(ValueError, match=r"8 tokens of a tile .* do not form a square.*image_aspect_ratio=\"pad\""):
        tiled(images=[image], text="<|image_pad|>Why?")
    tiled.image_processor.image_aspect_ratio = "pad"
    assert tiled(images=[image], text="<|image_pad|>Why?")["input_ids"][0].count(tiled.image_token_id) == 8


def test_several_images_of_a_sample_are_padded_to_squares(processor):
    image = np.full((16, 48, 3), 200, dtype=np.uint8)
    one = [{"type": "image", "image": image}]
    question = [{"type": "text", "text": "Which?"}]
    single = ask(processor, [{"role": "user", "content": one + question}])
    several = ask(processor, [{"role": "user", "content": one + one + question}])
    assert len(single["pixel_values"]) > 1
    assert several["image_grids"].tolist() == [[0, 0], [0, 0]]
    assert several["pixel_values"].shape == (2, 3, SIDE, SIDE)
    # The bars above and below have the mean colour, which is about zero after normalising (rounded to bytes).
    assert float(several["pixel_values"][0, :, 0].abs().max()) < 0.02
    assert float(several["pixel_values"][0, :, SIDE // 2].min()) > 1.0
    assert int((several["input_ids"] == IMAGE_ID).sum()) == 2 * 16


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(processor, mode):
    frames = [Image.fromarray(frame).convert(mode) for frame in frames_of(4)]
    expected = ask(processor, messages(video=np.stack([np.asarray(frame.convert("RGB")) for frame in frames])))
    inputs = ask(processor, messages(video=frames))
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    picture = Image.fromarray(frames_of(1, SIDE, SIDE)[0]).convert(mode)
    image_processor = VideoChatFlashImageProcessor(size={"height": SIDE, "width": SIDE}, image_aspect_ratio="square")
    expected = image_processor([np.asarray(picture.convert("RGB"))], return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor([picture], return_tensors="pt")["pixel_values"], expected)


# --- template, saving --------------------------------------------------------------------------------------------


def test_training_template_says_the_same_and_marks_answers(processor, clip):
    conversation = [
        *messages(path=clip, nframes=4),
        {"role": "assistant", "content": [{"type": "text", "text": "A dog runs."}]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is late."},
    ]
    other = [*messages(video=frames_of(4)), {"role": "assistant", "content": "Nothing."}]
    template = processor.training_chat_template
    assert template == load_chat_template("qwen_chatml_training")
    plain = processor.apply_chat_template(conversation)
    assert processor.apply_chat_template(conversation, chat_template=template) == plain
    assert plain.endswith("<|im_start|>assistant\nIt is late.<|im_end|>\n")
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
        assert answers == ["A dog runs.<|im_end|>It is late.<|im_end|>", "Nothing.<|im_end|>"]


def test_system_message_replaces_the_default(processor):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert processor.apply_chat_template(said) == expected


def test_save_and_load(processor, clip, tmp_path):
    changed = VideoChatFlashProcessor(
        VideoChatFlashImageProcessor(size={"height": SIDE, "width": SIDE}, image_aspect_ratio="pad"),
        tiny_tokenizer(),
        VideoChatFlashVideoProcessor(size={"height": SIDE, "width": SIDE}, mm_local_num_frames=2, min_frames=2),
        tokens_per_frame=8,
        time_message="{num_frames} frames in {duration:.1f} s",
    )
    changed.save_pretrained(tmp_path)
    tiny_videochat_flash_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VideoChatFlashProcessor
    assert (loaded.tokens_per_frame, loaded.mm_local_num_frames) == (8, 2)
    assert loaded.image_processor.image_aspect_ratio == "pad"
    assert loaded.video_processor.min_frames == 2
    assert loaded.chat_template == changed.chat_template
    before, after = ask(changed, messages(path=clip)), ask(loaded, messages(path=clip))
    assert torch.equal(before["input_ids"], after["input_ids"])
    assert torch.equal(before["pixel_values_videos"], after["pixel_values_videos"])
    assert "12 frames in 12.0 s What" in processor.decode(after["input_ids"][0])
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is VideoChatFlashVideoProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VideoChatFlashImageProcessor


def test_time_message_with_times_and_without(clip):
    parts = tiny_videochat_flash_processor()
    listing = VideoChatFlashProcessor(
        parts.image_processor, parts.tokenizer, parts.video_processor, tokens_per_frame=4, time_message="At {times} s."
    )
    text = listing.decode(ask(listing, messages(path=clip, nframes=4))["input_ids"][0])
    assert "\nAt 1.4, 4.4, 7.4, 10.4 s. What" in text
    silent = VideoChatFlashProcessor(
        parts.image_processor, parts.tokenizer, parts.video_processor, tokens_per_frame=4, time_message=""
    )
    assert "<|video_pad|>\nWhat" in silent.decode(ask(silent, messages(path=clip, nframes=4))["input_ids"][0])


def test_counting_helpers_agree_with_the_call(processor):
    sizes = [(30, 70), (64, 64), (90, 20)]
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    inputs = processor(
        images=[[image] for image in images], text=["<|image_pad|>"] * 3, padding=True, return_tensors="pt"
    )
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=[(7, 20, 30)])
    assert (inputs["input_ids"] == IMAGE_ID).sum(1).tolist() == counted["num_image_tokens"]
    assert counted["num_video_tokens"] == [8 * 4]
    from_array = processor._get_num_multimodal_tokens(image_sizes=np.array(sizes))
    assert from_array["num_image_tokens"] == counted["num_image_tokens"]


@pytest.mark.parametrize("rule", [None, "anyres_nopad"])
def test_counting_several_images_of_a_prompt(processor, rule):
    sizes = [(30, 70), (64, 64), (90, 20)]
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    options = {} if rule is None else {"multi_image_aspect_ratio": rule}
    inputs = processor(
        images=[images[:2], images[2:]], text=["<|image_pad|><|image_pad|>", "<|image_pad|>"], padding=True, **options
    )
    found = [row.count(IMAGE_ID) for row in inputs["input_ids"]]
    for given in ({"image_sizes": [sizes[:2], sizes[2:]]}, {"image_sizes": sizes, "images_per_sample": [2, 1]}):
        counted = processor._get_num_multimodal_tokens(**given, **options)
        assert [sum(counted["num_image_tokens"][:2]), counted["num_image_tokens"][2]] == found
        assert counted["num_image_patches"] == [1 + int(rows * cols) for rows, cols in inputs["image_grids"]]
    with pytest.raises(ValueError, match=r"images_per_sample=\[2\] adds up to 2, but 3 image sizes came"):
        processor._get_num_multimodal_tokens(image_sizes=sizes, images_per_sample=[2])


# --- errors ------------------------------------------------------------------------------------------------------


def test_numbers_of_placeholders_and_videos(processor):
    with pytest.raises(ValueError, match=r"Found 2 <\|video_pad\|> tokens and 1 videos"):
        processor(text="<|video_pad|><|video_pad|>Why?", videos=[frames_of(4)])
    with pytest.raises(ValueError, match=r"Found 0 <\|image_pad\|> tokens and 1 images"):
        processor(text="Why?", images=[frames_of(1)[0]])
    with pytest.raises(ValueError, match=r"Found 1 <\|video_pad\|> tokens and 0 videos"):
        processor(text="<|video_pad|>Why?")


def test_truncation_does_not_cut_a_video(processor):
    limits = {"truncation": True, "max_length": 60}
    with pytest.raises(
        ValueError, match=r"Truncation to 60 tokens.*32 video tokens, of which \d+ are left.*num_frames"
    ):
        processor(text="Look at this, the only video: <|video_pad|>Why?", videos=[frames_of(8)], **limits)
    # What follows the video may be cut.
    inputs = processor(text="<|video_pad|>Why?", videos=[frames_of(8)], **limits)
    assert len(inputs["input_ids"][0]) == 60


def test_prompt_over_the_models_length(processor):
    small = tiny_videochat_flash_processor()
    small.tokenizer.model_max_length = 100
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens \(64 of them visual\), but the model's limit is 100"):
        ask(small, messages(video=frames_of(16)))


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(processor, question):
    with pytest.raises(ValueError, match="question is empty"):
        ask(processor, messages(question, video=frames_of(4)))


def test_rate_is_needed(processor):
    with pytest.raises(ValueError, match="frame rate of the video is None"):
        ask(processor, messages(video=frames_of(8)), fps=1)
    with pytest.raises(ValueError, match="frame rate of the video is 0"):
        ask(processor, messages(video=frames_of(8), video_metadata={"fps": 0.0}))
    with pytest.raises(ValueError, match="exclude each other"):
        ask(processor, messages(video=frames_of(8)), fps=1, num_frames=4)


def test_blocks_that_name_no_video_or_two(processor, clip):
    with pytest.raises(ValueError, match="exactly one of 'video', 'url' and 'path', got none"):
        ask(processor, messages())
    with pytest.raises(ValueError, match=r"got \['url', 'path'\]"):
        ask(processor, messages(url=str(clip), path=str(clip)))


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


def test_frames_that_do_not_fit(processor):
    with pytest.raises(ValueError, match="must have one size"):
        ask(processor, messages(video=[frames_of(1)[0], frames_of(1, 10, 10)[0]]))
    with pytest.raises(ValueError, match="has no frames"):
        ask(processor, messages(video=frames_of(0)))
    with pytest.raises(ValueError, match="3 timestamps were given for 4 frames"):
        ask(processor, messages(video=frames_of(4), timestamps=[0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="2 entries for 1 videos"):
        ask(processor, messages(video=frames_of(4)), video_metadata=[{"fps": 1.0}, {"fps": 1.0}])


def test_settings_that_do_not_fit():
    parts = tiny_videochat_flash_processor()
    with pytest.raises(ValueError, match="is 8 in the processor and 4 in the video processor"):
        VideoChatFlashProcessor(parts.image_processor, parts.tokenizer, parts.video_processor, mm_local_num_frames=8)
    with pytest.raises(ValueError, match="cannot be filled in"):
        VideoChatFlashProcessor(
            parts.image_processor, parts.tokenizer, parts.video_processor, time_message="{length} s"
        )(text="<|video_pad|>", videos=[frames_of(4)])
    with pytest.raises(ValueError, match="Unknown image_aspect_ratio 'wide'"):
        parts.image_processor([frames_of(1)[0]], image_aspect_ratio="wide")
    with pytest.raises(ValueError, match="whole 32x32 tiles"):
        parts.image_processor([frames_of(1)[0]], image_grid_pinpoints=[[40, 40]])
    with pytest.raises(ValueError, match="takes no sound"):
        parts(text="Why?", audio=np.zeros(10))
