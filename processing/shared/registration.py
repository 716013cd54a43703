"""Registration of processors with the Auto classes."""

from typing import Any


def register_processors(config_class: type, *, image: type, video: type, processor: type) -> None:
    """Make the Auto classes find the processors of an architecture; may be called any number of times.

    Args:
        config_class: Configuration of the architecture.
        image: Image processor class.
        video: Video processor class.
        processor: Class that joins both with a tokenizer.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor

    backends: dict[str, Any] = {"torchvision": image}
    AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)
    AutoVideoProcessor.register(config_class, video, exist_ok=True)
    AutoProcessor.register(config_class, processor, exist_ok=True)
