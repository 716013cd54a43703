"""Losses of thirty steps of every architecture against a record, and of one batch against its rows one by one.

To renew the record after a wanted change of numerics: LONGVIDEO_RENEW=1 python -m pytest tests/trainers -k trajectory
"""

import json
import os
import platform
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.tiny_llava_st import tiny_llava_st_model
from tests.tiny_llava_st_processor import tiny_llava_st_processor
from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.trainers.sft_runs import losses, short_run
from tests.trainers.toy_rows import COLOURS, colour_row, toy_rows

TRAJECTORY = Path(__file__).parent / "loss_trajectory.json"
NUM_STEPS = 30
DROPOUT = {
    "mm_llm_compress": True,
    "llm_compress_type": "uniform",
    "llm_compress_layer_list": [1, 3],
    "llm_image_token_ratio_list": [1.0, 0.5, 0.25],
}
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "videochat_flash": (tiny_videochat_flash_model, tiny_videochat_flash_processor, {}),
    "videochat_flash_dropout": (tiny_videochat_flash_model, tiny_videochat_flash_processor, DROPOUT),
    "longvu": (tiny_longvu_model, tiny_longvu_processor, {}),
    "llava_st": (tiny_llava_st_model, tiny_llava_st_processor, {}),
    "crosslmm": (tiny_crosslmm_model, tiny_crosslmm_processor, {}),
    # The base, whose projector and decoder learn as one model; its adapters learn in stages of their own.
    "crossvllm": (tiny_crossvllm_model, tiny_crossvllm_processor, {"adapters": False}),
}


def environment() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def with_named_weights(model: Any) -> Any:
    """Random weights that depend on the names of parameters alone: versions of transformers begin with others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases, norms and closed gates begin with one value everywhere.
            if parameter.numel() > 1 and not (parameter == parameter.flatten()[0]).all():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_loss_trajectory_of_30_steps(tmp_path, name):
    make_model, make_processor, settings = RUNS[name]
    args = {"max_steps": NUM_STEPS, "learning_rate": 2e-3}
    model = with_named_weights(make_model(**settings))
    trainer = short_run(tmp_path, model, make_processor(), toy_rows(8), **args)
    trainer.train()
    curve = losses(trainer)
    record = json.loads(TRAJECTORY.read_text(encoding="utf-8")) if TRAJECTORY.is_file() else {"runs": {}}
    if os.environ.get("LONGVIDEO_RENEW"):
        record["runs"][name] = {"environment": environment(), "losses": [round(value, 5) for value in curve]}
        TRAJECTORY.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    expected = record["runs"][name]["losses"]
    assert len(curve) == len(expected) == NUM_STEPS
    drift = [abs(now - then) / then for now, then in zip(curve, expected, strict=True)]
    made_with = record["runs"][name]["environment"]
    # Adam turns rounding of near-zero gradients, which differs between CPUs, into steps of full size.
    assert max(drift) < 0.02 and sum(drift) / NUM_STEPS < 0.005, f"{max(drift)=:.4f}, recorded with {made_with}"
    # From guessing (log of the vocabulary) to less; small random weights learn slowly at this rate.
    assert sum(curve[-4:]) < 0.75 * sum(curve[:4])


@pytest.mark.parametrize("name", RUNS)
def test_batch_of_4_equals_4_accumulated_rows(tmp_path, name):
    """Three steps: the second and third losses show that the first update was the same."""
    make_model, make_processor, settings = RUNS[name]
    rows = [
        colour_row(colour, num_frames=4 + 4 * (i % 2), answer=colour * (1 + i)) for i, colour in enumerate(COLOURS)
    ]
    curves = []
    for size in (4, 1):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        trainer = short_run(
            tmp_path, make_model(**settings), make_processor(), rows, max_steps=3, learning_rate=1e-2, **args
        )
        trainer.train()
        curves.append(losses(trainer))
    # The same float32 sums in another order; without Adam no rounding becomes a step of full size.
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][2] < curves[0][0]
