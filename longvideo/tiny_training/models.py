"""The small models that are trained on the corpus: how each architecture is made and taught."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.tiny_training.build_crosslmm import build_crosslmm
from longvideo.tiny_training.build_llava_st import (
    GROUNDING_FRAMES,
    GROUNDING_SIZE,
    begin_llava_st_stage,
    build_llava_st,
)
from longvideo.tiny_training.build_longvu import build_longvu
from longvideo.tiny_training.build_parts import FRAME_SIZE, NUM_FRAMES, encode_frames, last_connector_layer
from longvideo.tiny_training.build_videochat_flash import build_videochat_flash
from longvideo.tiny_training.connector import CrossLMMConnector, LongVUConnector
from longvideo.tiny_training.grounding_stages import GROUNDING_STAGES, GroundingConversations
from longvideo.tiny_training.stages import CROSSLMM_STAGES
from longvideo.tiny_training.tower import CLIPS, IMAGES, Phase, TowerLessons


@dataclass(frozen=True)
class TinyModel:
    """How a tiny model is made.

    Args:
        build: returns a fresh model and its processor.
        lessons: how its towers are taught before anything else.
        frame_size: side of the frames in pixels.
        num_frames: frames per video.
        decoder: tiny model of the package whose trained decoder it begins with; none for a fresh one.
        encode: takes model and batch and encodes the videos whose features are measured for that; None runs the model.
        pictures_first: whether single pictures are described before any video, as its published recipe does.
        stages: its own stages in place of the common ones.
        make_rows: makes the rows of such a stage, as `CorpusConversations` does of a common one.
        begin_stage: called with model, stage and what is left out before a stage begins.
        connector: gives the last layer of what joins towers and decoder, whose output is brought to the length of the
            words' embeddings before the first stage, and which then learns more slowly than the decoder.
        ablations: what can be left out; `build` takes `use_NAME=False` for each.
    """

    build: Callable[..., tuple[PreTrainedModel, ProcessorMixin]]
    lessons: tuple[TowerLessons, ...]
    frame_size: int
    num_frames: int
    decoder: str = ""
    encode: Callable[[PreTrainedModel, dict[str, Any]], object] | None = None
    pictures_first: bool = False
    stages: tuple[Any, ...] = ()
    make_rows: Callable[..., Dataset] | None = None
    begin_stage: Callable[[PreTrainedModel, Any, Sequence[str]], None] | None = None
    connector: Callable[[PreTrainedModel], nn.Linear] | None = None
    ablations: tuple[str, ...] = ()


def _pixel_statistics(processor: ProcessorMixin) -> tuple[list[float], list[float]]:
    return processor.video_processor.image_mean, processor.video_processor.image_std


def _siglip_lessons(phase: Phase) -> TowerLessons:
    """Lessons of the SigLIP tower, which sees single frames."""
    return TowerLessons(
        "siglip",
        tower=lambda model: model.model.vision_tower,
        encode=encode_frames,
        statistics=_pixel_statistics,
        phases=(phase,),
    )


TINY_MODELS = {
    "videochat_flash": TinyModel(
        build_videochat_flash,
        (
            TowerLessons(
                "tower",
                tower=lambda model: model.model.vision_tower,
                encode=lambda tower, clips: tower(clips).last_hidden_state,
                statistics=_pixel_statistics,
                phases=(IMAGES, CLIPS),
            ),
        ),
        FRAME_SIZE,
        NUM_FRAMES,
    ),
    "longvu": TinyModel(
        build_longvu,
        (
            _siglip_lessons(IMAGES),
            TowerLessons(
                "dino",
                tower=lambda model: model.model.dino_tower,
                encode=encode_frames,
                statistics=lambda processor: (
                    processor.video_processor.dino_image_mean,
                    processor.video_processor.dino_image_std,
                ),
                # What it is for is told apart early: whether frames show the same.
                phases=(replace(IMAGES, num_steps=500),),
            ),
            TowerLessons(
                "connector",
                tower=LongVUConnector,
                encode=LongVUConnector.encode,
                statistics=_pixel_statistics,
                phases=(replace(IMAGES, batch_size=64, num_steps=1000, learning_rate=2e-3, centre_weight=20.0),),
            ),
        ),
        FRAME_SIZE,
        NUM_FRAMES,
        decoder="videochat_flash",
        pictures_first=True,
        connector=last_connector_layer,
    ),
    "llava_st": TinyModel(
        build_llava_st,
        (
            # A picture of this size takes twice the time of the others.
            _siglip_lessons(replace(IMAGES, batch_size=64, num_steps=1000)),
        ),
        GROUNDING_SIZE,
        GROUNDING_FRAMES,
        decoder="videochat_flash",
        stages=GROUNDING_STAGES,
        make_rows=GroundingConversations,
        begin_stage=begin_llava_st_stage,
        connector=last_connector_layer,
        ablations=("lape", "packer"),
    ),
    "crosslmm": TinyModel(
        build_crosslmm,
        (
            _siglip_lessons(IMAGES),
            TowerLessons(
                "connector",
                tower=CrossLMMConnector,
                encode=CrossLMMConnector.encode,
                statistics=_pixel_statistics,
                phases=(replace(IMAGES, batch_size=64, num_steps=600, learning_rate=2e-3, centre_weight=20.0),),
            ),
        ),
        FRAME_SIZE,
        NUM_FRAMES,
        decoder="videochat_flash",
        stages=CROSSLMM_STAGES,
        connector=last_connector_layer,
        # The projector gives the memory of cross-attention as well; the words' length is for what the decoder reads.
        encode=lambda model, batch: CrossLMMConnector(model).encode(batch["pixel_values_videos"]),
    ),
}
