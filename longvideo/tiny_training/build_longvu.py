"""The tiny LongVU: configuration, tokenizer and processor."""

from transformers import Dinov2Config, PreTrainedModel, ProcessorMixin, SiglipVisionConfig

from longvideo.modeling.longvu.configuration_longvu import LongVUConfig
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from longvideo.processing.longvu.image_processing_longvu import LongVUImageProcessor
from longvideo.processing.longvu.processing_longvu import LongVUProcessor
from longvideo.processing.longvu.video_processing_longvu import LongVUVideoProcessor
from longvideo.processing.shared.timestamps import TIME_MESSAGE
from longvideo.tiny_training.build_parts import (
    FRAME_SIZE,
    INIT_STD,
    build_text_config,
    order_numbers,
    train_tokenizer,
)


def build_longvu() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny LongVU, random, with its processor."""
    tokenizer = train_tokenizer()
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    tower = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
    config = LongVUConfig(
        vision_config=SiglipVisionConfig(**tower, intermediate_size=288, image_size=FRAME_SIZE, vision_use_head=False),
        dino_config=Dinov2Config(**tower, mlp_ratio=3, image_size=FRAME_SIZE, initializer_range=INIT_STD),
        text_config=build_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_hidden_size=96,
        vision_grid_size=FRAME_SIZE // 8,
        image_token_len=9,
        connector_depth=2,
        connector_num_heads=4,
        lowres_token=2,
        context_length=512,
        initializer_range=INIT_STD,
    )
    processor = LongVUProcessor(
        image_processor=LongVUImageProcessor(size=side, dino_size=side),
        tokenizer=tokenizer,
        video_processor=LongVUVideoProcessor(size=side, dino_size=side),
        time_message=TIME_MESSAGE,
    )
    model = LongVUForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    return model, processor
