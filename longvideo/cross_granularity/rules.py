"""How the controller of CrossVLLM goes on and when it stops."""

from collections.abc import Generator
from dataclasses import dataclass

from longvideo.cross_granularity.trace import CrossGranularityAnswer, ModuleCall, VideoQuestion
from longvideo.processing.crossvllm.event_lists import asks_everywhere
from longvideo.processing.crossvllm.segment_times import MIN_SEGMENT, cut_windows

# The state machine of one question: what it asks, what it is told, how it ends.
Asking = Generator[list[ModuleCall], list[str], CrossGranularityAnswer]


@dataclass(frozen=True)
class ControllerRules:
    """How the controller goes on and when it stops.

    Attributes:
        max_rounds: Largest number R of segments that are looked for again after one was sent back; 0 to 3 in the
            paper.
        reflection: Whether the detail module judges its segment; without, it is asked the question alone.
        stop_on_repeat: Whether a segment that was sent back before ends the search.
        repeat_iou: Overlap from which on two segments are the same.
        min_segment: Shortest segment in seconds.
        force_answer: Whether the detail module is asked the question alone where nobody gave an answer.
        exhaustive: Whether the video is examined part by part: True, False, or "auto" for questions that count or
            order.
        window_length: Seconds of a part.
        window_overlap: Seconds that two neighbouring parts share.
        max_windows: Largest number of parts; the overview module chooses where there are more.

    Raises:
        ValueError: A value is outside of its range.

    Source: CrossVLLM Sec. 3.3 and Table 7 (limit); the paper's limits are read as 3, 1 and 0.
    Differs: `stop_on_repeat`, `force_answer` and the exhaustive mode are ours.
    """

    max_rounds: int = 3
    reflection: bool = True
    stop_on_repeat: bool = True
    repeat_iou: float = 0.95
    min_segment: float = MIN_SEGMENT
    force_answer: bool = True
    exhaustive: bool | str = False
    window_length: float = 64.0
    window_overlap: float = 4.0
    max_windows: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.max_rounds, bool) or not isinstance(self.max_rounds, int) or self.max_rounds < 0:
            raise ValueError(f"max_rounds={self.max_rounds!r}, expected a whole number from 0 (no second look) on.")
        if not 0 < self.repeat_iou <= 1:
            raise ValueError(f"repeat_iou={self.repeat_iou}, expected an overlap above 0 and up to 1.")
        if not self.min_segment > 0:
            raise ValueError(f"min_segment={self.min_segment}, expected seconds above 0.")
        if self.exhaustive not in (True, False, "auto"):
            raise ValueError(f"exhaustive={self.exhaustive!r}, expected True, False or 'auto'.")
        if self.max_windows < 1:
            raise ValueError(f"max_windows={self.max_windows}, expected at least 1.")
        cut_windows(1.0, length=self.window_length, overlap=self.window_overlap)

    def examines_everything(self, sample: VideoQuestion) -> bool:
        """Say whether a question is answered part by part.

        Args:
            sample: The question.

        Returns:
            True where the exhaustive mode is on, or asked for and fit.
        """
        if self.exhaustive == "auto":
            return sample.task == "qa" and asks_everywhere(sample.question)
        return bool(self.exhaustive)
