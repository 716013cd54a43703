"""Conversion of original LLaVA-ST checkpoints (arXiv 2501.08282, repository appletea233/LLaVA-ST).

The release stores coordinates in six tables beside embedding and head; here they are folded into both, or kept as they
are. Stages of training are one full model and adapters, which are merged on the way (`llava_st_lora.py`). Sizes and
config.json are read in `llava_st_config.py`.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from longvideo.conversion.base import NO_PARTS, ArchitectureConversion, KeyMap, register_conversion
from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.decoders import DECODER_KEYS, load_tokenizer, write_generation_config
from longvideo.conversion.joins import Join
from longvideo.conversion.llava_st_config import (
    AXES,
    EMBEDDING,
    HEAD,
    READ_SIZES,
    VISION,
    check_llava_st_config,
    native_fields,
    original_fields,
    read_sizes,
    table_name,
)
from longvideo.conversion.llava_st_lora import StagedCheckpoint
from longvideo.conversion.originals import ORIGINAL_FOLDER
from longvideo.conversion.parts import SourceCheckpoint
from longvideo.conversion.towers import SIGLIP_NAMES, SIGLIP_UNUSED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKERS = {"token_packer": "spatial", "token_packer_slow": "temporal", "token_packer_fast": "fast"}
PACKER_NAMES = (
    *(f"to_{x}.{i}.{kind}" for x in "qkv" for i in (0, 2) for kind in ("weight", "bias")),
    *(f"ln_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")),
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "to_out.weight",
)
KEYS: dict[str, str | None] = {
    **DECODER_KEYS,
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    # The base model ends image rows with it; this one does not, but its files may still hold it.
    "model.image_newline": None,
    **{f"{VISION}{name}": f"model.vision_tower.{name}" for name in SIGLIP_NAMES},
    **{f"{VISION}{name}": None for name in SIGLIP_UNUSED},
    **{
        f"model.vision_resampler.{original}.devide_attention.{name}": f"model.packer.{native}.{name}"
        for original, native in PACKERS.items()
        for name in PACKER_NAMES
    },
    **{
        table_name(axis, side): f"model.coordinates.{axis}_{side}.weight"
        for axis in AXES
        for side in ("input", "output")
    },
}
COORDINATE_LAYOUTS = ("folded", "split", "none")
END_OF_TURN = "<|im_end|>"


class LlavaSTConversion(ArchitectureConversion):
    """LLaVA-ST with a Qwen2 decoder and SigLIP."""

    name = "llava_st"
    original_model_types = ("llava_qwen",)
    options = MappingProxyType({"coordinates": "folded", "lora_stages": ()})

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise ValueError if the original config is not a LLaVA-ST that this package can build.

        Args:
            config: The original config.json.
        """
        check_llava_st_config(config)

    def open_source(self, source: Path, parts: Mapping[str, Path], options: Mapping[str, Any]) -> SourceCheckpoint:
        """Open the source, with the stages that are merged into it.

        Args:
            source: The original folder.
            parts: Not needed; the tower is in the checkpoint.
            options: The choices.

        Returns:
            Its tensors.
        """
        stages = options["lora_stages"]
        return StagedCheckpoint(source, [Path(stage) for stage in stages]) if stages else SourceCheckpoint(source)

    def complete_config(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        *,
        options: Mapping[str, Any],
        source: Path | None = None,
    ) -> dict[str, Any]:
        """Return the original config with the sizes of its tensors and the ids of its tokens.

        Args:
            config: The original config.json.
            infos: Headers of all tensors under original names.
            options: The choices.
            source: The original folder; None on the way back.

        Returns:
            The config with an entry for what was read.

        Raises:
            ValueError: if tables are missing or damaged, or the tokenizer does not fit them.
        """
        layout = options["coordinates"]
        if layout not in COORDINATE_LAYOUTS:
            raise ValueError(f"--coordinates is {layout!r}; expected one of {', '.join(COORDINATE_LAYOUTS)}.")
        read = read_sizes(config, infos, coordinates=layout)
        if options["lora_stages"]:
            # The config of stage 1 knows neither the rows that later stages added nor the tables.
            sizes = {"num_temporal_tokens": read["num_temporal"], "num_spatial_tokens": read["num_spatial"]}
            config = {**config, **sizes, "vocab_size": read["num_rows"]}
        tokenizer = self.load_tokenizer(source, read, extend=bool(options["lora_stages"])) if source else None
        if tokenizer is not None:
            read["tokens"] = checked_tokens(tokenizer, read)
        return {**config, READ_SIZES: read}

    def load_tokenizer(
        self, source: Path, read: Mapping[str, Any], *, extend: bool
    ) -> "PreTrainedTokenizerBase | None":
        """Return the source's tokenizer, with the tokens of later stages added if `extend`; None if there is none."""
        from longvideo.processing.llava_st.tokenizer_llava_st import add_coordinate_tokens

        tokenizer = load_tokenizer(source, unnamed="Qwen2Tokenizer")
        if tokenizer is not None and extend:
            add_coordinate_tokens(tokenizer, read["num_temporal"], read["num_spatial"])
        return tokenizer

    def options_of(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return the choices that a native config was made with.

        Args:
            config: A `LlavaSTConfig`.

        Returns:
            The choices.
        """
        layout = config.coordinate_layout if config.num_coordinate_tokens else "none"
        return {"coordinates": layout, "lora_stages": ()}

    def joins(self, config: "PreTrainedConfig") -> tuple[Join, ...]:
        """Return embedding and head with their coordinate tables, for the folded layout.

        Args:
            config: A `LlavaSTConfig`.

        Returns:
            Two joins, or none for the split layout.
        """
        if config.coordinate_layout != "folded" or not config.num_coordinate_tokens:
            return ()
        sizes = dict(zip(AXES, config.coordinate_sizes, strict=True))
        return tuple(
            Join(
                name,
                ((name, config.coordinate_token_start), *((table_name(axis, side), sizes[axis]) for axis in AXES)),
            )
            for name, side in ((EMBEDDING, "input"), (HEAD, "output"))
        )

    def complete_originals(self, config: dict[str, Any], folder: Path, options: Mapping[str, Any]) -> None:
        """Write the config and tokenizer of the merged model over those of stage 1.

        Args:
            config: What `complete_config` returned.
            folder: Where the source's small files were kept.
            options: The choices.
        """
        if not options["lora_stages"]:
            return
        merged = {name: value for name, value in config.items() if name != READ_SIZES}
        (folder / "config.json").write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
        tokenizer = self.load_tokenizer(folder, config[READ_SIZES], extend=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def key_map(self, config: dict[str, Any], names: Collection[str] = ()) -> KeyMap:
        """Return the table, in terms of the split layout.

        Args:
            config: Not needed; there is one layout.
            names: Not needed.

        Returns:
            The table.
        """
        return KeyMap(KEYS)

    def build_config(
        self, config: dict[str, Any], parts: Mapping[str, dict[str, Any]] = NO_PARTS
    ) -> "PreTrainedConfig":
        """Return the native config for an original one.

        Args:
            config: What `complete_config` returned, or an original config.json for published sizes.
            parts: Not needed; the tower is in the checkpoint.

        Returns:
            A `LlavaSTConfig` with the behaviour of the released code.
        """
        from huggingface_hub.errors import StrictDataclassError

        from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig

        try:
            return LlavaSTConfig(**native_fields(config), architectures=["LlavaSTForConditionalGeneration"])
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from error

    def original_config(self, config: "PreTrainedConfig") -> dict[str, Any]:
        """Return a config in the layout of the original for a native one.

        Args:
            config: A `LlavaSTConfig`.

        Returns:
            The content of config.json.
        """
        return original_fields(config)

    def load_config(self, folder: Path) -> "PreTrainedConfig":
        """Read the config of a converted folder.

        Args:
            folder: The folder.

        Returns:
            A `LlavaSTConfig`.
        """
        from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig

        return LlavaSTConfig.from_pretrained(folder)

    def build_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        """Return the native model.

        Args:
            config: A `LlavaSTConfig`.

        Returns:
            A `LlavaSTForConditionalGeneration` without meaningful weights.
        """
        from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration

        return LlavaSTForConditionalGeneration(config)

    def write_companions(self, config: "PreTrainedConfig", source: Path, folder: Path) -> list[str]:
        """Write the generation config and, when the source has a tokenizer, the processor.

        Args:
            config: The native config.
            source: The original folder.
            folder: The folder that is being written.

        Returns:
            Notes for the report.
        """
        # What was kept of the source has the tokens that merging adds.
        tokenizer = load_tokenizer(folder / ORIGINAL_FOLDER, unnamed="Qwen2Tokenizer")
        notes = write_generation_config(config, source, folder, tokenizer, end_of_turn=END_OF_TURN)
        if tokenizer is None:
            return [
                *notes,
                "the source has no tokenizer, so no processor was written; the ids of visual and template tokens are "
                f"taken to be the last before the coordinates, which begin at {config.coordinate_token_start}.",
            ]
        # The original pads on the right, where batched generation would continue behind the padding.
        tokenizer.padding_side = "left"
        write_processor(config, tokenizer, folder)
        return [
            *notes,
            "as in the released code, the fast stream of videos does not reach the decoder (splice_fast_stream) and "
            "widths in questions are not injected (inject_width_inputs); these weights need it so.",
        ]


def checked_tokens(tokenizer: "PreTrainedTokenizerBase", read: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the added tokens.

    Args:
        tokenizer: The source's tokenizer.
        read: What `read_sizes` returned.

    Returns:
        Fields of `LlavaSTConfig`.

    Raises:
        ValueError: if the tokenizer does not fit embedding and tables.
    """
    from longvideo.processing.llava_st.tokenizer_llava_st import coordinate_token_fields

    try:
        fields = coordinate_token_fields(tokenizer, read["num_temporal"], read["num_spatial"])
    except ValueError as error:
        raise ValueError(f"the tokenizer of the source does not fit the coordinate tables: {error}") from error
    if fields.get("coordinate_token_start", read["num_rows"]) != read["num_rows"]:
        raise ValueError(
            f"<TEMP-000> has the id {fields['coordinate_token_start']} in the tokenizer, but the embedding has "
            f"{read['num_rows']} rows; the original needs both to be equal. Take the tokenizer files that came with "
            "these weights, or take them all away to convert without a processor."
        )
    return fields


def write_processor(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the processor for the model's frames and blocks."""
    from longvideo.processing.llava_st.image_processing_llava_st import LlavaSTImageProcessor
    from longvideo.processing.llava_st.processing_llava_st import LlavaSTProcessor
    from longvideo.processing.llava_st.video_processing_llava_st import LlavaSTVideoProcessor

    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    LlavaSTProcessor(
        image_processor=LlavaSTImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=LlavaSTVideoProcessor(
            size=size, num_frames=config.num_frames, temporal_factor=config.temporal_factor
        ),
        patch_size=config.vision_config.patch_size,
        spatial_factor=config.spatial_factor,
        temporal_factor=config.temporal_factor,
        use_downsample_image=config.use_downsample_image,
    ).save_pretrained(folder)


register_conversion(LlavaSTConversion())
