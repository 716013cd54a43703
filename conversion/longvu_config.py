"""What the config.json of an original LongVU says, in the terms of `LongVUConfig`, and back.

Training wrote the fields that its command line knew; where one is missing the original code has a fallback, which is
not always the published value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longvideo.conversion.checkpoint_io import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Backbone:
    """A decoder that LongVU was released with.

    Args:
        model_type: Its model_type in Transformers.
        architecture: The original's class.
        end_of_turn: The token that ends an answer.
        pad_token: The token that the original pads with.
        tokenizer_class: Class of its tokenizer, where the files name none.
    """

    model_type: str
    architecture: str
    end_of_turn: str
    pad_token: str
    tokenizer_class: str


BACKBONES = {
    "qwen": Backbone("qwen2", "CambrianQwenForCausalLM", "<|im_end|>", "<|endoftext|>", "Qwen2Tokenizer"),
    "llama": Backbone(
        "llama",
        "CambrianLlamaForCausalLM",
        "<|eot_id|>",
        "<|reserved_special_token_0|>",
        "PreTrainedTokenizerFast",
    ),
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
TEXT_FIELDS = {
    "qwen2": (*SHARED_FIELDS, "use_sliding_window", "sliding_window", "max_window_layers"),
    "llama": (*SHARED_FIELDS, "head_dim", "attention_bias", "mlp_bias"),
}
REQUIRED_FIELDS = (*SHARED_FIELDS[:5], "mm_projector_type")
# Native name: original name and value where it is missing. The thresholds and switches are the original code's
# fallbacks, the sizes the published ones; a size that does not fit the weights is found when shapes are compared.
FALLBACKS: dict[str, tuple[str, Any]] = {
    "vision_hidden_size": ("vision_hidden_size", 1024),
    "num_query_group": ("num_query_group", 1),
    "connector_depth": ("connector_depth", 3),
    "highres": ("highres", False),
    "lowres_token": ("lowres_token", 8),
    "dino_threshold": ("dino_threshold", 0.83),
    "drop_threshold": ("drop_threshold", 0.7),
    "frame_pos": ("frame_pos", False),
    "context_length": ("tokenizer_model_max_length", 8192),
    "inference_max_length": ("inference_max_length", 16),
}
TOKEN_LENGTHS = ("mm_vision_tower_aux_token_len_list", "vision_tower_aux_token_len_list")
PUBLISHED_TOKENS = 576
CONNECTOR_HEADS = 16
TOWER_NAMES = ("siglip", "dinov2")
TOWER_KINDS = {"towers/siglip": ("siglip_vision_model", "siglip"), "towers/dinov2": ("dinov2",)}


def backbone_of(config: dict[str, Any]) -> Backbone:
    """Return the decoder that an original config names.

    Args:
        config: The original config.json.

    Returns:
        The decoder.

    Raises:
        ValueError: if it is neither Qwen2 nor Llama.
    """
    said = f"{config.get('model_type')} {config.get('architectures')}".lower()
    found = [backbone for name, backbone in BACKBONES.items() if name in said]
    if len(found) != 1:
        raise ValueError(
            f"config.json has model_type {config.get('model_type')!r} and architectures "
            f"{config.get('architectures')}; LongVU has cambrian_qwen or cambrian_llama."
        )
    return found[0]


def check_longvu_config(config: dict[str, Any]) -> None:
    """Raise ValueError if an original config is not of a LongVU that this package can build.

    Args:
        config: The original config.json.
    """
    kind = config.get("model_type")
    if config.get("mm_projector_type") != "sva":
        raise ValueError(
            f"config.json (model_type {kind!r}) has mm_projector_type {config.get('mm_projector_type')!r}; LongVU has "
            "'sva'. Other models of the Cambrian family, such as Cambrian-S, share the model_type and are not "
            "converted."
        )
    towers = config.get("mm_vision_tower_aux_list")
    fits = isinstance(towers, list) and [name in str(tower) for name, tower in zip(TOWER_NAMES, towers, strict=False)]
    if towers is not None and (fits != [True, True] or len(towers) != len(TOWER_NAMES)):
        raise ValueError(
            f"config.json (model_type {kind!r}) has mm_vision_tower_aux_list {towers}; LongVU has a SigLIP and a "
            "DINOv2 tower, in this order. This is another model of the Cambrian family, such as Cambrian-1."
        )
    absent = [name for name in REQUIRED_FIELDS if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; expected the config of a LongVU checkpoint.")
    if "quantization_config" in config:
        raise ValueError("config.json describes quantised weights; convert the full-precision checkpoint instead.")
    backbone_of(config)
    query_length(config)
    grid_side(config)
    if (config.get("num_query_group") or 1) != 1:
        raise ValueError(
            f"config.json has num_query_group {config['num_query_group']}; every published LongVU has one group of "
            "queries, which is what can be built."
        )


def query_length(config: dict[str, Any]) -> int:
    """Return the number of queries per frame, which an original config gives twice.

    Args:
        config: The original config.json.

    Returns:
        144 for published video and 576 for image checkpoints.

    Raises:
        ValueError: if it is missing or the two disagree.
    """
    length, queries = config.get("image_token_len"), config.get("query_num_list")
    if length is None and not queries:
        raise ValueError(
            "config.json lacks image_token_len and query_num_list; expected 144 and [144] for a video checkpoint or "
            "576 and [576] for an image checkpoint."
        )
    if length is None:
        length = queries[0]
    if queries and list(queries) != [length]:
        raise ValueError(
            f"config.json has image_token_len {length} and query_num_list {queries}; expected the same number in "
            "both, 144 for a video checkpoint or 576 for an image checkpoint."
        )
    return length


def grid_side(config: dict[str, Any]) -> int:
    """Return the side of the grid to which the features of both towers are resampled.

    Args:
        config: The original config.json.

    Returns:
        24 for published checkpoints.

    Raises:
        ValueError: if the towers differ or their number of tokens is not a square.
    """
    lengths = next((config[name] for name in TOKEN_LENGTHS if config.get(name)), [PUBLISHED_TOKENS] * 2)
    side = math.isqrt(int(lengths[0]))
    if len(lengths) != 2 or lengths[0] != lengths[1] or side * side != lengths[0]:
        raise ValueError(
            f"config.json has {TOKEN_LENGTHS[0]} {lengths}; expected the same square number for both towers, as "
            f"{[PUBLISHED_TOKENS] * 2}."
        )
    return side


def check_longvu_parts(
    config: dict[str, Any], parts: Mapping[str, dict[str, Any]], infos: Mapping[str, TensorInfo]
) -> None:
    """Raise ValueError if towers or the number of queries do not fit the weights.

    Args:
        config: The original config.json.
        parts: The towers' config.json, by part name.
        infos: Headers of all tensors.
    """
    for tower, (name, kinds) in enumerate(TOWER_KINDS.items()):
        if name not in parts:
            continue
        given = parts[name].get("model_type")
        if given not in kinds:
            raise ValueError(
                f"the folder given for {name} has model_type {given!r}; expected {kinds[0]!r}. "
                "--vision-tower is the SigLIP tower, --dino-tower the DINOv2 tower."
            )
        projector = infos.get(f"model.mm_projector_aux_{tower}.0.weight")
        width = tower_fields(parts[name]).get("hidden_size")
        if projector is not None and len(projector.shape) == 2 and projector.shape[1] != width:
            raise ValueError(
                f"the tower in {name} is {width} wide, but the checkpoint was trained with one of "
                f"{projector.shape[1]} (mm_projector_aux_{tower} takes {projector.shape[1]} values per patch). Give "
                "the repository that the checkpoint was trained with."
            )
    positions = infos.get("model.vision_sampler_0.layers.0.pos_embed_0")
    block = (grid_side(config) // max(1, math.isqrt(query_length(config)))) ** 2
    # The image checkpoints' queries see one key per tower and have no table.
    stored = positions.shape[0] if positions is not None and positions.shape else 1
    if "model.vision_sampler_0.layers.0.proj_in.weight" in infos and stored != block:
        meant = grid_side(config) ** 2 // stored
        raise ValueError(
            f"config.json has image_token_len {query_length(config)}, with which a query sees {block} keys per tower, "
            f"but the weights are made for {stored}, which is image_token_len {meant}. Set image_token_len to {meant} "
            f"and query_num_list to [{meant}] in config.json, or take the config.json of these weights."
        )


def tower_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the vision half of a tower's config.json.

    Args:
        config: The config.json of the tower's repository; that of the whole SigLIP holds the vision half as an entry.

    Returns:
        Arguments of the tower's configuration class, with its model_type.
    """
    if config.get("model_type") == "siglip":
        return {**config.get("vision_config", {}), "model_type": "siglip_vision_model"}
    left_out = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    return {name: value for name, value in config.items() if name not in left_out}


def native_fields(
    config: dict[str, Any], siglip: dict[str, Any] | None, dino: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the arguments of `LongVUConfig` for an original config.

    Args:
        config: The original config.json.
        siglip: The SigLIP tower's config.json; None for the published sizes.
        dino: The DINOv2 tower's config.json; None for the published sizes.

    Returns:
        The arguments; the placeholder ids are the two behind the embedding table.
    """
    model_type = backbone_of(config).model_type
    text = {name: config[name] for name in TEXT_FIELDS[model_type] if config.get(name) is not None}
    text["rope_parameters"] = rope_parameters(config, model_type)
    fields = {
        name: fallback if config.get(original) is None else config[original]
        for name, (original, fallback) in FALLBACKS.items()
    }
    return {
        "text_config": {"model_type": model_type, **text},
        "vision_config": None if siglip is None else tower_fields(siglip),
        "dino_config": None if dino is None else tower_fields(dino),
        "image_token_id": config["vocab_size"],
        "video_token_id": config["vocab_size"] + 1,
        "vision_grid_size": grid_side(config),
        "image_token_len": query_length(config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "connector_num_heads": config.get("connector_num_heads") or CONNECTOR_HEADS,
        **fields,
    }


def rope_parameters(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the rotary parameters in the form of Transformers 5.

    Args:
        config: The original config.json with `rope_theta` and `rope_scaling`.
        model_type: "qwen2" or "llama".

    Returns:
        `rope_parameters`.

    Source: the original's Qwen2 class sets `rope_scaling` to None, its Llama class does not.
    """
    theta = config.get("rope_theta")
    scaling = dict(config.get("rope_scaling") or {}) if model_type == "llama" else {}
    old_name = scaling.pop("type", None)
    scaling.setdefault("rope_type", old_name or "default")
    return {"rope_theta": float(10000.0 if theta is None else theta), **scaling}


def original_fields(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return an original config for a native one.

    Args:
        config: A `LongVUConfig`.

    Returns:
        The content of config.json.

    Raises:
        ValueError: if the decoder has no original layout.
    """
    text = config.text_config.to_dict()
    name = next((name for name, b in BACKBONES.items() if b.model_type == text.get("model_type")), None)
    if name is None:
        kinds = [backbone.model_type for backbone in BACKBONES.values()]
        raise ValueError(f"a decoder of type {text.get('model_type')!r} has no original layout; expected {kinds}.")
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", 10000.0)
    tokens = [config.vision_grid_size**2] * 2
    # A constant of the original code, so only another number needs an entry, which the original does not know.
    heads = config.connector_num_heads
    return {
        "architectures": [BACKBONES[name].architecture],
        "model_type": f"cambrian_{name}",
        **{key: text[key] for key in TEXT_FIELDS[BACKBONES[name].model_type] if key in text},
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "mm_projector_type": "sva",
        "mm_vision_tower_aux_list": ["siglip/CLIP-ViT-SO400M-14-384", "facebook/dinov2-giant-res378"],
        **dict.fromkeys(TOKEN_LENGTHS, tokens),
        "image_token_len": config.image_token_len,
        "query_num_list": [config.image_token_len],
        "connector_only": True,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "is_image_newline": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_padding_side": "right",
        **{original: getattr(config, native) for native, (original, _) in FALLBACKS.items()},
        **({} if heads == CONNECTOR_HEADS else {"connector_num_heads": heads}),
    }


def original_tower_fields(config: "PreTrainedConfig", architecture: str) -> dict[str, Any]:
    """Return the config.json of a tower's own repository.

    Args:
        config: The tower's configuration.
        architecture: The tower's class.

    Returns:
        The content of config.json.
    """
    fields = config.to_diff_dict()
    return {**fields, "architectures": [architecture], "model_type": config.model_type}
