"""Conversion of original LongVU checkpoints (arXiv 2410.17434, repository Vision-CAIR/LongVU).

The original stores decoder and connector, and loads both towers from repositories of their own; here they are part of
the model. A run that trained the towers stored them too. What an original config.json says is read in
`longvu_config.py`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.conversion.base import NO_PARTS, ArchitectureConversion, KeyMap, register_conversion
from longvideo.conversion.checkpoint_io import TensorInfo, read_json
from longvideo.conversion.decoders import DECODER_KEYS, add_placeholders, load_tokenizer, write_generation_config
from longvideo.conversion.longvu_config import (
    BACKBONES,
    backbone_of,
    check_longvu_config,
    check_longvu_parts,
    native_fields,
    original_fields,
    original_tower_fields,
)
from longvideo.conversion.originals import ORIGINAL_FOLDER
from longvideo.conversion.parts import Part
from longvideo.conversion.towers import ENCODER_NAMES, SIGLIP_NAMES, SIGLIP_UNUSED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SIGLIP = Part(
    name="towers/siglip",
    option="vision_tower",
    title="SigLIP tower",
    repository="google/siglip-so400m-patch14-384",
    inside="model.vision_tower_aux_list.0.",
)
DINO = Part(
    name="towers/dinov2",
    option="dino_tower",
    title="DINOv2 tower",
    repository="facebook/dinov2-giant",
    inside="model.vision_tower_aux_list.1.",
)
# Names inside one sampler; `layers` of an unused second kind of sampler have the same.
SAMPLER_NAMES = (
    "layers.{}.pos_embed_{}",
    "layers.{}.proj_context.weight",
    "layers.{}.proj_in.weight",
    "layers.{}.cross_attn.q_proj.{}.weight",
    "layers.{}.cross_attn.q_proj.{}.bias",
    "layers.{}.cross_attn.k_proj_{}.{}.weight",
    "layers.{}.cross_attn.k_proj_{}.{}.bias",
    "layers.{}.cross_attn.v_proj_{}.{}.weight",
    "layers.{}.cross_attn.v_proj_{}.{}.bias",
    "layers.{}.cross_attn.o_proj.weight",
    "layers.{}.norm.weight",
    "layers.{}.norm.bias",
    "layers.{}.proj_out.linear_1.weight",
    "layers.{}.proj_out.linear_2.weight",
)
CONNECTOR_KEYS: dict[str, str | None] = {
    "model.vision_query": "model.vision_query",
    "model.image_newline": "model.image_newline",
    "model.mm_projector_aux_{}.0.weight": "model.vision_projectors.{}.linear_1.weight",
    "model.mm_projector_aux_{}.0.bias": "model.vision_projectors.{}.linear_1.bias",
    "model.mm_projector_aux_{}.2.weight": "model.vision_projectors.{}.linear_2.weight",
    "model.mm_projector_aux_{}.2.bias": "model.vision_projectors.{}.linear_2.bias",
    "model.mm_projector_aux_{}.3.weight": "model.vision_projectors.{}.norm.weight",
    "model.mm_projector_aux_{}.3.bias": "model.vision_projectors.{}.norm.bias",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    **{f"model.vision_sampler_0.{name}": f"model.vision_sampler.{name}" for name in SAMPLER_NAMES},
    # Created without connector_only; the original never calls them.
    **{f"model.vision_sampler_layers.{{}}.{name}": None for name in SAMPLER_NAMES},
}
# What the public repository holds besides the vision half.
SIGLIP_TEXT_HALF = (
    "logit_scale",
    "logit_bias",
    "text_model.embeddings.position_ids",
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    *(f"text_model.{name}" for name in ENCODER_NAMES),
    "text_model.final_layer_norm.weight",
    "text_model.final_layer_norm.bias",
    "text_model.head.weight",
    "text_model.head.bias",
)
DINO_NAMES = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
    "encoder.layer.{}.norm1.weight",
    "encoder.layer.{}.norm1.bias",
    "encoder.layer.{}.attention.attention.query.weight",
    "encoder.layer.{}.attention.attention.query.bias",
    "encoder.layer.{}.attention.attention.key.weight",
    "encoder.layer.{}.attention.attention.key.bias",
    "encoder.layer.{}.attention.attention.value.weight",
    "encoder.layer.{}.attention.attention.value.bias",
    "encoder.layer.{}.attention.output.dense.weight",
    "encoder.layer.{}.attention.output.dense.bias",
    "encoder.layer.{}.layer_scale1.lambda1",
    "encoder.layer.{}.norm2.weight",
    "encoder.layer.{}.norm2.bias",
    "encoder.layer.{}.mlp.weights_in.weight",
    "encoder.layer.{}.mlp.weights_in.bias",
    "encoder.layer.{}.mlp.weights_out.weight",
    "encoder.layer.{}.mlp.weights_out.bias",
    "encoder.layer.{}.mlp.fc1.weight",
    "encoder.layer.{}.mlp.fc1.bias",
    "encoder.layer.{}.mlp.fc2.weight",
    "encoder.layer.{}.mlp.fc2.bias",
    "encoder.layer.{}.layer_scale2.lambda1",
    "layernorm.weight",
    "layernorm.bias",
)
# Only for training DINOv2 itself.
DINO_UNUSED = ("embeddings.mask_token",)


class LongVUConversion(ArchitectureConversion):
    """LongVU with a Qwen2 or Llama decoder, SigLIP and DINOv2."""

    name = "longvu"
    original_model_types = tuple(f"cambrian_{backbone}" for backbone in BACKBONES)
    parts = (SIGLIP, DINO)

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise ValueError if the original config is not a LongVU that this package can build.

        Args:
            config: The original config.json.
        """
        check_longvu_config(config)

    def check_parts(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]], infos: Mapping[str, TensorInfo]
    ) -> None:
        """Raise ValueError if a tower is of another kind or width than the checkpoint was trained with.

        Args:
            config: The original config.json.
            parts: The towers' config.json.
            infos: Headers of all tensors.
        """
        check_longvu_parts(config, parts, infos)

    def key_map(self, config: dict[str, Any], names: Collection[str] = ()) -> KeyMap:
        """Return the table for where the source keeps its towers.

        Args:
            config: The original config.json.
            names: The source's tensors; without them the towers are taken to lie in folders of their own.

        Returns:
            The table.
        """
        siglip, dino = (
            f"{part.inside}vision_tower." if any(name.startswith(part.inside) for name in names) else f"{part.name}/"
            for part in (SIGLIP, DINO)
        )
        # Transformers 5 leaves the prefix out when it saves a tower by itself.
        bare = f"{siglip}{SIGLIP_NAMES[0]}" in names
        vision = siglip if bare else f"{siglip}vision_model."
        return KeyMap(
            {
                **DECODER_KEYS,
                **CONNECTOR_KEYS,
                **{f"{vision}{name}": f"model.vision_tower.{name}" for name in SIGLIP_NAMES},
                **{f"{vision}{name}": None for name in SIGLIP_UNUSED},
                **{f"{siglip}{name}": None for name in SIGLIP_TEXT_HALF},
                **{f"{dino}{name}": f"model.dino_tower.{name}" for name in DINO_NAMES},
                **{f"{dino}{name}": None for name in DINO_UNUSED},
            }
        )

    def build_config(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]] = NO_PARTS
    ) -> "PreTrainedConfig":
        """Return the native config for an original one, without placeholder ids.

        Args:
            config: The original config.json.
            parts: The towers' config.json; a missing one has the published sizes.

        Returns:
            A `LongVUConfig` with every behaviour of the original; the placeholders lie just beyond the embedding
            table, which the model allows.
        """
        from huggingface_hub.errors import StrictDataclassError

        from longvideo.modeling.longvu.configuration_longvu import LongVUConfig

        try:
            return LongVUConfig(
                **native_fields(config, parts.get(SIGLIP.name), parts.get(DINO.name)),
                original_behaviour=True,
                architectures=["LongVUForConditionalGeneration"],
            )
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from error

    def original_config(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return a config in the layout of the original's training script for a native one.

        Args:
            config: A `LongVUConfig`.

        Returns:
            The content of config.json.
        """
        return original_fields(config)

    def original_parts(self, config: "PreTrainedConfig") -> dict[str, dict[str, Any]]:
        """Return the config.json of both towers for a native config.

        Args:
            config: A `LongVUConfig`.

        Returns:
            Part name to config.
        """
        return {
            SIGLIP.name: original_tower_fields(config.vision_config, "SiglipVisionModel"),
            DINO.name: original_tower_fields(config.dino_config, "Dinov2Model"),
        }

    def load_config(self, folder: Path) -> "PreTrainedConfig":
        """Read the config of a converted folder.

        Args:
            folder: The folder.

        Returns:
            A `LongVUConfig`.
        """
        from longvideo.modeling.longvu.configuration_longvu import LongVUConfig

        return LongVUConfig.from_pretrained(folder)

    def build_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        """Return the native model.

        Args:
            config: A `LongVUConfig`.

        Returns:
            A `LongVUForConditionalGeneration` without meaningful weights.
        """
        from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration

        return LongVUForConditionalGeneration(config)

    def write_companions(self, config: "PreTrainedConfig", source: Path, folder: Path) -> list[str]:
        """Write the generation config and, when the source has a tokenizer, the processor; set the token ids.

        Args:
            config: The native config, whose placeholder ids are set.
            source: The original folder.
            folder: The folder that is being written.

        Returns:
            Notes for the report.
        """
        backbone = backbone_of(read_json(source / "config.json"))
        end = {"end_of_turn": backbone.end_of_turn}
        tokenizer = load_tokenizer(source, unnamed=backbone.tokenizer_class)
        if tokenizer is None:
            return [
                *write_generation_config(config, source, folder, None, **end),
                "the source has no tokenizer, so no processor was written; the placeholder ids are "
                f"{config.image_token_id} (image) and {config.video_token_id} (video), just beyond the embeddings.",
            ]
        notes = add_placeholders(tokenizer, config)
        if tokenizer.pad_token is None:
            vocabulary = tokenizer.get_vocab()
            known = (token for token in (backbone.pad_token, backbone.end_of_turn) if token in vocabulary)
            tokenizer.pad_token = next(known, tokenizer.eos_token)
        notes += write_generation_config(config, source, folder, tokenizer, **end)
        # The original pads on the right, where batched generation would continue behind the padding.
        tokenizer.padding_side = "left"
        write_processor(config, tokenizer, folder)
        return notes


def write_processor(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the processor for the frames that both towers take.

    DINOv2 gets frames with as many patches as SigLIP's, with which the original feeds it (378 pixels beside 384); the
    pixels' mean and deviation are those of the towers' own processors.
    """
    from longvideo.processing.longvu.image_processing_longvu import LongVUImageProcessor
    from longvideo.processing.longvu.processing_longvu import LongVUProcessor
    from longvideo.processing.longvu.video_processing_longvu import LongVUVideoProcessor

    siglip, dino = config.vision_config, config.dino_config
    sides = {"": siglip.image_size, "dino_": siglip.image_size // siglip.patch_size * dino.patch_size}
    options: dict[str, Any] = {}
    for (prefix, side), part in zip(sides.items(), (SIGLIP, DINO), strict=True):
        options[f"{prefix}size"] = {"height": side, "width": side}
        path = folder / ORIGINAL_FOLDER / part.name / "preprocessor_config.json"
        given = read_json(path) if path.is_file() else {}
        options |= {f"{prefix}{name}": given[name] for name in ("image_mean", "image_std") if given.get(name)}
    LongVUProcessor(
        image_processor=LongVUImageProcessor(**options),
        tokenizer=tokenizer,
        video_processor=LongVUVideoProcessor(**options),
    ).save_pretrained(folder)


register_conversion(LongVUConversion())
