"""What the tests of cross-granularity training share: questions about decoded clips, short runs, scripted policies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from longvideo.trainers import CrossGranularityConfig, CrossGranularityTrainer, cross_granularity_trainer
from tests.tiny import tiny_tokenizer
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor

SECONDS = 24
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}


def question_row(number: int) -> dict[str, Any]:
    """A question about a clip of 24 s, one frame a second, that is coloured for six of them."""
    name = list(COLOURS)[number % len(COLOURS)]
    begin = 6 * (number % 3) + 2
    frames = np.full((SECONDS, 48, 48, 3), 20 + number, dtype=np.uint8)
    frames[begin : begin + 6] = COLOURS[name]
    return {
        "id": f"clip-{number}",
        "video": frames,
        "video_metadata": {"fps": 1.0},
        "question": "Which colour?",
        "answer": name,
        "segment": [float(begin), float(begin + 6)],
    }


def model_and_processor(**kwargs: Any) -> tuple[Any, Any]:
    """A tiny random CrossVLLM with adapters and its processor; prompts of training have about 800 tokens."""
    text = {"max_position_embeddings": 2048, **kwargs.pop("text_kwargs", {})}
    model = tiny_crossvllm_model(text_kwargs=text, **kwargs)
    return model, tiny_crossvllm_processor(tokenizer=tiny_tokenizer())


def short_run(folder: Path, model: Any, processor: Any, rows: list[dict[str, Any]] | None = None, **args: Any) -> Any:
    """A trainer of one pair of steps over two rows on the CPU."""
    rows = [question_row(i) for i in range(4)] if rows is None else rows
    settings = {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_policy_tokens": 4,
        "max_answer_tokens": 4,
        "num_policies": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
    }
    return CrossGranularityTrainer(
        model,
        CrossGranularityConfig(**{**settings, **args}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=processor,
    )


@contextmanager
def scripted(policies: Callable[[Any, str], list[str]], tokenizer: Any) -> Iterator[list[Any]]:
    """Lets the coarse module write given texts; yields the calls.

    Args:
        policies: gives the texts of a call from its number of samples (None: most likely text) and its prompt.
        tokenizer: of the processor.
    """
    original, calls = cross_granularity_trainer.generate, []

    def write(model: Any, prompt_ids: Any, features: Any, **settings: Any) -> list[list[int]]:
        if settings["granularity"] != "coarse":
            return original(model, prompt_ids, features, **settings)
        calls.append((settings["num_samples"], len(prompt_ids), model.granularity))
        texts = policies(settings["num_samples"], tokenizer.decode(prompt_ids))
        return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]

    with mock.patch.object(cross_granularity_trainer, "generate", write):
        yield calls


def losses_of(trainer: Any, key: str) -> list[float]:
    """Logged values of a key, in the order of the steps."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
