"""Pipelines of the package: `video-question-answering` (alias `video-text-to-text`)."""

from typing import Any

# Loading it first lets the waiting registration run before any file of this folder is half imported.
import transformers.pipelines  # noqa: F401

TASK = "video-question-answering"
ALIAS = "video-text-to-text"

_EXPORTS = {
    "VideoQuestionAnsweringPipeline": "longvideo.pipelines.video_question_answering",
    "AnswerStream": "longvideo.pipelines.streaming",
    "load_pipeline": "longvideo.pipelines.loading",
    "check_checkpoint": "longvideo.pipelines.loading",
}

__all__ = [
    "ALIAS",
    "TASK",
    "AnswerStream",
    "VideoQuestionAnsweringPipeline",
    "check_checkpoint",
    "load_pipeline",
    "register",
]


def register() -> None:
    """Register the task and its alias with Transformers; calling it again changes nothing."""
    from transformers import AutoModelForImageTextToText
    from transformers.pipelines import PIPELINE_REGISTRY

    from longvideo.pipelines.video_question_answering import VideoQuestionAnsweringPipeline

    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is None or known["impl"] is not VideoQuestionAnsweringPipeline:
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=VideoQuestionAnsweringPipeline,
            pt_model=(AutoModelForImageTextToText,),
            type="multimodal",
        )
    # An alias hides a task of the same name: leave the name alone once the library has such a task itself.
    if ALIAS not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.task_aliases[ALIAS] = TASK


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
