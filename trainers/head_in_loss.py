"""The head applied by the loss: while a model trains, logits of most positions are needed by nobody.

A video is thousands of tokens, its answer a few; logits of all of them are the largest tensor of a step. So the head
hands hidden states on, and the loss makes logits of what it counts, with the labels that the model itself made to fit,
whatever it did to the length of the sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from longvideo.trainers.label_rules import IGNORE_INDEX


def has_own_loss(base: nn.Module) -> bool:
    """Whether a model computes its loss from logits of its own order.

    Args:
        base: Model of this library.

    Returns:
        True for LLaVA-ST with coordinates, whose loss is over two tokens at each of them.
    """
    return bool(getattr(base.config, "num_coordinate_tokens", 0))


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether the weight is all there is to a head: an adapter's wrapper and a hook that moves weights are more.

    Args:
        head: Output embedding of a model.

    Returns:
        Whether it can be applied to chosen positions outside of the model's forward.
    """
    return isinstance(head, nn.Linear) and not hasattr(head, "base_layer") and not hasattr(head, "_hf_hook")


def without_logits(outputs: Any) -> Any:
    """Takes what stands in the place of logits, hidden states, out of a model's output.

    Args:
        outputs: Output of a forward under `head_in_loss`.

    Returns:
        The same kind of output. A new one: an output keeps its entries when an attribute becomes None.
    """
    return type(outputs)(**{key: value for key, value in outputs.items() if key != "logits"})


@contextmanager
def head_in_loss(base: nn.Module, loss: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Lets the head return what it is given, and another loss apply it.

    Args:
        base: Model with a plain head.
        loss: Called with hidden states (B, S, D) and labels (B, S), with `head` and the other arguments of a loss
            function of transformers as keywords.
    """
    head = base.get_output_embeddings()
    own_loss = base.__dict__.get("_loss_function")
    own_forward = head.__dict__.get("forward")

    def apply(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, **kwargs: Any) -> Any:
        return loss(logits, labels, head=head, vocab_size=vocab_size, **kwargs)

    base.__dict__["_loss_function"] = apply
    head.__dict__["forward"] = lambda hidden_states: hidden_states
    try:
        yield
    finally:
        for owner, name, own in ((base, "_loss_function", own_loss), (head, "forward", own_forward)):
            owner.__dict__.pop(name, None)
            if own is not None:
                owner.__dict__[name] = own


def supervised_logits(base: nn.Module, *, wanted: bool = True) -> Any:
    """Lets a model that trains make logits of supervised positions alone; its loss stays what it is.

    Args:
        base: Model of this library; its forward is called inside.
        wanted: False changes nothing.

    Returns:
        A context, whose value says whether logits are left out of the output (see `without_logits`). They stay where
        no gradient is wanted, where the model has a loss of its own, and where an adapter changes the head.
    """
    possible = wanted and base.training and torch.is_grad_enabled() and not has_own_loss(base)
    if not possible or not is_plain_head(base.get_output_embeddings()):
        return nullcontext(False)
    return _supervised_logits(base)


@contextmanager
def _supervised_logits(base: nn.Module) -> Iterator[bool]:
    own_loss = base.loss_function

    def loss(
        hidden_BSD: torch.Tensor,
        labels_BS: torch.Tensor,
        head: nn.Linear,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        following_BS = F.pad(labels_BS, (0, 1), value=IGNORE_INDEX)[:, 1:] if shift_labels is None else shift_labels
        mask_BS = following_BS.to(hidden_BSD.device) != IGNORE_INDEX
        logits_1NV = F.linear(hidden_BSD[mask_BS], head.weight, head.bias)[None]
        following_1N = following_BS.to(hidden_BSD.device)[mask_BS][None]
        # A model may take the number of words from what it believes to be logits.
        kwargs["vocab_size"] = logits_1NV.shape[-1]
        return own_loss(logits=logits_1NV, labels=None, shift_labels=following_1N, **kwargs)

    with head_in_loss(base, loss):
        yield True
