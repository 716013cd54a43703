"""Procedural videos with questions: coloured shapes in timed events, deterministic by seed."""

from longvideo.evaluation.corpus.captions import describe, describe_frame, list_events
from longvideo.evaluation.corpus.grounding import (
    ALL_TASKS,
    DENSE_TASKS,
    GROUNDING_TASKS,
    Grounding,
    end_to_end_times,
    list_grounded_events,
    make_groundings,
)
from longvideo.evaluation.corpus.grounding_rows import (
    GroundingItem,
    grounding_items,
    grounding_row,
    write_grounding_corpus,
)
from longvideo.evaluation.corpus.questions import (
    KINDS,
    Question,
    all_questions,
    corpus_vocabulary,
    make_questions,
)
from longvideo.evaluation.corpus.render import render_frames, write_video
from longvideo.evaluation.corpus.rows import (
    Item,
    balanced_items,
    make_row,
    read_rows,
    write_corpus,
)
from longvideo.evaluation.corpus.scenes import DIFFICULTIES, Difficulty, Scene, make_scene, sample_times
from longvideo.evaluation.corpus.st_align import read_st_align, write_st_align

__all__ = [
    "ALL_TASKS",
    "DENSE_TASKS",
    "DIFFICULTIES",
    "GROUNDING_TASKS",
    "KINDS",
    "Difficulty",
    "Grounding",
    "GroundingItem",
    "Item",
    "Question",
    "Scene",
    "all_questions",
    "balanced_items",
    "corpus_vocabulary",
    "describe",
    "describe_frame",
    "end_to_end_times",
    "grounding_items",
    "grounding_row",
    "list_events",
    "list_grounded_events",
    "make_groundings",
    "make_questions",
    "make_row",
    "make_scene",
    "read_rows",
    "read_st_align",
    "render_frames",
    "sample_times",
    "write_corpus",
    "write_grounding_corpus",
    "write_st_align",
    "write_video",
]
