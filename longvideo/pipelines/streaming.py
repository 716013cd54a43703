"""Text pieces of an answer while it is being written."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TextIteratorStreamer

from longvideo.pipelines.grounding import AnswerStreamer


class AnswerStream:
    """Iterator over the text pieces of one answer; generation runs in a thread of its own.

    Args:
        run: called with the streamer in the thread; returns the pipeline's result.
        tokenizer: decodes the pieces.
        hidden: tokens that are no part of an answer; None leaves all special tokens out.
    """

    def __init__(
        self,
        run: Callable[[TextIteratorStreamer], dict[str, Any]],
        tokenizer: Any,
        hidden: frozenset[int] | None = None,
    ) -> None:
        self._streamer = AnswerStreamer(tokenizer, hidden)
        self._run = run
        self._result: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._result = self._run(self._streamer)
        except BaseException as error:
            self._error = error
            # Without the end mark the reader would wait for ever.
            self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        for piece in self._streamer:
            if piece:
                yield piece
        self._join()

    def _join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def result(self) -> dict[str, Any]:
        """The whole result, as the call without `stream=True` returns it; waits for the end."""
        self._join()
        assert self._result is not None
        return self._result
