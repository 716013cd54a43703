"""Base class of CrossVLLM models: checkpoints of a base (or a reference to it) and a folder for each adapter."""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longvideo.modeling.crossvllm.adapters_crossvllm import (
    FOLDER,
    HUB_OPTIONS,
    load_adapters,
    save_adapters,
    split_state_dict,
)
from longvideo.modeling.crossvllm.building_crossvllm import load_base
from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig
from longvideo.modeling.crossvllm.granularity_crossvllm import CrossVLLMGranularityMixin


class CrossVLLMPreTrainedModel(CrossVLLMGranularityMixin, PreTrainedModel):
    """Base class: configuration, weight names, checkpoints and what the models support."""

    config: CrossVLLMConfig
    config_class = CrossVLLMConfig
    base_model_prefix = "model"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def initialize_weights(self) -> None:
        for part in self.modules():
            # Below a class that is not its own, upstream passes over modules without own parameters: towers have some.
            if part is not self and isinstance(part, PreTrainedModel) and not part.is_custom_code():
                part.initialize_weights()
        super().initialize_weights()

    # ------------------------------------------------------------------ gradient checkpointing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # The second run of a layer comes after the call, when another granularity may be active.
        remembering = partial(self._checkpoint_in_granularity, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=remembering, **kwargs)

    def _checkpoint_in_granularity(self, function: Callable, run: Callable, *args: Any, **kwargs: Any) -> Any:
        return function(partial(self._run_in_granularity, self.granularity, run), *args, **kwargs)

    def _run_in_granularity(self, granularity: str, run: Callable, *args: Any, **kwargs: Any) -> Any:
        with self.use_granularity(granularity):
            return run(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        config: CrossVLLMConfig | str | os.PathLike | None = None,
        adapters: bool | None = None,
        **kwargs,
    ) -> "CrossVLLMPreTrainedModel":
        """Loads a checkpoint, with the adapters of both granularities where it has them.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args: as upstream.
            config: as upstream.
            adapters: None loads adapters where the checkpoint has them, False loads the base alone, True makes a
                checkpoint without adapters an error.
            **kwargs: as upstream.

        Returns:
            The model as upstream, in the configuration's default granularity.

        Raises:
            ImportError: the checkpoint has adapters and peft is not installed.
            OSError: a file is missing.
            ValueError: adapters that do not fit the base, or that were asked for and are not there.
        """
        name, hub = pretrained_model_name_or_path, {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if name is None:
            return super().from_pretrained(name, *args, config=config, **kwargs)
        if not isinstance(config, CrossVLLMConfig):
            source = name if config is None else config
            peek, _ = CrossVLLMConfig.get_config_dict(source, **hub)
            if peek.get("base_model_name_or_path"):
                config, kwargs = CrossVLLMConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        if isinstance(config, CrossVLLMConfig) and config.base_model_name_or_path:
            rest = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
            result = model = load_base(cls, copy.deepcopy(config), **rest)
        else:
            result = super().from_pretrained(name, *args, config=config, **kwargs)
            # With output_loading_info there is a second value.
            model = result[0] if isinstance(result, tuple) else result
        model._load_saved_adapters(name, adapters, hub)
        return result

    def _load_saved_adapters(self, name: str | os.PathLike, wanted: bool | None, hub: dict) -> None:
        present = self.config.adapters
        if wanted and not present:
            raise ValueError(
                f"{name} has no adapters (adapters is false in its config.json). Leave adapters=True out and call "
                "add_adapters for fresh ones."
            )
        # Loading makes new tensors, which learn by default.
        self.base_model.vision_tower.requires_grad_(False)
        self.config.adapters = False
        if present and wanted is not False:
            load_adapters(self, name, **hub)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        base_model: str | None = None,
        **kwargs,
    ) -> None:
        """Saves the base as upstream does and, beside it, a folder for each adapter.

        Args:
            save_directory: folder, made when absent.
            is_main_process: as upstream.
            state_dict: as upstream, adapters included.
            base_model: folder or Hub id of the LLaVA-NeXT-Video or CrossVLLM that this model was made from. The base
                is not written then, but loaded from there; it must be what it was.
            **kwargs: as upstream.

        Raises:
            ValueError: `base_model` for a model without adapters: all of its weights would be lost.
        """
        if base_model is not None and not self.has_adapters:
            raise ValueError(
                f"base_model={base_model!r} leaves the base unwritten, but this model has no adapters, so nothing "
                "would be saved. Save it whole."
            )
        kwargs |= {"is_main_process": is_main_process}
        if not self.has_adapters:
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        state_dict = self.state_dict() if state_dict is None else state_dict
        self.config.base_model_name_or_path = base_model
        # Upstream would write the active adapter only.
        self._hf_peft_config_loaded = False
        try:
            if is_main_process:
                os.makedirs(save_directory, exist_ok=True)
                save_adapters(self, save_directory, state_dict)
            if base_model is None:
                base, _ = split_state_dict(self, state_dict)
                super().save_pretrained(save_directory, state_dict=base, **kwargs)
            elif is_main_process:
                self._save_settings(save_directory)
        finally:
            self._hf_peft_config_loaded = True
            self.config.base_model_name_or_path = None

    def _save_settings(self, folder: str | os.PathLike) -> None:
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).split(".")[1]
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)

    def _upload_modified_files(self, working_dir: str, repo_id: str, files_timestamps: dict, **kwargs) -> Any:
        # Upstream looks into folders one level deep.
        hidden = {**files_timestamps, FOLDER: float("inf")}
        commit = super()._upload_modified_files(working_dir, repo_id, hidden, **kwargs)
        folder = os.path.join(working_dir, FOLDER)
        if self.has_adapters and os.path.isdir(folder):
            HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=FOLDER,
                commit_message="Upload adapters",
                token=kwargs.get("token"),
                revision=commit.pr_revision or kwargs.get("revision"),
            )
        return commit
