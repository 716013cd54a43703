"""Runs a function over a long first axis in pieces, so that its activations stay bounded."""

from collections.abc import Callable, Iterator

import torch


def iterate_chunks(x: torch.Tensor, chunk_size: int) -> Iterator[torch.Tensor]:
    """Yields consecutive pieces of the first axis.

    Args:
        x: (N, ...) tensor.
        chunk_size: rows per piece, at least 1.

    Returns:
        An iterator over views of `x`; the last one may be shorter.

    Raises:
        ValueError: `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"Chunk size must be at least 1, got {chunk_size}.")
    yield from x.split(chunk_size)


def map_chunks(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Applies `function` piece by piece and joins the results.

    Args:
        function: takes (n, ...) and returns (n, ...), rows independent of each other.
        x: (N, ...) tensor.
        chunk_size: rows per piece.

    Returns:
        (N, ...) the same as `function(x)`.

    Raises:
        ValueError: `chunk_size` is below 1.
    """
    return torch.cat([function(piece) for piece in iterate_chunks(x, chunk_size)])
