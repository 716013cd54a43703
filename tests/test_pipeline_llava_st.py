"""`pipeline("video-question-answering")` with LLaVA-ST: tasks, typed answers, coordinates in text, counts."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import longvideo  # noqa: F401  registers the task
from longvideo.pipelines import VideoQuestionAnsweringPipeline
from longvideo.processing.llava_st.grounding_llava_st import Box, GroundingResult, Span
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.videos import make_video

QUESTION = "What happens?"
NEW = {"max_new_tokens": 4}
WIDTH, HEIGHT, SECONDS = 64, 48, 6.0  # 48 frames at 8 per second
LAST = SECONDS - 1 / 8  # where the last frame lies, for which the last time token stands
TUBE = "{<TEMP-001><TEMP-003>} <TEMP-001>:[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava_st_model().save_pretrained(folder)
    tiny_llava_st_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    return str(make_video(path, num_frames=48, fps=8, size=(WIDTH, HEIGHT)))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("video-question-answering", model=str(checkpoint), device="cpu")


@pytest.fixture
def say(pipe, monkeypatch):
    """Lets the model answer with given texts, the end mark included, and notes what it was given."""

    def call(*texts):
        given, left = [], list(texts)

        def generate(self, streamer=None, **kwargs):
            given.append(kwargs)
            tokenizer = pipe.processor.tokenizer
            tokens = tokenizer.encode(left.pop(0), add_special_tokens=False)
            answer = torch.tensor([[*tokens, tokenizer.eos_token_id]])
            if streamer is not None:
                streamer.put(kwargs["input_ids"])
                for token in answer[0]:
                    streamer.put(token[None])
                streamer.end()
            return torch.cat([kwargs["input_ids"], answer], dim=1)

        monkeypatch.setattr(type(pipe.model), "generate", generate)
        return given

    return call


def test_answers_are_those_of_the_model(pipe, checkpoint, video):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    blocks = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": blocks}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    result = pipe(video, QUESTION, max_new_tokens=8, return_token_counts=True)
    assert result["answer"] == processor.decode(ids, skip_special_tokens=False).replace("<eos>", "").strip()
    assert result["grounding"].text == result["answer"]
    counts = result["token_counts"]
    # 6 frames of 4 x 4 patches; 6 fast and 8 slow positions, ends of the blocks included.
    assert (counts["frames"], counts["patch_tokens"], counts["visual_tokens"]) == (6, 96, 14)
    assert counts["text_tokens"] == inputs["input_ids"].shape[1] - 14 and counts["selections"] == []


def test_times_and_boxes_are_those_of_the_source(pipe, video, say):
    say(TUBE, TUBE)
    result = pipe(video, QUESTION, grounding_task="stvg")
    assert result["answer"] == TUBE and "<TEMP-001>" in result["generated_text"]
    found = result["grounding"]
    # Six times: steps of a fifth; five places: steps of a quarter.
    assert found.spans == (Span(pytest.approx(1 / 5 * LAST), pytest.approx(3 / 5 * LAST)),)
    assert found.tubes[0].boxes == (Box(0.0, pytest.approx(HEIGHT / 4), pytest.approx(WIDTH / 2), HEIGHT),)
    assert found.tubes[0].times == pytest.approx((LAST / 5,)) and not found.malformed
    cut = pipe(video, QUESTION, start=2.0, end=5.0)["grounding"]
    # Frames 16 to 39 lie at 2 s to 4.875 s.
    assert (cut.spans[0].start, cut.spans[0].end) == pytest.approx((2 + 2.875 / 5, 2 + 3 * 2.875 / 5), abs=1e-6)


def test_boxes_of_pictures(pipe, say):
    say("[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>] {<TEMP-000><TEMP-001>}", "a cup")
    picture = Image.new("RGB", (200, 100))
    found = pipe(image=picture, question="the cup", grounding_task="rec")["grounding"]
    assert found.boxes == (Box(0.0, 25.0, 100.0, 100.0),)
    assert [part.text for part in found.malformed] == ["{<TEMP-000><TEMP-001>}"], "a picture has no times"
    result = pipe(image=picture, grounding_task="reg", box=(0, 0, 50, 50))
    assert result["answer"] == "a cup" and result["grounding"].captions[0].text == "a cup"


def prompt_of(pipe, row, **kwargs):
    tensors = pipe.preprocess(row, **kwargs)["tensors"]
    values = tensors["coordinate_values"][0]
    text = pipe.processor.tokenizer.decode(tensors["input_ids"][0], skip_special_tokens=False)
    return text, values[values != 0].tolist(), tensors


def test_seconds_and_pixels_of_a_question_become_coordinates(pipe, video):
    row = {"video": video, "question": "the dog"}
    text, values, _ = prompt_of(pipe, row, grounding_task="svg", span=(LAST / 4, LAST * 3 / 4))
    assert "the dog" in text and "{<TEMP-INPUT>,<TEMP-INPUT>}" in text
    assert values == pytest.approx([0.25, 0.75], abs=1e-6)
    # Frames 12 to 35 lie at 1.5 s to 4.375 s; the last one is shown until 4.5 s.
    for end in (4.375, 4.45, 4.5):
        cut = prompt_of(pipe, row, grounding_task="svg", span=(1.5 + 2.875 / 2, end), start=1.5, end=4.5)
        assert cut[1] == pytest.approx([0.5, 1], abs=1e-6)
    elc = {"video": video, "grounding_task": "elc", "span": LAST / 2, "box": (16, 12, 32, 48)}
    values = prompt_of(pipe, elc)[1]
    assert values == pytest.approx([0.5, 0.25, 0.25, 0.5, 1.0], abs=1e-6)
    assert prompt_of(pipe, {**row, "grounding_task": "tvg"}, grounding_task="svg")[0].count("textual query") == 1
    other = prompt_of(pipe, row, grounding_task="svg", span=(1.5, 4.5), pattern=1)[0]
    assert "During the span of" in other
    frames = np.zeros((12, HEIGHT, WIDTH, 3), np.uint8)
    given = {"video": frames, "question": "it", "video_metadata": {"fps": 2.0, "total_num_frames": 12}}
    values = prompt_of(pipe, given, grounding_task="svg", span=(1.1, 4.4))[1]
    assert values == pytest.approx([0.2, 0.8], abs=1e-6)  # from 0 s to 5.5 s
    values = prompt_of(pipe, given, grounding_task="svg", span=(2.0, 2.75), start=1.0, end=4.0)[1]
    assert values == pytest.approx([0.4, 0.7], abs=1e-6)  # from 1 s to 3.5 s
    given["video_metadata"] = {"fps": 10.0, "total_num_frames": 120, "frames_indices": list(range(5, 120, 10))}
    values = prompt_of(pipe, given, grounding_task="svg", span=(1.6, 6.0))[1]
    assert values == pytest.approx([0.1, 0.5], abs=1e-6)  # from 0.5 s to 11.5 s


def test_a_question_and_its_answer_mean_the_same_seconds(pipe, tmp_path, say):
    """Whatever is cut, the time token of a second in the question is read back as that second."""
    clip = str(make_video(tmp_path / "ntsc.mp4", num_frames=50, fps=7, size=(WIDTH, HEIGHT)))
    for start, end in ((None, None), (2.05, None), (None, 5.93), (1.3, 4.77)):
        second = 3.125
        values = prompt_of(
            pipe, {"video": clip, "question": "it"}, grounding_task="svg", span=(second, 4.0), start=start, end=end
        )[1]
        say(f"{{<t{values[0]:.9f}><t1>}}")
        found = pipe(clip, QUESTION, start=start, end=end)["grounding"]
        # A question holds three digits of a fraction of at most 7 s.
        assert found.spans[0].start == pytest.approx(second, abs=0.0035), (start, end)


def test_seconds_of_a_variable_frame_rate_are_those_of_its_frames(pipe, tmp_path, say):
    times = [index / 8 for index in range(24)] + [3.0 + index for index in range(24)]
    clip = str(make_video(tmp_path / "vfr.mp4", 48, 8, size=(WIDTH, HEIGHT), codec="libx264", times=times))
    # Frames 0, 9, 19, 28, 38 and 47 are seen; the second token of six stands for place 9.4, the fourth for 28.2.
    say(TUBE, "{<t0.255><t0.766>}")
    found = pipe(clip, QUESTION, grounding_task="stvg")["grounding"]
    assert (found.spans[0].start, found.spans[0].end) == pytest.approx((1.125 + 0.4 / 8, 7.2), abs=1e-3)
    assert found.tubes[0].times == pytest.approx((1.175,), abs=1e-3)
    row = {"video": clip, "question": "it"}
    values = prompt_of(pipe, row, grounding_task="svg", span=(1.5, 15.0))[1]
    # A question holds three digits; 1.5 s is frame 12 of 47, 15 s frame 36.
    assert values == pytest.approx([12 / 47, 36 / 47], abs=5e-4)
    back = pipe(clip, QUESTION)["grounding"].spans[0]
    # Three digits of 47 places, of which the later ones are a second each.
    assert (back.start, back.end) == pytest.approx((1.5, 15.0), abs=0.05)


def test_the_event_that_was_asked_for_begins_where_the_question_says(pipe, video, say):
    say("Ends in <TEMP-004>, it jumps. <TEMP-003>:[<WIDTH-000><HEIGHT-001><WIDTH-002><HEIGHT-004>]")
    found = pipe(video, grounding_task="elc", span=1.2, box=(0, 0, 10, 10))["grounding"]
    assert found.spans == (Span(1.2, pytest.approx(0.8 * LAST)),) and found.captions[0].text == "it jumps"


def test_coordinates_stay_exact_in_half_precision(checkpoint, video):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half = VideoQuestionAnsweringPipeline(model=model, processor=tiny_llava_st_processor(), device="cpu")
    _, values, tensors = prompt_of(
        half, {"video": video, "question": "it"}, grounding_task="svg", span=(LAST / 1000, LAST / 2)
    )
    assert tensors["pixel_values_videos"].dtype == torch.bfloat16
    assert values == pytest.approx([0.001, 0.5], abs=1e-6)
    inputs = half.processor(text="from <t0.919> on", return_tensors="pt")
    inputs["other"] = torch.ones(1)
    moved = inputs.to("cpu", torch.bfloat16)
    assert moved is inputs and moved["other"].dtype == torch.bfloat16
    assert moved["coordinate_values"].dtype == torch.float32
    assert float(moved["coordinate_values"].max()) == pytest.approx(0.919, abs=1e-6)
    # What is no tensor stays none when masks are added behind.
    assert "video_metadata" in moved.skip_tensor_conversion


def test_streaming_shows_coordinates_and_no_end_mark(pipe, video, say):
    say(TUBE)
    stream = pipe(video, QUESTION, stream=True, grounding_task="stvg")
    assert "".join(stream).strip() == TUBE
    assert stream.result["answer"] == TUBE and len(stream.result["grounding"].tubes) == 1


def test_the_pipeline_of_transformers_shows_coordinates(pipe, video, say):
    say(TUBE)
    plain = pipeline("image-text-to-text", model=pipe.model, processor=pipe.processor)
    blocks = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
    result = plain(text=[{"role": "user", "content": blocks}], return_full_text=False, **NEW)
    assert result[0]["generated_text"] == TUBE
    ids = pipe.processor.tokenizer(f"<|im_start|>{TUBE}<|im_end|>", return_tensors="pt")["input_ids"]
    decode = pipe.processor.post_process_image_text_to_text
    assert decode(ids) == [TUBE] and decode(ids[0]) == TUBE
    assert decode(ids, skip_special_tokens=False) == [f"<|im_start|>{TUBE}<|im_end|>"]


def test_lists_chats_and_several_questions(pipe, video, monkeypatch):
    single = pipe(video, QUESTION, **NEW)
    chat = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]}]
    result = pipe(chat, **NEW)
    assert result["generated_text"] == [*chat, {"role": "assistant", "content": single["answer"]}]
    assert result["grounding"] == single["grounding"]
    rows = [{"video": video, "question": "it", "grounding_task": task} for task in ("tvg", "stvg")]
    assert [row["grounding"].text for row in pipe(rows, **NEW)] == [row["answer"] for row in pipe(rows, **NEW)]
    calls = []
    encode = type(pipe.model).encode_video
    monkeypatch.setattr(type(pipe.model), "encode_video", lambda *a, **k: calls.append(1) or encode(*a, **k))
    together = pipe(video, [QUESTION, "How many?"], **NEW)
    assert len(calls) == 1 and together[0]["answer"] == single["answer"] and len(together) == 2


def test_options_timings_and_image_counts(pipe, video):
    scores = pipe.score_options(video, QUESTION, ["{<TEMP-001><TEMP-002>}", "no"])
    assert len(scores) == 2 and all(score < 0 for score in scores)
    result = pipe(image=Image.new("RGB", (40, 30)), question=QUESTION, return_token_counts=True, **NEW)
    counts = result["token_counts"]
    assert (counts["frames"], counts["visual_tokens"], counts["patch_tokens"]) == (0, 16, 16)
    timings = pipe(video, QUESTION, return_timings=True, **NEW)["timings"]
    assert all(0 < seconds < 60 for seconds in timings.values())


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"grounding_task": "stgv"}, "no task 'stgv'"),
        ({"grounding_task": "svg"}, "needs span_seconds"),
        ({"grounding_task": "svg", "span": (4.0, 2.0)}, "reversed or empty"),
        ({"grounding_task": "svg", "span": (4.0, 7.0)}, "lies outside of the video"),
        ({"grounding_task": "elc", "question": None, "span": 1.0, "box": (5, 5, 5, 9)}, "has no area"),
        ({"grounding_task": "elc", "question": None, "span": 1.0, "box": (5, 5, 70, 9)}, "leaves the frame of 64"),
        ({"grounding_task": "rec"}, "is about images"),
        ({"grounding_task": "tvg", "question": None}, "needs query"),
        ({"span": (1.0, 2.0)}, "span came without grounding_task"),
        ({"question": None}, "no question was given"),
        ({"return_kept_tokens": True}, "no kept tokens"),
        ({"max_new_tokens": 10**6}, "number of frames is fixed"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(pipe, video, kwargs, text):
    with pytest.raises(ValueError, match=text):
        pipe(video, **{"question": "the dog", **NEW, **kwargs})


def test_tasks_need_a_visual_of_known_length_and_a_model_that_has_them(pipe, video):
    frames = np.zeros((12, HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(ValueError, match="how long the video is"):
        pipe(frames, "it", grounding_task="svg", span=(1.0, 2.0))
    chat = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]}]
    with pytest.raises(ValueError, match="in place of a chat"):
        pipe(chat, grounding_task="tvg")
    plain = VideoQuestionAnsweringPipeline(
        model=tiny_videochat_flash_model(), processor=tiny_videochat_flash_processor(), device="cpu"
    )
    with pytest.raises(ValueError, match="VideoChatFlashProcessor has no tasks for times and places"):
        plain(video, QUESTION, grounding_task="tvg")
    assert "grounding" not in plain(video, QUESTION, **NEW)


def test_a_model_without_coordinates_answers_in_words(video):
    plain = VideoQuestionAnsweringPipeline(
        model=tiny_llava_st_model(num_temporal_tokens=0, num_spatial_tokens=0),
        processor=tiny_llava_st_processor(0, 0),
        device="cpu",
    )
    result = plain(video, QUESTION, **NEW)
    assert result["answer"] and "grounding" not in result
    pieces = list(plain(video, QUESTION, stream=True, **NEW))
    assert "".join(pieces).strip() == result["answer"]
    with pytest.raises(ValueError, match=r"grounding_task cannot be used: .* with coordinates"):
        plain(video, QUESTION, grounding_task="tvg")
    # Asked by hand there is nothing to read but the text, whatever it says.
    read = plain.processor.post_process_grounding
    assert read("from {0.1,0.2} on", durations=SECONDS) == GroundingResult("from {0.1,0.2} on")
    assert read(["yes", "no"], durations=SECONDS) == [GroundingResult("yes"), GroundingResult("no")]
