"""Guided attention: places that policies should look at, and a loss that equals one read off whole attention maps."""

import random

import pytest
import torch

from longvideo.evaluation.corpus.long_scenes import LONG_FPS, LongDifficulty, make_long_scene
from longvideo.tiny_training import build_parts
from longvideo.tiny_training.build_crossvllm import BEFORE_START, build_crossvllm
from longvideo.tiny_training.crossvllm_rows import LessonCollator, frame_indices, make_lesson, names_of
from longvideo.tiny_training.guided_attention import GuidedAttention

FORMS = ("policy", "policy_letter", "policy_named")
DIFFICULTY = LongDifficulty(letter=1.0)


@pytest.fixture(scope="module")
def built():
    patch = pytest.MonkeyPatch()
    # Training the tokenizer takes longer than all else.
    patch.setattr(build_parts, "NUM_TOKENIZER_SCENES", 60)
    torch.manual_seed(0)
    model, processor = build_crossvllm()
    patch.undo()
    model.model.language_model.config._attn_implementation = "eager"
    return model.eval(), processor


def lessons_of(form: str, num: int = 4, first: int = 0):
    scenes = [make_long_scene(seed, difficulty=DIFFICULTY) for seed in range(first, first + num)]
    return [make_lesson(scene, form, random.Random(scene.seed)) for scene in scenes]


def forward(model, batch, **wishes):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    video = model.get_video_features(
        vision_features=batch["vision_features"], granularity=batch["granularity"], return_dict=True
    )
    return model(**inputs, mm_encoder_outputs={"video": video}, use_cache=False, **wishes)


@pytest.mark.parametrize("form", FORMS)
def test_policies_are_to_look_at_the_name_and_at_what_it_names(built, form: str) -> None:
    model, processor = built
    tokenizer = processor.tokenizer
    lessons = lessons_of(form, 12)
    batch = LessonCollator(model, processor, guided=True)(lessons)
    guides = batch["guides"]
    assert len(guides) == sum(len(lesson.turns) for lesson in lessons)
    events = [(row, event) for row, lesson in enumerate(lessons) for event in lesson.events]
    for guide, (row, event) in zip(guides, events, strict=True):
        ids = batch["input_ids"][guide.row]
        assert guide.row == row and tokenizer.decode(ids[guide.place]) == BEFORE_START
        assert batch["labels"][guide.row, guide.place] == ids[guide.place]
        words = tokenizer.decode(ids[list(guide.names)]).split()
        assert words and {*words} <= {*names_of(lessons[row].scene, event)}
        # It is named in this turn: no policy is written between the name and its own.
        between = ids[max(guide.names) : guide.place].tolist()
        assert tokenizer.eos_token_id not in between
        visual = (ids == model.config.video_token_id).nonzero().flatten().tolist()
        times = [(index + 0.5) / LONG_FPS for index in frame_indices(lessons[row].scene, "coarse", None)]
        shown = [place for place, time in zip(visual, times, strict=True) if event[0] <= time < event[1]]
        assert list(guide.frames) == shown and shown


def test_nothing_else_is_guided(built) -> None:
    model, processor = built
    assert LessonCollator(model, processor)(lessons_of("policy"))["guides"] == []
    for form in ("plain_coarse", "cut", "judge"):
        assert LessonCollator(model, processor, guided=True)(lessons_of(form))["guides"] == []


@torch.no_grad()
def test_the_loss_is_that_of_whole_attention_maps(built) -> None:
    model, processor = built
    batch = LessonCollator(model, processor, guided=True)(lessons_of("policy"))
    guides, attention = batch["guides"], GuidedAttention(model.model.language_model)
    with attention.watching():
        output = forward(model, batch, output_attentions=True)
        found = attention.loss(guides, batch["attention_mask"])
    naming, looking = output.attentions[1], output.attentions[-1]
    names, frames = [], []
    for guide in guides:
        names.append(-torch.log(naming[guide.row, -1, guide.place, list(guide.names)].sum() + 1e-4))
        for head in looking[guide.row]:
            frames.append(-torch.log(head[guide.place, list(guide.frames)].sum() + 1e-4))
    # float32, the same numbers in another order.
    torch.testing.assert_close(found, torch.stack(names).mean() + torch.stack(frames).mean(), atol=1e-4, rtol=1e-4)
    assert not attention._seen


def test_a_model_learns_to_look_there(built) -> None:
    model, processor = built
    batch = LessonCollator(model, processor, guided=True)(lessons_of("policy_named"))
    attention, decoder = GuidedAttention(model.model.language_model), model.model.language_model
    state = {name: x.clone() for name, x in decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(decoder.parameters(), 2e-3)
    losses = []
    for _ in range(25):
        with attention.watching():
            forward(model, batch)
            loss = attention.loss(batch["guides"], batch["attention_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    decoder.load_state_dict(state)
    # Far from what they begin with: an even look at 200 places of which few are right.
    assert losses[0] > 3 and losses[-1] < losses[0] / 2
