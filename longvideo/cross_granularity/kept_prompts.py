"""The overview's prompt of one round, kept for the next: only what was written in between goes through the decoder.

Shapes: S tokens of a prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from longvideo.cross_granularity.trace import ModuleCall

# Settings of `generate` that bring another cache or fill it in another way.
OTHER_CACHES = (
    "past_key_values", "cache_implementation", "cache_config", "assistant_model", "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)  # fmt: skip


class KeptPrompt:
    """Keys and values of the last prompt about a whole video.

    The prompt of a later round has the video and the role before it in common and only adds what was sent back. The
    cache is kept between rounds of one question; its size is that of the prompt.

    Attributes:
        num_reused: Positions that did not go through the decoder again so far.
    """

    def __init__(self) -> None:
        self.num_reused = 0
        self._call: ModuleCall | None = None
        self._ids_S: torch.Tensor | None = None
        self._cache: DynamicCache | None = None

    def begin(self, call: ModuleCall, ids_S: torch.Tensor, video_token_id: int, text_config: Any) -> DynamicCache:
        """Give the cache that a prompt goes on from.

        Args:
            call: What is asked.
            ids_S: (S,) its prompt.
            video_token_id: Placeholder of videos.
            text_config: Configuration of the decoder.

        Returns:
            The cache of the last prompt up to where this one differs, or an empty one. It is filled in place and kept.
        """
        known = self._known(call, ids_S, video_token_id)
        if known:
            # How many to take off, negative: only some versions also take how many shall be left.
            surplus = self._cache.get_seq_length() - known
            if surplus:
                self._cache.crop(-surplus)
        else:
            self._cache = DynamicCache(config=text_config)
        self.num_reused += known
        self._call, self._ids_S = call, ids_S
        return self._cache

    def forget(self) -> None:
        """Let go of the cache."""
        self._call = self._ids_S = self._cache = None

    def _known(self, call: ModuleCall, ids_S: torch.Tensor, video_token_id: int) -> int:
        """Count the positions that a prompt has in common with the last one; 0 where they do not serve it."""
        # A longer prompt about the same question is that of a later round. Between two questions the model may learn.
        if self._call is None or call.source is not self._call.source or len(ids_S) <= len(self._ids_S):
            return 0
        # A layer with a window has let go of what stood before it; a call that failed has filled less than its prompt.
        slides = any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)
        if slides or self._cache.get_seq_length() < len(self._ids_S):
            return 0
        differs = ids_S[: len(self._ids_S)] != self._ids_S
        known = int(differs.int().argmax()) if differs.any() else len(self._ids_S)
        return known if not (ids_S[known:] == video_token_id).any() else 0


def can_keep(call: ModuleCall, settings: Mapping[str, Any], model: Any) -> bool:
    """Say whether a call writes one text about a whole video, word by word, into a cache of the usual kind.

    Args:
        call: What is asked.
        settings: Of `generate`.
        model: With a `generation_config`.

    Returns:
        True where its cache may be kept.
    """
    config = settings.get("generation_config") or model.generation_config

    def value(name: str) -> Any:
        return settings[name] if name in settings else getattr(config, name, None)

    one = all((value(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
    usual = not any(value(name) for name in OTHER_CACHES) and value("use_cache") is not False
    return call.segment is None and one and usual


__all__ = ["KeptPrompt", "can_keep"]
