"""Videos and images that cannot be read in the middle of an epoch: which one it is, and a report of those left out."""

import copy
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from longvideo.trainers.message_rows import describe_source, visual_blocks

logger = logging.get_logger(__name__)
POLICIES = ("raise", "skip")
REPORT = "bad_videos.jsonl"
# So many rows in a row that cannot be read are no accident: a folder is missing, or an option is wrong.
MOST_SPARES = 16


class BadMediaError(ValueError):
    """A video or an image of a row cannot be read.

    Args:
        where: Name of the row.
        source: What cannot be read.
        reason: Why.
    """

    def __init__(self, where: str, source: str, reason: str) -> None:
        super().__init__(
            f"{where}: {source} cannot be read: {reason} Repair or leave out the row, or set on_bad_video='skip' to "
            "go on without such rows."
        )
        self.where, self.source, self.reason = where, source, reason


def find_bad_media(
    messages: list[dict[str, Any]], read: Callable[[list[dict[str, Any]]], Any], where: str
) -> BadMediaError | None:
    """Find the video or image at which reading a row fails.

    Args:
        messages: Messages of `normalize_messages`.
        read: Reads messages, as the collator does.
        where: How errors name the row.

    Returns:
        The error, or None when all can be read and the trouble lies elsewhere.
    """
    for block in visual_blocks(messages):
        try:
            read([{"role": "user", "content": [dict(block)]}])
        except Exception as error:
            bad = BadMediaError(where, describe_source(block), f"{type(error).__name__}: {error}")
            bad.__cause__ = error
            return bad
    return None


class BadMediaLog:
    """Counts rows that are left out, warns of each source once, and writes them into a file.

    Args:
        folder: Where `bad_videos.jsonl` is written, one line per row that was left out; None writes nothing. Worker
            processes write to the same file.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = folder
        self.count = 0
        self._seen: set[str] = set()

    def add(self, error: BadMediaError) -> None:
        """Count and report a row.

        Args:
            error: What was wrong with it.
        """
        self.count += 1
        if error.source not in self._seen:
            self._seen.add(error.source)
            logger.warning(f"{error.where} is left out: {error.source} cannot be read: {error.reason}")
        if self.folder is not None:
            os.makedirs(self.folder, exist_ok=True)
            line = json.dumps({"row": error.where, "source": error.source, "reason": error.reason})
            with open(os.path.join(self.folder, REPORT), "a", encoding="utf-8") as file:
                file.write(line + "\n")


@contextmanager
def without_spares(trainer: Any) -> Iterator[None]:
    """Make loaders of a trainer without rows that stand in for others, as evaluation must not have them.

    Args:
        trainer: A trainer with a `data_collator`.
    """
    collator = trainer.data_collator
    if hasattr(collator, "spare_rows"):
        trainer.data_collator = copy.copy(collator)
        trainer.data_collator.spare_rows = ()
    try:
        yield
    finally:
        trainer.data_collator = collator


def spare_rows(rows: Sequence[Mapping[str, Any]] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """Choose rows in place of a batch of which none can be read; the choice depends on the batch alone.

    Args:
        rows: Rows to choose from, or None.
        name: Name of the batch.

    Returns:
        Iterator over at most `MOST_SPARES` rows.
    """
    if not all(hasattr(rows, name) for name in ("__len__", "__getitem__")) or not len(rows):
        return iter(())
    choice = random.Random(zlib.crc32(name.encode()))
    return (rows[choice.randrange(len(rows))] for _ in range(MOST_SPARES))
