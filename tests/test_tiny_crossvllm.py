"""The tiny CrossVLLM: its parts, its lessons, and all stages at the smallest size with the table made of them."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText

from longvideo.evaluation.corpus.long_scenes import (
    LONG_FPS,
    LongDifficulty,
    long_items,
    long_questions,
    make_long_scene,
    render_long,
)
from longvideo.evaluation.corpus.scenes import COLOURS, SHAPES
from longvideo.evaluation.granularity_table import ROWS
from longvideo.evaluation.granularity_table import main as table
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.processing.crossvllm import policies
from longvideo.tiny_training import build_parts, crossvllm_rows, train_crossvllm
from longvideo.tiny_training.build_crossvllm import (
    NOT_SEEN,
    begin_as_answers,
    build_crossvllm,
    order_times,
    prompt_phrases,
    take_projectors,
    take_tower,
)
from longvideo.tiny_training.crossvllm_rows import (
    CrossLessons,
    LessonCollator,
    LongQuestions,
    SceneEncoder,
    frame_indices,
    make_lesson,
    wrong_segment,
)
from longvideo.tiny_training.decoder import TINY_FOLDER, take_decoder
from longvideo.trainers.cross_granularity_modules import ModuleTexts, SeenVideos
from longvideo.trainers.cross_granularity_rows import as_question

SOURCE = TINY_FOLDER / "videochat_flash"


@pytest.fixture(scope="module", autouse=True)
def small_tokenizer():
    """From few scenes: training it takes longer than all else that a model is made of."""
    patch = pytest.MonkeyPatch()
    patch.setattr(build_parts, "NUM_TOKENIZER_SCENES", 60)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    model, processor = build_crossvllm()
    return model.eval(), processor


def test_it_fits_in_eight_megabytes_with_both_adapters(built) -> None:
    model, _ = built
    config = model.config
    assert config.tokens_per_frame("coarse") == 1 and config.tokens_per_frame("fine") == 9
    adapters = 2 * sum(
        config.lora_r * (x.weight.shape[0] + x.weight.shape[1])
        for x in model.model.language_model.modules()
        if isinstance(x, torch.nn.Linear)
    )
    # Two bytes each; the projectors are written twice.
    assert 2 * (sum(x.numel() for x in model.parameters()) + adapters) < 7.7e6


def test_what_never_varies_in_prompts_is_one_token(built) -> None:
    tokenizer = built[1].tokenizer
    assert all(len(tokenizer(phrase)["input_ids"]) == 1 for phrase in prompt_phrases())
    question = "What colour is the ring ?"
    rejected = [policies.Rejected((10.0, 25.0), NOT_SEEN)]
    texts = [
        policies.coarse_prompt(question, 240, grounding_only=True),
        policies.coarse_prompt(question, 240, rejected=rejected),
        policies.fine_prompt(question),
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) < 45
    policy = f" {policies.policy_text(115, 130)}"
    assert len(tokenizer(policy)["input_ids"]) == 5 and tokenizer.decode(tokenizer(policy)["input_ids"]) == policy


def test_it_begins_with_a_trained_decoder_and_tower(built) -> None:
    model, processor = built
    state = {name: x.clone() for name, x in model.state_dict().items()}
    theirs = VideoChatFlashForConditionalGeneration.from_pretrained(SOURCE, dtype=torch.float32)
    take_decoder(model, processor.tokenizer, SOURCE)
    order_times(model, processor.tokenizer)
    layer = model.model.language_model.layers[2].mlp.up_proj.weight
    assert torch.equal(layer, theirs.model.language_model.layers[2].mlp.up_proj.weight)
    take_tower(model, SOURCE)
    tower, source = model.model.vision_tower, theirs.model.vision_tower
    pixels = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = source.vision_layernorm(tower(pixels).last_hidden_state[:, 1:])
        wanted = source(pixels[:, None]).last_hidden_state
    # The same blocks behind another norm and beside a class token: alike, not equal.
    likeness = torch.cosine_similarity(ours - ours.mean((0, 1)), wanted - wanted.mean((0, 1)), dim=-1)
    assert likeness.mean() > 0.5
    model.load_state_dict(state)


def test_projectors_begin_as_the_connector_that_the_decoder_knows(built) -> None:
    model, _ = built
    theirs = VideoChatFlashForConditionalGeneration.from_pretrained(SOURCE, dtype=torch.float32)
    patches = torch.rand(3, 36, 128, generator=torch.Generator().manual_seed(0))
    fresh = model.model.projectors["coarse"](patches)
    take_projectors(model, SOURCE)
    for projector in model.model.projectors.values():
        torch.testing.assert_close(projector(patches), theirs.model.multi_modal_projector(patches))
    assert not torch.allclose(fresh, model.model.projectors["coarse"](patches))


def test_times_that_are_near_have_embeddings_that_are_near(built) -> None:
    model, processor = built
    order_times(model, processor.tokenizer)
    ids = processor.tokenizer.convert_tokens_to_ids([str(seconds) for seconds in (100, 105, 150)])
    near, far = (
        torch.cosine_similarity(model.get_input_embeddings().weight[ids[0]], other, dim=0)
        for other in model.get_input_embeddings().weight[ids[1:]]
    )
    assert near > 0.5 > far


@pytest.mark.parametrize("form", crossvllm_rows.FORMS)
def test_lessons_ask_what_their_answers_fit(form: str) -> None:
    for seed in range(30):
        scene = make_long_scene(seed, difficulty=LongDifficulty(letter=1.0))
        lesson = make_lesson(scene, form, random.Random(seed))
        events = {found.segment for found in long_questions(scene)}
        assert lesson.turns and lesson.granularity == (
            "fine" if form in ("plain_fine", "cut", "missed", "judge") else "coarse"
        )
        if form.startswith("policy"):
            asked = [text.split("Question: ")[-1] for text, _ in lesson.turns]
            assert form != "policy_letter" or [" letter " in text for text in asked] == [True]
            assert form != "policy_named" or {*asked} <= {*SHAPES, *COLOURS, "letter"}
            for _, answer in lesson.turns:
                policy = policies.parse_coarse(answer)
                assert (policy.t_start, policy.t_end) in events and policy.state == "json"
        if form == "missed":
            ((question, answer),) = lesson.turns
            (asked,) = (
                x for x in long_questions(scene) if (x.question.question, x.question.answer) == (question, answer)
            )
            assert lesson.segment[1] <= asked.segment[0] or lesson.segment[0] >= asked.segment[1]
        if form == "judge":
            judged = policies.parse_fine(lesson.turns[0][1])
            truth = {x.segment for x in long_questions(scene) if x.question.question in lesson.turns[0][0]}
            seen = any(min(end, lesson.segment[1]) > max(start, lesson.segment[0]) for start, end in truth)
            assert seen == (judged.reflection == "")


def test_segments_that_were_sent_back_are_wrong_and_at_most_as_many_as_the_controller_gives() -> None:
    numbers = set()
    for seed in range(1500):
        scene = make_long_scene(seed)
        for text, answer in make_lesson(scene, "policy", random.Random(seed)).turns:
            policy = policies.parse_coarse(answer)
            sent_back = [tuple(map(float, found)) for found in re.findall(r"(\d+\.0) to (\d+\.0) is not", text)]
            assert all(end <= policy.t_start or start >= policy.t_end for start, end in sent_back)
            assert policies.DIFFERS in text or not sent_back
            numbers.add(len(sent_back))
    assert numbers == {0, 1, 2, 3}


def test_policies_begin_to_look_where_plain_answers_do(built) -> None:
    model, processor = built
    table, tokenizer = model.get_input_embeddings().weight, processor.tokenizer
    plain, policy = (tokenizer.convert_tokens_to_ids(phrase) for phrase in (" ASSISTANT:", ' {"t_start": '))
    before = table.detach().clone()
    assert not torch.equal(before[plain], before[policy])
    begin_as_answers(model, tokenizer)
    changed = (table != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [policy] and torch.equal(table[policy], before[plain])


def test_wrong_segments_show_nothing_of_the_event() -> None:
    scene, rng = make_long_scene(4), random.Random(0)
    truth = long_questions(scene)[0].segment
    for _ in range(100):
        start, end = wrong_segment(scene, truth, rng)
        assert 0 <= start < end <= scene.duration and (end <= truth[0] or start >= truth[1])


def test_features_and_prompts_are_those_that_the_trainer_sees(built) -> None:
    model, processor = built
    scene, found = long_items(1)[0]
    row = as_question(
        {
            "video": render_long(scene, 48),
            "video_metadata": {"fps": LONG_FPS},
            "question": found.question.question,
            "answer": found.question.answer,
        }
    )
    wishes = {name: {"granularity": name, "training": True} for name in ("coarse", "fine")}
    seen, encoder = SeenVideos(processor, wishes), SceneEncoder(model, processor)
    for granularity, segment in (("coarse", None), ("fine", found.segment), ("fine", (0.0, 10.0))):
        wanted = seen.look(model, row, granularity, segment)
        ours = encoder([(scene, frame_indices(scene, granularity, segment))])[0]
        # The same pixels by way of the processor; float32.
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    lesson = crossvllm_rows.Lesson(scene, "fine", found.segment, ((row.question, row.answers[0]),))
    batch = LessonCollator(model, processor)([lesson])
    texts = ModuleTexts(processor, wishes)
    ids, begin = texts.answered(row, texts.prompt(row, "fine", 8, scene.duration), row.answers[0])
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == [-100] * begin + ids[begin:]


def test_turns_are_spelled_as_the_template_has_them(built) -> None:
    model, processor = built
    lesson = make_lesson(make_long_scene(1), "policy", random.Random(1))
    batch = LessonCollator(model, processor)([lesson])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    told = []
    for text, answer in lesson.turns:
        told += [{"role": "user", "content": [{"type": "text", "text": text}]}]
        told += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    told[0]["content"].insert(0, {"type": "video", "video": "-"})
    text = processor.apply_chat_template(told, tokenize=False)
    token = processor.video_token
    assert processor.tokenizer.decode(ids) == text.replace(token, token * 60).rstrip()
    answered = processor.tokenizer.decode(ids[labels != -100])
    assert answered == "".join(f" {answer}{processor.tokenizer.eos_token}" for _, answer in lesson.turns)


def test_rows_of_a_batch_have_one_form_and_stay_the_same() -> None:
    lessons = CrossLessons(train_crossvllm.STAGES[1], first_seed=0)
    for begin in range(0, 64, crossvllm_rows.BATCH_SIZE):
        assert len({lessons[begin + place].granularity for place in range(4)}) == 1
    assert lessons[5] == lessons[5] and len(lessons) == train_crossvllm.STAGES[1].num_steps * crossvllm_rows.BATCH_SIZE


def test_a_question_gives_the_same_video_twice() -> None:
    rows = LongQuestions(3, first_seed=0, size=16, kept=2)
    first = rows[0]
    assert rows[0] is first and rows[1] is not first and rows[2]["segment"][0] < rows[2]["segment"][1]
    # A third one makes room.
    assert rows[0] is not first


def precisions_of(monkeypatch) -> set[torch.dtype]:
    """Types in which answers are computed where gradients flow, in the stages of both trainers."""
    computed: set[torch.dtype] = set()
    real = CrossVLLMForConditionalGeneration.forward

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.training:
            assert {p.dtype for p in self.parameters()} == {torch.float32}
            # The head's product is made wide again on the way out.
            computed.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return output

    monkeypatch.setattr(CrossVLLMForConditionalGeneration, "forward", forward)
    return computed


@pytest.mark.parametrize("bf16", [False, True])
def test_all_stages_and_the_table_at_the_smallest_size(tmp_path, monkeypatch, capsys, bf16) -> None:
    monkeypatch.setattr(crossvllm_rows, "BATCH_SIZE", 2)
    monkeypatch.setattr(train_crossvllm, "BATCH_SIZE", 2)
    monkeypatch.setattr(train_crossvllm, "RL_QUESTIONS", 1)
    out = tmp_path / "run"
    # Given up before the last stage, then continued.
    real = train_crossvllm.run_both
    monkeypatch.setattr(train_crossvllm, "run_both", lambda *args, **kwargs: False)
    assert train_crossvllm.train(out, minutes=60, scale=1e-4, num_checks=0) is None
    monkeypatch.setattr(train_crossvllm, "run_both", real)
    computed = precisions_of(monkeypatch)
    folder = train_crossvllm.train(out, minutes=60, scale=1e-4, num_checks=4, bf16=bf16)
    # Weights and the policies that are written stay in float32; what learns is computed in the asked precision.
    assert computed == {torch.bfloat16 if bf16 else torch.float32}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    checked = [line for line in log if line["stage"] == "check after 5-both"]
    assert len(checked) == 1 and {"miou", "right_found", "right_true_colour"} <= checked[0].keys()
    names = [stage.name for stage in train_crossvllm.STAGES]
    assert all((out / name / "done").exists() for name in (*names, train_crossvllm.RL_NAME))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8e6
    assert AutoModelForImageTextToText.from_pretrained(folder).has_adapters
    result = tmp_path / "table.json"
    capsys.readouterr()
    assert table(["--run", str(out), "--num", "2", "--seeds", "0", "--max-rounds", "1", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    values = json.loads(result.read_text())
    assert list(values["summary"]) == list(ROWS) and all(row in printed for row in ROWS)
    assert list(values["trade_off"]) == ["stride 6, 60 frames", "stride 3, 15 frames", "stride 2, 6 frames"]
    assert values["difference"]["num"] == 2 and len(values["answers"]) == 2 * (len(ROWS) + 3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_scale_must_be_positive(tmp_path, capsys) -> None:
    assert train_crossvllm.main(["--out", str(tmp_path), "--scale", "0"]) == 2
    assert "expected a positive factor" in capsys.readouterr().err
