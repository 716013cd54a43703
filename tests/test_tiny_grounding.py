"""What the tiny LLaVA-ST is taught: rows of the paper's three stages, shorter stages, and what can be left out."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from longvideo.evaluation.corpus import GROUNDING_TASKS, make_groundings, make_scene
from longvideo.evaluation.corpus.grounding import IMAGE_TASKS
from longvideo.tiny_training.build_llava_st import begin_llava_st_stage, shuffle_tokens
from longvideo.tiny_training.build_parts import last_connector_layer
from longvideo.tiny_training.grounding_stages import (
    BATCH_SIZE,
    GROUNDING_STAGES,
    MOST_TURNS,
    TURNS,
    GroundingConversations,
    choose_groundings,
    without_seconds,
)
from longvideo.tiny_training.models import TINY_MODELS
from longvideo.tiny_training.stages import BATCH_SIZE as TRAINED_BATCH_SIZE
from longvideo.tiny_training.stages import scale_stage
from longvideo.tiny_training.train import main, stages_of, train
from tests.tiny_llava_st import tiny_llava_st_model

FORMS = {"picture", "caption", "events", "questions", *GROUNDING_TASKS}


def rows_of(form: str, num: int = 4, **changes: object) -> list[dict]:
    stage = replace(GROUNDING_STAGES[-1], shares=((form, 1.0),), num_videos=30, **changes)
    data = GroundingConversations(stage, size=16, num_frames=20, first_seed=0)
    return [data[index] for index in range(num)]


def texts(row: dict, role: str) -> list[str]:
    return [turn["content"][-1]["text"] for turn in row["messages"] if turn["role"] == role]


def test_stages_are_those_of_the_paper() -> None:
    assert stages_of(TINY_MODELS["llava_st"]) == GROUNDING_STAGES
    asked = [{name for name, _ in stage.shares} for stage in GROUNDING_STAGES]
    # The paper's first stage is two here: the connector alone, then the decoder with it.
    assert not (asked[0] | asked[1]) & set(GROUNDING_TASKS) and not any(s.lape for s in GROUNDING_STAGES[:2])
    # The second one is five here: features are shortened, then one shape and several in pictures, and in videos.
    assert [names & set(GROUNDING_TASKS) for names in asked[2:7]] == [
        {"rec"},
        {"rec"},
        {"rec", "reg"},
        {"rec", "tvg", "tr"},
        {"rec", "reg", "tvg", "tr"},
    ]
    assert asked[-1] >= set(GROUNDING_TASKS) and all(stage.lape for stage in GROUNDING_STAGES[2:]) and len(asked) == 9
    # What was taught in random order is taught more and more in its own.
    assert [stage.shuffled for stage in GROUNDING_STAGES] == [0, 0, 0, 1, 1, 1, 0.7, 0.5, 0.3]
    for stage, names in zip(GROUNDING_STAGES, asked, strict=True):
        assert names <= FORMS and sum(share for _, share in stage.shares) == pytest.approx(1)
        assert stage.num_videos % BATCH_SIZE == 0
    # Batches are of one form only when both count them alike.
    assert BATCH_SIZE == TRAINED_BATCH_SIZE


@pytest.mark.parametrize("form", sorted(FORMS))
def test_rows_of_every_form(form: str) -> None:
    rows = rows_of(form)
    for row in rows:
        visual = row["messages"][0]["content"][0]
        is_image = form in IMAGE_TASKS or form == "picture"
        assert visual["type"] == ("image" if is_image else "video")
        if not is_image:
            assert visual["video"].shape == (20, 16, 16, 3)
            # Frames lie from end to end, as the processor of LLaVA-ST samples them.
            assert visual["timestamps"][0] == 0 and visual["timestamps"][-1] == visual["duration"] - 1 / 8
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= max(MOST_TURNS, 5)
        answers = " ".join(texts(row, "assistant"))
        assert answers and ("OUTPUT" in answers) == (form in GROUNDING_TASKS and form not in ("reg", "tr"))
        assert "second" not in answers
    assert [texts(row, "assistant") for row in rows_of(form)] == [texts(row, "assistant") for row in rows]


def test_pictures_show_one_shape_before_they_are_crowded() -> None:
    turns = [len(row["messages"]) // 2 for row in rows_of("rec", 20)]
    assert sum(turns) >= 1.8 * len(turns) and max(turns) == MOST_TURNS
    alone = rows_of("rec", 20, pictures=GROUNDING_STAGES[3].pictures)
    assert {len(row["messages"]) for row in alone} == {2}


def test_rows_of_a_batch_have_one_form() -> None:
    stage = replace(GROUNDING_STAGES[-1], num_videos=5 * BATCH_SIZE)
    data = GroundingConversations(stage, size=16, num_frames=20, first_seed=0)
    for batch in range(3):
        kinds = set()
        for index in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE):
            row = data[index]
            coordinates = {re.sub(r"[0-9.]", "", tag) for tag in re.findall(r"<[^>]*>", texts(row, "assistant")[0])}
            kinds.add((row["messages"][0]["content"][0]["type"], frozenset(coordinates)))
        assert len(kinds) == 1


def test_turns_of_a_conversation_are_about_different_shapes() -> None:
    sorts: Counter[str] = Counter()
    for seed in range(60):
        pool = make_groundings(make_scene(seed), ["tvg"], size=(16, 16))
        chosen = choose_groundings(pool, MOST_TURNS, random.Random(seed))
        assert len({item.subject for item in chosen}) == len(chosen) <= MOST_TURNS
        assert bool(chosen) == bool(pool)
        sorts.update(item.bucket for item in chosen)
    assert set(sorts) == {"seen", "moves", "coloured", "letter"}
    assert len(choose_groundings(pool * 2, TURNS["stvg"], random.Random(0))) <= TURNS["stvg"]


def test_captions_lose_their_times() -> None:
    text = "0 seconds : red circle left ; 1 second : nothing ; 12 seconds : letter X ."
    assert without_seconds(text) == "red circle left ; nothing ; letter X ."


def test_stages_can_be_shorter() -> None:
    stage = scale_stage(GROUNDING_STAGES[0], 0.3)
    assert stage.num_videos == 0.3 * GROUNDING_STAGES[0].num_videos and stage.warmup_steps == 6
    assert scale_stage(GROUNDING_STAGES[0], 1e-6).num_videos == BATCH_SIZE
    assert scale_stage(GROUNDING_STAGES[0], 2).warmup_steps == GROUNDING_STAGES[0].warmup_steps


@pytest.mark.parametrize(("without", "wanted"), [((), [False] * 2 + [True] * 7), (("lape",), [False] * 9)])
def test_position_embeddings_begin_with_places(without, wanted) -> None:
    model = tiny_llava_st_model()
    found = []
    for stage in GROUNDING_STAGES:
        begin_llava_st_stage(model, stage, without)
        found.append(model.config.use_lape)
        assert ("get_image_features" in vars(model.model)) == (stage.shuffled > 0 and not without)
    assert found == wanted


def test_features_are_shortened_once() -> None:
    model = tiny_llava_st_model()
    layer, packer = last_connector_layer(model), model.model.packer
    before = [value.detach().clone() for value in layer.parameters()]
    added = {name: value.detach().clone() for name, value in packer.named_parameters()}
    for stage in GROUNDING_STAGES:
        begin_llava_st_stage(model, stage, ())
    for value, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(value, old * 0.2)
    for name, value in packer.named_parameters():
        torch.testing.assert_close(value, added[name] * (0.1 if "to_out" in name else 1.0))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_tokens_in_random_order_keep_their_places(kind) -> None:
    model = tiny_llava_st_model()
    frames = () if kind == "image" else (model.config.num_frames,)
    pixels = torch.rand(2, *frames, 3, *[model.config.vision_config.image_size] * 2)

    def encode() -> list[torch.Tensor]:
        return getattr(model, f"get_{kind}_features")(pixels, return_dict=True).pooler_output

    with torch.no_grad():
        plain = encode()
        shuffle_tokens(model, 1.0)
        model.eval()
        asked = encode()
        model.train()
        taught = encode()
        shuffle_tokens(model, 0.0)
        again = encode()
    for old, same, mixed, last in zip(plain, asked, taught, again, strict=True):
        assert torch.equal(old, same) and torch.equal(old, last) and not torch.equal(old, mixed)
        # Everything is there once, with the position embedding that was added to it.
        nearest = torch.cdist(old, mixed).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(old)))
        torch.testing.assert_close(old, mixed[nearest])


def test_a_place_is_asked_for_twice() -> None:
    once, twice = (rows_of("rec", 20, repeats=chance) for chance in (0.0, 1.0))
    for short, long in zip(once, twice, strict=True):
        questions, answers = texts(long, "user"), texts(long, "assistant")
        assert questions[:-1] == texts(short, "user") and answers[:-1] == texts(short, "assistant")
        assert (questions[-1], answers[-1]) in zip(questions[:-1], answers[:-1], strict=True)


def test_what_cannot_be_left_out(tmp_path, capsys) -> None:
    assert TINY_MODELS["llava_st"].ablations == ("lape", "packer")
    with pytest.raises(ValueError, match=r"longvu cannot be trained without \['lape'\]; it has no switches"):
        train("longvu", tmp_path, minutes=0, seed=0, without=("lape",))
    with pytest.raises(ValueError, match="scale is 0"):
        train("llava_st", tmp_path, minutes=0, seed=0, scale=0)
    assert main(["llava_st", "--out", str(tmp_path), "--without", "ntp"]) == 2
    assert "cannot be trained without ['ntp']; it has ['lape', 'packer']" in capsys.readouterr().err
