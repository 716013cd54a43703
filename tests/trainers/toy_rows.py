"""Rows for the trainer tests: one-coloured clips and the name of the colour."""

from typing import Any

import numpy as np

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
SIZE = 32  # pixels, the frame size of the tiny models


def video_block(colour: str, num_frames: int = 4) -> dict[str, Any]:
    """A video block of decoded frames, one per second; each frame differs a little from the others.

    Args:
        colour: Key of `COLOURS`.
        num_frames: Number of frames F.

    Returns:
        The block.
    """
    frames_FHWC = np.empty((num_frames, SIZE, SIZE, 3), dtype=np.uint8)
    frames_FHWC[:] = COLOURS[colour]
    frames_FHWC[:, :, : SIZE // 4] = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 3
    return {"type": "video", "video": frames_FHWC, "timestamps": [float(i) for i in range(num_frames)]}


def colour_row(colour: str, *, num_frames: int = 4, answer: str | None = None) -> dict[str, Any]:
    """One question about one clip."""
    return {
        "id": f"{colour}-{num_frames}",
        "messages": [
            {
                "role": "user",
                "content": [video_block(colour, num_frames), {"type": "text", "text": "Which colour?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": answer or colour}]},
        ],
    }


def two_turn_row(colour: str, *, num_frames: int = 4) -> dict[str, Any]:
    """Two questions about one clip, the second one as a plain string."""
    row = colour_row(colour, num_frames=num_frames, answer=f"It is {colour}.")
    row["messages"] += [
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes\nI am."},
    ]
    return row


def toy_rows(num_rows: int = 8) -> list[dict[str, Any]]:
    """Rows with clips of one and of two clips' length and answers of different length."""
    names = list(COLOURS)
    return [colour_row(names[i % len(names)], num_frames=4 + 4 * (i // len(names) % 2)) for i in range(num_rows)]
