"""Puts dual cross-attention into the layers of a decoder, in place, and takes it out again.

Paper: CrossLMM (arXiv 2505.17020), Sec. 3.1: every K decoder layers, between self-attention and MLP.

What a caller does: `patch_decoder(language_model, config)` on a decoder with `layers` (what `AutoModel` gives for
Llama, Mistral, Qwen2, Qwen3, ...), then pass `visual_memory=prepare_visual_memory(...)` to its forward. A model that
holds the decoder calls `init_cross_attention` in its `_init_weights`. `add_t2v` enters stage 2.

A patched layer keeps its parts under their names and gets the child `dual_cross_attention`, so that all other keys of
the state dict stay as they were. Its class is a subclass of the layer's own, made once for each.
"""

import copy

import torch
from torch import nn
from transformers import initialization as init

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.dual_cross_attention import CrossLMMCrossAttention, CrossLMMDualCrossAttention
from longvideo.modeling.crosslmm.visibility import VisibilityPlan, VisualMemory

LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PATCHED_CLASSES: dict[type, type] = {}


class PatchedLayerMixin:
    """Forward of a patched layer over the four parts of its own class."""

    original_class: type

    def __call__(
        self, hidden_states: torch.Tensor, *args, visual_memory: VisualMemory | None = None, **kwargs
    ) -> torch.Tensor:
        """Hands the memory's tokens on by position: only so does re-entrant checkpointing return their gradient."""
        if args:
            raise ValueError(
                f"A patched {self.original_class.__name__} takes all but the hidden states by keyword, got "
                f"{len(args)} more by position."
            )
        tokens, plan = (None, None) if visual_memory is None else (visual_memory.tokens, visual_memory.plan)
        return super().__call__(hidden_states, tokens, visual_plan=plan, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory_tokens: torch.Tensor | None = None,
        visual_plan: VisibilityPlan | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Runs self-attention, dual cross-attention and MLP.

        Args:
            hidden_states: (B, S, D).
            memory_tokens: (P, E) new original tokens or None.
            visual_plan: who sees what; None skips cross-attention.
            **kwargs: what the layer's own forward takes.

        Returns:
            (B, S, D).

        Source: Eq. 4, then Eqs. 5-10.
        """
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + attended
        if visual_plan is not None:
            hidden_states = self.dual_cross_attention(
                hidden_states, memory_tokens, visual_plan, kwargs.get("past_key_values")
            )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickles and copies by the original class, because the patched one has no importable name."""
        return (_new_patched, (self.original_class,), *super().__reduce_ex__(protocol)[2:])


def _new_patched(original_class: type) -> nn.Module:
    cls = patched_layer_class(original_class)
    return cls.__new__(cls)


def patched_layer_class(original_class: type) -> type:
    """Returns the subclass of a decoder layer's class that patched layers have.

    Args:
        original_class: class of an unpatched layer.
    """
    if original_class not in _PATCHED_CLASSES:
        # The forward stands in the class body because checkpointing wraps what it finds there.
        body = {"original_class": original_class, "forward": PatchedLayerMixin.forward, "__module__": __name__}
        name = f"CrossLMM{original_class.__name__}"
        _PATCHED_CLASSES[original_class] = type(name, (PatchedLayerMixin, original_class), body)
    return _PATCHED_CLASSES[original_class]


def _check_layer(layer: nn.Module, index: int) -> None:
    name = type(layer).__name__
    if isinstance(layer, PatchedLayerMixin):
        raise ValueError(f"Layer {index} is patched already ({name}). Call unpatch_decoder first.")
    found = {child for child, _ in layer.named_children()}
    # Some families scale the residual by a plain number of the layer, which the patched forward would leave out.
    scaled = [key for key in vars(layer) if "residual" in key or "multiplier" in key]
    if found != set(LAYER_PARTS) or scaled:
        raise ValueError(
            f"Layer {index} of the decoder is a {name} with the parts {sorted(found) + scaled}. CrossLMM can patch "
            f"layers of exactly {', '.join(LAYER_PARTS)}: Llama, Mistral, Qwen2, Qwen3 and the like."
        )


def patched_layers(language_model: nn.Module) -> list[nn.Module]:
    """Returns the patched layers of a decoder, or of a model that holds one, in order."""
    return [module for module in language_model.modules() if isinstance(module, PatchedLayerMixin)]


def patch_decoder(language_model: nn.Module, config: CrossLMMConfig) -> nn.Module:
    """Adds dual cross-attention to the layers `config.cross_attention_layers`, in place.

    Args:
        language_model: decoder with `layers`.
        config: CrossLMM configuration.

    Returns:
        The same model. Its outputs are equal bit for bit to what they were.

    Raises:
        ValueError: no `layers`, fewer layers than the configuration names, or layers of other parts.
    """
    layers = getattr(language_model, "layers", None)
    if layers is None:
        raise ValueError(
            f"{type(language_model).__name__} has no `layers`. Pass the decoder itself, as AutoModel loads it; of a "
            "model with a head pass `model.model`."
        )
    chosen = list(config.cross_attention_layers)
    if chosen and max(chosen) >= len(layers):
        raise ValueError(
            f"cross_attention_layers is {chosen}, but {type(language_model).__name__} has {len(layers)} layers, "
            f"numbered from 0. Choose other layers, or a cross_attention_interval of at most {len(layers)}."
        )
    for i in chosen:
        _check_layer(layers[i], i)
    for slot, i in enumerate(chosen):
        layer = layers[i]
        norm = copy.deepcopy(layer.post_attention_layernorm)
        dual = CrossLMMDualCrossAttention(language_model.config, config, norm, slot=slot)
        for name in ("v2v", "t2v", "v2v_gate", "t2v_gate"):
            _place_like(dual, name, layer)
        layer.__class__ = patched_layer_class(type(layer))
        layer.dual_cross_attention = dual
        dual.train(layer.training)
        _init_layer(layer, config)
    _name_unsplit_layers(language_model)
    return language_model


def _place_like(dual: CrossLMMDualCrossAttention, name: str, layer: nn.Module) -> None:
    child = getattr(dual, name, None)
    # The norm and not a projection, whose weight may be quantised.
    like = layer.post_attention_layernorm.weight
    if isinstance(child, nn.Module):
        child.to(like.device, like.dtype)
    elif child is not None:
        setattr(dual, name, nn.Parameter(child.data.to(like.device, like.dtype)))


def _name_unsplit_layers(language_model: nn.Module) -> None:
    """Lists the patched classes among those that must stay whole on a device."""
    named = getattr(language_model, "_no_split_modules", None)
    if named is None:
        return
    patched = {cls.__name__ for cls in _PATCHED_CLASSES.values()}
    present = {type(layer).__name__ for layer in language_model.layers}
    language_model._no_split_modules = (set(named) - patched) | (present & patched)


def unpatch_decoder(language_model: nn.Module) -> nn.Module:
    """Takes all cross-attention out again, in place.

    Args:
        language_model: decoder, or a model that holds one; without patched layers nothing changes.

    Returns:
        The same model with its layers' own classes.
    """
    for layer in patched_layers(language_model):
        del layer.dual_cross_attention
        layer.__class__ = layer.original_class
    for module in language_model.modules():
        if hasattr(module, "layers") and hasattr(module, "_no_split_modules"):
            _name_unsplit_layers(module)
    return language_model


def _init_branch(module: CrossLMMCrossAttention, layer: nn.Module, config: CrossLMMConfig) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            init.ones_(child.weight)
            init.zeros_(child.bias)
            continue
        source = getattr(layer.self_attn, name) if config.init_from_self_attn else None
        if source is None:
            init.normal_(child.weight, mean=0.0, std=config.initializer_range)
        else:
            init.copy_(child.weight, source.weight)
        if child.bias is not None:
            if source is None or source.bias is None:
                init.zeros_(child.bias)
            else:
                init.copy_(child.bias, source.bias)


def _init_layer(layer: nn.Module, config: CrossLMMConfig, names: tuple[str, ...] = ("v2v", "t2v")) -> None:
    dual = layer.dual_cross_attention
    with torch.no_grad():
        for name in names:
            module = getattr(dual, name)
            if module is None:
                continue
            _init_branch(module, layer, config)
            if config.gate_mode == "residual":
                init.zeros_(module.o_proj.weight)
            init.constant_(getattr(dual, f"{name}_gate"), 0.0 if config.gate_mode == "attn" else 1.0)


def init_cross_attention(model: nn.Module, config: CrossLMMConfig) -> None:
    """Initialises the cross-attention of all patched layers: random or copied projections, closed gates.

    Args:
        model: decoder, or a model that holds one.
        config: CrossLMM configuration.

    Values that were loaded from a checkpoint (transformers marks them) are left as they are, so `_init_weights` may
    call it while loading. The query norms are not touched.
    """
    for layer in patched_layers(model):
        _init_layer(layer, config)
        if config.init_t2v_from_v2v:
            _copy_v2v(layer.dual_cross_attention)


def _copy_v2v(dual: CrossLMMDualCrossAttention) -> None:
    if dual.v2v is None or dual.t2v is None:
        return
    with torch.no_grad():
        source = dict(dual.v2v.named_parameters())
        for name, parameter in dual.t2v.named_parameters():
            init.copy_(parameter, source[name])


def add_t2v(language_model: nn.Module, config: CrossLMMConfig) -> nn.Module:
    """Enters stage 2: gives every patched layer a T2V with a closed gate, in place.

    Args:
        language_model: patched decoder, or a model that holds one.
        config: CrossLMM configuration; its `use_t2v` becomes True. `init_t2v_from_v2v` copies the projections of V2V,
            `init_from_self_attn` those of self-attention, else they are random.

    Returns:
        The same model; its outputs do not change.

    Raises:
        ValueError: no patched layer, or T2V is there already.

    Source: Table 2c and supplement, T2V in instruction tuning only.
    """
    layers = patched_layers(language_model)
    if not layers or any(layer.dual_cross_attention.t2v is not None for layer in layers):
        state = "has no patched layers" if not layers else "has T2V already"
        raise ValueError(
            f"{type(language_model).__name__} {state}. add_t2v takes a model that was patched with use_t2v=False."
        )
    for layer in layers:
        dual = layer.dual_cross_attention
        dual.add_branch("t2v")
        for name in ("t2v", "t2v_gate"):
            _place_like(dual, name, layer)
        dual.t2v.train(dual.training)
        _init_layer(layer, config, names=("t2v",))
        if config.init_t2v_from_v2v:
            _copy_v2v(dual)
    config.use_t2v = True
    return language_model
