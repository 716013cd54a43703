"""Logits of supervised positions alone: the same loss and gradients, fewer rows through the head."""

from typing import Any

import pytest
import torch

from longvideo.trainers import IGNORE_INDEX, lora_config
from longvideo.trainers.head_in_loss import supervised_logits, without_logits
from tests.trainers.sft_runs import assert_same_gradients, gradients, losses, short_run
from tests.trainers.zoo import VARIANTS, make_batch, make_model, rows_of

WITH_OWN_LOSS = ("llava_st", "llava_st-split", "llava_st-tied")


def rows_through(head: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions whose logits are made with the weight of a head, call by call."""
    found: list[int] = []
    real = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight is head.weight:
            found.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_all_logits(name, monkeypatch) -> None:
    batch = make_batch(name, num_rows=3)
    expected = make_model(name).train()(**batch, use_cache=False)
    plain = gradients(make_model(name).train(), [batch])
    model = make_model(name).train()
    rows = rows_through(model.get_output_embeddings(), monkeypatch)
    with supervised_logits(model) as are_left_out:
        outputs = model(**batch, use_cache=False)
    assert are_left_out == (name not in WITH_OWN_LOSS)
    # The same sums in float32 in another order.
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
    if are_left_out:
        assert rows == [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())]
        left = without_logits(outputs)
        assert type(left) is type(outputs) and "logits" not in left and left.loss is outputs.loss
    with supervised_logits(model):
        assert_same_gradients(plain, gradients(model, [batch]))
    # Everything is as before behind it.
    after = model(**batch, use_cache=False)
    assert after.logits.shape == expected.logits.shape and "forward" not in vars(model.get_output_embeddings())


def test_evaluation_and_wrapped_heads_keep_all_logits() -> None:
    peft = pytest.importorskip("peft")
    model = make_model("videochat_flash")
    for wish in (
        supervised_logits(model.eval()),
        supervised_logits(model.train(), wanted=False),
        supervised_logits(
            peft.get_peft_model(model, lora_config(model, r=2, new_tokens=[7])).train().get_base_model()
        ),
    ):
        with wish as are_left_out:
            assert are_left_out is False
    with torch.no_grad(), supervised_logits(make_model("longvu").train()) as are_left_out:
        assert are_left_out is False


@pytest.mark.parametrize("name", ["videochat_flash-dropout", "longvu"])
def test_a_run_is_the_same_with_and_without(name, monkeypatch, tmp_path) -> None:
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}

    def run(only: bool) -> tuple[list[float], list[int], Any]:
        with pytest.MonkeyPatch.context() as patch:
            model = make_model(name)
            rows = rows_through(model.get_output_embeddings(), patch)
            trainer = short_run(
                tmp_path,
                model,
                VARIANTS[name].processor(),
                rows_of(name),
                learning_rate=1e-3,
                supervised_logits_only=only,
                **settings,
            )
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
            batch = trainer.data_collator([trainer.train_dataset[0]])
            model.train()
            returned = trainer.compute_loss(model, dict(batch), return_outputs=True)[1]
            assert ("logits" in returned) is not only
        return [*losses(trainer), evaluated], rows, trainer

    (all_losses, all_rows, _), (few_losses, few_rows, _) = run(False), run(True)
    # Two sums of float32 and two steps of Adam.
    assert few_losses == pytest.approx(all_losses, rel=1e-4)
    assert sum(few_rows[:4]) < 0.5 * sum(all_rows[:4]) and few_rows[4:-1] == all_rows[4:-1]
