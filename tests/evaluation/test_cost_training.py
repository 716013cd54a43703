"""What training takes, counted beforehand: groups, tokens, and memory against what a backward pass really keeps."""

import pytest
import torch

from longvideo.evaluation import cost_training as cost
from longvideo.trainers import VideoSFTCollator, set_trainable_parts
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.toy_rows import colour_row

RATES = {"language_model": 1e-5, "connector": 1e-4, "vision_tower": 2e-6}


def saved_bytes(model: torch.nn.Module, batch: dict) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, each storage once, weights left out."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return sum(kept.values())


def test_groups_are_those_of_the_trainer():
    model = tiny_videochat_flash_model()
    set_trainable_parts(model, ["connector"])
    groups = {group.name: group for group in cost.parameter_groups(model, RATES)}
    assert list(groups) == ["vision_tower", "connector", "language_model"]
    assert groups["connector"].trainable == groups["connector"].total > 0
    assert groups["vision_tower"].trainable == groups["language_model"].trainable == 0
    assert sum(group.total for group in groups.values()) == sum(p.numel() for p in model.parameters())
    text = dict(cost.describe_groups(list(groups.values())))
    assert text["  connector"].endswith("rate 0.0001") and text["  vision_tower"].endswith("frozen")
    apart = {group.name for group in cost.parameter_groups(model, {**RATES, "embeddings": 1e-6})}
    assert apart == {*groups, "embeddings"}


def test_tokens_are_those_that_the_decoder_reads():
    row = colour_row("red", num_frames=8)
    batch = VideoSFTCollator(tiny_videochat_flash_processor())([row])
    counts = cost.count_row(batch, tiny_videochat_flash_model().config)
    assert counts.tokens == batch["input_ids"].shape[1] and counts.frames == 8 and counts.visual == 8 * 4
    assert counts.supervised == int((batch["labels"] >= 0).sum())
    # One placeholder stands for as many tokens as the model will put there.
    model, batch = tiny_longvu_model(), VideoSFTCollator(tiny_longvu_processor())([row])
    counts = cost.count_row(batch, model.config)
    read = int(model(**batch, use_cache=False).attention_mask.sum())
    # At most so many: what the model drops is decided by the video.
    assert counts.visual > 8 and read <= counts.tokens


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [["connector", "language_model"], ["vision_tower", "connector", "language_model"]])
def test_activations_are_about_what_is_kept(checkpointing, parts):
    model = tiny_videochat_flash_model(text_kwargs={"hidden_size": 64, "intermediate_size": 192}).train()
    set_trainable_parts(model, parts)
    batch = VideoSFTCollator(tiny_videochat_flash_processor())([colour_row("red", num_frames=8)])
    row = cost.count_row(batch, model.config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = saved_bytes(model, batch)
    memory = cost.memory_of_training(model, model.config, row, rows=1, value=4, checkpointing=checkpointing)
    # The estimate leaves out small tensors, so that it is taken to be right within a factor of 2.5; with checkpointing
    # it has a layer of decoder and tower besides, which is computed again in the backward pass.
    assert memory["activations"] > kept / 2.5
    if checkpointing:
        assert memory["activations"] < cost.activation_bytes(
            model, model.config, row, rows=1, value=4, checkpointing=False
        )
    else:
        assert memory["activations"] < kept * 2.5
    learning = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (memory["gradients"], memory["optimizer"]) == (learning, 2 * learning)
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")


def test_memory_for_people():
    memory = {
        "weights": 2 * 10**9,
        "gradients": 10**9,
        "optimizer": 2 * 10**9,
        "activations": 10**9,
        "total": 6 * 10**9,
    }
    rows = cost.describe_memory(memory, device_bytes=8 * 10**9)
    assert rows[0][1].startswith("6.00 GB of 8.00 GB that the device has")
    assert [name for name, _ in rows[1:]] == ["  weights", "  gradients", "  optimizer", "  activations"]
