"""`pipeline("video-question-answering")`: every form of input, the outputs, settings, streaming, budget, counting."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils.chat_template_utils import Chat

import longvideo  # noqa: F401  registers the task
from longvideo import pipelines
from longvideo.pipelines import accounting
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.videos import make_video

QUESTION = "What happens?"
NEW = {"max_new_tokens": 5}
DROPOUT = {"type": "uniform0_attention", "layers": [1, 3], "ratios": [1.0, 0.75, 0.25]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_videochat_flash_model().save_pretrained(folder)
    tiny_videochat_flash_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=64))


@pytest.fixture(scope="module")
def other_video(tmp_path_factory):
    return str(make_video(tmp_path_factory.mktemp("video") / "other.mp4", num_frames=40))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("video-question-answering", model=str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def answer(pipe, video):
    return pipe(video=video, question=QUESTION, **NEW)["answer"]


def chat(video, question=QUESTION):
    blocks = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    return [{"role": "user", "content": blocks}]


def test_answer_is_that_of_the_model(checkpoint, video, answer):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        chat(video),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    ids = model.generate(**inputs, do_sample=False, **NEW)
    assert answer == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer


def test_alias_and_silence(checkpoint, video, answer, caplog):
    pipe = pipeline("video-text-to-text", model=str(checkpoint), device="cpu")
    assert isinstance(pipe, pipelines.VideoQuestionAnsweringPipeline)
    assert pipe(video, QUESTION, **NEW)["answer"] == answer
    assert "not supported" not in caplog.text


def test_registering_again_changes_nothing():
    before = PIPELINE_REGISTRY.supported_tasks["video-question-answering"]
    pipelines.register()
    assert PIPELINE_REGISTRY.supported_tasks["video-question-answering"] is before


def test_one_sample_in_every_form(pipe, video, answer):
    wanted = {"answer": answer, "generated_text": answer}
    assert pipe(video, QUESTION, **NEW) == wanted
    assert pipe({"video": video, "question": QUESTION}, **NEW) == wanted
    assert pipe({"video": video}, QUESTION, **NEW) == wanted
    assert pipe({"messages": chat(video)}, return_full_text=False, **NEW) == wanted
    assert pipe(chat(video), return_full_text=False, **NEW) == wanted


def test_lists_keep_their_order(pipe, video, other_video, answer):
    other = pipe(other_video, QUESTION, **NEW)["answer"]
    assert other != answer, "the two videos must differ for the order to be seen"
    rows = [{"video": video, "question": QUESTION}, {"video": other_video, "question": QUESTION}]
    for result in (
        pipe(rows, **NEW),
        pipe([video, other_video], QUESTION, **NEW),
        pipe([video, other_video], [QUESTION, QUESTION], **NEW),
        pipe([chat(video), chat(other_video)], return_full_text=False, **NEW),
    ):
        assert [item["answer"] for item in result] == [answer, other]
    two = pipe(video, [QUESTION, "How many?"], **NEW)
    assert two[0]["answer"] == answer and len(two) == 2


def test_generators_and_datasets_are_worked_off_lazily(pipe, video, other_video, answer):
    other = pipe(other_video, QUESTION, **NEW)["answer"]
    read = []

    def rows():
        for path in (video, other_video):
            read.append(path)
            yield {"video": path, "question": QUESTION}

    result = pipe(rows(), **NEW)
    assert isinstance(result, object) and not isinstance(result, list)
    assert next(iter(result))["answer"] == answer
    assert len(read) < 3
    assert [item["answer"] for item in pipe((path for path in (video, other_video)), QUESTION, **NEW)] == [
        answer,
        other,
    ]

    class Rows(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"path": (video, other_video)[index], "video": (video, other_video)[index], "question": QUESTION}

    keyed = pipe(KeyDataset(Rows(), "path"), QUESTION, **NEW)
    assert [item["answer"] for item in keyed] == [answer, other]
    assert [item["answer"] for item in pipe(Rows(), **NEW)] == [answer, other]


def test_rows_of_the_datasets_package(pipe, video, answer):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"video": video, "question": QUESTION}])
    assert [item["answer"] for item in pipe(table, **NEW)] == [answer]


def test_chat_output_holds_the_new_turn_and_leaves_the_input_alone(pipe, video, answer):
    messages = chat(video)
    result = pipe(messages, **NEW)
    assert result["generated_text"] == [*chat(video), {"role": "assistant", "content": answer}]
    assert result["answer"] == answer
    assert messages == chat(video)


def test_a_begun_answer_is_continued(pipe, video):
    blocks = [{"type": "text", "text": "The colour is"}]
    messages = [*chat(video), {"role": "assistant", "content": blocks}]
    result = pipe(messages, **NEW)
    assert len(result["generated_text"]) == 2
    text = result["generated_text"][-1]["content"][-1]["text"]
    assert text.startswith("The colour is") and text.endswith(result["answer"])
    tokenizer, begun = pipe.processor.tokenizer, pipe.preprocess(Chat(messages))
    assert tokenizer.decode(begun["tensors"]["input_ids"][0]).endswith("<|im_start|>assistant\nThe colour is")
    fresh = pipe.preprocess(Chat(messages), continue_final_message=False)
    assert tokenizer.decode(fresh["tensors"]["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_arrays_frames_and_pictures(pipe):
    frames = np.random.default_rng(0).integers(0, 255, (16, 40, 48, 3), dtype=np.uint8)
    facts = {"fps": 4.0, "total_num_frames": 16, "duration": 4.0}
    result = pipe(frames, QUESTION, video_metadata=facts, return_video_metadata=True, num_frames=8, **NEW)
    assert result["video_metadata"][0]["fps"] == 4.0
    assert len(result["video_metadata"][0]["frames_indices"]) == 8
    pictures = [Image.fromarray(frame) for frame in frames[:4]]
    counted = pipe(pictures, QUESTION, return_token_counts=True, **NEW)["token_counts"]
    assert counted["frames"] == 4 and counted["visual_tokens"] == 16
    one = pipe(image=pictures[0], question=QUESTION, return_token_counts=True, **NEW)["token_counts"]
    assert one["frames"] == 0
    assert one["visual_tokens"] % 16 == 0 and one["visual_tokens"] > 0
    assert one["patch_tokens"] == one["visual_tokens"] * 4, "64 patches of a tile become 16 tokens"


def test_frame_settings_reach_the_processor(pipe, video):
    def frames(**kwargs):
        facts = pipe(video, QUESTION, return_video_metadata=True, **kwargs, **NEW)["video_metadata"][0]
        return facts["frame_times"]

    assert len(frames(num_frames=4)) == 4
    assert len(frames(max_frames=4)) == 4
    assert len(frames(min_frames=12)) == 12
    assert len(frames(processor_kwargs={"num_frames": 12})) == 12
    cut = frames(start=2.0, end=6.0, num_frames=4)
    # Source frames lie at multiples of 1/8 s.
    assert cut[0] >= 2.0 and cut[-1] < 6.0


def test_timings_and_token_counts_only_on_request(pipe, video):
    assert set(pipe(video, QUESTION, **NEW)) == {"answer", "generated_text"}
    result = pipe(video, QUESTION, return_timings=True, return_token_counts=True, visual_dropout=DROPOUT, **NEW)
    assert set(result["timings"]) == {"decode", "encode", "generate"}
    assert all(0 < seconds < 60 for seconds in result["timings"].values())
    counts = result["token_counts"]
    assert counts["frames"] == 8 and counts["patch_tokens"] == 8 * 64 and counts["visual_tokens"] == 8 * 4
    # int(32 * 0.75) and int(32 * 0.25)
    assert [(stage["layer"], stage["visual_tokens"]) for stage in counts["after_stages"]] == [(1, 24), (3, 8)]
    assert [stage["kind"] for stage in counts["after_stages"]] == ["uniform", "attention"]
    assert counts["text_tokens"] + counts["visual_tokens"] == counts["prompt_tokens"]
    assert 0 < counts["generated_tokens"] <= 5


def test_dropout_can_be_switched_off_for_a_call(checkpoint, video):
    pipe = pipeline("video-question-answering", model=str(checkpoint), device="cpu")
    config = pipe.model.config
    config.mm_llm_compress, config.llm_compress_type = True, "uniform"
    config.llm_compress_layer_list, config.llm_image_token_ratio_list = [2], [1.0, 0.5]

    def stages(**kwargs):
        return len(pipe(video, QUESTION, return_token_counts=True, **kwargs, **NEW)["token_counts"]["after_stages"])

    assert (stages(), stages(visual_dropout=False), stages(visual_dropout=DROPOUT)) == (1, 0, 2)


def test_kept_tokens_belong_to_the_frames(pipe, video, answer):
    result = pipe(video, QUESTION, return_kept_tokens=True, visual_dropout=DROPOUT, **NEW)
    kept = result["kept_tokens"]
    assert kept["frames"].shape == (8, 32, 32, 3) and kept["frames"].dtype == torch.uint8
    assert kept["merge_groups"].shape == (2, 4 * 64) and int(kept["merge_groups"].max()) == 15
    assert [stage.kept_visual_indices[0].numel() for stage in kept["stages"]] == [24, 8]
    assert len(kept["times"]) == 8
    # The lower half of a frame has a colour that follows from its number: normalization is undone, the order kept.
    for frame, seconds in zip(kept["frames"], kept["times"], strict=True):
        number = int(seconds * 8)
        wanted = torch.tensor([40 + number * step % 160 for step in (37, 59, 83)])
        # Lossy 4:2:0 video of flat colours: a few levels off.
        assert (frame[18:23, 12:30].float().mean(dim=(0, 1)) - wanted).abs().max() < 12
    without = pipe(video, QUESTION, return_kept_tokens=True, **NEW)
    assert without["answer"] == answer, "encoding first must not change the answer"


def test_kept_tokens_of_the_first_of_two_unequal_videos(pipe):
    frames = np.random.default_rng(0).integers(0, 255, (12, 40, 48, 3), dtype=np.uint8)
    blocks = [{"type": "video", "video": part} for part in (frames[:4], frames[4:])]
    messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": QUESTION}]}]
    result = pipe(messages, return_kept_tokens=True, **NEW)
    assert result["kept_tokens"]["frames"].shape[0] == 4 and result["kept_tokens"]["merge_groups"].shape[0] == 1
    assert pipe(messages, **NEW)["answer"] == result["answer"]


def test_generation_settings(checkpoint, video, answer):
    pipe = pipeline("video-question-answering", model=str(checkpoint), device="cpu", max_new_tokens=5)
    assert pipe(video, QUESTION)["answer"] == answer
    assert pipe(video, QUESTION, generate_kwargs={"max_new_tokens": 5})["answer"] == answer
    counts = pipe(video, QUESTION, max_new_tokens=2, return_token_counts=True)["token_counts"]
    assert counts["generated_tokens"] <= 2
    with pytest.raises(ValueError, match="given twice"):
        pipe(video, QUESTION, max_new_tokens=2, generate_kwargs={"max_new_tokens": 3})
    with pytest.raises(TypeError, match=r"Unknown argument\(s\) \['num_frame'\]"):
        pipe(video, QUESTION, num_frame=4)


def test_default_is_greedy_and_256_tokens(checkpoint, pipe):
    settings = pipe._generate_settings(None)
    assert settings["max_new_tokens"] == 256 and settings["do_sample"] is False
    assert pipe._generate_settings({"max_length": 90}).get("max_new_tokens") is None
    sampling = tiny_videochat_flash_model()
    sampling.generation_config.update(do_sample=True, temperature=0.3, max_new_tokens=9)
    own = pipelines.VideoQuestionAnsweringPipeline(
        model=sampling, processor=tiny_videochat_flash_processor(), device="cpu"
    )
    settings = own._generate_settings(None)
    assert settings["do_sample"] is False and "max_new_tokens" not in settings
    assert own._generate_settings({"do_sample": True})["do_sample"] is True


def test_streaming(pipe, video, answer, capsys):
    stream = pipe(video, QUESTION, stream=True, return_token_counts=True, **NEW)
    assert "".join(stream).strip() == answer
    assert stream.result["answer"] == answer and stream.result["token_counts"]["frames"] == 8
    pipe(video, QUESTION, streamer=TextStreamer(pipe.processor.tokenizer, skip_prompt=True), **NEW)
    assert answer in capsys.readouterr().out
    with pytest.raises(ValueError, match="one question about one video"):
        pipe([video, video], QUESTION, stream=True)
    with pytest.raises(FileNotFoundError):
        pipe("missing.mp4", QUESTION, stream=True)
    broken = pipe(video, QUESTION, stream=True, visual_dropout={"type": "nonsense"}, **NEW)
    with pytest.raises(ValueError, match="nonsense"):
        list(broken)


def test_batch_size_is_taken_as_one(pipe, video, other_video, answer):
    with pytest.warns(UserWarning, match="batch_size is taken as 1"):
        assert pipe([video, other_video], QUESTION, batch_size=2, **NEW)[0]["answer"] == answer


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
    dropped = pipe.score_options(video, QUESTION, options, visual_dropout=DROPOUT)
    assert dropped != pytest.approx(scores, abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        pipe.score_options(video, QUESTION, ["red"])


def test_save_pretrained_writes_model_and_processor_but_no_code(pipe, video, answer, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    again = pipeline("video-question-answering", model=str(tmp_path), device="cpu")
    assert again(video, QUESTION, **NEW)["answer"] == answer


def test_budget_names_numbers_and_what_fits(checkpoint, video):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.config.text_config.max_position_embeddings = 200
    pipe = pipelines.VideoQuestionAnsweringPipeline(
        model=model, processor=AutoProcessor.from_pretrained(checkpoint), device="cpu"
    )
    with pytest.raises(ValueError, match="at most 200") as caught:
        pipe(video, QUESTION, num_frames=16, max_new_tokens=20)
    text = str(caught.value)
    assert "64 visual" in text and "num_frames=" in text
    fit = int(text.split("num_frames=")[1].split(" ")[0])
    pipe(video, QUESTION, num_frames=fit, max_new_tokens=20)
    with pytest.raises(ValueError, match="at most 200"):
        pipe(video, QUESTION, num_frames=fit + 4, max_new_tokens=20)
    with pytest.raises(ValueError, match="Not even one clip"):
        pipe(video, QUESTION, num_frames=4, max_new_tokens=199)


def test_context_length_follows_long_context_scaling():
    text = types.SimpleNamespace(max_position_embeddings=32768, rope_parameters=None)
    config = types.SimpleNamespace(get_text_config=lambda: text)
    assert accounting.context_length(config) == 32768
    text.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert accounting.context_length(config) == 131072
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    assert accounting.context_length(config) == 32768


def test_hooks_are_gone_after_a_call(pipe, video):
    pipe(video, QUESTION, **NEW)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.model.modules()]
    assert sum(hooks) == 0
