"""`VideoDPOCollator`: two answers behind one prompt whose visuals are read once."""

from typing import Any

import numpy as np
import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, VideoSFTCollator
from longvideo.trainers.dpo_collator import VideoDPOCollator, as_conversation, split_pair
from tests.tiny import tiny_videochat_flash_processor
from tests.trainers.dpo_runs import pair_of, pairs_of
from tests.trainers.sft_runs import image_row
from tests.trainers.toy_rows import colour_row, two_turn_row, video_block
from tests.trainers.zoo import KINDS, rows_of


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_videochat_flash_processor()


def answers(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    return [processor.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in batch["labels"]]


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_answers_are_those_of_supervised_rows(name, side):
    """Ids, labels and pixels are those of the same conversations under `VideoSFTCollator`, padding aside."""
    processor, rows = KINDS[name].processor(), pairs_of(name)
    batch = VideoDPOCollator(processor, padding_side=side)(rows)
    plain = VideoSFTCollator(processor)
    for index in range(8):
        row = rows[index % 4]
        answer = row["chosen" if index < 4 else "rejected"]
        own = plain([{"messages": [*row["prompt"], *answer]}])
        real = batch["attention_mask"][index].bool()
        assert real.nonzero()[-1 if side == "left" else 0] == (len(real) - 1 if side == "left" else 0)
        for key in {"input_ids", "labels", "coordinate_values"} & set(own):
            assert torch.equal(batch[key][index][real], own[key][0]), key
            assert len(batch[key][index][~real].unique()) <= 1
        first = int((own["labels"][0] != IGNORE_INDEX).nonzero()[0])
        assert batch["prompt_mask"][index][real].tolist() == [i < first for i in range(int(real.sum()))]
        assert not batch["prompt_mask"][index][~real].any()
    chosen = plain([{"messages": [*row["prompt"], *row["chosen"]]} for row in rows])
    for key in [key for key in chosen if key.startswith(("pixel", "video_", "image_"))]:
        assert torch.equal(batch[key], chosen[key]), key
    lengths = (batch["attention_mask"].sum(1) - batch["prompt_mask"].sum(1)).view(2, 4)
    assert torch.equal(batch["answer_room"].view(2, 4), lengths.max(0).values.expand(2, 4))
    if side == "left":
        kept = batch["labels"][:, -batch["logits_to_keep"] :]
        assert (kept[:, 0] == IGNORE_INDEX).all() and (kept[:, 1] != IGNORE_INDEX).any()
        assert (kept != IGNORE_INDEX).sum() == (batch["labels"] != IGNORE_INDEX).sum()


def test_visuals_are_read_once_for_both_answers(processor, monkeypatch):
    reads = []
    kind = type(processor.video_processor)
    read = kind.read_source
    monkeypatch.setattr(kind, "read_source", lambda self, *a, **k: reads.append(1) or read(self, *a, **k))
    collator = VideoDPOCollator(processor)
    batch = collator(pairs_of("videochat_flash"))
    assert len(reads) == 4 and batch["video_num_frames"].tolist() == [4, 8, 4, 8]
    # The next row with other frames is read anew, and the processor is as it was.
    collator([pair_of(colour_row("red"), "no")])
    assert len(reads) == 5 and not {"_process_videos", "_process_images"} & set(vars(processor))


def test_only_the_answers_are_compared(processor):
    """Assistant turns of the prompt are no answers; those after the question are, all of them."""
    row = pair_of(two_turn_row("red"), "No.")
    batch = VideoDPOCollator(processor)([row])
    assert answers(processor, batch) == ["Yes\nI am.<|im_end|>", "No.<|im_end|>"]
    follow_up = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    batch = VideoDPOCollator(processor)([{**row, "chosen": [*row["chosen"], *follow_up]}])
    assert answers(processor, batch) == ["Yes\nI am.<|im_end|>Yes.<|im_end|>", "No.<|im_end|>"]


def test_prompts_may_be_implicit_and_answers_strings(processor):
    row = pairs_of("videochat_flash")[0]
    explicit = VideoDPOCollator(processor)([row])
    copied = [{**row["prompt"][0], "content": [dict(block) for block in row["prompt"][0]["content"]]}]
    copied[0]["content"][0]["video"] = copied[0]["content"][0]["video"].copy()
    implicit = {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*copied, *row["rejected"]]}
    strings = {**row, "chosen": "red", "rejected": row["rejected"][0]["content"]}
    for other in (implicit, strings):
        batch = VideoDPOCollator(processor)([other])
        assert batch.keys() == explicit.keys()
        for key, value in explicit.items():
            assert value == batch[key] if isinstance(value, int) else torch.equal(value, batch[key]), key
    # Of two identical conversations the last turn is the answer.
    same = {"chosen": implicit["chosen"], "rejected": implicit["chosen"]}
    assert answers(processor, VideoDPOCollator(processor)([same])) == ["red<|im_end|>"] * 2
    text = {"prompt": "Which colour?", "chosen": "red", "rejected": "blue"}
    assert answers(processor, VideoDPOCollator(processor)([text])) == ["red<|im_end|>", "blue<|im_end|>"]


def test_videos_may_stand_in_columns_and_rows_in_tables(processor):
    datasets = pytest.importorskip("datasets")
    frames = video_block("red")["video"]
    prompt = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Colour?"}]}]
    row = {"prompt": prompt, "chosen": "red", "rejected": "blue", "videos": [frames]}
    batch = VideoDPOCollator(processor)([row, pair_of(image_row("What?", "Grey."), "Pink.")])
    assert batch["video_num_frames"].tolist() == [4] and batch["pixel_values"].shape[0] >= 1
    table = datasets.Dataset.from_list([{**row, "videos": None, "prompt": "Hi", "note": None}])
    assert answers(processor, VideoDPOCollator(processor)([table[0]])) == ["red<|im_end|>", "blue<|im_end|>"]


def test_both_answers_get_the_same_frames_within_a_budget(processor):
    row = pair_of(colour_row("red", num_frames=16), "It is " + "very " * 20 + "red.")
    longer = VideoSFTCollator(processor)([{"messages": [*row["prompt"], *row["rejected"]]}])["input_ids"].shape[1]
    batch = VideoDPOCollator(processor, max_length=longer - 20)([row])
    assert batch["video_num_frames"].tolist() == [8]
    assert (batch["input_ids"] == processor.video_token_id).sum(1).tolist() == [32, 32]
    assert batch["attention_mask"].sum(1).max() <= longer - 20
    assert VideoDPOCollator(processor, max_frames_per_row=4)([row])["video_num_frames"].tolist() == [4]


def test_references_travel_with_their_rows(processor):
    rows = pairs_of("videochat_flash")[:2]
    marked = [{**row, "ref_chosen_logps": -1.5 - i, "ref_rejected_logps": -7} for i, row in enumerate(rows)]
    batch = VideoDPOCollator(processor)(marked)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.5] and batch["ref_rejected_logps"].tolist() == [-7, -7]
    with pytest.raises(ValueError, match=r"Row 1 of the batch \(id 'blue-8'\) has no ref_chosen_logps"):
        VideoDPOCollator(processor)([marked[0], rows[1]])
    for broken in (float("nan"), None):
        with pytest.raises(ValueError, match=r"Row 0 of the batch .* not two finite numbers"):
            VideoDPOCollator(processor)([{**marked[0], "ref_rejected_logps": broken}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "needs `chosen` and `rejected` answers .it has"),
        ({"rejected": []}, "needs `chosen` and `rejected` answers"),
        ({"prompt": None}, "do not begin with the same messages. Put the question"),
        ({"prompt": [{"role": "assistant", "content": "Hm"}]}, "the prompt ends with an assistant message"),
        ({"chosen": [{"role": "user", "content": "Hm"}]}, "`chosen` begins with a message of 'user'"),
        (
            {"rejected": [{"role": "assistant", "content": [video_block("red")]}]},
            "`rejected` holds a video or an image. Visuals belong into the prompt",
        ),
        ({"chosen": [{"role": "assistant"}]}, "chosen answer: message 0 must be a dict with `role` and `content`"),
    ],
)
def test_rows_that_are_no_pairs(processor, change, message):
    row = {**pairs_of("videochat_flash")[0], **change}
    with pytest.raises(ValueError, match=rf"Row 0 of the batch \(id 'red-4'\).*{message}"):
        VideoDPOCollator(processor)([row])


def test_rows_of_supervised_finetuning_are_named_so(processor):
    with pytest.raises(ValueError, match="Rows with `messages` are for VideoSFTTrainer"):
        VideoDPOCollator(processor)(rows_of("videochat_flash"))


def test_settings_that_do_not_fit(processor):
    with pytest.raises(ValueError, match=r"\['label_rule', 'mask'\] are settings of supervised finetuning"):
        VideoDPOCollator(processor, mask="all", label_rule="longvu")
    with pytest.raises(ValueError, match="padding_side='top' is unknown"):
        VideoDPOCollator(processor, padding_side="top")


def test_a_video_that_cannot_be_read_is_named_or_skipped(processor, tmp_path):
    good = pairs_of("videochat_flash")[0]
    prompt = [{"role": "user", "content": [{"type": "video", "path": str(tmp_path / "no.mp4")}]}]
    bad = {**good, "id": "gone", "prompt": prompt}
    with pytest.raises(ValueError, match="gone"):
        VideoDPOCollator(processor)([bad, good])
    batch = VideoDPOCollator(processor, on_bad_video="skip", with_facts=True)([bad, good])
    assert len(batch["input_ids"]) == 2 and batch["batch_facts"].num_skipped == 1


def test_the_longer_answer_stands_for_the_length_of_a_row():
    row = pairs_of("videochat_flash")[0]
    assert as_conversation(row)["messages"] == [*row["prompt"], *row["rejected"]]
    prompt, (chosen, rejected) = split_pair({**row, "chosen": "red"})
    assert chosen == [{"role": "assistant", "content": "red"}] and (prompt, rejected) == (
        row["prompt"],
        row["rejected"],
    )
    assert isinstance(prompt[0]["content"][0]["video"], np.ndarray)
