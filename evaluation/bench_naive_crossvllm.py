"""The modules of CrossVLLM as one would write them first: every call decodes, encodes and reads everything again.

The benchmark measures the package's modules against these; a test compares what they write.
"""

from collections.abc import Sequence
from typing import Any


class NaiveModule:
    """Asks a CrossVLLM in one granularity and keeps nothing.

    Args:
        pipe: Its video question answering pipeline.
        granularity: "coarse" or "fine".
        **settings: Of `generate`.
    """

    def __init__(self, pipe: Any, granularity: str, **settings: Any) -> None:
        self.pipe, self.granularity = pipe, granularity
        self.settings = {"do_sample": False, **settings}

    def __call__(self, calls: Sequence[Any]) -> list[str]:
        """Ask the model, one call after the other.

        Args:
            calls: What it is asked, see `ModuleCall`.

        Returns:
            One text each.
        """
        return [self.ask(call) for call in calls]

    def ask(self, call: Any) -> str:
        """Ask the model once.

        Args:
            call: What it is asked.

        Returns:
            What it wrote.
        """
        import torch

        from longvideo.cross_granularity.modules import fewer_frames_allowed, messages_of

        processor, model = self.pipe.processor, self.pipe.model
        with fewer_frames_allowed():
            inputs = processor.apply_chat_template(
                messages_of(call, processor),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt", "granularity": self.granularity},
            )
        pixels = inputs["pixel_values_videos"].to(model.device, model.dtype)
        tensors = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ids_1S = model.generate(
                **tensors, pixel_values_videos=pixels, granularity=self.granularity, **self.settings
            )
        new_S = ids_1S[0, tensors["input_ids"].shape[1] :]
        return processor.decode(new_S, skip_special_tokens=True).strip()
