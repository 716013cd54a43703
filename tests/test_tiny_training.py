"""What the tiny models are taught: labels of patches, and conversations in which no answer betrays another."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from longvideo.evaluation.corpus import all_questions, make_scene
from longvideo.evaluation.corpus.scenes import COLOURS, DIRECTIONS, Actor, Background, Motion, Needle, Scene
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.tiny_training.build_parts import train_tokenizer
from longvideo.tiny_training.conversations import HARMLESS_KINDS, MAX_TURNS, NOTHING, choose_questions
from longvideo.tiny_training.decoder import TINY_FOLDER, take_decoder
from longvideo.tiny_training.models import TINY_MODELS
from longvideo.tiny_training.stages import ALL_KINDS, PICTURES, STAGES
from longvideo.tiny_training.tower import CLIPS, IMAGES, TARGETS, PatchLabels, patch_targets
from longvideo.tiny_training.train import CorpusConversations, stages_of
from tests.tiny_longvu import tiny_longvu_model

GREY = Background("plain", (90, 90, 90), (110, 110, 110))


def test_patches_are_labelled_with_what_they_show() -> None:
    actor = Actor("ring", "blue", 0.2, 0.3, 0.5, 0.0, 3.0, motion=Motion("right", 0.0, 2.0, 0.4))
    scene = Scene(0, "train", 8, 8, GREY, (actor,), Needle("T", 4.0, 5.0))
    labels, centres = patch_targets(scene, [1.0, 2.5, 3.5, 4.5], grid=6)
    assert labels.shape == (4, 36, 4) and centres.shape == (4, 36, 6)
    grid = labels.reshape(4, 6, 6, 4)
    column = {name: place for place, name in enumerate(TARGETS)}
    # At 1 s the middle of the ring is at (0.5, 0.5): patches around it show it, the corner does not.
    shown = 1 + TARGETS["shape"].index("ring")
    assert grid[0, 2, 2, column["shape"]] == shown and grid[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert grid[0, 2, 2, column["colour"]] == 1 + list(COLOURS).index("blue")
    assert grid[0, 2, 2, column["direction"]] == 1 + list(DIRECTIONS).index("right")
    assert grid[1, 3, 4, column["shape"]] == shown and grid[1, 3, 4, column["direction"]] == 0
    assert not grid[2].any()
    assert (grid[3, ..., column["letter"]] == 1 + TARGETS["letter"].index("T")).all() and not grid[3, ..., :3].any()
    here = centres.reshape(4, 6, 6, 6)
    np.testing.assert_allclose(here[0, 2, 2, 2:], [0.5, 0.5, 0.7, 0.5], atol=1e-6)  # rounding of float32
    np.testing.assert_allclose(here[1, 3, 4, :4], [0.5, 0.5, 0.7, 0.5], atol=1e-6)
    assert np.isnan(here[0, 2, 2, :2]).all() and np.isnan(here[1, 3, 4, 4:]).all() and np.isnan(here[3]).all()


def test_lessons_of_a_phase_are_clips_of_their_length() -> None:
    for phase in (IMAGES, CLIPS):
        frames, labels, centres = PatchLabels(phase, size=24, grid=3, first_seed=7)[5]
        assert frames.shape == (phase.num_frames, 24, 24, 3)
        assert labels.shape == (phase.num_frames, 9, 4) and centres.shape == (phase.num_frames, 9, 6)


def test_conversations_are_about_one_kind() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(300):
        questions = all_questions(make_scene(seed))
        chosen = choose_questions(questions, ALL_KINDS, random.Random(seed))
        assert 1 <= len(chosen) <= MAX_TURNS and len(set(chosen)) == len(chosen)
        main = {question.kind for question in chosen} - set(HARMLESS_KINDS)
        assert len(main) <= 1
        spans = [question.bucket.split()[1] for question in chosen if question.kind == "when"]
        assert len(set(spans)) == len(spans)
        kinds.update(question.kind for question in chosen)
    assert min(kinds[kind] for kind in ("colour", "shape", "direction", "order", "at_time", "when", "needle")) >= 30


def test_rows_of_a_batch_have_one_form_and_repeat() -> None:
    stage = next(stage for stage in STAGES if stage.captions > 0 and stage.events > 0)
    data = CorpusConversations(stage, size=24, num_frames=16, first_seed=0)
    forms = set()
    for batch in range(40):
        requests = set()
        for index in range(8 * batch, 8 * batch + 8):
            messages = data[index]["messages"]
            question = messages[0]["content"][1]["text"]
            requests.add(question if question.startswith(("Describe the", "List the")) else "question")
            assert messages[0]["content"][0]["type"] == "video" and messages[1]["role"] == "assistant"
            assert data[index]["messages"][1] == messages[1]
        assert len(requests) == 1
        forms |= requests
    assert len(forms) == 5


def test_a_trained_decoder_meets_the_new_connector_before_it_learns() -> None:
    assert stages_of(TINY_MODELS["videochat_flash"]) == STAGES
    for name in ("longvu", "llava_st"):
        first, second, *_ = stages_of(TINY_MODELS[name])
        assert first.trainable_parts == ("connector",) and "language_model" in second.trainable_parts


def test_pictures_come_before_videos_where_the_recipe_has_them_and_are_described() -> None:
    stages = stages_of(TINY_MODELS["longvu"])
    assert [stage.pictures for stage in stages] == [False, True] + [False] * (len(stages) - 2)
    data = CorpusConversations(PICTURES, size=24, num_frames=16, first_seed=0)
    answers = []
    for index in range(60):
        question, answer = data[index]["messages"]
        assert [block["type"] for block in question["content"]] == ["image", "text"]
        assert question["content"][0]["image"].shape == (24, 24, 3)
        answers.append(answer["content"][0]["text"])
    assert answers.count(NOTHING) < 20 and len(set(answers)) > 25
    assert data[7]["messages"][1]["content"][0]["text"] == answers[7]


def test_decoder_and_shared_embeddings_are_taken_over() -> None:
    model, processor = TINY_MODELS["longvu"].build()
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<unheard>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    own = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<unheard>")].clone()
    source = TINY_FOLDER / TINY_MODELS["longvu"].decoder
    count = take_decoder(model, tokenizer, source)
    theirs = VideoChatFlashForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(source)
    assert len(words) * 0.9 < count <= len(words)
    text = "What colour is the circle ?"
    with torch.no_grad():
        expected, logits = (
            m(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0, -1] for m in (theirs, model)
        )
    ids = [word for word in words.get_vocab() if word in tokenizer.get_vocab()]
    ours, known = tokenizer.convert_tokens_to_ids(ids), words.convert_tokens_to_ids(ids)
    # The same numbers in the same order: nothing to round differently but the width of the head.
    torch.testing.assert_close(logits[ours], expected[known], atol=1e-5, rtol=0)
    assert torch.equal(model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<unheard>")], own)


def test_a_decoder_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch|does not fit"):
        take_decoder(tiny_longvu_model(), train_tokenizer(300), TINY_FOLDER / "videochat_flash")


def test_clips_of_few_frames_come_among_whole_videos_and_every_row_asks_something() -> None:
    (stage,) = (stage for stage in stages_of(TINY_MODELS["longvu"]) if stage.name == "6a-clips")
    data = CorpusConversations(stage, size=24, num_frames=16, first_seed=0)
    lengths = []
    for batch in range(20):
        rows = [data[index]["messages"] for index in range(8 * batch, 8 * batch + 8)]
        numbers = {len(messages[0]["content"][0]["video"]) for messages in rows}
        assert len(numbers) == 1 and all(len(messages) >= 2 for messages in rows)
        lengths += numbers
    assert set(lengths) == {4, 16} and 6 <= lengths.count(4) <= 18
