"""Training in bfloat16, on processors with instructions for it as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16_HELP = "compute in bfloat16 (weights stay in float32): twice as fast where the processor has avx512_bf16 or AMX"


def precision_arguments(bf16: bool) -> dict[str, Any]:
    """Arguments of a trainer for a precision.

    Args:
        bf16: whether to compute in bfloat16.

    Returns:
        Keyword arguments for `TrainingArguments`; none for float32.
    """
    # The Trainer refuses bfloat16 without a GPU unless the processor is asked for by name.
    return {"bf16": True, "use_cpu": not torch.cuda.is_available()} if bf16 else {}


@contextmanager
def fast_attention(bf16: bool) -> Iterator[None]:
    """Takes plain matrix products for attention in bfloat16 on a processor, whose fused kernel is slower.

    Args:
        bf16: whether attention is computed in bfloat16; nothing changes otherwise, nor where there is a GPU.
    """
    if not bf16 or torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # Its name speaks of CUDA; without it the plain products are computed in float32 on a processor too.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
