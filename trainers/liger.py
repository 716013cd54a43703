"""liger-kernel on our models: its kernels in the text model, and the loss fused with the head.

liger-kernel looks a model up by its `model_type` and knows none of ours, so that `use_liger_kernel=True` would do
nothing, silently. The decoder inside is a model that it knows. Head and loss are ours: while a model trains, the
head hands hidden states on, and liger's fused linear cross entropy takes them together with the labels that the model
itself made to fit, whatever it did to the length of the sequence. Logits are never made.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available, is_peft_available, logging

from longvideo.trainers.head_in_loss import has_own_loss, head_in_loss, is_plain_head, without_logits

logger = logging.get_logger(__name__)

# Those of TrainingArguments.liger_kernel_config that concern the loss; the rest goes to the text model.
FUSED_LOSS = "fused_linear_cross_entropy"
PLAIN_LOSS = "cross_entropy"


def apply_liger(model: nn.Module, *, device: torch.device | str | None = None, **kernels: bool) -> bool:
    """Put liger-kernel's kernels into a model, in place; where they cannot run, say so once and change nothing.

    Args:
        model: Model of this library, or a PEFT model around one.
        device: Where it will train; None for where it is.
        **kernels: As `TrainingArguments.liger_kernel_config`: `rope`, `rms_norm`, `swiglu`,
            `fused_linear_cross_entropy`, all on by default.

    Returns:
        Whether kernels are in the model.

    Differs: liger swaps rotary embedding, norm and MLP of the text model's classes for the whole process, so other
        models of the same kind get them too. The loss stays as it is, with logits, where the model has its own
        (LLaVA-ST with coordinates), where an adapter changes the head, under ZeRO stage 3, and in evaluation.
    """
    base = _unwrap(model)
    device = torch.device(next(base.parameters()).device if device is None else device)
    text_model = base.get_decoder() if isinstance(base, PreTrainedModel) else None
    reason = _why_not(base, text_model, device)
    if reason:
        logger.warning_once(f"liger-kernel is not used: {reason} Training goes on without it.")
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    fused = kernels.pop(FUSED_LOSS, True)
    kernels.pop(PLAIN_LOSS, None)
    _apply_liger_kernel_to_instance(model=text_model, **kernels, **{FUSED_LOSS: False, PLAIN_LOSS: False})
    if fused:
        _fuse_loss(base)
    return True


def _unwrap(model: nn.Module) -> nn.Module:
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def _why_not(base: nn.Module, text_model: nn.Module | None, device: torch.device) -> str | None:
    """Returns the reason for which no kernel can run, a sentence, or None."""
    if not is_liger_kernel_available():
        return "the package is missing (pip install 'longvideo[liger]')."
    if device.type not in ("cuda", "xpu"):
        return f"its kernels need a GPU, and the model trains on {device.type!r}."
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = getattr(getattr(text_model, "config", None), "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for the text model of {type(base).__name__}, of type {kind!r}."
    return None


def has_fused_loss(base: nn.Module) -> bool:
    """Whether liger's loss is in a model."""
    return getattr(base, "_longvideo_fused_loss", False)


def _fuse_loss(base: PreTrainedModel) -> None:
    """Wraps the forward of one instance; calling it again does nothing."""
    if has_fused_loss(base):
        return
    if has_own_loss(base):
        logger.warning_once(
            f"{type(base).__name__} computes its own loss from logits; liger-kernel's fused one is left out."
        )
        return
    plain = base.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        fused = (
            base.training
            and torch.is_grad_enabled()
            and kwargs.get("labels") is not None
            and kwargs.get("return_dict", base.config.return_dict) is not False
            and is_plain_head(base.get_output_embeddings())
            and not is_deepspeed_zero3_enabled()
        )
        if not fused:
            return plain(*args, **kwargs)
        with head_in_loss(base, _liger_loss):
            outputs = plain(*args, **kwargs)
        return without_logits(outputs)

    base.forward = forward
    base._longvideo_fused_loss = True


def _liger_loss(hidden_states: torch.Tensor, labels: torch.Tensor, head: nn.Module, **kwargs: Any) -> torch.Tensor:
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    return LigerForCausalLMLoss(
        hidden_states=hidden_states,
        lm_head_weight=head.weight,
        labels=labels,
        hidden_size=hidden_states.shape[-1],
        **{key: value for key, value in kwargs.items() if key in ("num_items_in_batch", "shift_labels")},
    )


@contextmanager
def liger_in_training(trainer: Any) -> Iterator[None]:
    """Does what `use_liger_kernel=True` asks for, in place of `transformers.Trainer`, which would find no kernels.

    Its own way looks for kernels by the type of the whole model, and stops the run where the package is missing.

    Args:
        trainer: A `transformers.Trainer` that is about to train.

    Raises:
        ValueError: A trainer that makes its model later, with `model_init`.
    """
    args = trainer.args
    if not args.use_liger_kernel:
        yield
        return
    if trainer.model_init is not None:
        raise ValueError(
            "use_liger_kernel=True needs a model that is there; give the trainer model=, not model_init=."
        )
    apply_liger(trainer.model, device=args.device, **(args.liger_kernel_config or {}))
    args.use_liger_kernel = False
    try:
        yield
    finally:
        args.use_liger_kernel = True
