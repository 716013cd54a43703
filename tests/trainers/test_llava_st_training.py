"""`VideoSFTTrainer` on a model whose answers hold coordinates: values in the batch, parts, adapters, recipe."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.trainers import (
    IGNORE_INDEX,
    VideoSFTCollator,
    VideoSFTConfig,
    VideoSFTTrainer,
    load_recipe,
    part_of,
    set_trainable_parts,
)
from longvideo.trainers.sft_config import sub_part_of
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.trainers.sft_runs import (
    assert_batch_equals_rows,
    changed_names,
    image_row,
    losses,
    short_run,
    snapshot,
)

LEARNS = ["connector", "language_model"]
MakeTrainer = Callable[..., VideoSFTTrainer]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_llava_st_processor()


@pytest.fixture
def make_trainer(tmp_path, processor) -> MakeTrainer:
    def make(rows: list[dict[str, Any]], *, model: Any = None, **args: Any) -> VideoSFTTrainer:
        model = tiny_llava_st_model() if model is None else model
        return short_run(tmp_path, model, processor, rows, **{"trainable_parts": LEARNS, **args})

    return make


def video_row(question: str = "When?", answer: str = "During {<t0.25><t0.8>}.", *, shade: int = 0) -> dict[str, Any]:
    frames = np.random.default_rng(shade).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    block = {"type": "video", "video": frames, "timestamps": [float(i) for i in range(6)]}
    user = [block, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def text_row() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def mixed_rows() -> list[dict[str, Any]]:
    """Two videos, one with coordinates in question and answer, an image, and text alone."""
    tube = video_row("In {<t0>,<t1>}?", "<t0.4>:[<w0><h0><w0.3><h1>] <t0.6>:[<w0.1><h0><w0.3><h1>]", shade=1)
    return [video_row(), tube, image_row("Where?", "[<w0.1><h0.2><w0.5><h0.9>]"), text_row()]


@pytest.mark.parametrize("layout", ["folded", "split"])
def test_every_parameter_has_a_part(layout):
    model = tiny_llava_st_model(coordinate_layout=layout)
    named = [name for name, _ in model.named_parameters()]
    parts = {name.split(".")[1]: part_of(name) for name in named if name.startswith("model.")}
    wanted = {"vision_tower": "vision_tower", "multi_modal_projector": "connector", "packer": "connector"}
    wanted |= {"language_model": "language_model"} | ({"coordinates": "language_model"} if layout == "split" else {})
    assert parts == wanted and all(part_of(name) for name in named)
    subs = {sub_part_of(name): name.split(".")[1:3] for name in named if sub_part_of(name)}
    assert set(subs) == {"packer", "embeddings"}
    set_trainable_parts(model, ["packer", "embeddings"])
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {
        name for name in named if ".packer." in name or "embed_tokens" in name or ".coordinates." in name
    }


def test_batches_hold_values_beside_their_templates(processor):
    batch = VideoSFTCollator(processor)(mixed_rows())
    assert batch["pixel_values_videos"].shape == (2, 6, 3, 32, 32) and "video_num_frames" not in batch
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    values, ids = batch["coordinate_values"], batch["input_ids"]
    assert values.shape == ids.shape == batch["labels"].shape and values.dtype == torch.float32
    tokens = {axis: processor.tokenizer.convert_tokens_to_ids(f"<{axis}-OUTPUT>") for axis in ("TEMP", "WIDTH")}
    asked = processor.tokenizer.convert_tokens_to_ids("<TEMP-INPUT>")
    assert values[0][ids[0] == tokens["TEMP"]].tolist() == pytest.approx([0.25, 0.8])
    assert values[1][ids[1] == asked].tolist() == [0.0, 1.0]
    assert values[1][ids[1] == tokens["WIDTH"]].tolist() == pytest.approx([0.0, 0.3, 0.1, 0.3])
    assert values[2][ids[2] == tokens["WIDTH"]].tolist() == pytest.approx([0.1, 0.5])
    assert not values[3].any() and not values[batch["attention_mask"] == 0].any()
    # Templates of answers are labels, those of questions are not.
    labels = batch["labels"]
    assert (labels == tokens["TEMP"]).sum(1).tolist() == [2, 2, 0, 0] and not (labels == asked).any()


def test_no_token_of_a_visual_block_is_taught(processor):
    batch = VideoSFTCollator(processor, mask="all")(mixed_rows())
    visual = torch.isin(batch["input_ids"], torch.tensor(processor.image_token_ids + processor.video_token_ids))
    # 6 fast and 8 slow positions of a video, 16 of an image, start and end among them.
    assert visual.sum(1).tolist() == [14, 14, 16, 0]
    ignored = batch["labels"] == IGNORE_INDEX
    first = torch.zeros_like(ignored)
    first[:, 0] = True
    assert torch.equal(ignored, visual | first | (batch["attention_mask"] == 0))


def test_label_rule_of_the_original(processor):
    """Whole assistant turns with their header, and line breaks and marks of turns wherever they stand."""
    rows = mixed_rows()[:1]
    ours = VideoSFTCollator(processor, label_rule="llava_st")(rows)
    ids, labels = ours["input_ids"][0], ours["labels"][0]
    decode = processor.tokenizer.decode
    text = decode(ids[labels != IGNORE_INDEX])
    assert text.endswith("<|im_start|>assistant\nDuring {<TEMP-OUTPUT><TEMP-OUTPUT>}.<|im_end|>\n")
    # System and user turn give line breaks and marks; the very first token has nothing before it to predict it.
    assert text.startswith("\n<|im_end|>\n<|im_start|>\n\n<|im_end|>\n<|im_start|>assistant")
    assert torch.equal(ours["labels"], VideoSFTCollator(processor, label_rule="videochat_flash")(rows)["labels"])


def test_text_rows_may_see_a_black_image(processor):
    batch = VideoSFTCollator(processor, blank_image_position=5)([text_row()])
    image = torch.isin(batch["input_ids"][0], torch.tensor(processor.image_token_ids))
    assert image.nonzero().flatten().tolist() == list(range(5, 21))
    assert batch["coordinate_values"].shape == batch["input_ids"].shape
    assert tiny_llava_st_model()(**batch).loss.isfinite()


def test_loss_falls_and_the_tower_stays(make_trainer):
    model = tiny_llava_st_model()
    before = snapshot(model)
    trainer = make_trainer(mixed_rows()[:2], model=model, max_steps=6, learning_rate=5e-3)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < 0.8 * curve[0]
    assert {part_of(name) for name in changed_names(model, before)} == set(LEARNS)


def test_batch_of_4_equals_4_rows_alone(processor):
    """Videos, image and text in one batch, padded on the right, give the gradients that they give alone."""
    assert_batch_equals_rows(tiny_llava_st_model(), processor, mixed_rows(), LEARNS)


def test_first_stage_teaches_packers_and_embedding(make_trainer):
    model = tiny_llava_st_model()
    before = snapshot(model)
    args = {"trainable_parts": ["packer", "embeddings"], "learning_rate": 1e-3, "embeddings_learning_rate": 1e-4}
    trainer = make_trainer(mixed_rows()[:2], model=model, **args)
    trainer.train()
    assert {sub_part_of(name) for name in changed_names(model, before)} == {"packer", "embeddings"}
    entry = next(entry for entry in trainer.state.log_history if "learning_rate_embeddings" in entry)
    assert set(entry) >= {"learning_rate_connector", "learning_rate_embeddings"}


def test_rates_of_parts(make_trainer):
    model = tiny_llava_st_model(coordinate_layout="split")
    rates = {"learning_rate": 2e-4, "connector_learning_rate": 2e-5, "embeddings_learning_rate": 3e-5}
    trainer = make_trainer(mixed_rows()[:1], model=model, **rates)
    found: dict[str, set[float]] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            found.setdefault(sub_part_of(name) or part_of(name), set()).add(group["lr"])
    assert found == {"language_model": {2e-4}, "connector": {2e-5}, "packer": {2e-5}, "embeddings": {3e-5}}
    plain = make_trainer(mixed_rows()[:1], learning_rate=2e-4)
    assert {group["part"] for group in plain.create_optimizer().param_groups} == set(LEARNS)


def test_unknown_sub_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must name one or more of .*'embeddings', 'packer'"):
        VideoSFTConfig(output_dir=str(tmp_path), trainable_parts=["tables"])
    with pytest.raises(ValueError, match="embeddings_learning_rate=0 must be positive"):
        VideoSFTConfig(output_dir=str(tmp_path), embeddings_learning_rate=0)


def test_adapter_of_the_recipe_learns(make_trainer):
    peft = pytest.importorskip("peft")
    entry = load_recipe("llava_st")["stages"]["stage2_coordinates"]
    settings = peft.LoraConfig(**{**entry["lora"], "r": 2, "lora_alpha": 4})
    model = peft.get_peft_model(tiny_llava_st_model(coordinate_layout=entry["model"]["coordinate_layout"]), settings)
    before = snapshot(model)
    rates = {name: value for name, value in entry["args"].items() if name.endswith("learning_rate")}
    parts = entry["args"]["trainable_parts"]
    trainer = make_trainer(mixed_rows()[:2], model=model, trainable_parts=parts, max_steps=2, **rates)
    trainer.train()
    changed = changed_names(model, before)
    kinds = {"lora" if "lora_" in name else sub_part_of(name) for name in changed}
    assert kinds == {"lora", "packer", "embeddings"} and not any("original_module" in name for name in changed)
    assert any(".coordinates." in name for name in changed)


@pytest.mark.parametrize(
    ("stage", "parts", "rate", "batch"),
    [
        (1, ["packer", "embeddings"], 1e-4, 384),
        (2, ["language_model", "connector"], 2e-4, 192),
        (3, ["language_model", "connector"], 2e-4, 192),
    ],
)
def test_recipe_of_the_paper(tmp_path, stage, parts, rate, batch):
    args = VideoSFTConfig.from_recipe("llava_st", stage, output_dir=str(tmp_path), bf16=False)
    assert (args.trainable_parts, args.learning_rate, args.max_length) == (parts, rate, 32768)
    entry = list(load_recipe("llava_st")["stages"].values())[stage - 1]
    per_gpu = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert entry["gpus"] * per_gpu == entry["global_batch_size"] == batch
    assert args.label_rule == "llava_st" and args.weight_decay == 0
    if stage > 1:
        assert args.part_learning_rates["embeddings"] == args.part_learning_rates["connector"] == 2e-5
        assert (entry["lora"]["r"], entry["lora"]["lora_alpha"]) == (128, 256)
        text = {"model_type": "qwen2", "vocab_size": 151660}
        assert LlavaSTConfig(**entry["model"], text_config=text).coordinate_layout == "split"
