"""Coordinate tokens that a stage of LLaVA-ST needs: added to model and tokenizer, or refused where they do not fit."""

from typing import Any

COUNTS = ("num_temporal_tokens", "num_spatial_tokens")
FIELDS = (*COUNTS, "coordinate_layout")


def split_fields(config: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out of the fields of a stage what no configuration can just be given, because weights hang on it.

    Args:
        config: Configuration of the checkpoint.
        fields: Fields that the stage needs.

    Returns:
        The plain fields, and those about coordinates.

    Raises:
        ValueError: Other numbers of coordinates than the checkpoint's, which has some already.
    """
    if not hasattr(config, "coordinate_layout"):
        return fields, {}
    plain = {name: value for name, value in fields.items() if name not in FIELDS}
    special = {name: value for name, value in fields.items() if name in FIELDS}
    present = tuple(getattr(config, name) for name in COUNTS)
    wanted = tuple(special.get(name, number) for name, number in zip(COUNTS, present, strict=True))
    if wanted == present or (present == (0, 0) and min(wanted) > 0):
        return plain, special
    advice = (
        "convert the checkpoint with --coordinates none, or train it with its coordinates"
        if wanted == (0, 0)
        else "take a checkpoint with as many, or none, or train with those that it has"
    )
    words = " ".join(f"--set model.{name}={number}" for name, number in zip(COUNTS, present, strict=True))
    raise ValueError(
        f"The stage needs {wanted[0]} times and {wanted[1]} heights and widths in the vocabulary, and the model has "
        f"{present[0]} and {present[1]}: {advice} ({words})."
    )


def needs_tokens(config: Any, fields: dict[str, Any]) -> bool:
    """Say whether a stage adds coordinate tokens to a model.

    Args:
        config: Configuration of the checkpoint.
        fields: What `split_fields` took out, or all fields of the stage.

    Returns:
        Whether it does.
    """
    present = [getattr(config, name, 0) for name in COUNTS]
    return hasattr(config, "coordinate_layout") and present != [
        fields.get(name, number) for name, number in zip(COUNTS, present, strict=True)
    ]


def prepare_coordinates(model: Any, processor: Any, fields: dict[str, Any]) -> str | None:
    """Add coordinate tokens to a model without any, and bring them into the layout of the stage.

    Args:
        model: The model; changed in place.
        processor: Its processor, whose tokenizer is changed with it.
        fields: What `split_fields` took out.

    Returns:
        What was done, None for nothing.
    """
    config, told = model.config, []
    wanted = [fields.get(name, getattr(config, name, 0)) for name in COUNTS]
    if needs_tokens(config, fields):
        from longvideo.processing.llava_st.tokenizer_llava_st import add_coordinate_tokens

        added = add_coordinate_tokens(processor.tokenizer, *wanted)
        # New rows are drawn around those that there are, which a model without weights does not have.
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=model.device.type != "meta")
        for name, value in added.items():
            setattr(config, name, value)
        for name in COUNTS:
            setattr(processor, name, added[name])
        told.append(f"{wanted[0]} times and {wanted[1]} heights and widths added to the vocabulary")
    layout = fields.get("coordinate_layout")
    if layout is not None and layout != config.coordinate_layout:
        _ = model.unfold_coordinates() if layout == "split" else model.fold_coordinates()
        told.append(f"coordinates {layout}")
    return "; ".join(told) or None
