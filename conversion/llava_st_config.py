"""What an original LLaVA-ST says about its sizes, in the terms of `LlavaSTConfig`, and back.

The original writes most sizes into its code (100 frames, 100 times, heights and widths, packers of 8 heads) and loads
the tower's configuration from the tower's own repository, so sizes are read from the tensors' headers. Numbers of
heads leave no trace there; for other than published widths config.json must give them.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.decoders import QWEN2_FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RESAMPLER = "fast_slow_resampler"
PROJECTOR = "mlp2x_gelu"
TOWER = "google/siglip-so400m-patch14-384"
REQUIRED_FIELDS = (*QWEN2_FIELDS[:6], "mm_vision_tower")
# Where `complete_config` puts what headers say.
READ_SIZES = "sizes_read_from_headers"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Axis to the original's name of it, in the order of the ids.
AXES = {"temporal": "temporal", "height": "spatial_height", "width": "spatial_width"}
SIDES = ("input", "output")
VISION = "model.vision_tower.vision_tower.vision_model."
PACKER = "model.vision_resampler.token_packer.devide_attention."
PUBLISHED_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# Constants of the original code.
PUBLISHED_PACKER = {"hidden_size": 1024, "num_heads": 8, "spatial_factor": 3, "temporal_factor": 5}
PUBLISHED_COORDINATES = 100
TOWER_OVERRIDES, PACKER_OVERRIDES = "vision_tower_overrides", "packer_overrides"


def table_name(axis: str, side: str) -> str:
    """Return the original's name of a coordinate table.

    Args:
        axis: "temporal", "height" or "width".
        side: "input" or "output".

    Returns:
        The tensor's name.
    """
    return f"model.{AXES[axis]}_{side}_embeddings.weight"


TABLES = tuple(table_name(axis, side) for axis in AXES for side in SIDES)


def check_llava_st_config(config: dict[str, Any]) -> None:
    """Raise ValueError if an original config is not of a LLaVA-ST that this package can build.

    Args:
        config: The original config.json.
    """
    kind = config.get("model_type")
    if config.get("mm_resampler_type") != RESAMPLER:
        raise ValueError(
            f"config.json (model_type {kind!r}) has mm_resampler_type {config.get('mm_resampler_type')!r}; LLaVA-ST "
            f"has {RESAMPLER!r}. This is another model of the LLaVA family, such as the LLaVA-OneVision that LLaVA-ST "
            "was trained from, which has neither its packers nor its coordinates."
        )
    absent = [name for name in REQUIRED_FIELDS if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; expected the config of a LLaVA-ST checkpoint.")
    if "quantization_config" in config:
        raise ValueError("config.json describes quantised weights; convert the full-precision checkpoint instead.")
    if config.get("mm_projector_type", PROJECTOR) != PROJECTOR or "siglip" not in config["mm_vision_tower"].lower():
        raise ValueError(
            f"config.json has mm_projector_type {config.get('mm_projector_type')!r} and mm_vision_tower "
            f"{config['mm_vision_tower']!r}; LLaVA-ST has {PROJECTOR!r} and a SigLIP tower."
        )
    if config.get("tie_word_embeddings"):
        raise ValueError(
            "config.json has tie_word_embeddings true, but input and output tables of LLaVA-ST are different tensors. "
            "Store lm_head.weight beside the embeddings and set tie_word_embeddings to false."
        )


def read_sizes(config: dict[str, Any], infos: Mapping[str, TensorInfo], *, coordinates: str) -> dict[str, Any]:
    """Return the sizes that tensors have.

    Args:
        config: The original config.json.
        infos: Headers of all tensors under original names.
        coordinates: The layout that was asked for; "none" for a model of stage 1.

    Returns:
        `coordinates`, `tower`, `packer`, `num_temporal`, `num_spatial` and `num_rows` (of the embedding); what has no
        tensor is left out, so that it is reported as missing later.

    Raises:
        ValueError: if the coordinate tables are missing, empty or do not fit each other.
    """
    shapes = {name: info.shape for name, info in infos.items()}
    num_temporal, num_spatial = (0, 0) if coordinates == "none" else table_sizes(config, shapes)
    if coordinates == "none" and any(name in shapes for name in TABLES):
        raise ValueError("--coordinates none is for models of stage 1, but these files hold coordinate tables.")
    return {
        "coordinates": coordinates,
        "num_temporal": num_temporal,
        "num_spatial": num_spatial,
        "num_rows": shapes[EMBEDDING][0] if EMBEDDING in shapes else config["vocab_size"],
        "tower": read_tower_sizes(config, shapes),
        "packer": {"hidden_size": shapes[f"{PACKER}ln_q.weight"][0]} if f"{PACKER}ln_q.weight" in shapes else {},
    }


def table_sizes(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the number of times and of heights (and widths) of the coordinate tables."""
    tables = {name: shapes.get(name) for name in TABLES}
    absent = [name for name, shape in tables.items() if shape is None]
    if len(absent) == len(tables):
        packed = any(name.startswith("model.vision_resampler.") for name in shapes)
        raise ValueError(
            "the files hold no coordinate tables (model.temporal_input_embeddings.weight and five more). "
            + (
                "This is LLaVA-ST after stage 1, before coordinates are learned: give the folders of the later stages "
                "with --lora-stages, or --coordinates none for a model without coordinates."
                if packed
                else "This is no LLaVA-ST; expected the merged model, or the folder of stage 1 with --lora-stages."
            )
        )
    width = config["hidden_size"]
    wrong = {name: shape for name, shape in tables.items() if shape is None or len(shape) != 2 or shape[1] != width}
    wrong |= {name: shape for name, shape in tables.items() if name not in wrong and not shape[0]}
    if wrong:
        listed = ", ".join(f"{name} {'missing' if shape is None else list(shape)}" for name, shape in wrong.items())
        raise ValueError(
            f"coordinate tables are damaged: {listed}; expected [entries, {width}] each. Files saved from partitioned "
            "training (ZeRO) may hold empty ones: gather the parameters and save again."
        )
    rows = {name: shape[0] for name, shape in tables.items() if shape is not None}
    times, *spaces = ({rows[table_name(axis, side)] for side in SIDES} for axis in AXES)
    if len(times) > 1 or len(set.union(*spaces)) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(
            f"coordinate tables have different numbers of rows ({listed}); expected as many input as output rows, and "
            "as many heights as widths."
        )
    return times.pop(), spaces[0].pop()


def read_tower_sizes(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the tower's sizes as far as its tensors tell them."""
    sizes: dict[str, int] = {}
    patches, positions = (
        shapes.get(f"{VISION}embeddings.{name}.weight") for name in ("patch_embedding", "position_embedding")
    )
    if patches is not None and len(patches) == 4 and positions is not None:
        sizes |= {"hidden_size": patches[0], "patch_size": patches[2]}
        grid = math.isqrt(positions[0])
        # The published tower leaves a rest of the image out: 384 pixels are 27 patches of 14.
        named = re.search(r"patch\d+-(\d+)", str(config["mm_vision_tower"]))
        sizes["image_size"] = grid * patches[2]
        if named and int(named[1]) // patches[2] == grid:
            sizes["image_size"] = int(named[1])
    layer = re.compile(re.escape(f"{VISION}encoder.layers.") + r"(\d+)\.")
    numbers = {int(match[1]) for match in map(layer.match, shapes) if match}
    if numbers:
        sizes["num_hidden_layers"] = max(numbers) + 1
    inner = shapes.get(f"{VISION}encoder.layers.0.mlp.fc1.weight")
    return sizes if inner is None else {**sizes, "intermediate_size": inner[0]}


def tower_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the tower's configuration.

    Args:
        config: What `complete_config` returned, or an original config.json for published sizes.

    Returns:
        Arguments with model_type.

    Raises:
        ValueError: if the number of heads is unknown.
    """
    given = checked_overrides(config, TOWER_OVERRIDES, PUBLISHED_TOWER)
    read = config.get(READ_SIZES, {}).get("tower", {})
    sizes = {**PUBLISHED_TOWER, **read, **given}
    if sizes["hidden_size"] != PUBLISHED_TOWER["hidden_size"] and "num_attention_heads" not in given:
        raise unknown_heads("tower", sizes["hidden_size"], TOWER_OVERRIDES, "num_attention_heads")
    return {"model_type": "siglip_vision_model", **sizes}


def packer_fields(config: dict[str, Any], grid: int) -> dict[str, int]:
    """Return the packers' sizes.

    Args:
        config: What `complete_config` returned, or an original config.json for published sizes.
        grid: Patches along a side of a frame.

    Returns:
        Values by the names of `PUBLISHED_PACKER`.

    Raises:
        ValueError: if the number of heads is unknown, or numbers of latents do not fit the grid.
    """
    given = checked_overrides(config, PACKER_OVERRIDES, PUBLISHED_PACKER)
    sizes = {**PUBLISHED_PACKER, **config.get(READ_SIZES, {}).get("packer", {}), **given}
    if sizes["hidden_size"] != PUBLISHED_PACKER["hidden_size"] and "num_heads" not in given:
        raise unknown_heads("packers", sizes["hidden_size"], PACKER_OVERRIDES, "num_heads")
    for name, power in (("mm_perceiver_latents", 1), ("mm_perceiver_latents_fast", 2)):
        wanted = (grid // sizes["spatial_factor"] ** power) ** 2
        if config.get(name) not in (None, wanted):
            raise ValueError(
                f"config.json has {name} {config[name]}, but the packers make {wanted} tokens of a frame of {grid} x "
                f"{grid} patches. Is config.json that of these weights?"
            )
    return sizes


def checked_overrides(config: dict[str, Any], field: str, known: dict[str, int]) -> dict[str, Any]:
    """Return the entries of `field` after refusing those that mean nothing."""
    given = config.get(field) or {}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{field} has {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return given


def unknown_heads(what: str, width: int, field: str, name: str) -> ValueError:
    """Return the error for a number of heads that no file tells."""
    return ValueError(
        f"the {what} of this checkpoint are {width} wide, not as published, so their number of attention heads is "
        f'unknown. Give it in config.json: "{field}": {{"{name}": NUMBER}}.'
    )


def token_fields(config: dict[str, Any], num_temporal: int, num_spatial: int) -> dict[str, int]:
    """Return the ids of the added tokens where no tokenizer tells them: the last rows of the embedding.

    Args:
        config: The original config.json, for `vocab_size`.
        num_temporal: Number of times.
        num_spatial: Number of heights and of widths.

    Returns:
        Fields of `LlavaSTConfig`.
    """
    from longvideo.processing.llava_st.tokenizer_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS

    start = config["vocab_size"]
    if not num_temporal:
        ids = {name: start - len(VISUAL_TOKENS) + i for i, name in enumerate(VISUAL_TOKENS)}
        return {**ids, "num_temporal_tokens": 0, "num_spatial_tokens": 0}
    names = [*VISUAL_TOKENS, *TEMPLATE_TOKENS]
    return {
        **{name: start - len(names) + i for i, name in enumerate(names)},
        "coordinate_token_start": start,
        "num_temporal_tokens": num_temporal,
        "num_spatial_tokens": num_spatial,
    }


def native_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LlavaSTConfig`, with every behaviour of the released code.

    Args:
        config: What `complete_config` returned, or an original config.json for published sizes.

    Returns:
        The arguments.
    """
    read = config.get(READ_SIZES, {})
    tower = tower_fields(config)
    packer = packer_fields(config, tower["image_size"] // tower["patch_size"])
    num_temporal, num_spatial = (read.get(name, PUBLISHED_COORDINATES) for name in ("num_temporal", "num_spatial"))
    tokens = read.get("tokens") or token_fields(config, num_temporal, num_spatial)
    layout = read.get("coordinates", "folded")
    rows = tokens.get("coordinate_token_start", config["vocab_size"])
    rows += num_temporal + 2 * num_spatial if layout == "folded" else 0
    text = {name: config[name] for name in QWEN2_FIELDS if config.get(name) is not None}
    theta = config.get("rope_theta")
    return {
        # The original sets rope_scaling to None whatever the file says.
        "text_config": {
            "model_type": "qwen2",
            **text,
            "vocab_size": rows,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 if theta is None else float(theta)},
        },
        "vision_config": tower,
        **tokens,
        "coordinate_layout": "split" if layout == "split" else "folded",
        # Every frame takes one entry of the table of times.
        "num_frames": num_temporal or config.get("max_frame") or PUBLISHED_COORDINATES,
        "packer_hidden_size": packer["hidden_size"],
        "packer_num_heads": packer["num_heads"],
        "spatial_factor": packer["spatial_factor"],
        "temporal_factor": packer["temporal_factor"],
        "packer_query": "center",
        "use_downsample_image": bool(config.get("use_downsample_image", False)),
        "lape_interpolate_frames": False,
        "splice_fast_stream": False,
        "inject_width_inputs": False,
        "soft_coordinate_targets": True,
        "sample_loss": "sample_sum",
        "tie_word_embeddings": False,
    }


def original_fields(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return an original config for a native one.

    Args:
        config: A `LlavaSTConfig`.

    Returns:
        The content of config.json.

    Raises:
        ValueError: if the model has parts that no original has.
    """
    text = config.text_config.to_dict()
    if text.get("model_type") != "qwen2" or not config.use_packer:
        raise ValueError(
            f"a LLaVA-ST with a decoder of type {text.get('model_type')!r} and use_packer {config.use_packer} has no "
            "original layout; expected qwen2 and packers."
        )
    coordinates = {"num_spatial_tokens": config.num_spatial_tokens, "num_temporal_tokens": config.num_temporal_tokens}
    tower = {name: getattr(config.vision_config, name) for name in PUBLISHED_TOWER}
    packer = {
        "hidden_size": config.packer_hidden_size,
        "num_heads": config.packer_num_heads,
        "spatial_factor": config.spatial_factor,
        "temporal_factor": config.temporal_factor,
    }
    grid = config.grid_size
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **{name: text[name] for name in QWEN2_FIELDS if name in text},
        "vocab_size": config.coordinate_token_start if config.num_coordinate_tokens else text["vocab_size"],
        "tie_word_embeddings": False,
        "rope_theta": (text.get("rope_parameters") or {}).get("rope_theta", 1e6),
        "rope_scaling": None,
        "mm_vision_tower": TOWER,
        "vision_tower": TOWER,
        "mm_hidden_size": tower["hidden_size"],
        "mm_projector_type": PROJECTOR,
        "mm_resampler_type": RESAMPLER,
        "mm_perceiver_latents": (grid // packer["spatial_factor"]) ** 2,
        "mm_perceiver_latents_fast": (grid // packer["spatial_factor"] ** 2) ** 2,
        "mm_perceiver_depth": 3,
        "mm_perceiver_ff_mult": 4,
        "mm_perceiver_pretrained": None,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_spatial_pool_mode": "bilinear",
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "use_downsample_image": config.use_downsample_image,
        "max_frame": config.num_frames,
        "tokenizer_padding_side": "right",
        **(coordinates if config.num_coordinate_tokens else {}),
        **({} if tower == PUBLISHED_TOWER else {TOWER_OVERRIDES: tower}),
        **({} if packer == PUBLISHED_PACKER else {PACKER_OVERRIDES: packer}),
    }
