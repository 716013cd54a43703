"""The tiny CrossLMM: configuration, tokenizer and processor."""

from typing import Any

from transformers import PreTrainedModel, ProcessorMixin, SiglipVisionConfig

from longvideo.modeling.crosslmm.configuration_crosslmm import CrossLMMConfig
from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration
from longvideo.processing.crosslmm.image_processing_crosslmm import CrossLMMImageProcessor
from longvideo.processing.crosslmm.processing_crosslmm import CrossLMMProcessor
from longvideo.processing.crosslmm.video_processing_crosslmm import CrossLMMVideoProcessor
from longvideo.processing.shared.timestamps import TIME_MESSAGE
from longvideo.tiny_training.build_parts import (
    FRAME_SIZE,
    INIT_STD,
    NUM_FRAMES,
    build_text_config,
    order_numbers,
    train_tokenizer,
)


def build_crosslmm(*, num_layers: int = 4, **fields: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny CrossLMM as it enters stage 1, random and without T2V, with its processor.

    Args:
        num_layers: layers of the decoder.
        **fields: of the configuration, in place of ours.

    Returns:
        Model and processor.
    """
    tokenizer = train_tokenizer()
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    config = CrossLMMConfig(
        **{
            "vision_config": SiglipVisionConfig(
                hidden_size=96,
                intermediate_size=288,
                # The last one is not built: features are those of the layer before, as in the paper.
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=FRAME_SIZE,
                patch_size=8,
                vision_use_head=False,
            ),
            "text_config": build_text_config(tokenizer, num_layers=num_layers),
            "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            "tokens_per_frame": 9,
            # Every second of four layers has as large a part in the whole as every fourth of twenty-eight.
            "cross_attention_interval": 2,
            "use_t2v": False,
            "vision_chunk_size": 128,
            "initializer_range": INIT_STD,
            **fields,
        }
    )
    processor = CrossLMMProcessor(
        image_processor=CrossLMMImageProcessor(size=side),
        tokenizer=tokenizer,
        video_processor=CrossLMMVideoProcessor(size=side, min_frames=NUM_FRAMES, max_frames=NUM_FRAMES),
        tokens_per_frame=config.tokens_per_frame,
        time_message=TIME_MESSAGE,
    )
    model = CrossLMMForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    return model, processor
