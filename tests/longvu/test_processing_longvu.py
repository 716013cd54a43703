"""Messages with videos and images to LongVU's inputs: frames, times, pixels of both towers, windows, errors."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor, PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from longvideo.evaluation.presets import BENCHMARK_PRESETS
from longvideo.processing.longvu import LongVUImageProcessor, LongVUProcessor, LongVUVideoProcessor
from longvideo.processing.shared.chat_templates import load_chat_template
from longvideo.processing.shared.video_probe import probe_video
from tests.processing_inputs import ask, frames_of, messages
from tests.tiny import tiny_tokenizer
from tests.tiny_longvu import tiny_longvu_config
from tests.tiny_longvu_processor import SIDE, tiny_longvu_processor
from tests.videos import frame_number, make_frame_folder, make_gif, make_sound, make_video

VIDEO_ID, IMAGE_ID = 4, 3
PIXELS = ("pixel_values_videos", "pixel_values_videos_dino")


@pytest.fixture(scope="module")
def processor() -> LongVUProcessor:
    return tiny_longvu_processor()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds at 8 frames per second, 64 x 48 pixels."""
    return make_video(tmp_path_factory.mktemp("clips") / "numbered.mp4", num_frames=96, fps=8)


def numbers_of(pixels_FCHW: torch.Tensor, mean: list, std: list, height: int, width: int) -> list[int]:
    """The numbers that the frames of `tests.videos` show, read back from normalised squares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    rows = round(pixels_FCHW.shape[-1] * height / width)
    top = (pixels_FCHW.shape[-1] - rows) // 2
    return [
        frame_number(((frame * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()[top : top + rows])
        for frame in pixels_FCHW
    ]


# --- sources and times -------------------------------------------------------------------------------------------


def test_path_is_sampled_once_per_second_from_the_first_frame(clip):
    processor = tiny_longvu_processor(40, 50)
    inputs = ask(processor, messages(path=clip))
    facts = inputs["video_metadata"][0]
    assert list(facts.frames_indices) == list(range(0, 96, 8))
    assert (facts.fps, facts.duration, facts.timestamps) == (8, 12, [float(second) for second in range(12)])
    assert inputs["pixel_values_videos"].shape == (12, 3, 40, 40)
    assert inputs["pixel_values_videos_dino"].shape == (12, 3, 50, 50)
    part = processor.video_processor
    numbers = list(range(0, 96, 8))
    assert numbers_of(inputs["pixel_values_videos"], part.image_mean, part.image_std, 48, 64) == numbers
    dino = numbers_of(inputs["pixel_values_videos_dino"], part.dino_image_mean, part.dino_image_std, 48, 64)
    assert dino == numbers
    assert inputs["video_num_frames"].tolist() == [12] and inputs["video_num_frames"].dtype == torch.int64
    assert inputs["video_sizes"].tolist() == [[48, 64]] and inputs["video_sizes"].dtype == torch.int64


def test_one_placeholder_and_a_line_break(processor, clip):
    inputs = ask(processor, messages(path=clip))
    assert processor.decode(inputs["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|video_pad|>\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["input_ids"][0].tolist().count(VIDEO_ID) == 1


def test_sentence_about_time(processor, clip, tmp_path):
    told = tiny_longvu_processor()
    told.time_message = "{duration:.1f} s, {num_frames} frames."
    texts = [each.decode(ask(each, messages(path=clip))["input_ids"][0]) for each in (processor, told)]
    inputs = ask(told, messages(path=clip))
    sentence = f"{probe_video(clip).duration:.1f} s, {int(inputs['video_num_frames'][0])} frames. "
    assert texts[1] == texts[0].replace("<|video_pad|>\n", f"<|video_pad|>\n{sentence}")
    assert sentence not in texts[0]
    told.save_pretrained(tmp_path)
    assert LongVUProcessor.from_pretrained(tmp_path).time_message == told.time_message


def test_frames_in_any_form_give_the_same_pixels(processor, tmp_path):
    frames = frames_of(8)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    forms = {
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "paths": [tmp_path / f"{index}.png" for index in range(8)],
    }
    results = {name: ask(processor, messages(video=form)) for name, form in forms.items()}
    for name, inputs in results.items():
        for key in (*PIXELS, "input_ids"):
            assert torch.equal(inputs[key], results["array"][key]), (name, key)


@pytest.mark.parametrize(
    ("order", "decoded", "pictures"),
    [("original", [48, 64], [64, 48]), ("height_width", [48, 64], [48, 64]), ("width_height", [64, 48], [64, 48])],
)
def test_order_of_video_sizes(clip, tmp_path, order, decoded, pictures):
    video_processor = tiny_longvu_processor(video_size_order=order).video_processor
    folder = make_frame_folder(tmp_path / "frames", 3)
    gif = make_gif(tmp_path / "a.gif", 3)
    array = frames_of(3, 48, 64)
    for source, expected in (
        (clip, decoded),
        (array, decoded),
        (folder, pictures),
        (gif, pictures),
        ([[sorted(map(str, folder.iterdir()))]], pictures),
    ):
        assert video_processor(source, return_tensors="pt")["video_sizes"].tolist() == [expected], source
        assert video_processor.iterate_windows(source).video_size.tolist() == expected, source


def test_array_with_rate_is_sampled_and_frames_with_times_are_kept(processor):
    inputs = ask(processor, messages(video=frames_of(48), video_metadata={"fps": 4.0}))
    assert list(inputs["video_metadata"][0].frames_indices) == list(range(0, 48, 4))
    inputs = ask(processor, messages(video=frames_of(4), timestamps=[1.0, 3.0, 5.0, 7.0]))
    assert inputs["video_metadata"][0].timestamps == [1.0, 3.0, 5.0, 7.0]
    assert inputs["video_num_frames"].tolist() == [4]


# --- sampling rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "options", "step"),
    [
        (29.97, {}, 30),
        (23.976, {}, 24),
        (24.5, {}, 24),  # round half to even, as Python does
        (0.4, {}, 1),
        (29.97, {"fps": 2}, 15),
        (24.6, {"fps": 0.5}, 49),
        (24.6, {"fps": 0.5, "fps_rule": "rounded_stride"}, 50),
    ],
)
def test_strides_of_the_original(fps, options, step):
    metadata = VideoMetadata(total_num_frames=1000, fps=fps)
    assert LongVUVideoProcessor().sample_frames(metadata, **options).tolist() == list(range(0, 1000, step))


def test_there_is_no_limit_but_one_may_be_set():
    hours = VideoMetadata(total_num_frames=4 * 3600 * 25, fps=25.0)
    assert len(LongVUVideoProcessor().sample_frames(hours)) == 4 * 3600
    capped = LongVUVideoProcessor(max_frames=100).sample_frames(hours)
    assert capped.tolist() == [144 * 25 * place for place in range(100)]
    # A default gives way to a wish that contradicts it; two wishes must agree.
    assert len(LongVUVideoProcessor(max_frames=100).sample_frames(hours, min_frames=20_000)) == 20_000
    with pytest.raises(ValueError, match="min_frames=16 is above max_frames=8"):
        LongVUVideoProcessor().sample_frames(hours, min_frames=16, max_frames=8)


def test_long_videos_of_benchmarks_are_thinned_by_a_whole_stride():
    def count(seconds: int) -> int:
        metadata = VideoMetadata(total_num_frames=seconds * 25, fps=25.0)
        return len(LongVUVideoProcessor(fps=0.5, thin_above=1000).sample_frames(metadata))

    assert [count(seconds) for seconds in (2000, 3998, 4000, 6000)] == [1000, 1999, 1000, 1000]


def test_even_rule_gives_the_rate_that_was_asked_for(processor, clip):
    inputs = ask(processor, messages(path=clip, fps=3), fps_rule="even")
    assert inputs["video_num_frames"].tolist() == [36]
    # The nearest stride to 8 / 3 frames is 3.
    assert ask(processor, messages(path=clip, fps=3))["video_num_frames"].tolist() == [32]


@pytest.mark.parametrize(
    ("wishes", "count"),
    [({"num_frames": 5}, 5), ({"fps": 2}, 24), ({"fps": 2, "max_frames": 7}, 7), ({"min_frames": 16}, 16)],
)
def test_wishes_of_call_and_block(processor, clip, wishes, count):
    call = ask(processor, messages(path=clip), **wishes)
    assert call["video_num_frames"].tolist() == [count]
    renamed = {"nframes" if name == "num_frames" else name: value for name, value in wishes.items()}
    block = ask(processor, messages(path=clip, **renamed))
    assert torch.equal(block["pixel_values_videos"], call["pixel_values_videos"])


def test_window_in_seconds(processor, clip):
    inputs = ask(processor, messages(path=clip, video_start=4.0, video_end=8.0))
    assert list(inputs["video_metadata"][0].frames_indices) == [32, 40, 48, 56]
    with processor.iterate_windows(clip, 3, start=4.0, end=8.0) as windows:
        assert windows.metadata.frames_indices == [32, 40, 48, 56]
        assert torch.equal(torch.cat([part[PIXELS[1]] for part in windows]), inputs[PIXELS[1]])


@pytest.mark.parametrize("name", ["egoschema", "mvbench", "mlvu", "videomme"])
def test_presets_of_benchmarks(name):
    preset = BENCHMARK_PRESETS[f"longvu-{name}"]
    video_processor = LongVUVideoProcessor()
    metadata = VideoMetadata(total_num_frames=3000 * 25, fps=25.0)
    indices = video_processor.sample_frames(metadata, **preset.processor_kwargs)
    steps = {"egoschema": 50, "mvbench": 12, "mlvu": 50, "videomme": 50}
    assert set(np.diff(indices)) == {steps[name]}
    config = tiny_longvu_config()
    preset.apply(config)
    expected = {"egoschema": (0.83, 0.8), "mvbench": (0.83, 0.8), "mlvu": (0.82, 0.77), "videomme": (0.83, 0.65)}
    assert (config.dino_threshold, config.drop_threshold) == expected[name]


# --- pixels ------------------------------------------------------------------------------------------------------


def test_bars_have_the_mean_colour_of_each_tower():
    part = tiny_longvu_processor(8, 8).video_processor
    outputs = part(np.full((1, 2, 8, 3), 255, dtype=np.uint8), do_normalize=False, return_tensors="pt")
    siglip, dino = ((outputs[name][0] * 255).round().int() for name in PIXELS)
    assert siglip[:, 0, 0].tolist() == [127, 127, 127] and dino[:, 0, 0].tolist() == [123, 116, 103]
    # Two rows of picture in eight: three bars of one row on top, three below.
    assert siglip[0, :, 0].tolist() == [127] * 3 + [255] * 2 + [127] * 3
    odd = part(np.full((1, 8, 3, 3), 255, dtype=np.uint8), do_normalize=False, return_tensors="pt")
    # An odd rest goes to the right.
    assert (odd[PIXELS[0]][0, 0, 0] * 255).round().tolist() == [127] * 2 + [255] * 3 + [127] * 3


def test_pixels_are_those_of_pil():
    frame = frames_of(1, 30, 51)[0]
    square = Image.new("RGB", (51, 51), (123, 116, 103))
    square.paste(Image.fromarray(frame), (0, (51 - 30) // 2))
    expected = torch.from_numpy(np.array(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    processor = tiny_longvu_processor()
    video = processor.video_processor(frame[None], do_normalize=False, return_tensors="pt")[PIXELS[1]][0]
    image = processor.image_processor(frame, do_normalize=False, return_tensors="pt")["pixel_values_dino"][0]
    for pixels in (video, image):
        assert torch.equal((pixels * 255).round().byte(), expected)


def test_frames_of_files_and_of_memory_give_the_same_pixels(processor, tmp_path):
    folder = make_frame_folder(tmp_path / "frames", 3)
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    from_files = processor.video_processor(str(folder), return_tensors="pt")
    from_memory = processor.video_processor(frames, return_tensors="pt")
    for name in PIXELS:
        assert torch.equal(from_files[name], from_memory[name])


def test_other_sizes_filters_and_types():
    video_processor = tiny_longvu_processor().video_processor
    frames = torch.rand(4, 3, 40, 60)
    outputs = video_processor(frames, do_normalize=False, do_rescale=False, return_tensors="pt")
    assert outputs[PIXELS[0]].shape == (4, 3, SIDE, SIDE)
    # Bars of a picture with values up to 1 are grey, not 127.
    assert float(outputs[PIXELS[0]][:, :, 0].mean()) == pytest.approx(0.5, abs=1e-6)  # one constant, resized
    cropped = video_processor(frames_of(4), size={"shortest_edge": 20}, do_center_crop=True, crop_size=18)
    assert cropped[PIXELS[0]].shape == (4, 3, 18, 18) and cropped[PIXELS[1]].shape == (4, 3, SIDE, SIDE)
    stretched = video_processor(np.full((1, 8, 32, 3), 255, np.uint8), do_pad=False, return_tensors="pt")
    assert float(stretched[PIXELS[0]].min()) == 1.0
    nearest = video_processor(frames_of(4), resample=0, return_tensors="pt")
    bicubic = video_processor(frames_of(4), return_tensors="pt")
    assert not torch.equal(nearest[PIXELS[1]], bicubic[PIXELS[1]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(processor, mode):
    frames = [Image.fromarray(frame).convert(mode) for frame in frames_of(4)]
    expected = ask(processor, messages(video=np.stack([np.asarray(frame.convert("RGB")) for frame in frames])))
    inputs = ask(processor, messages(video=frames))
    assert torch.equal(inputs[PIXELS[0]], expected[PIXELS[0]])
    picture = Image.fromarray(frames_of(1)[0]).convert(mode)
    expected = processor.image_processor([np.asarray(picture.convert("RGB"))], return_tensors="pt")
    found = processor.image_processor([picture], return_tensors="pt")
    assert torch.equal(found["pixel_values_dino"], expected["pixel_values_dino"])


def test_grey_arrays_count_as_three_channels(processor):
    grey = frames_of(3)[..., :1]
    outputs = processor.video_processor(grey, return_tensors="pt")
    expected = processor.video_processor(grey.repeat(3, -1), return_tensors="pt")
    for name in PIXELS:
        assert torch.equal(outputs[name], expected[name])


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [1, 5, 12, 40])
def test_windows_are_the_pixels_of_the_call(processor, clip, window_size):
    expected = ask(processor, messages(path=clip))
    windows = processor.iterate_windows(clip, window_size)
    assert windows.num_frames == 12 and windows.video_size.tolist() == expected["video_sizes"][0].tolist()
    assert len(windows) == -(-12 // window_size)
    assert list(windows.metadata.timestamps) == [float(second) for second in range(12)]
    given = list(windows)
    assert [len(part[PIXELS[0]]) for part in given[:-1]] == [window_size] * (len(windows) - 1)
    for name in PIXELS:
        assert torch.equal(torch.cat([part[name] for part in given]), expected[name])
    assert list(windows) == []


def test_windows_of_arrays_and_closing_early(processor, clip):
    frames = frames_of(7)
    expected = processor.video_processor(frames, return_tensors="pt")
    given = list(processor.iterate_windows(frames, 3))
    assert [len(part[PIXELS[1]]) for part in given] == [3, 3, 1]
    assert torch.equal(torch.cat([part[PIXELS[1]] for part in given]), expected[PIXELS[1]])
    with processor.iterate_windows(clip, 2) as windows:
        next(windows)
    assert list(windows) == []


def test_windows_hold_one_window_of_pixels(tmp_path):
    """Memory of Python and numpy while a video is read: frames at the source's size are far larger than a window."""
    path = make_video(tmp_path / "large.mp4", num_frames=60, fps=1, size=(320, 240), codec="mpeg4")
    processor = tiny_longvu_processor()
    all_frames = 60 * 320 * 240 * 3
    list(processor.iterate_windows(path, 4))
    tracemalloc.start()
    count = sum(len(part[PIXELS[0]]) for part in processor.iterate_windows(path, 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60
    # Four frames of a window and a few in flight, of sixty.
    assert peak < all_frames / 4


def test_windows_that_make_no_sense(processor, clip):
    with pytest.raises(ValueError, match="one video at a time, got 2"):
        processor.iterate_windows([str(clip), frames_of(3)])
    with pytest.raises(ValueError, match="window_size=0"):
        processor.iterate_windows(clip, 0)


# --- batches -----------------------------------------------------------------------------------------------------


def test_batch_of_text_image_and_videos_is_padded_on_the_left(processor, clip):
    content = [
        {"type": "video", "path": clip, "nframes": 4},
        {"type": "text", "text": "then "},
        {"type": "image", "image": Image.fromarray(frames_of(1)[0])},
        {"type": "video", "video": frames_of(6, 20, 20)},
        {"type": "text", "text": "Which?"},
    ]
    image_only = [{"type": "image", "image": frames_of(1, 10, 30)[0]}, {"type": "text", "text": "What is it?"}]
    batch = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": content}],
        [{"role": "user", "content": image_only}],
        messages(video=frames_of(3)),
    ]
    inputs = ask(processor, batch)
    assert inputs["video_num_frames"].tolist() == [4, 6, 3]
    assert inputs["video_sizes"].tolist() == [[48, 64], [20, 20], [24, 40]]
    assert inputs[PIXELS[0]].shape == inputs[PIXELS[1]].shape == (13, 3, SIDE, SIDE)
    assert inputs["pixel_values"].shape == inputs["pixel_values_dino"].shape == (2, 3, SIDE, SIDE)
    assert inputs["image_sizes"].tolist() == [[40, 24], [30, 10]]
    assert (inputs["input_ids"] == VIDEO_ID).sum(1).tolist() == [0, 2, 0, 1]
    assert (inputs["input_ids"] == IMAGE_ID).sum(1).tolist() == [0, 1, 1, 0]
    row = [token for token in inputs["input_ids"][1].tolist() if token in (VIDEO_ID, IMAGE_ID)]
    assert row == [VIDEO_ID, IMAGE_ID, VIDEO_ID]
    lengths = inputs["attention_mask"].sum(1)
    assert inputs["attention_mask"][:, -1].tolist() == [1] * 4 and inputs["attention_mask"][0, 0] == 0
    for index, conversation in enumerate(batch):
        alone = ask(processor, conversation)
        assert torch.equal(inputs["input_ids"][index, -lengths[index] :], alone["input_ids"][0])
    assert torch.equal(inputs[PIXELS[1]][10:], ask(processor, batch[3])[PIXELS[1]])


def test_text_only_has_no_pixels(processor):
    inputs = ask(processor, [{"role": "user", "content": "Hello"}])
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_prompts_and_videos_without_template(processor, clip):
    inputs = processor(text=["<|video_pad|>Why?", "<|video_pad|>Who?"], videos=[clip, frames_of(3)], padding=True)
    assert [row.count(VIDEO_ID) for row in inputs["input_ids"]] == [1, 1]
    assert processor.decode(inputs["input_ids"][1]).endswith("<|video_pad|>\nWho?")
    assert "video_metadata" not in inputs and list(inputs["video_num_frames"]) == [12, 3]
    counted = processor._get_num_multimodal_tokens(image_sizes=[(20, 30)], video_sizes=[(7, 20, 30)])
    assert (counted["num_image_tokens"], counted["num_video_tokens"]) == ([1], [1])


def test_messages_are_not_changed(processor, clip):
    conversation = messages(path=clip, nframes=4)
    ask(processor, conversation)
    assert conversation == messages(path=clip, nframes=4)


# --- templates, saving -------------------------------------------------------------------------------------------


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with the special tokens of Llama 3 that puts a begin-of-text in front, as the released one."""
    from tokenizers import decoders, processors

    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<|reserved_special_token_0|>"]
    vocab = {token: i for i, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|reserved_special_token_0|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


def test_llama_template_and_one_begin_of_text(processor):
    llama = LongVUProcessor(processor.image_processor, llama_tokenizer(), processor.video_processor)
    assert llama.chat_template == load_chat_template("llama3")
    inputs = ask(llama, messages("  What happens? \n", video=frames_of(3)))
    text = llama.decode(inputs["input_ids"][0])
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|video_pad|>\n  What happens?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("kind", ["chatml", "llama"])
def test_training_template_says_the_same_and_marks_answers(processor, kind):
    tokenizer, end = (tiny_tokenizer(), "<|im_end|>") if kind == "chatml" else (llama_tokenizer(), "<|eot_id|>")
    processor = LongVUProcessor(processor.image_processor, tokenizer, processor.video_processor)
    conversation = [
        *messages(video=frames_of(3)),
        {"role": "assistant", "content": [{"type": "text", "text": "A dog runs."}]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is late."},
    ]
    template = processor.training_chat_template
    assert processor.apply_chat_template(conversation, chat_template=template) == processor.apply_chat_template(
        conversation
    )
    inputs = processor.apply_chat_template(
        [conversation],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    mask = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.decode(inputs["input_ids"][0][mask]) == f"A dog runs.{end}It is late.{end}"


def test_save_and_load(clip, tmp_path):
    changed = tiny_longvu_processor(20, 24, fps=2, video_size_order="width_height", dino_image_mean=[0.1, 0.2, 0.3])
    changed.save_pretrained(tmp_path)
    tiny_longvu_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LongVUProcessor and loaded.chat_template == changed.chat_template
    before, after = ask(changed, messages(path=clip)), ask(loaded, messages(path=clip))
    assert before.keys() == after.keys() and before["video_num_frames"].tolist() == [24]
    for name in set(before) - {"video_metadata"}:
        assert torch.equal(before[name], after[name]), name
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is LongVUVideoProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is LongVUImageProcessor


def test_defaults_are_those_of_the_releases():
    video, image = LongVUVideoProcessor(), LongVUImageProcessor()
    for part in (video, image):
        assert dict(part.size) == {"height": 384, "width": 384} and part.dino_size == {"height": 378, "width": 378}
        assert list(part.image_mean) == [0.5] * 3 == list(part.image_std)
        assert list(part.dino_image_mean) == [0.485, 0.456, 0.406]
        assert list(part.dino_image_std) == [0.229, 0.224, 0.225]
    assert (video.fps_rule, video.video_size_order, video.max_frames) == ("stride", "original", None)


# --- errors ------------------------------------------------------------------------------------------------------


def test_numbers_of_placeholders_and_videos(processor):
    with pytest.raises(ValueError, match=r"Found 2 <\|video_pad\|> tokens and 1 videos"):
        processor(text="<|video_pad|><|video_pad|>Why?", videos=[frames_of(4)])
    with pytest.raises(ValueError, match=r"Found 0 <\|image_pad\|> tokens and 1 images"):
        processor(text="Why?", images=[frames_of(1)[0]])
    with pytest.raises(ValueError, match="takes no sound"):
        processor(text="Why?", audio=np.zeros(10))
    with pytest.raises(ValueError, match="Nothing was given"):
        processor()


def test_truncation_does_not_cut_a_video_off(processor):
    limits = {"truncation": True, "max_length": 10}
    with pytest.raises(ValueError, match="Truncation to 10 tokens cuts into a video: sample 0 has 1 video tokens"):
        processor(text="Look at this, the only video: <|video_pad|>Why?", videos=[frames_of(8)], **limits)
    assert len(processor(text="<|video_pad|>Why did it?", videos=[frames_of(8)], **limits)["input_ids"][0]) == 10


def test_questions_rates_and_blocks(processor, clip):
    with pytest.raises(ValueError, match="question is empty"):
        ask(processor, messages("  \n", video=frames_of(4)))
    with pytest.raises(ValueError, match="frame rate of the video is None"):
        ask(processor, messages(video=frames_of(8)), fps=1)
    with pytest.raises(ValueError, match="exclude each other"):
        ask(processor, messages(video=frames_of(8)), fps=1, num_frames=4)
    with pytest.raises(ValueError, match=r"num_frames=12 frames were asked for, but the video has 8"):
        ask(processor, messages(video=frames_of(8)), num_frames=12)
    with pytest.raises(ValueError, match="exactly one of 'video', 'url' and 'path', got none"):
        ask(processor, messages())
    with pytest.raises(ValueError, match="Sampling frames from a list of images is not supported"):
        ask(processor, messages(video=["a.png", "b.png"]), do_sample_frames=True)


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
        with pytest.raises(error, match=words):
            processor.iterate_windows(path)


def test_frames_and_settings_that_do_not_fit(processor, clip, tmp_path):
    with pytest.raises(ValueError, match="must have one size"):
        ask(processor, messages(video=[frames_of(1)[0], frames_of(1, 10, 10)[0]]))
    with pytest.raises(ValueError, match="has no frames"):
        ask(processor, messages(video=frames_of(0)))
    with pytest.raises(ValueError, match="3 timestamps were given for 4 frames"):
        ask(processor, messages(video=frames_of(4), timestamps=[0.0, 1.0, 2.0]))
    folder = make_frame_folder(tmp_path / "frames", 2)
    Image.fromarray(frames_of(1)[0]).save(folder / "frame_3.png")
    with pytest.raises(ValueError, match="frame pictures differ in size"):
        ask(processor, messages(path=folder))
    for option, value in (("fps_rule", "often"), ("video_size_order", "wide"), ("video_backend", "vhs")):
        with pytest.raises(ValueError, match=f"Unknown .*{value}"):
            ask(processor, messages(path=clip), **{option: value})
    with pytest.raises(ValueError, match="height and width"):
        processor.image_processor([frames_of(1)[0]], size={"shortest_edge": 20})
    with pytest.raises(ValueError, match="does not know the placeholder"):
        LongVUProcessor(processor.image_processor, plain_tokenizer(), processor.video_processor)


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without placeholders."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )
