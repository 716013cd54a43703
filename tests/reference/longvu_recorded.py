"""Recorded cases of the original LongVU, for checks of single operations.

A case is a folder with `inputs.safetensors`, `expected.safetensors` and `meta.json` in `cases/` beside a `checkpoint/`
of the original layout, anywhere below `$LONGVIDEO_GOLDEN`. Sizes, thresholds and names are read from the case.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))


@dataclass
class RecordedCase:
    """One case with the weights of its checkpoint's connector and embeddings.

    Args:
        inputs: tensors given to the original.
        expected: tensors it gave.
        config: its configuration, with the overrides of the case.
        weights: tensors of the checkpoint by their original name, without the leading `model.`.
        meta: `meta.json`.
    """

    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    meta: dict[str, Any]

    @property
    def side(self) -> int:
        """Side of the full grid."""
        return round(self.config["image_token_len"] ** 0.5)

    @property
    def size(self) -> tuple[int, int]:
        """What the model reads as width and height of the first sample."""
        width, height = self.inputs["image_sizes"][0].tolist()
        return width, height

    @property
    def num_text(self) -> int:
        """Ids of the first sample without the placeholder and without padding."""
        ids = self.inputs["input_ids"][0]
        if "attention_mask" in self.inputs:
            ids = ids[self.inputs["attention_mask"][0].bool() | (ids < 0)]
        return int((ids >= 0).sum())

    @property
    def budget(self) -> int:
        """Positions for visual tokens."""
        reserve = self.config.get("inference_max_length", 16)
        return self.config["tokenizer_model_max_length"] - self.num_text - reserve

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Applies one of the original's two-layer projectors, with its norm where it has one."""
        w = self.weights
        x = F.gelu(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"]))
        x = F.linear(x, w[f"{name}.2.weight"], w[f"{name}.2.bias"])
        if f"{name}.3.weight" in w:
            x = F.layer_norm(x, x.shape[-1:], w[f"{name}.3.weight"], w[f"{name}.3.bias"], 1e-5)
        return x


def find_recorded(*names: str, single: bool = True) -> list[Path]:
    """Folders of LongVU cases that recorded certain tensors.

    Args:
        names: tensors that `expected.safetensors` must hold.
        single: only cases of one sample.

    Returns:
        Folders, sorted; empty where no recordings are at hand.
    """
    found = []
    for path in sorted(GOLDEN.rglob("checkpoint/config.json")):
        config = json.loads(path.read_text())
        if config.get("mm_projector_type") != "sva" or "query_num_list" not in config:
            continue
        for meta_path in sorted(path.parent.parent.glob("cases/*/meta.json")):
            meta = json.loads(meta_path.read_text())
            one = len(meta["inputs"]["input_ids"]["shape"]) == 1 or meta["inputs"]["input_ids"]["shape"][0] == 1
            if all(name in meta["expected"] for name in names) and (one or not single):
                found.append(meta_path.parent)
    return found


def load_recorded(folder: Path) -> RecordedCase:
    """Reads a case and the weights beside it.

    Args:
        folder: one of `find_recorded`.

    Returns:
        The case.
    """
    checkpoint = folder.parent.parent / "checkpoint"
    meta = json.loads((folder / "meta.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text()) | (meta.get("config_overrides") or {})
    weights = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        weights |= {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    return RecordedCase(
        inputs=load_file(folder / "inputs.safetensors"),
        expected=load_file(folder / "expected.safetensors"),
        config=config,
        weights=weights,
        meta=meta,
    )
