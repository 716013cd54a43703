"""Messages with videos to inputs of CrossVLLM: granularities, strides, segments, pixels, saving, errors."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor, CLIPImageProcessor

from longvideo.processing.crossvllm import CrossVLLMProcessor, CrossVLLMVideoProcessor
from longvideo.processing.crossvllm.source_frames import SourceFrames
from tests.processing_inputs import ask, frames_of, messages
from tests.tiny import tiny_tokenizer
from tests.tiny_crossvllm_processor import SIDE, tiny_crossvllm_processor
from tests.videos import frame_number, make_video

VIDEO_ID, IMAGE_ID = 4, 3


@pytest.fixture(scope="module")
def processor() -> CrossVLLMProcessor:
    return tiny_crossvllm_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Ten seconds at 8 frames per second, already as large as the tower's frames."""
    return make_video(tmp_path_factory.mktemp("clips") / "numbered.mp4", num_frames=80, fps=8, size=(SIDE, SIDE))


def numbers_of(pixels_FCHW: torch.Tensor, processor: CrossVLLMProcessor) -> list[int]:
    """The numbers that the frames of `tests.videos` show, read back from normalised pixels."""
    video = processor.video_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (video.image_mean, video.image_std))
    bytes_FHWC = ((pixels_FCHW * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [frame_number(frame) for frame in bytes_FHWC]


def middles(first: int, total: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal parts of `total` frames, by the definition."""
    edges = [index * total // count for index in range(count + 1)]
    return [first + (begin + end - 1) // 2 for begin, end in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("wishes", "frames", "tokens"),
    [
        ({}, 12, 4),
        ({"granularity": "coarse"}, 12, 4),
        ({"granularity": "fine"}, 4, 36),
        ({"training": True}, 6, 4),
        ({"granularity": "fine", "training": True}, 2, 36),
        ({"spatial_pool_stride": 3}, 12, 16),
        ({"granularity": "fine", "spatial_pool_stride": 1}, 4, 144),
        ({"spatial_pool_stride": 12}, 12, 1),
        ({"granularity": "fine", "num_frames": 7}, 7, 36),
        ({"fps": 2}, 20, 4),
        ({"max_frames": 5}, 5, 4),
        ({"min_frames": 16}, 16, 4),
        ({"granularity": "fine", "fine_num_frames": 9}, 9, 36),
    ],
)
def test_granularities_have_their_frames_and_placeholders(processor, clip, wishes, frames, tokens) -> None:
    inputs = ask(processor, messages(path=clip), **wishes)
    assert inputs["pixel_values_videos"].shape == (1, frames, 3, SIDE, SIDE)
    assert int((inputs["input_ids"] == VIDEO_ID).sum()) == frames * tokens
    assert list(inputs["video_metadata"][0].frames_indices) == middles(0, 80, frames)
    assert numbers_of(inputs["pixel_values_videos"][0], processor) == middles(0, 80, frames)


@pytest.mark.parametrize(
    ("start", "end", "first", "total"),
    [
        (2.0, 6.0, 16, 32),
        (0.0, 3.0, 0, 24),
        (9.0, 10.0, 72, 8),
        (4.0, 4.1, 32, 1),
        (4.0, 4.2, 32, 2),
        (2.2, 2.4, 17, 3),
        (9.0, 9.95, 72, 8),
    ],
)
def test_segments_are_read_from_the_source(processor, clip, start, end, first, total) -> None:
    content = [{"type": "video", "path": str(clip), "video_start": start, "video_end": end}]
    content.append({"type": "text", "text": "What?"})
    inputs = ask(processor, [{"role": "user", "content": content}], granularity="fine")
    expected = middles(first, total, min(4, total))
    assert list(inputs["video_metadata"][0].frames_indices) == expected
    assert numbers_of(inputs["pixel_values_videos"][0], processor) == expected


@pytest.mark.parametrize("segment", [(2.2, 2.4), (9.0, 9.95), (9.0, 10.0), (2.0, 6.0)])
def test_a_segment_has_the_same_frames_wherever_it_comes_from(processor, clip, segment) -> None:
    block = {"type": "video", "video_start": segment[0], "video_end": segment[1]}
    frames, facts = np.stack(frames_of(80)), {"fps": 8.0}
    taken = []
    for video, known in ((str(clip), {}), (frames, {"video_metadata": facts})):
        content = [{**block, "video": video, **known}, {"type": "text", "text": "What?"}]
        inputs = ask(processor, [{"role": "user", "content": content}], granularity="fine")
        taken.append(list(inputs["video_metadata"][0].frames_indices))
        source = SourceFrames(video, known.get("video_metadata"))
        taken.append(source.choose(processor.video_processor, segment, granularity="fine"))
    assert taken == taken[:1] * 4


def test_a_short_video_has_fewer_frames(processor, tmp_path, recwarn) -> None:
    short = make_video(tmp_path / "short.mp4", num_frames=3, fps=8, size=(SIDE, SIDE))
    inputs = ask(processor, messages(path=short))
    assert numbers_of(inputs["pixel_values_videos"][0], processor) == [0, 1, 2]
    assert [str(entry.message) for entry in recwarn if "frames" in str(entry.message)] == []


def test_unequal_frame_counts_in_a_batch(processor, clip, tmp_path) -> None:
    short = make_video(tmp_path / "short.mp4", num_frames=5, fps=8, size=(SIDE, SIDE))
    inputs = ask(processor, [messages(path=clip), messages(path=short)], padding=True)
    assert inputs["pixel_values_videos"].shape == (17, 3, SIDE, SIDE)
    assert inputs["video_num_frames"].tolist() == [12, 5]
    assert (inputs["input_ids"] == VIDEO_ID).sum(dim=1).tolist() == [48, 20]


def test_the_prompt_is_vicunas(processor, clip) -> None:
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "video", "path": str(clip)}]},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        {"role": "user", "content": "And?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "Be brief. USER: <|video_pad|>\nWhy? ASSISTANT: So.<|im_end|>USER: And? ASSISTANT:"


def test_what_the_assistant_says_can_be_marked(processor) -> None:
    chat = [*messages(video=frames_of(2)), {"role": "assistant", "content": [{"type": "text", "text": "A hat."}]}]
    inputs = processor.apply_chat_template(
        chat,
        chat_template=processor.training_chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    marked = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()]
    assert processor.decode(marked) == " A hat.<|im_end|>"


def test_a_prompt_without_pixels_is_the_same(processor, clip) -> None:
    chat = messages(path=clip)
    for granularity, frames in (("coarse", 12), ("fine", 4)):
        text = processor.prompt_of(chat, [frames], granularity=granularity)
        expected = ask(processor, chat, granularity=granularity)["input_ids"]
        assert processor.tokenizer(text, return_tensors="pt")["input_ids"].tolist() == expected.tolist()
    with pytest.raises(ValueError, match=r"1 times .* and 2 numbers of frames"):
        processor.prompt_of(chat, [3, 4])


def test_the_middle_of_a_wide_frame_is_kept(processor, tmp_path) -> None:
    """The shorter side gets the tower's size, the sides of the longer one are cut off; files, frames and pictures."""
    frame = np.zeros((24, 96, 3), dtype=np.uint8)
    frame[:, 36:60] = 255
    frames = np.stack([frame] * 3)
    for index in range(3):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    bright = [(1 - mean) / std for mean, std in zip(*_statistics(processor), strict=True)]
    for source in ({"video": frames}, {"path": tmp_path}, {"video": [tmp_path / f"{i}.png" for i in range(3)]}):
        pixels = ask(processor, messages(**source))["pixel_values_videos"]
        assert pixels.shape == (1, 3, 3, SIDE, SIDE)
        for channel in range(3):
            # 1e-5: normalising in float32. The outermost columns mix with the dark sides.
            inner = pixels[0, :, channel, :, 3:-3]
            assert torch.allclose(inner, torch.full_like(inner, bright[channel]), atol=1e-5)


def _statistics(processor: CrossVLLMProcessor) -> tuple[list[float], list[float]]:
    return processor.video_processor.image_mean, processor.video_processor.image_std


def test_files_and_memory_give_the_same_pixels(processor, tmp_path) -> None:
    frames = np.stack([np.random.default_rng(n).integers(0, 256, (50, 70, 3), dtype=np.uint8) for n in range(4)])
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    from_memory = ask(processor, messages(video=frames))["pixel_values_videos"]
    assert torch.equal(ask(processor, messages(path=tmp_path))["pixel_values_videos"], from_memory)


def test_images_are_not_pooled(processor) -> None:
    picture = {"type": "image", "image": Image.fromarray(frames_of(1)[0])}
    inputs = ask(processor, [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}])
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 144


def test_saving_and_loading(processor, clip, tmp_path) -> None:
    made = tiny_crossvllm_processor(granularity="fine", fine_stride=4, fine_num_frames=3)
    made.save_pretrained(tmp_path)
    from tests.tiny_crossvllm import tiny_crossvllm_config

    tiny_crossvllm_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CrossVLLMProcessor
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is CrossVLLMVideoProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CLIPImageProcessor
    expected, found = (ask(each, messages(path=clip)) for each in (made, loaded))
    assert int((found["input_ids"] == VIDEO_ID).sum()) == 27
    for name in ("input_ids", "pixel_values_videos"):
        assert torch.equal(found[name], expected[name])


def test_defaults_are_those_of_the_paper() -> None:
    from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig

    tokenizer = tiny_tokenizer()
    made = CrossVLLMProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        video_processor=CrossVLLMVideoProcessor(),
    )
    config = CrossVLLMConfig()
    for granularity in ("coarse", "fine"):
        for training in (False, True):
            frames = made.video_processor.frame_budget({"granularity": granularity, "training": training})
            assert frames == config.num_frames(granularity, training=training)
        assert made.get_num_video_tokens(1, granularity=granularity) == config.tokens_per_frame(granularity)
    assert made.get_num_video_tokens(288) == 4608 == made.get_num_video_tokens(32, granularity="fine")
    assert [made.get_num_video_tokens(5, spatial_pool_stride=stride) for stride in (2, 3, 6, 12)] == [720, 320, 80, 20]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"granularity": "medium"}, "granularity='medium', expected one of coarse, fine"),
        ({"spatial_pool_stride": 5}, r"12 x 12 patches .* the stride 5 does not divide.*\[1, 2, 3, 4, 6, 12\]"),
        ({"spatial_pool_stride": 0}, "spatial_pool_stride=0"),
        ({"coarse_num_frames": 0}, "coarse_num_frames=0"),
        ({"num_frames": 3, "fps": 2}, "exclude each other"),
        ({"min_frames": 9, "max_frames": 3}, "min_frames=9 is above max_frames=3"),
    ],
)
def test_wrong_wishes(processor, clip, wishes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ask(processor, messages(path=clip), **wishes)


def test_wrong_processors() -> None:
    with pytest.raises(ValueError, match="fine_stride=0"):
        tiny_crossvllm_processor(fine_stride=0)
    tokenizer = tiny_tokenizer()
    tokenizer.video_token = "<video>"
    with pytest.raises(ValueError, match="does not know the placeholder '<video>'"):
        tiny_crossvllm_processor(tokenizer=tokenizer)
