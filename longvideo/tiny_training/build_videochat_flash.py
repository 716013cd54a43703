"""The tiny VideoChat-Flash: configuration, tokenizer and processor."""

from transformers import PreTrainedModel, ProcessorMixin

from longvideo.modeling.encoders.umt.configuration_umt import UMTVisionConfig
from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration
from longvideo.processing.videochat_flash.image_processing_videochat_flash import VideoChatFlashImageProcessor
from longvideo.processing.videochat_flash.processing_videochat_flash import VideoChatFlashProcessor
from longvideo.processing.videochat_flash.video_processing_videochat_flash import VideoChatFlashVideoProcessor
from longvideo.tiny_training.build_parts import (
    FRAME_SIZE,
    INIT_STD,
    NUM_FRAMES,
    build_text_config,
    order_numbers,
    train_tokenizer,
)


def build_videochat_flash() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes the tiny VideoChat-Flash, random, with its processor."""
    tokenizer = train_tokenizer()
    side = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    config = VideoChatFlashConfig(
        vision_config=UMTVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=FRAME_SIZE,
            patch_size=8,
            # Tables of just this size: interpolated ones blur the quick waves, and with them what moves.
            position_grid_size=FRAME_SIZE // 8,
            position_num_frames=4,
            initializer_range=INIT_STD,
        ),
        text_config=build_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tokens_per_frame=8,
        llm_compress_type="uniform0_attention",
        llm_compress_layer_list=[1, 3],
        llm_image_token_ratio_list=[1.0, 0.75, 0.25],
        initializer_range=INIT_STD,
    )
    processor = VideoChatFlashProcessor(
        # One tile per image: its 32 tokens form no square, which a grid of tiles needs.
        image_processor=VideoChatFlashImageProcessor(
            size=side,
            image_aspect_ratio="pad",
            image_grid_pinpoints=[[FRAME_SIZE * i, FRAME_SIZE * j] for i in (1, 2) for j in (1, 2)],
        ),
        tokenizer=tokenizer,
        video_processor=VideoChatFlashVideoProcessor(size=side, min_frames=NUM_FRAMES, max_frames=NUM_FRAMES),
        tokens_per_frame=config.tokens_per_frame,
        mm_local_num_frames=config.mm_local_num_frames,
    )
    model = VideoChatFlashForConditionalGeneration(config)
    order_numbers(model, tokenizer)
    return model, processor
