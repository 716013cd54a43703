"""What the processor of LLaVA-ST returns."""

import torch
from transformers.feature_extraction_utils import BatchFeature


class LlavaSTInputs(BatchFeature):
    """`BatchFeature` whose `coordinate_values` stay float32: `inputs.to(device, torch.bfloat16)` moves no time."""

    def to(self, *args, **kwargs) -> "LlavaSTInputs":
        values = self.data.get("coordinate_values")
        super().to(*args, **kwargs)
        if isinstance(values, torch.Tensor):
            # Steps of bfloat16 are up to 1/256 of the video or of the frame.
            self.data["coordinate_values"] = values.to(self.data["coordinate_values"].device)
        return self
