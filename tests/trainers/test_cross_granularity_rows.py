"""Rows of cross-granularity training, the targets of both supervised stages, the order of steps, wrong settings."""

import numpy as np
import pytest

from longvideo.processing.crossvllm.policies import parse_coarse
from longvideo.trainers import CrossGranularityConfig, coarse_grounding_row, fine_answer_row
from longvideo.trainers.cross_granularity_rows import PairedSteps, QuestionCollator, as_question
from tests.trainers.cross_granularity_runs import question_row

CLIP = np.zeros((24, 8, 8, 3), dtype=np.uint8)
FPS = {"fps": 2.0}


def texts_of(row):
    user, assistant = row["messages"]
    return user["content"][0], user["content"][1]["text"], assistant["content"][0]["text"]


def test_a_grounding_row_becomes_a_prompt_without_direct_output_and_a_policy():
    row = {"id": 7, "video": CLIP, "video_metadata": FPS, "query": "a dog runs", "segment": [2, 5.25]}
    built = coarse_grounding_row(row)
    block, prompt, policy = texts_of(built)
    assert built["id"] == 7 and block["video"] is CLIP and block["video_metadata"] == FPS
    assert "The length of the original video is 12.0 seconds." in prompt  # 24 frames at 2 a second
    assert 'When does this happen: "a dog runs"?' in prompt and "Direct output" not in prompt
    assert policy == '{"t_start": 2.0, "t_end": 5.2, "answer": ""}' and parse_coarse(policy).parse_ok


def test_times_and_questions_have_other_names():
    row = {"video": "clip.mp4", "question": "Where is the dog?", "t_start": 1, "t_end": 99.5, "duration": 99.0}
    block, prompt, policy = texts_of(coarse_grounding_row(row))
    assert prompt.endswith("Question: Where is the dog?") and "video_metadata" not in block
    assert parse_coarse(policy).t_end == 99.0  # annotations round up


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"segment": None}, r"the segment None, expected \[start, end\]"),
        ({"segment": [5, 5]}, r"the segment \[5, 5\]"),
        ({"segment": [1, 2, 3]}, r"the segment \[1, 2, 3\]"),
        ({"segment": [13, 14]}, "the segment 13 to 14 s in a video of 12 s"),
        ({"query": None}, "needs `video` and `query` or `question`"),
        ({"video": None}, "needs `video` and"),
    ],
)
def test_grounding_rows_that_are_none(change, text):
    row = {"video": CLIP, "video_metadata": FPS, "query": "a dog", "segment": [2, 5], **change}
    with pytest.raises(ValueError, match=f"Row 3.*{text}"):
        coarse_grounding_row(row, name="Row 3")


def test_an_answer_row_shows_the_segment_and_asks_plainly():
    block, prompt, answer = texts_of(fine_answer_row({**question_row(0), "answer": ["red", "crimson"]}))
    assert (block["video_start"], block["video_end"]) == (2.0, 8.0)
    assert (prompt, answer) == ("Which colour?", "red")
    block, _, _ = texts_of(fine_answer_row({"video": "a.mp4", "question": "Who?", "answer": "Ann"}))
    assert block == {"type": "video", "video": "a.mp4"}


def test_questions_come_from_columns_or_messages():
    from_columns = as_question(question_row(1))
    assert from_columns.answers == ("green",) and from_columns.segment == (8.0, 14.0)
    plain = {key: value for key, value in question_row(1).items() if key != "segment"}
    from_messages = as_question({**fine_answer_row(plain), "segment": [8, 14]})
    for name in ("question", "answers", "segment", "metadata"):
        assert getattr(from_messages, name) == getattr(from_columns, name)
    batch = QuestionCollator()([question_row(0), {**plain, "id": None}])
    assert [question.name for question in batch["questions"]] == ["Row 'clip-0'", "Row 1 of the batch"]
    assert batch["row_count"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"video": None}, "no video or no question"),
        ({"question": "  "}, "no video or no question"),
        ({"answer": []}, "the answer"),
        ({"answer": ["red", ""]}, "the answer"),
        ({"segment": [4, 2]}, r"the segment \[4, 2\]"),
        ({"messages": [{"role": "user", "content": "Hm?"}]}, "one question about one video and one answer"),
    ],
)
def test_questions_that_are_none(change, text):
    with pytest.raises(ValueError, match=f"Row 'clip-0'.*{text}"):
        QuestionCollator()([{**question_row(0), **change}])


def test_rows_of_a_step_come_twice_and_each_epoch_has_its_order():
    sampler = PairedSteps(11, rows_per_step=3, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and len(orders[0]) == len(sampler) == 18
    for begin in range(0, 18, 6):
        assert orders[0][begin : begin + 3] == orders[0][begin + 3 : begin + 6]
    assert len(set(orders[0])) == 9  # two rows fill no step
    with pytest.raises(ValueError, match="2 rows do not fill an optimizer step of 3"):
        PairedSteps(2, rows_per_step=3, seed=0)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_policies": 1}, "num_policies=1 must be at least 2"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be positive"),
        ({"fine_learning_rate": 0.0}, "fine_learning_rate=0.0 must be positive"),
        ({"ref_sync_steps": -1}, "ref_sync_steps=-1 must be at least 0"),
        ({"max_steps": 3}, "max_steps=3 must be an even number"),
        ({"save_steps": 5}, "save_steps=5 must be an even number"),
        ({"save_steps": 0.1}, "save_steps=0.1 must be an even number"),
        ({"trainable_parts": ["connector"]}, "a setting of supervised finetuning"),
        ({"max_length": 10}, "a setting of supervised finetuning"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, setting, text):
    with pytest.raises(ValueError, match=text):
        CrossGranularityConfig(output_dir=str(tmp_path), use_cpu=True, **setting)


def test_defaults_are_those_of_table_4(tmp_path):
    args = CrossGranularityConfig(output_dir=str(tmp_path), use_cpu=True, fine_learning_rate=1e-4)
    assert (args.num_policies, args.ref_sync_steps, args.beta) == (4, 0, 0.1)
    assert args.module_learning_rates == {"coarse": 2e-5, "fine": 1e-4}
    assert args.ddp_find_unused_parameters is True
