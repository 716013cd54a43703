"""Patches of frames by source and frame index, so that no frame of a video goes through the tower twice.

Coarse and fine modules of CrossVLLM share a frozen tower, and a later round looks at frames of an earlier one.

Shapes: T frames of a video, P patches of a frame, E vision width.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

Key = tuple[str, int]


class FrameFeatureCache:
    """Patches of frames, keyed by the name of their source and their zero-based index in it.

    Frames of one source must be resized and normalized alike, or the name must say how.

    Args:
        max_frames: frames that are kept, those used last; None for all.
        device: where they are kept; None where they were made.

    Raises:
        ValueError: `max_frames` is below 1.
    """

    def __init__(self, max_frames: int | None = None, device: torch.device | str | None = None):
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"max_frames is {max_frames}; keep at least 1 frame, or None for all.")
        self.max_frames, self.device = max_frames, device
        self.hits = 0
        self.misses = 0
        self._frames: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._model: str | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, key: Key) -> bool:
        return key in self._frames

    def claim(self, model_key: str) -> None:
        """Notes whose tower the patches come from; another tower's are a `ValueError`."""
        if self._model not in (None, model_key):
            raise ValueError(
                "The frames in this cache were encoded by another tower or with other settings. Use one cache per "
                "model, or clear it."
            )
        self._model = model_key

    def select_new(self, keys: Sequence[Key]) -> list[int]:
        """Returns the positions of keys that are not kept, each key once, and counts hits and misses."""
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._frames}
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        return sorted(new.values())

    def get(self, key: Key) -> torch.Tensor:
        """Returns the patches (P, E) of a frame that is kept."""
        self._frames.move_to_end(key)
        return self._frames[key]

    def put(self, key: Key, patches_PE: torch.Tensor) -> None:
        """Keeps the patches of a frame, without their gradient; the one unused for longest makes room."""
        # A copy: a view would keep the whole batch of frames alive.
        kept = patches_PE.detach()
        self._frames[key] = kept.clone() if self.device is None else kept.to(self.device, copy=True)
        self._frames.move_to_end(key)
        while self.max_frames is not None and len(self._frames) > self.max_frames:
            self._frames.popitem(last=False)

    def missing(self, source: str, frame_indices: Iterable[int]) -> list[int]:
        """Returns the frame indices of a source that still have to be decoded and encoded, each once."""
        return [index for index in dict.fromkeys(frame_indices) if (source, index) not in self._frames]

    def gather(self, source: str, frame_indices: Sequence[int]) -> torch.Tensor:
        """Joins kept frames into the features of a video.

        Args:
            source: name of the video.
            frame_indices: zero-based indices in the source, in any order, at least one.

        Returns:
            (T, P, E), an entry of `vision_features`.

        Raises:
            ValueError: no index, or one that is not kept.
        """
        lost = self.missing(source, frame_indices)
        if lost or not len(frame_indices):
            raise ValueError(
                f"Frames {lost} of {source!r} are not in the cache ({len(frame_indices)} were asked for). Encode them "
                "with get_vision_features first, and keep at least as many frames as a question needs."
            )
        self.hits += len(frame_indices)
        return torch.stack([self.get((source, int(index))) for index in frame_indices])

    def clear(self, source: str | None = None) -> None:
        """Forgets the frames of a source, or all of them."""
        if source is None:
            self._frames.clear()
            self._model = None
            return
        for key in [key for key in self._frames if key[0] == source]:
            del self._frames[key]
