"""Conversion of original VideoChat-Flash checkpoints (arXiv 2501.00574, repository OpenGVLab/VideoChat-Flash).

The training repository (`llava_qwen_flash`, and `llava_qwen` without the dropping) and the remote code on the Hub
(`videochat_flash_qwen`) store the same tensors under the same names. Our towers keep the originals' fused names, so
that every entry below is a plain rename.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.conversion.base import NO_PARTS, ArchitectureConversion, KeyMap, register_conversion
from longvideo.conversion.checkpoint_io import read_json
from longvideo.conversion.decoders import (
    DECODER_KEYS,
    QWEN2_FIELDS,
    add_placeholders,
    load_tokenizer,
    write_generation_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROJECTOR_KEYS: dict[str, str | None] = {
    "model.mm_projector.mlp.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.mlp.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.mlp.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.mm_projector.mlp.2.bias": "model.multi_modal_projector.linear_2.bias",
}
UMT_KEYS: dict[str, str | None] = {
    "model.vision_tower.vision_tower.encoder.patch_embed.proj.weight": "model.vision_tower.patch_embed.proj.weight",
    "model.vision_tower.vision_tower.encoder.patch_embed.proj.bias": "model.vision_tower.patch_embed.proj.bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.norm1.weight": "model.vision_tower.blocks.{}.norm1.weight",
    "model.vision_tower.vision_tower.encoder.blocks.{}.norm1.bias": "model.vision_tower.blocks.{}.norm1.bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.attn.qkv.weight": "model.vision_tower.blocks.{}.attn.qkv.weight",  # noqa: E501
    "model.vision_tower.vision_tower.encoder.blocks.{}.attn.q_bias": "model.vision_tower.blocks.{}.attn.q_bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.attn.v_bias": "model.vision_tower.blocks.{}.attn.v_bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.attn.proj.weight": "model.vision_tower.blocks.{}.attn.proj.weight",  # noqa: E501
    "model.vision_tower.vision_tower.encoder.blocks.{}.attn.proj.bias": "model.vision_tower.blocks.{}.attn.proj.bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.norm2.weight": "model.vision_tower.blocks.{}.norm2.weight",
    "model.vision_tower.vision_tower.encoder.blocks.{}.norm2.bias": "model.vision_tower.blocks.{}.norm2.bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.mlp.fc1.weight": "model.vision_tower.blocks.{}.mlp.fc1.weight",
    "model.vision_tower.vision_tower.encoder.blocks.{}.mlp.fc1.bias": "model.vision_tower.blocks.{}.mlp.fc1.bias",
    "model.vision_tower.vision_tower.encoder.blocks.{}.mlp.fc2.weight": "model.vision_tower.blocks.{}.mlp.fc2.weight",
    "model.vision_tower.vision_tower.encoder.blocks.{}.mlp.fc2.bias": "model.vision_tower.blocks.{}.mlp.fc2.bias",
    "model.vision_tower.vision_tower.encoder.vision_layernorm.weight": "model.vision_tower.vision_layernorm.weight",
    "model.vision_tower.vision_tower.encoder.vision_layernorm.bias": "model.vision_tower.vision_layernorm.bias",
}
INTERNVIDEO2_KEYS: dict[str, str | None] = {
    "model.vision_tower.vision_tower.cls_token": "model.vision_tower.cls_token",
    "model.vision_tower.vision_tower.pos_embed": "model.vision_tower.pos_embed",
    "model.vision_tower.vision_tower.img_pos_embed": "model.vision_tower.img_pos_embed",
    "model.vision_tower.vision_tower.patch_embed.proj.weight": "model.vision_tower.patch_embed.proj.weight",
    "model.vision_tower.vision_tower.patch_embed.proj.bias": "model.vision_tower.patch_embed.proj.bias",
    "model.vision_tower.vision_tower.blocks.{}.norm1.weight": "model.vision_tower.blocks.{}.norm1.weight",
    "model.vision_tower.vision_tower.blocks.{}.attn.qkv.weight": "model.vision_tower.blocks.{}.attn.qkv.weight",
    "model.vision_tower.vision_tower.blocks.{}.attn.q_norm.weight": "model.vision_tower.blocks.{}.attn.q_norm.weight",
    "model.vision_tower.vision_tower.blocks.{}.attn.k_norm.weight": "model.vision_tower.blocks.{}.attn.k_norm.weight",
    "model.vision_tower.vision_tower.blocks.{}.attn.proj.weight": "model.vision_tower.blocks.{}.attn.proj.weight",
    "model.vision_tower.vision_tower.blocks.{}.attn.proj.bias": "model.vision_tower.blocks.{}.attn.proj.bias",
    "model.vision_tower.vision_tower.blocks.{}.ls1.weight": "model.vision_tower.blocks.{}.ls1.weight",
    "model.vision_tower.vision_tower.blocks.{}.norm2.weight": "model.vision_tower.blocks.{}.norm2.weight",
    "model.vision_tower.vision_tower.blocks.{}.mlp.fc1.weight": "model.vision_tower.blocks.{}.mlp.fc1.weight",
    "model.vision_tower.vision_tower.blocks.{}.mlp.fc1.bias": "model.vision_tower.blocks.{}.mlp.fc1.bias",
    "model.vision_tower.vision_tower.blocks.{}.mlp.fc2.weight": "model.vision_tower.blocks.{}.mlp.fc2.weight",
    "model.vision_tower.vision_tower.blocks.{}.mlp.fc2.bias": "model.vision_tower.blocks.{}.mlp.fc2.bias",
    "model.vision_tower.vision_tower.blocks.{}.ls2.weight": "model.vision_tower.blocks.{}.ls2.weight",
}
TOWER_KEYS = {"umt_vision_model": UMT_KEYS, "internvideo2_vision_model": INTERNVIDEO2_KEYS}

# Sizes that the original code writes into its tower classes; `num_hidden_layers` is the nominal depth.
TOWERS: dict[str, dict[str, Any]] = {
    "internvideo2": {
        "model_type": "internvideo2_vision_model",
        "hidden_size": 1408,
        "image_size": 224,
        "num_attention_heads": 16,
        "num_hidden_layers": 40,
        "patch_size": 14,
    },
    "umt-hd": {
        "model_type": "umt_vision_model",
        "hidden_size": 1024,
        "image_size": 448,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 16,
    },
    "umt": {
        "model_type": "umt_vision_model",
        "hidden_size": 1024,
        "image_size": 224,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 16,
    },
}
IMAGE_TOWERS = ("clip-vit", "ShareGPT4V", "siglip")
IMAGE_TOWER_OWNERS = ("openai", "laion")
PROJECTOR_PATTERN = r"tome(\d+)_mlp_hd64"
COMPRESSION_FIELDS = (
    "mm_local_num_frames",
    "vision_encode_type",
    "mm_llm_compress",
    "llm_compress_type",
    "llm_compress_layer_list",
    "llm_image_token_ratio_list",
)
REQUIRED_FIELDS = (*QWEN2_FIELDS[:6], "mm_vision_tower", "mm_hidden_size", "mm_projector_type")
END_OF_TURN = "<|im_end|>"


class VideoChatFlashConversion(ArchitectureConversion):
    """VideoChat-Flash with a UMT or InternVideo2 tower and a Qwen2 decoder."""

    name = "videochat_flash"
    original_model_types = ("videochat_flash_qwen", "llava_qwen_flash", "llava_qwen")

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise ValueError if the original config is not a VideoChat-Flash that this package can build.

        Args:
            config: The original config.json.
        """
        absent = [name for name in REQUIRED_FIELDS if config.get(name) is None]
        if absent:
            raise ValueError(
                f"config.json (model_type {config.get('model_type')!r}) lacks {', '.join(absent)}; expected the "
                "config of a VideoChat-Flash checkpoint. Is this a checkpoint of another architecture?"
            )
        if not re.fullmatch(PROJECTOR_PATTERN, str(config["mm_projector_type"])):
            raise ValueError(
                f"config.json has mm_projector_type {config['mm_projector_type']!r}; VideoChat-Flash has "
                "tome16_mlp_hd64. This is a checkpoint of another architecture of the LLaVA family."
            )
        if "quantization_config" in config:
            raise ValueError("config.json describes quantised weights; convert the full-precision checkpoint instead.")
        tower_sizes(config)
        expected = {
            "mm_vision_select_feature": ("patch",),
            "mm_newline_position": ("nothing",),
            "mm_patch_merge_type": ("spatial_nopad", "flat"),
        }
        for name, values in expected.items():
            if config.get(name, values[0]) not in values:
                raise ValueError(
                    f"config.json has {name} {config[name]!r}, which needs parts that no VideoChat-Flash has; "
                    f"expected {' or '.join(values)}."
                )

    def key_map(self, config: dict[str, Any], names: Collection[str] = ()) -> KeyMap:
        """Return the table for the tower that the config names.

        Args:
            config: The original config.json.
            names: Not needed; there is one layout.

        Returns:
            The table.
        """
        return KeyMap({**DECODER_KEYS, **PROJECTOR_KEYS, **TOWER_KEYS[tower_sizes(config)["model_type"]]})

    def build_config(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]] = NO_PARTS
    ) -> "PreTrainedConfig":
        """Return the native config for an original one, without placeholder ids.

        Args:
            config: The original config.json.
            parts: Not needed; the tower is in the checkpoint.

        Returns:
            A `VideoChatFlashConfig`; the placeholders lie just beyond the embedding table, which the model allows.
        """
        from huggingface_hub.errors import StrictDataclassError

        from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig

        text_config = {name: config[name] for name in QWEN2_FIELDS if config.get(name) is not None}
        text_config["rope_parameters"] = rope_parameters(config)
        projector = re.fullmatch(PROJECTOR_PATTERN, config["mm_projector_type"])
        assert projector is not None
        try:
            return VideoChatFlashConfig(
                text_config={"model_type": "qwen2", **text_config},
                vision_config=tower_sizes(config),
                image_token_id=config["vocab_size"],
                video_token_id=config["vocab_size"] + 1,
                tokens_per_frame=int(projector[1]),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                architectures=["VideoChatFlashForConditionalGeneration"],
                **{name: config[name] for name in COMPRESSION_FIELDS if config.get(name) is not None},
            )
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from error

    def original_config(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return a config in the layout of the Hub's remote code for a native one.

        Args:
            config: A `VideoChatFlashConfig`.

        Returns:
            The content of config.json.
        """
        text, vision = config.text_config.to_dict(), config.vision_config
        name = next(
            (
                name
                for name, sizes in TOWERS.items()
                if sizes["model_type"] == vision.model_type
                and (vision.model_type != "umt_vision_model" or (name == "umt-hd") == (vision.image_size != 224))
            ),
            None,
        )
        if name is None:
            raise ValueError(
                f"a tower of type {vision.model_type!r} has no original layout; expected {list(TOWER_KEYS)}."
            )
        rope = dict(text.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", 1e6)
        sizes = {key: getattr(vision, key) for key in TOWERS[name] if key != "model_type"}
        sizes["num_hidden_layers"] += 1
        if vision.intermediate_size != mlp_width(vision.model_type, vision.hidden_size):
            sizes["intermediate_size"] = vision.intermediate_size
        published = all(TOWERS[name].get(key) == value for key, value in sizes.items())
        original = {
            "architectures": ["VideoChatFlashQwenForCausalLM"],
            "model_type": "videochat_flash_qwen",
            **{key: text[key] for key in QWEN2_FIELDS if key in text},
            "tie_word_embeddings": config.tie_word_embeddings,
            "rope_theta": theta,
            "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
            "mm_vision_tower": "internvideo2" if name == "internvideo2" else f"{name}-large",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": f"tome{config.tokens_per_frame}_mlp_hd64",
            "mm_patch_merge_type": "spatial_nopad",
            "mm_newline_position": "nothing",
            "mm_pos_num_frames": 8,
            **{key: getattr(config, key) for key in COMPRESSION_FIELDS},
        }
        return original if published else {**original, "vision_tower_overrides": sizes}

    def load_config(self, folder: Path) -> "PreTrainedConfig":
        """Read the config of a converted folder.

        Args:
            folder: The folder.

        Returns:
            A `VideoChatFlashConfig`.
        """
        from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig

        return VideoChatFlashConfig.from_pretrained(folder)

    def build_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        """Return the native model.

        Args:
            config: A `VideoChatFlashConfig`.

        Returns:
            A `VideoChatFlashForConditionalGeneration` without meaningful weights.
        """
        from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

        return VideoChatFlashForConditionalGeneration(config)

    def write_companions(self, config: "PreTrainedConfig", source: Path, folder: Path) -> list[str]:
        """Write the generation config and, when the source has a tokenizer, the processor; set the token ids.

        Args:
            config: The native config, whose placeholder ids are set.
            source: The original folder.
            folder: The folder that is being written.

        Returns:
            Notes for the report.
        """
        tokenizer = load_tokenizer(source, unnamed="Qwen2Tokenizer")
        if tokenizer is None:
            return [
                *write_generation_config(config, source, folder, None, end_of_turn=END_OF_TURN),
                "the source has no tokenizer, so no processor was written; the placeholder ids are "
                f"{config.image_token_id} (image) and {config.video_token_id} (video), just beyond the embeddings.",
            ]
        notes = add_placeholders(tokenizer, config)
        notes += write_generation_config(config, source, folder, tokenizer, end_of_turn=END_OF_TURN)
        # The original pads on the right, where batched generation would continue behind the padding.
        tokenizer.padding_side = "left"
        write_processor(config, tokenizer, read_json(source / "config.json"), folder)
        return notes


def tower_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the vision configuration for the tower that an original config names.

    The built depth is nominal + mm_vision_select_layer + 1: the original never creates the blocks behind the one whose
    features it takes, and they are not in checkpoints.

    Args:
        config: The original config.json.

    Returns:
        Arguments of the tower's configuration class, with its model_type.

    Raises:
        ValueError: if the tower is unknown or not a video tower, or the sizes disagree.

    Source: `build_vision_tower` of the original chooses by substring, in this order.
    """
    name = str(config["mm_vision_tower"])
    if name.startswith(IMAGE_TOWER_OWNERS) or any(part in name for part in IMAGE_TOWERS):
        raise ValueError(
            f"config.json has mm_vision_tower {name!r}, an image tower that no published VideoChat-Flash uses; "
            f"expected a name with {', '.join(TOWERS)}."
        )
    kind = next((kind for kind in TOWERS if kind in name), None)
    if kind is None:
        raise ValueError(f"config.json has mm_vision_tower {name!r}; expected a name with {', '.join(TOWERS)}.")
    overrides = config.get("vision_tower_overrides") or {}
    allowed = {*TOWERS[kind], "intermediate_size"} - {"model_type"}
    unknown = sorted(set(overrides) - allowed)
    if unknown:
        raise ValueError(f"vision_tower_overrides has {', '.join(unknown)}; expected {', '.join(sorted(allowed))}.")
    sizes = {**TOWERS[kind], **overrides}
    select_layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(select_layer, int) or not -sizes["num_hidden_layers"] <= select_layer <= -1:
        raise ValueError(
            f"config.json has mm_vision_select_layer {select_layer!r}; expected a number from "
            f"{-sizes['num_hidden_layers']} to -1, counted from the last block."
        )
    sizes["num_hidden_layers"] += select_layer + 1
    wide = sizes["hidden_size"]
    if config["mm_hidden_size"] != wide:
        raise ValueError(
            f"config.json has mm_hidden_size {config['mm_hidden_size']}, but the tower {name!r} is {wide} wide."
        )
    sizes.setdefault("intermediate_size", mlp_width(sizes["model_type"], wide))
    sizes["num_frames"] = config.get("mm_local_num_frames", 4)
    return sizes


def mlp_width(model_type: str, hidden_size: int) -> int:
    """Return the width of the tower's MLP, which the original derives from the token width."""
    return int(hidden_size * 48 / 11) if model_type == "internvideo2_vision_model" else 4 * hidden_size


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters in the form of Transformers 5.

    Args:
        config: The original config.json with `rope_theta` and `rope_scaling` (YaRN passes through).

    Returns:
        `rope_parameters`.

    Differs: the original's decoder ignores `rope_scaling`; its authors describe YaRN (factor 4) for very long inputs,
        which is what the field asks for, so it is applied here.
    """
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("type", None)
    scaling.setdefault("rope_type", rope_type or "default")
    return {"rope_theta": float(config.get("rope_theta", 1e6)), **scaling}


def write_processor(
    config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase", original: dict[str, Any], folder: Path
) -> None:
    """Write the processor for the tower's frame size and the original's image tiling."""
    from longvideo.processing.videochat_flash.image_processing_videochat_flash import VideoChatFlashImageProcessor
    from longvideo.processing.videochat_flash.processing_videochat_flash import VideoChatFlashProcessor
    from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor

    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    tiling = {name: original[name] for name in ("image_aspect_ratio", "image_grid_pinpoints") if original.get(name)}
    VideoChatFlashProcessor(
        image_processor=VideoChatFlashImageProcessor(size=size, **tiling),
        tokenizer=tokenizer,
        video_processor=VideoChatFlashVideoProcessor(size=size, mm_local_num_frames=config.mm_local_num_frames),
        tokens_per_frame=config.tokens_per_frame,
    ).save_pretrained(folder)


register_conversion(VideoChatFlashConversion())
