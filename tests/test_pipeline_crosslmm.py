"""`pipeline("video-question-answering")` with CrossLMM: answers, counts, several questions, pictures, budget."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import longvideo  # noqa: F401  registers the task
from longvideo.pipelines import VideoQuestionAnsweringPipeline
from tests.hub.saved_tiny import save_tiny
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.videos import make_video

QUESTION = "What happens?"
NEW = {"max_new_tokens": 4}
COUNTS = {**NEW, "return_token_counts": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny("crosslmm", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """56 frames in 7 s."""
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=56))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("video-question-answering", model=str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def answer(pipe, video):
    return pipe(video, QUESTION, **NEW)["answer"]


def chat(*visuals, question=QUESTION):
    blocks = [{"type": "image" if isinstance(v, Image.Image) else "video", "video": v, "image": v} for v in visuals]
    kept = [{key: block[key] for key in ("type", block["type"])} for block in blocks]
    return [{"role": "user", "content": [*kept, {"type": "text", "text": question}]}]


def inputs_of(processor, messages):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )


def test_answer_is_that_of_the_model(checkpoint, video, answer):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = inputs_of(processor, chat(video))
    ids = model.generate(**inputs, do_sample=False, **NEW)
    assert answer == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer


def test_alias(checkpoint, video, answer):
    alias = pipeline("video-text-to-text", model=str(checkpoint), device="cpu")
    assert isinstance(alias, VideoQuestionAnsweringPipeline) and alias(video, QUESTION, **NEW)["answer"] == answer


def test_counts_and_timings(pipe, video):
    result = pipe(video, QUESTION, return_timings=True, num_frames=5, **COUNTS)
    counts = result["token_counts"]
    # 4 x 4 patches of a frame become 2 x 2 tokens.
    assert (counts["frames"], counts["patch_tokens"], counts["visual_tokens"]) == (5, 80, 20)
    assert counts["prompt_tokens"] == counts["text_tokens"] + 20
    assert counts["after_stages"] == [] and counts["selections"] == [] and 0 < counts["generated_tokens"] <= 4
    assert set(result["timings"]) == {"decode", "encode", "generate"}
    assert all(0 < seconds < 60 for seconds in result["timings"].values())


def test_frame_settings(pipe, video):
    def times(**kwargs):
        return pipe(video, QUESTION, return_video_metadata=True, **kwargs, **NEW)["video_metadata"][0]["frame_times"]

    assert len(times()) == 7, "one frame per second by default"
    assert len(times(num_frames=3)) == 3 and len(times(max_frames=2)) == 2
    cut = times(start=2.0, end=6.0, fps=2)
    assert cut[0] >= 2.0 and cut[-1] < 6.0 and len(cut) == 8


def test_several_questions_encode_the_video_once(pipe, video, answer, monkeypatch):
    questions = [QUESTION, "How many?", "Where?"]
    singles = [pipe(video, question, **NEW)["answer"] for question in questions]
    calls = []
    encode = type(pipe.model).encode_video
    monkeypatch.setattr(type(pipe.model), "encode_video", lambda *a, **k: calls.append(1) or encode(*a, **k))
    together = pipe(video, questions, **COUNTS)
    assert [result["answer"] for result in together] == singles and len(set(singles)) > 1
    assert len(calls) == 1 and [result["token_counts"]["frames"] for result in together] == [7, 7, 7]


def test_lists_chats_and_streaming(pipe, video, answer):
    assert [row["answer"] for row in pipe([{"video": video, "question": QUESTION}] * 2, **NEW)] == [answer] * 2
    messages = chat(video)
    assert pipe(messages, **NEW)["generated_text"] == [*messages, {"role": "assistant", "content": answer}]
    stream = pipe(video, QUESTION, stream=True, **COUNTS)
    assert "".join(stream).strip() == answer and stream.result["token_counts"]["visual_tokens"] == 28
    with pytest.raises(FileNotFoundError):
        pipe("missing.mp4", QUESTION, stream=True)


def test_a_second_turn_sees_both_videos(pipe, checkpoint, video):
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), dtype=np.uint8)
    messages = [*chat(video), {"role": "assistant", "content": "A bird."}, *chat(frames, question="And here?")]
    result = pipe(messages, **COUNTS)
    assert result["token_counts"]["frames"] == 10 and result["token_counts"]["visual_tokens"] == 40
    model, processor = pipe.model, pipe.processor
    inputs = inputs_of(processor, messages)
    assert inputs["video_num_frames"].tolist() == [7, 3]
    ids = model.generate(**inputs, do_sample=False, **NEW)
    assert result["answer"] == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_pictures_and_arrays(pipe, video):
    frames = np.random.default_rng(0).integers(0, 255, (5, 40, 48, 3), dtype=np.uint8)
    counts = pipe([Image.fromarray(frame) for frame in frames], QUESTION, **COUNTS)["token_counts"]
    assert (counts["frames"], counts["visual_tokens"]) == (5, 20)
    picture = Image.fromarray(frames[0])
    one = pipe(image=picture, question=QUESTION, **COUNTS)["token_counts"]
    assert (one["frames"], one["visual_tokens"], one["patch_tokens"]) == (0, 4, 16)
    both = pipe(chat(picture, video, picture), **COUNTS)["token_counts"]
    assert (both["frames"], both["visual_tokens"]) == (7, 36)


def test_options_are_scored_by_their_likelihood(pipe, video):
    options = ["red", "a blue one"]
    scores = pipe.score_options(video, QUESTION, options)
    row = pipe.preprocess({"video": video, "question": QUESTION})["tensors"]
    for option, score in zip(options, scores, strict=True):
        ids = torch.tensor([pipe.processor.tokenizer.encode(option, add_special_tokens=False)])
        full = torch.cat([row["input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = pipe.model(
                input_ids=full, attention_mask=torch.ones_like(full), pixel_values_videos=row["pixel_values_videos"]
            ).logits
        picked = torch.log_softmax(logits[0, row["input_ids"].shape[1] - 1 : -1], dim=-1).gather(1, ids.T)
        # fp32; one pass against prefill and single steps
        assert score == pytest.approx(float(picked.mean()), abs=1e-4)


def test_half_precision(checkpoint, video):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half = VideoQuestionAnsweringPipeline(model=model, processor=tiny_crosslmm_processor(), device="cpu")
    assert half.preprocess({"video": video, "question": QUESTION})["tensors"]["pixel_values_videos"].dtype == (
        torch.bfloat16
    )
    assert isinstance(half(video, QUESTION, **NEW)["answer"], str)


def test_save_pretrained_writes_no_code(pipe, video, answer, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline("video-question-answering", model=str(tmp_path), device="cpu")
    assert again(video, QUESTION, **NEW)["answer"] == answer


def test_budget_names_what_fits(video):
    model = tiny_crosslmm_model(text_kwargs={"max_position_embeddings": 150})
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=tiny_crosslmm_processor(), device="cpu")
    with pytest.raises(ValueError, match="at most 150") as caught:
        pipe(video, QUESTION, num_frames=30, **NEW)
    fit = int(str(caught.value).split("num_frames=")[1].split(" ")[0])
    assert "120 visual" in str(caught.value) and 0 < fit < 30
    pipe(video, QUESTION, num_frames=fit, **NEW)
    with pytest.raises(ValueError, match="at most 150"):
        pipe(video, QUESTION, num_frames=fit + 1, **NEW)
    with pytest.raises(ValueError, match="Not even one frame fits"):
        pipe(video, QUESTION, num_frames=1, max_new_tokens=149)


def test_what_the_model_cannot_do_is_said(pipe, video, answer):
    with pytest.raises(ValueError, match="crosslmm model does not drop visual tokens inside its decoder"):
        pipe(video, QUESTION, visual_dropout=True, **NEW)
    assert pipe(video, QUESTION, visual_dropout=False, **NEW)["answer"] == answer
    with pytest.raises(ValueError, match="there are no kept tokens"):
        pipe(video, QUESTION, return_kept_tokens=True, **NEW)
    with pytest.raises(ValueError, match="CrossLMMProcessor has no tasks for times and places"):
        pipe(video, QUESTION, grounding_task="tvg", **NEW)


def test_hooks_are_gone_after_a_call(pipe, video, answer):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.model.modules()]
    assert sum(hooks) == 0
