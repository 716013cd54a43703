"""`pipeline("video-question-answering")` with LongVU: windows in place of pixels, counts, questions, budget."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import longvideo  # noqa: F401  registers the task
from longvideo.pipelines import VideoQuestionAnsweringPipeline, encoding
from longvideo.processing.longvu.video_windows import VideoWindows
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video

QUESTION = "What happens?"
NEW = {"max_new_tokens": 4}
COUNTS = {**NEW, "return_token_counts": True}
# Of 64 frames in 8 s; a frame gives 12 tokens, or 6 at low resolution.
FULL, MIX, STC = {"num_frames": 8}, {"num_frames": 28}, {"num_frames": 48}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_longvu_model(context_length=300).save_pretrained(folder)
    tiny_longvu_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=64))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("video-question-answering", model=str(checkpoint), device="cpu")


def ask_model(checkpoint, video, question=QUESTION, **options):
    """The answer without the pipeline, from all pixels at once, and what the model chose."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    blocks = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": blocks}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **options},
    )
    chosen = []
    hook = model.register_forward_hook(lambda _, __, output: chosen.append(output.video_selections))
    ids = model.generate(**inputs, do_sample=False, **NEW)
    hook.remove()
    text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert chosen[1:] == [None] * (len(chosen) - 1), "chosen once, for the prompt"
    return text, chosen[0][0], inputs["input_ids"].shape[1]


@pytest.mark.parametrize(("options", "mode"), [(FULL, "full"), (MIX, "mix"), (STC, "stc")])
def test_windows_give_what_all_pixels_give(pipe, checkpoint, video, monkeypatch, options, mode):
    largest = []
    dino = pipe.model.model.dino_tower

    def note(module, given):
        largest.append(len(given[0]))

    hook = dino.register_forward_pre_hook(note)
    monkeypatch.setattr(encoding, "WINDOW_FRAMES", 3)
    result = pipe(video, QUESTION, return_timings=True, **options, **COUNTS)
    hook.remove()
    text, selection, num_ids = ask_model(checkpoint, video, **options)
    assert result["answer"] == text and selection.mode == mode
    assert max(largest) == 3, "no more than one window reached the tower"
    counts, num_tokens = result["token_counts"], len(selection.token_frame)
    assert counts["selections"] == [
        {
            "frames": options["num_frames"],
            "kept_frames": len(selection.kept_frames),
            "full_resolution_frames": int(selection.full_resolution.sum()),
            "mode": mode,
            "visual_tokens": num_tokens,
        }
    ]
    # 7 x 7 patches of each sampled frame; the video's one placeholder is no text.
    assert counts["frames"] == options["num_frames"] and counts["patch_tokens"] == 49 * counts["frames"]
    assert (counts["visual_tokens"], counts["text_tokens"]) == (num_tokens, num_ids - 1)
    assert counts["prompt_tokens"] == num_tokens + num_ids - 1 <= 300 - 4
    assert counts["after_stages"] == [] and 0 < counts["generated_tokens"] <= 4
    assert all(0 < seconds < 60 for seconds in result["timings"].values())


def test_several_questions_encode_the_video_once(pipe, video, monkeypatch):
    questions = [QUESTION, "How many?", "Where?"]
    singles = [pipe(video, question, **FULL, **NEW)["answer"] for question in questions]
    calls = []
    encode = type(pipe.model).encode_video
    monkeypatch.setattr(type(pipe.model), "encode_video", lambda *a, **k: calls.append(1) or encode(*a, **k))
    together = pipe(video, questions, **FULL, **COUNTS)
    assert [result["answer"] for result in together] == singles and len(set(singles)) > 1
    assert len(calls) == 1
    assert [result["token_counts"]["frames"] for result in together] == [8, 8, 8]


def test_lists_chats_and_streaming(pipe, video):
    answer = pipe(video, QUESTION, **FULL, **NEW)["answer"]
    chat = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]}]
    assert [row["answer"] for row in pipe([{"video": video, "question": QUESTION}] * 2, **FULL, **NEW)] == [answer] * 2
    assert pipe(chat, **FULL, **NEW)["generated_text"] == [*chat, {"role": "assistant", "content": answer}]
    stream = pipe(video, QUESTION, stream=True, **FULL, **COUNTS)
    assert "".join(stream).strip() == answer and stream.result["token_counts"]["visual_tokens"] > 0
    with pytest.raises(FileNotFoundError):
        pipe("missing.mp4", QUESTION, stream=True)


def test_pictures_arrays_and_two_videos(pipe, video):
    frames = np.random.default_rng(0).integers(0, 255, (6, 40, 48, 3), dtype=np.uint8)
    counts = pipe([Image.fromarray(frame) for frame in frames], QUESTION, **COUNTS)["token_counts"]
    assert counts["frames"] == 6 and counts["selections"][0]["kept_frames"] == 6
    one = pipe(image=Image.fromarray(frames[0]), question=QUESTION, **COUNTS)["token_counts"]
    assert one["frames"] == 0 and one["patch_tokens"] == 49 and one["selections"][0]["mode"] == "low"
    blocks = [
        {"type": "video", "video": video},
        {"type": "video", "video": frames},
        {"type": "text", "text": QUESTION},
    ]
    both = pipe([{"role": "user", "content": blocks}], **COUNTS)["token_counts"]
    assert [selection["frames"] for selection in both["selections"]] == [8, 6]
    assert both["visual_tokens"] == sum(selection["visual_tokens"] for selection in both["selections"])


def test_frame_settings_and_facts(pipe, video):
    def facts(**kwargs):
        return pipe(video, QUESTION, return_video_metadata=True, **kwargs, **NEW)["video_metadata"][0]

    assert facts()["frame_times"] == [float(second) for second in range(8)], "one frame per second by default"
    cut = facts(start=2.0, end=6.0, fps=2)["frame_times"]
    assert cut[0] >= 2.0 and cut[-1] < 6.0 and len(cut) == 8
    assert len(facts(max_frames=3)["frame_times"]) == 3


def test_kept_tokens_hold_small_frames_and_the_selection(pipe, video):
    kept = pipe(video, QUESTION, return_kept_tokens=True, **STC, **NEW)["kept_tokens"]
    assert set(kept) == {"frames", "times", "selection", "grid_sides"}
    assert kept["frames"].shape == (48, 28, 28, 3) and kept["frames"].dtype == torch.uint8
    assert kept["grid_sides"] == (3, 2) and kept["selection"].mode == "stc" and len(kept["times"]) == 48
    # The lower half of a frame has a colour that follows from its number; bars of grey above and below.
    for place in (0, 21, 47):
        number = round(kept["times"][place] * 8)
        wanted = torch.tensor([40 + number * step % 160 for step in (37, 59, 83)])
        # Lossy 4:2:0 video of flat colours: a few levels off.
        assert (kept["frames"][place, 16:21, 10:26].float().mean(dim=(0, 1)) - wanted).abs().max() < 12
    large = torch.zeros(1, 384, 192, 3, dtype=torch.uint8)
    assert encoding.shrink(large).shape == (1, 120, 60, 3)


def test_options_are_compared_beside_the_same_tokens(pipe, video):
    chosen = []
    hook = pipe.model.register_forward_hook(lambda _, __, output: chosen.append(output.video_selections))
    scores = pipe.score_options(video, QUESTION, ["r", "a blue one"], **MIX)
    hook.remove()
    sizes = [len(selections[0].token_frame) for selections in chosen if selections]
    assert len(sizes) == 2 and sizes[0] == sizes[1], "room for the longest option beside each of them"
    row = pipe.preprocess({"video": video, "question": QUESTION}, **MIX)
    windows = row["about"]["windows"]
    encoded = pipe.model.encode_video(windows=windows, num_frames=28, video_size=tuple(windows.video_size.tolist()))
    settings = {"max_new_tokens": len("a blue one"), "output_logits": True, "return_dict_in_generate": True}
    ids = row["tensors"]["input_ids"]
    first = pipe.model.generate(input_ids=ids, encoded_video=encoded, do_sample=False, **settings).logits[0]
    token = pipe.processor.tokenizer.encode("r", add_special_tokens=False)[0]
    # fp32, the same prompt twice
    assert scores[0] == pytest.approx(float(first.log_softmax(-1)[0, token]), abs=1e-4)


def test_text_that_leaves_no_room_is_refused_before_decoding(pipe, video, monkeypatch):
    read = []
    monkeypatch.setattr(VideoWindows, "__next__", lambda self: read.append(1))
    with pytest.raises(ValueError, match=r"leaves nothing of the model's 300 positions.*lower\s+max_new_tokens"):
        pipe(video, QUESTION, max_new_tokens=290)
    with pytest.raises(ValueError, match=r"\d+ tokens of text"):
        pipe(video, "word " * 80, **NEW)
    assert not read


def test_what_the_model_cannot_do_is_said(pipe, video):
    with pytest.raises(ValueError, match="longvu model does not drop visual tokens inside its decoder"):
        pipe(video, QUESTION, visual_dropout=True, **NEW)
    # Random weights may say nothing at all.
    assert isinstance(pipe(video, QUESTION, visual_dropout=False, **FULL, **NEW)["answer"], str)


def test_files_are_closed_whatever_happens(checkpoint, video, monkeypatch):
    model = tiny_longvu_model(context_length=300)
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=tiny_longvu_processor(), device="cpu")
    closed = []
    close = VideoWindows.close
    monkeypatch.setattr(VideoWindows, "close", lambda self: closed.append(1) or close(self))
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(video, QUESTION, **FULL, **NEW)
    assert closed
