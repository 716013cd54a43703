"""Procedural videos with questions: coloured shapes in timed events, deterministic by seed."""

from longvideo.evaluation.corpus.captions import describe, describe_frame, list_events
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

__all__ = [
    "DIFFICULTIES",
    "KINDS",
    "Difficulty",
    "Item",
    "Question",
    "Scene",
    "all_questions",
    "balanced_items",
    "corpus_vocabulary",
    "describe",
    "describe_frame",
    "list_events",
    "make_questions",
    "make_row",
    "make_scene",
    "read_rows",
    "render_frames",
    "sample_times",
    "write_corpus",
    "write_video",
]
