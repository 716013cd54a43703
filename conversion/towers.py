"""Names of the tensors of towers that several originals share."""

ENCODER_NAMES = (
    "encoder.layers.{}.layer_norm1.weight",
    "encoder.layers.{}.layer_norm1.bias",
    "encoder.layers.{}.layer_norm2.weight",
    "encoder.layers.{}.layer_norm2.bias",
    "encoder.layers.{}.self_attn.q_proj.weight",
    "encoder.layers.{}.self_attn.q_proj.bias",
    "encoder.layers.{}.self_attn.k_proj.weight",
    "encoder.layers.{}.self_attn.k_proj.bias",
    "encoder.layers.{}.self_attn.v_proj.weight",
    "encoder.layers.{}.self_attn.v_proj.bias",
    "encoder.layers.{}.self_attn.out_proj.weight",
    "encoder.layers.{}.self_attn.out_proj.bias",
    "encoder.layers.{}.mlp.fc1.weight",
    "encoder.layers.{}.mlp.fc1.bias",
    "encoder.layers.{}.mlp.fc2.weight",
    "encoder.layers.{}.mlp.fc2.bias",
)
SIGLIP_NAMES = (
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.bias",
    "embeddings.position_embedding.weight",
    *ENCODER_NAMES,
)
# Features are those before the last norm; the pooling head runs in the original and its output is thrown away; old
# files also hold the position numbers.
SIGLIP_UNUSED = (
    "embeddings.position_ids",
    "post_layernorm.weight",
    "post_layernorm.bias",
    "head.probe",
    "head.attention.in_proj_weight",
    "head.attention.in_proj_bias",
    "head.attention.out_proj.weight",
    "head.attention.out_proj.bias",
    "head.layernorm.weight",
    "head.layernorm.bias",
    "head.mlp.fc1.weight",
    "head.mlp.fc1.bias",
    "head.mlp.fc2.weight",
    "head.mlp.fc2.bias",
)
