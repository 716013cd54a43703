"""Stages of LLaVA-ST's training as one checkpoint: a full model, and adapters merged into it tensor by tensor.

A stage's folder has `adapter_config.json`, the adapter's weights and `non_lora_trainables.bin`, the tensors that were
trained themselves. A folder of the name checkpoint-N, saved during training, has these (and the adapter) in
`global_stepN/mp_rank_00_model_states.pt`.

Source: `load_lora_model` of `builder.py` and `merge_model.py` in appletea233/LLaVA-ST.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from longvideo.conversion.checkpoint_io import (
    SAFETENSORS_DTYPES,
    BinFile,
    SafetensorsFile,
    TensorFile,
    TensorInfo,
    read_json,
    require_state_dict,
    unpickle,
)
from longvideo.conversion.llava_st_config import EMBEDDING, HEAD, TABLES
from longvideo.conversion.parts import SourceCheckpoint

PREFIX = "base_model.model."
EXTRA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_NAME = re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight")
# Settings of PEFT that change what is merged, with the values that the original has.
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
}


class TrainingStateFile(BinFile):
    """The model's part of a DeepSpeed training state.

    Args:
        path: The file.

    Raises:
        ValueError: if it has no state dict under `module`, or holds more than weights-only loading allows.
    """

    def load(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict."""
        state = unpickle(self.path)
        if not isinstance(state, dict) or "module" not in state:
            raise ValueError(f"{self.path} has no entry 'module'; expected a training state of DeepSpeed (ZeRO 2).")
        return require_state_dict(state["module"], self.path)


class LoraStage:
    """One stage's adapter and the tensors that were trained beside it, under the names of the full model.

    Args:
        folder: The stage's folder.
        label: What the report calls it, `lora_stages/N`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the adapter is of a kind that is not merged by W + scaling * B A.
    """

    def __init__(self, folder: Path, label: str) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--lora-stages: {folder} is not a folder; expected one with adapter_config.json and {EXTRA_FILE}."
            )
        self.folder, self.label = folder, label
        self.config = read_json(folder / "adapter_config.json")
        for setting, allowed in PLAIN_SETTINGS.items():
            if self.config.get(setting, allowed[0]) not in allowed:
                raise ValueError(
                    f"{folder / 'adapter_config.json'} has {setting} {self.config[setting]!r}; expected "
                    f"{allowed[0]!r}, as LLaVA-ST was trained. Merge this adapter with PEFT first."
                )
        self.files: dict[str, TensorFile] = {}
        self.extra: dict[str, tuple[str, TensorInfo]] = {}
        self.lora: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
        try:
            for path in self.find_files():
                self.add(path)
            for name, pair in self.lora.items():
                self.check_pair(name, pair)
        except (OSError, ValueError):
            self.close()
            raise

    def find_files(self) -> list[Path]:
        """Return the weight files; what a later one holds replaces what an earlier one holds."""
        found = [self.folder / name for name in ADAPTER_FILES if (self.folder / name).is_file()][:1]
        step = re.search(r"checkpoint-(\d+)", self.folder.name)
        extra = f"global_step{step[1]}/mp_rank_00_model_states.pt" if step else EXTRA_FILE
        if not found and not step:
            raise FileNotFoundError(f"{self.folder} has no {' or '.join(ADAPTER_FILES)}; expected a stage's adapter.")
        if not (self.folder / extra).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {extra}; expected the tensors that the stage trained beside its adapter "
                "(embeddings, packers, coordinate tables)."
            )
        return [*found, self.folder / extra]

    def add(self, path: Path) -> None:
        """Take in the tensors of one file."""
        kind = {".safetensors": SafetensorsFile, ".pt": TrainingStateFile}.get(path.suffix, BinFile)
        file = str(path.relative_to(self.folder))
        self.files[file] = kind(path)
        for stored, info in self.files[file].infos.items():
            if not stored.startswith(PREFIX):
                raise ValueError(
                    f"{path}: tensor {stored} does not begin with {PREFIX}; expected names as PEFT gives."
                )
            name = stored[len(PREFIX) :].replace(".base_layer.", ".")
            match = LORA_NAME.fullmatch(name)
            if match:
                self.lora.setdefault(f"{match[1]}.weight", {})[match[2]] = (file, info)
            else:
                self.extra[name] = (file, info)

    def check_pair(self, name: str, pair: dict[str, tuple[str, TensorInfo]]) -> None:
        """Raise ValueError if A and B of one matrix do not belong together."""
        ranks = {side: info.shape[0 if side == "A" else 1] for side, (_, info) in pair.items() if len(info.shape) == 2}
        if ranks != dict.fromkeys("AB", self.rank(name)):
            shapes = {side: list(info.shape) for side, (_, info) in sorted(pair.items())}
            raise ValueError(
                f"{self.folder}: the adapter of {name} has {shapes}, but adapter_config.json asks for A and B of rank "
                f"{self.rank(name)}."
            )

    def rank(self, name: str) -> int:
        """Return the rank for one matrix."""
        return int(self.pattern("rank_pattern", name, self.config["r"]))

    def scaling(self, name: str) -> float:
        """Return the factor of B A for one matrix."""
        rank = self.rank(name)
        alpha = float(self.pattern("alpha_pattern", name, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def pattern(self, field: str, name: str, default: float) -> float:
        """Return the entry of a pattern of PEFT that a module's name ends with."""
        module = name.removesuffix(".weight")
        for key, value in (self.config.get(field) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return default

    def read(self, place: tuple[str, TensorInfo]) -> torch.Tensor:
        """Return one stored tensor."""
        file, info = place
        return self.files[file].read(info.name)

    def close(self) -> None:
        """Close every file."""
        for file in self.files.values():
            file.close()

    @property
    def note(self) -> str:
        """What the stage brought, for the report."""
        return (
            f"{self.label} ({self.folder.name}) was merged: an adapter of rank {self.config['r']} and alpha "
            f"{self.config['lora_alpha']} into {len(self.lora)} matrices, and {len(self.extra)} tensors as they are."
        )


class StagedCheckpoint(SourceCheckpoint):
    """A full model with stages merged into it, in the order in which they are given.

    Args:
        folder: The full model of stage 1.
        stages: Folders of the later stages.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a stage does not fit the model.
    """

    def __init__(self, folder: Path, stages: Iterable[Path]) -> None:
        super().__init__(folder)
        self.stages: list[LoraStage] = []
        self.stored = dict(self.infos)
        try:
            for number, stage in enumerate(stages, 1):
                self.stages.append(LoraStage(stage, f"lora_stages/{number}"))
                self.merge_headers(self.stages[-1])
        except (OSError, ValueError):
            self.close()
            raise
        self.notes += [stage.note for stage in self.stages]

    def merge_headers(self, stage: LoraStage) -> None:
        """Bring `infos` to the state after a stage."""
        unknown = sorted({*stage.extra, *stage.lora} - {*self.infos, *TABLES})
        if unknown:
            raise ValueError(
                f"{stage.folder} trained {len(unknown)} tensors that {self.folder} does not have: "
                f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Give the stage-1 model that the "
                "adapter was trained on, and the stages in their order."
            )
        embedding = self.infos.get(EMBEDDING)
        for name, (_, info) in stage.extra.items():
            known = self.infos.get(name)
            grows = name in (EMBEDDING, HEAD) and known is not None and info.shape[1:] == known.shape[1:]
            if known is not None and info.shape != known.shape and not (grows and info.shape[0] > known.shape[0]):
                raise ValueError(
                    f"{stage.folder}: {name} is {list(info.shape)}, but {list(known.shape)} before this stage. Give "
                    "the stage-1 model that the adapter was trained on, and the stages in their order."
                )
            # Tensors of later stages are copied into those of the model, in its type.
            like = known or embedding or info
            file = known.file if known is not None else f"{stage.label}/{info.file}"
            self.infos[name] = TensorInfo(name, info.shape, like.dtype, file)
        for name, pair in stage.lora.items():
            wanted = (pair["B"][1].shape[0], pair["A"][1].shape[1])
            if self.infos[name].shape != wanted:
                raise ValueError(
                    f"{stage.folder}: the adapter of {name} changes a matrix of {list(wanted)}, but the model has "
                    f"{list(self.infos[name].shape)}."
                )
        rows = self.infos[EMBEDDING].shape[0] if embedding is not None else 0
        head = self.infos.get(HEAD)
        if head is not None and head.shape[0] < rows:
            self.infos[HEAD] = TensorInfo(HEAD, (rows, *head.shape[1:]), head.dtype, head.file)

    @property
    def files(self) -> dict[str, Path]:
        """Every weight file, by the name that rows give it."""
        return super().files | {
            f"{stage.label}/{file}": stage.folder / file for stage in self.stages for file in stage.files
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor after all stages.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor on the CPU.

        Source: a stage resizes first (new rows are the mean of the old ones), then loads its tensors, then merges.
        """
        tensor = super().read(name) if name in self.stored else None
        dtype = SAFETENSORS_DTYPES[self.infos[name].dtype]
        for stage in self.stages:
            trained = stage.extra.get(EMBEDDING)
            if name in (EMBEDDING, HEAD) and tensor is not None and trained is not None:
                tensor = with_mean_rows(tensor, trained[1].shape[0])
            if name in stage.extra:
                tensor = stage.read(stage.extra[name]).to(dtype)
            if name in stage.lora and tensor is not None:
                tensor = merged(tensor, stage, name)
        assert tensor is not None
        return tensor

    def close(self) -> None:
        """Close every open file."""
        super().close()
        for stage in self.stages:
            stage.close()


def with_mean_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a matrix with rows added that are the mean of those it has.

    Args:
        matrix: The matrix.
        rows: Wanted number of rows.

    Returns:
        The matrix, or itself where it has enough rows.
    """
    if rows <= len(matrix):
        return matrix
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])


def merged(weight: torch.Tensor, stage: LoraStage, name: str) -> torch.Tensor:
    """Return W + scaling * B A, computed in float32 and stored in the type of W."""
    low, high = (stage.read(stage.lora[name][side]).float() for side in "AB")
    return (weight.float() + stage.scaling(name) * (high @ low)).to(weight.dtype)
