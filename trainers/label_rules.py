"""Which tokens a row supervises: the assistant's turns, all text, or what the original training codes supervise."""

from collections.abc import Sequence
from typing import Any

IGNORE_INDEX = -100
MASKS = ("assistant", "all")
# Tokens that the original rules supervise wherever they stand, by the conversation format that a tokenizer knows.
_CHATML_DELIMITERS = ("\n", "<|im_start|>", "<|im_end|>")
_LLAMA3_DELIMITERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n")
LABEL_RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "videochat_flash": (_CHATML_DELIMITERS,),
    "longvu": (_CHATML_DELIMITERS, _LLAMA3_DELIMITERS),
    "llava_st": (_CHATML_DELIMITERS,),
}


def check_label_settings(mask: str, label_rule: str | None) -> None:
    """Check that names of a mask and of a rule are known.

    Args:
        mask: One of `MASKS`.
        label_rule: None, or a key of `LABEL_RULES`.

    Raises:
        ValueError: One is not.
    """
    if mask not in MASKS:
        raise ValueError(f"mask={mask!r} is unknown; use one of {MASKS}.")
    if label_rule is not None and label_rule not in LABEL_RULES:
        raise ValueError(f"label_rule={label_rule!r} is unknown; use None or one of {tuple(LABEL_RULES)}.")


def delimiter_ids(label_rule: str | None, tokenizer: Any) -> list[int]:
    """List the tokens that an original rule supervises wherever they stand.

    Args:
        label_rule: None for none, or a key of `LABEL_RULES`.
        tokenizer: The tokenizer.

    Returns:
        Ids of the delimiters of the first format that the tokenizer knows.

    Raises:
        ValueError: The tokenizer makes several tokens of a delimiter of each format.

    Source: VideoChat-Flash training code `preprocess_qwen`, LongVU training code `preprocess_llama3`.
    """
    if label_rule is None:
        return []
    formats: Sequence[tuple[str, ...]] = LABEL_RULES[label_rule]
    broken = []
    for texts in formats:
        encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
        split = {text: len(token_ids) for text, token_ids in encoded.items() if len(token_ids) != 1}
        if not split:
            return [token_ids[0] for token_ids in encoded.values()]
        broken.append(next(iter(split.items())))
    text, num_tokens = broken[0]
    names = " or ".join(("ChatML tokenizer (Qwen2)", "Llama 3 tokenizer")[: len(formats)])
    raise ValueError(
        f"label_rule={label_rule!r} needs {text!r} to be one token, but this tokenizer makes {num_tokens} of "
        f"it. Use a {names}, or label_rule=None."
    )
