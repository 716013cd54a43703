"""The question-answering evaluation: arithmetic, scores against a plain computation, determinism, command."""

import json

import pytest
import torch

from longvideo.evaluation.answer_questions import (
    Answered,
    answer_item,
    default_frames,
    encode_first_video,
    evaluate,
    format_table,
    load_checkpoint,
    main,
    prompt_ids,
    read_prompt,
    score_options,
    summarize,
)
from longvideo.evaluation.corpus import balanced_items, write_video
from longvideo.evaluation.metrics import wilson_interval
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor

ANSWERS = [[70, 80, 2], [90, 2], [70, 81, 82, 2], [2]]
DROPOUT = {"llm_compress_type": "uniform0_attention", "llm_compress_layer_list": [1, 3]}
DROPOUT |= {"llm_image_token_ratio_list": [1.0, 0.5, 0.25]}


@pytest.fixture(scope="module")
def model():
    return tiny_videochat_flash_model(**DROPOUT)


@pytest.fixture(scope="module")
def processor():
    return tiny_videochat_flash_processor()


@pytest.fixture(scope="module")
def longvu():
    """Frames of 12 or 6 tokens each; beside the questions some of 16 frames fit at the full grid."""
    return tiny_longvu_model(context_length=260, dino_threshold=2.0), tiny_longvu_processor()


@pytest.fixture(scope="module")
def item():
    return max(balanced_items(24), key=lambda item: len(item.questions))


@pytest.fixture(scope="module")
def video(item, tmp_path_factory):
    return write_video(item.scene, tmp_path_factory.mktemp("video") / "scene.mp4", size=(64, 64))


def result(kind: str, chosen: int) -> Answered:
    return Answered("a.mp4", kind, "?", ("a", "b", "c", "d"), 1, chosen, (0.0, 0.0, 0.0, 0.0))


def test_summary_counts_and_intervals() -> None:
    results = [result("needle", 1)] * 5 + [result("needle", 0)] * 5 + [result("colour", 1)] * 3 + [result("colour", 2)]
    summary = summarize(results)
    assert list(summary) == ["colour", "needle", "all"]
    assert [summary[kind]["num_correct"] for kind in summary] == [3, 5, 8]
    assert [summary[kind]["accuracy"] for kind in summary] == [0.75, 0.5, 8 / 14]
    # Tabulated to four digits.
    assert summary["needle"]["interval_95"] == pytest.approx([0.2366, 0.7634], abs=6e-5)
    assert summary["all"]["interval_95"] == list(wilson_interval(8, 14))
    lines = format_table(summary).splitlines()
    assert lines[2].split() == ["needle", "10", "5", "50.0", "%", "23.7", "-", "76.3", "%"]


@pytest.mark.parametrize("dropout", [False, True])
@torch.no_grad()
def test_scores_are_those_of_generation(model, processor, item, video, dropout: bool) -> None:
    """Batched scores equal a prefill of the prompt from pixels and one decoding step per token, one answer alone."""
    questions = [question.question for question in item.questions]
    inputs, prompts = prompt_ids(processor, video, questions, 16)
    encoded = encode_first_video(model, inputs)
    scores = score_options(model, encoded, prompts[1], ANSWERS, visual_dropout=dropout)
    pixels = inputs["pixel_values_videos"][1:2]
    for answer, score in zip(ANSWERS, scores, strict=True):
        prompt = torch.tensor([prompts[1]])
        out = model(input_ids=prompt, pixel_values_videos=pixels, visual_dropout=dropout, use_cache=True)
        assert (out.visual_dropout is not None) == dropout
        total, seen = 0.0, prompt.shape[1]
        for token in answer:
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            seen += 1
            mask = torch.ones(1, seen, dtype=torch.long)
            step = torch.tensor([[token]])
            out = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        # float32 sums of up to four terms, in another order of operations.
        assert score == pytest.approx(total, abs=2e-3)


@torch.no_grad()
def test_answers_do_not_decide_what_is_seen(longvu, item, video) -> None:
    """Where the question chooses the frames, an answer in the prompt would choose others; scores are as without it."""
    model, processor = longvu
    inputs, prompts = prompt_ids(processor, video, [item.questions[0].question] * 2, 16)
    assert inputs["pixel_values_videos_dino"].shape[0] == 32
    encoded, prompt = encode_first_video(model, inputs), prompts[0]
    read = read_prompt(model, encoded, prompt)
    seen = read.video_selections[0]
    assert seen.mode == "mix" and 0 < int(seen.full_resolution.sum()) < 16
    assert read.logits.shape[1] == 1
    scores = score_options(model, encoded, prompt, ANSWERS)
    one = {name: value[:16] for name, value in inputs.items() if name.startswith("pixel_values_videos")}
    one |= {name: inputs[name][:1] for name in ("video_num_frames", "video_sizes")}
    changed = 0
    for answer, score in zip(ANSWERS, scores, strict=True):
        out = model(input_ids=torch.tensor([prompt]), **one, use_cache=True)
        assert torch.equal(out.video_selections[0].full_resolution, seen.full_resolution)
        total, mask = 0.0, out.attention_mask
        for token in answer:
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            step = torch.tensor([[token]])
            out = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        # float32 sums of up to four terms, in another order of operations.
        assert score == pytest.approx(total, abs=2e-3)
        within = model(input_ids=torch.tensor([prompt + answer * 6]), **one).video_selections[0]
        changed += not torch.equal(within.full_resolution, seen.full_resolution)
    assert changed


@torch.no_grad()
def test_two_tower_models_answer_all_questions(longvu, item, video) -> None:
    model, processor = longvu
    together = answer_item(model, processor, item, video)
    assert [answered.question for answered in together] == [question.question for question in item.questions]
    place = len(item.questions) - 1
    alone = answer_item(model, processor, type(item)(item.scene, (item.questions[place],)), video)[0]
    # Rounded to four digits; float32 in batches of another width.
    assert alone.scores == pytest.approx(together[place].scores, abs=2e-3)


@torch.no_grad()
def test_questions_of_a_video_do_not_mix(model, processor, item, video) -> None:
    for form in ("open", "letter"):
        together = answer_item(model, processor, item, video, form=form)
        assert [answered.question for answered in together] == [question.question for question in item.questions]
        for place, question in enumerate(item.questions):
            single = type(item)(item.scene, (question,))
            alone = answer_item(model, processor, single, video, form=form)[0]
            # Rounded to four digits; float32 in batches of another width.
            assert alone.scores == pytest.approx(together[place].scores, abs=2e-3)
            assert together[place].chosen == max(range(4), key=together[place].scores.__getitem__)
            assert together[place].truth == question.answer_index


@torch.no_grad()
def test_models_of_a_fixed_number_of_frames_get_that_number(model, processor, item, video) -> None:
    assert default_frames(model, processor) == 16
    fixed = tiny_llava_st_model(), tiny_llava_st_processor()
    assert default_frames(*fixed) == fixed[0].config.num_frames == 6
    assert len(answer_item(*fixed, item, video)) == len(item.questions)


def test_evaluation_is_deterministic_and_complete(longvu, monkeypatch) -> None:
    # A model that chooses nothing, neither patches to merge nor frames to keep at the full grid: among equal ones the
    # last bit decides, and scores then differ by as much as 0.2. Here all frames fit. And the same files twice: x264
    # does not always choose alike, and that is not what is asked here.
    files: dict[int, bytes] = {}

    def write_once(scene, path, **kwargs) -> None:
        if scene.seed not in files:
            files[scene.seed] = write_video(scene, path, **kwargs).read_bytes()
        path.write_bytes(files[scene.seed])

    monkeypatch.setattr("longvideo.evaluation.answer_questions.write_video", write_once)
    model, processor = tiny_longvu_model(context_length=2048, dino_threshold=2.0), longvu[1]
    first = evaluate(model, processor, 6, kinds=["colour", "needle"], size=32)
    second = evaluate(model, processor, 6, kinds=["colour", "needle"], size=32)
    for one, other in zip(first, second, strict=True):
        assert (one.video, one.question, one.options, one.truth) == (
            other.video,
            other.question,
            other.options,
            other.truth,
        )
        # Rounded to four digits; float32 sums may differ with the place of a tensor in memory.
        assert one.scores == pytest.approx(other.scores, abs=2e-4)
    assert sorted(answered.kind for answered in first) == ["colour"] * 3 + ["needle"] * 3
    with pytest.raises(ValueError, match="unknown form 'free'"):
        evaluate(model, processor, 6, form="free")


def test_command(model, processor, tmp_path, capsys) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "reports" / "answers.json"
    arguments = ["--model", str(tmp_path / "model"), "--num", "4", "--kinds", "count", "--size", "32"]
    assert main([*arguments, "--json", str(out), "--visual-dropout", "on"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    right = sum(answer["chosen"] == answer["truth"] for answer in written["answers"])
    assert written["summary"]["all"]["num_correct"] == right and len(written["answers"]) == 4
    assert printed.splitlines()[1].split()[:3] == ["count", "4", str(right)]
    assert "chance 25.0 %" in printed and "visual dropout: on" in printed
    assert [path.name for path in out.parent.iterdir()] == ["answers.json"]
    assert main(["--model", str(tmp_path / "absent"), "--num", "1"]) == 2
    assert "error:" in capsys.readouterr().err


def test_checkpoints_by_name_of_the_architecture(longvu, tmp_path, monkeypatch, capsys) -> None:
    model, _ = load_checkpoint("videochat_flash")
    assert model.config.model_type == "videochat_flash" and not model.training
    for part in longvu:
        part.save_pretrained(tmp_path / "longvu")
    monkeypatch.setattr("longvideo.tiny_checkpoint", lambda name: str(tmp_path / name))
    assert load_checkpoint("longvu")[0].config.model_type == "longvu"
    assert main(["--model", "longvu", "--num", "1", "--visual-dropout", "on"]) == 2
    assert "LongVUForConditionalGeneration has no visual dropout" in capsys.readouterr().err
