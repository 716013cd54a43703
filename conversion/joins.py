"""Tensors that are stored whole in one layout and in pieces in the other: rows of a matrix in tables of their own."""

from dataclasses import dataclass
from pathlib import Path

import torch

from longvideo.conversion.checkpoint_io import TensorInfo
from longvideo.conversion.parts import SourceCheckpoint


@dataclass(frozen=True)
class Join:
    """Pieces of one matrix.

    Args:
        name: Original name under which the native layout holds the whole.
        pieces: Original name and number of rows of every piece, in the order of the rows.
    """

    name: str
    pieces: tuple[tuple[str, int], ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole."""
        return sum(rows for _, rows in self.pieces)

    def cut(self, whole: TensorInfo) -> dict[str, TensorInfo]:
        """Return the pieces' headers.

        Args:
            whole: The matrix.

        Returns:
            Piece name to header.

        Raises:
            ValueError: if the matrix has other rows than the pieces together.
        """
        if not whole.shape or whole.shape[0] != self.num_rows:
            raise ValueError(
                f"{whole.name} is {list(whole.shape)}, but the original layout stores its rows in "
                f"{len(self.pieces)} tensors of {' + '.join(str(rows) for _, rows in self.pieces)} = {self.num_rows} "
                f"rows and has no place for others. Resize the embeddings to {self.num_rows} rows first."
            )
        return {
            name: TensorInfo(name, (rows, *whole.shape[1:]), whole.dtype, whole.file) for name, rows in self.pieces
        }


class CheckpointView(SourceCheckpoint):
    """A checkpoint whose tensors are shown under other headers; the checkpoint itself is closed by its owner.

    Args:
        inner: The checkpoint.
    """

    def __init__(self, inner: SourceCheckpoint) -> None:
        self.inner = inner
        self.folder = inner.folder
        self.checkpoints = inner.checkpoints
        self.notes = inner.notes
        self.infos = dict(inner.infos)
        self.pieces: dict[str, list[str]] = {}

    @property
    def files(self) -> dict[str, Path]:
        """Every weight file, by the name that rows give it."""
        return self.inner.files

    def close(self) -> None:
        """Leave closing to the owner."""


class JoinedCheckpoint(CheckpointView):
    """An original checkpoint with the pieces of every join as one tensor.

    Args:
        inner: The checkpoint.
        joins: What belongs together; a join of which a piece is absent is left as it is.

    Raises:
        ValueError: if pieces of one matrix have different dtypes.
    """

    def __init__(self, inner: SourceCheckpoint, joins: tuple[Join, ...]) -> None:
        super().__init__(inner)
        for join in joins:
            names = [name for name, _ in join.pieces]
            infos = [inner.infos[name] for name in names if name in inner.infos]
            if len(infos) < len(names):
                continue
            first = infos[0]
            other = next((info for info in infos if info.dtype != first.dtype), None)
            if other is not None:
                raise ValueError(
                    f"{first.name} is {first.dtype} and {other.name} {other.dtype}; tensors of different types do not "
                    "fit into one matrix. Keep them apart (--coordinates split), or save them in one type."
                )
            for name in names:
                del self.infos[name]
            rows = sum(info.shape[0] for info in infos)
            self.infos[join.name] = TensorInfo(join.name, (rows, *first.shape[1:]), first.dtype, first.file)
            self.pieces[join.name] = names

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor on the CPU.
        """
        if name not in self.pieces:
            return self.inner.read(name)
        return torch.cat([self.inner.read(piece) for piece in self.pieces[name]])

    def stored_parts(self, name: str, tensor: torch.Tensor) -> list[tuple[TensorInfo, torch.Tensor]]:
        """Return the pieces of a tensor.

        Args:
            name: A key of `infos`.
            tensor: What `read` returned for it.

        Returns:
            Header and values of every piece.
        """
        if name not in self.pieces:
            return super().stored_parts(name, tensor)
        infos = [self.inner.infos[piece] for piece in self.pieces[name]]
        return list(zip(infos, tensor.split([info.shape[0] for info in infos]), strict=True))


class CutCheckpoint(CheckpointView):
    """A native checkpoint with every whole matrix as its pieces.

    Args:
        inner: The checkpoint.
        joins: Whole and pieces under native names.
        tied: Name of a matrix by that of the absent one that is equal to it.

    Raises:
        ValueError: if a matrix has other rows than its pieces together.
    """

    def __init__(self, inner: SourceCheckpoint, joins: tuple[Join, ...], tied: dict[str, str]) -> None:
        super().__init__(inner)
        self.places: dict[str, tuple[str, int, int]] = {}
        for join in joins:
            stored = join.name if join.name in inner.infos else tied.get(join.name, join.name)
            if stored not in inner.infos:
                continue
            self.infos.pop(join.name, None)
            pieces = join.cut(inner.infos[stored])
            self.infos |= pieces
            self.pieces[join.name] = list(pieces)
            start = 0
            for name, rows in join.pieces:
                self.places[name] = (stored, start, start + rows)
                start += rows

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Args:
            name: A key of `infos`.

        Returns:
            The tensor on the CPU.
        """
        if name not in self.places:
            return self.inner.read(name)
        stored, start, end = self.places[name]
        return self.inner.read(stored)[start:end].clone()


def cut_shapes(shapes: dict[str, tuple[int, ...]], joins: tuple[Join, ...]) -> dict[str, tuple[int, ...]]:
    """Return shapes with every whole matrix as its pieces.

    Args:
        shapes: Name to shape.
        joins: Whole and pieces under the same kind of names.

    Returns:
        Name to shape; pieces that have the name of the whole replace it.
    """
    cut = dict(shapes)
    for join in joins:
        whole = cut.pop(join.name)
        cut |= {name: (rows, *whole[1:]) for name, rows in join.pieces}
    return cut
