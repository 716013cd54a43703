"""Where the rows of coordinate tokens lie: in embedding and head (folded) or in six tables beside them (split).

Everything else asks `LlavaSTVocabularyMixin`, so both layouts compute the same.

Shapes: M rows of one table, C rows of all three axes together, D language width, V rows of embedding and head.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging

from longvideo.modeling.llava_st.configuration_llava_st import AXES, LlavaSTConfig
from longvideo.modeling.llava_st.coordinates_llava_st import place_coordinate_rows, propagate

logger = logging.get_logger(__name__)

EMBEDDING_KEY = "model.language_model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"
TABLE_PREFIX = "model.coordinates."
_COUNTING = threading.Lock()


class LlavaSTCoordinates(nn.Module):
    """The six coordinate tables of the split layout.

    Args:
        config: model configuration.

    Source: `llava_arch.py`, `initialize_spatial_temporal_tokens`; there the output tables are linear maps.
    """

    def __init__(self, config: LlavaSTConfig):
        super().__init__()
        width = config.text_config.hidden_size
        for side in ("input", "output"):
            for axis, size in zip(AXES, config.coordinate_sizes, strict=True):
                setattr(self, f"{axis}_{side}", nn.Embedding(size, width))

    def rows(self, side: str) -> torch.Tensor:
        """Returns the rows of all axes, (C, D), of "input" or "output"."""
        return torch.cat([read_weight(getattr(self, f"{axis}_{side}")) for axis in AXES])


def read_weight(module: nn.Module, start: int = 0, count: int | None = None) -> torch.Tensor:
    """Returns rows of the weight of a module that is read outside its own forward pass.

    Args:
        module: a linear map or an embedding, maybe wrapped by PEFT, maybe offloaded by accelerate.
        start: first row.
        count: number of rows, None for all from the first one on.

    Returns:
        Its rows, with what active adapters add; PEFT's wrapper of single rows merges them in by itself.

    Raises:
        ValueError: an adapter whose rows cannot be told: anything but LoRA of a linear map.
    """
    rows = slice(start, None if count is None else start + count)
    weight = module.weight
    weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight = weights_map["weight"] if weight.is_meta and weights_map is not None else weight
    return _with_adapters(module, weight[rows], rows)


def _with_adapters(module: nn.Module, weight: torch.Tensor, rows: slice) -> torch.Tensor:
    """Adds what adapters of PEFT that are active and not merged add to rows of a weight."""
    if "peft" not in sys.modules:
        return weight
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer) or module.disable_adapters or module.merged:
        return weight
    lora_a, lora_b = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
    for name in module.active_adapters:
        if not any(name in getattr(module, part) for part in module.adapter_layer_names):
            continue
        if name not in lora_a or name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"The adapter {name!r} changes rows of coordinates, which position embeddings of videos and images "
                "read too, in a way that they cannot follow. On the head use plain LoRA (no DoRA), modules_to_save or "
                "trainable_token_indices, on tables of coordinates modules_to_save; or leave that module out."
            )
        # Only these rows: the whole product would be as large as the head.
        added = lora_b[name].weight[rows] @ lora_a[name].weight * module.scaling[name]
        weight = weight + added.to(weight)
    return weight


def _check_tables(state: dict[str, torch.Tensor], config: LlavaSTConfig, width: int) -> None:
    for side in ("input", "output"):
        for axis, size in zip(AXES, config.coordinate_sizes, strict=True):
            name = f"{TABLE_PREFIX}{axis}_{side}.weight"
            found = state.get(name)
            if found is None or tuple(found.shape) != (size, width):
                raise ValueError(
                    f"The table {name} is {'missing' if found is None else tuple(found.shape)}; expected "
                    f"({size}, {width}). The tables must fit the tokenizer's coordinate tokens; a folder saved from "
                    "partitioned weights may hold empty ones."
                )


def fold_state_dict(state: dict[str, torch.Tensor], config: LlavaSTConfig) -> dict[str, torch.Tensor]:
    """Turns weights of the split layout into those of the folded one.

    Args:
        state: weights of `LlavaSTForConditionalGeneration`; the head may be absent where it is tied.
        config: their configuration, of either layout; sizes and `coordinate_token_start` are read.

    Returns:
        The same weights with the tables as last rows of embedding and head.

    Raises:
        ValueError: tables or matrices that do not fit the configuration.
    """
    _check_tables(state, config, state[EMBEDDING_KEY].shape[1])
    folded = {name: tensor for name, tensor in state.items() if not name.startswith(TABLE_PREFIX)}
    for key, side in ((EMBEDDING_KEY, "input"), (HEAD_KEY, "output")):
        if key not in state:
            continue
        if len(state[key]) != config.coordinate_token_start:
            raise ValueError(
                f"{key} has {len(state[key])} rows, but the coordinates begin at id {config.coordinate_token_start}. "
                "In the split layout both are equal; the tokenizer does not fit these weights."
            )
        tables = [state[f"{TABLE_PREFIX}{axis}_{side}.weight"] for axis in AXES]
        folded[key] = torch.cat([state[key], *(table.to(state[key]) for table in tables)])
    return folded


def unfold_state_dict(state: dict[str, torch.Tensor], config: LlavaSTConfig) -> dict[str, torch.Tensor]:
    """Turns weights of the folded layout into those of the split one.

    Args:
        state: weights of `LlavaSTForConditionalGeneration`; the head may be absent where it is tied.
        config: their configuration, of either layout.

    Returns:
        The same weights with the coordinates' rows in six tables.

    Raises:
        ValueError: rows are missing, or there are rows behind the coordinates, which the split layout cannot hold.
    """
    start, end = config.coordinate_token_start, config.coordinate_token_start + config.num_coordinate_tokens
    unfolded = dict(state)
    for key, side in ((EMBEDDING_KEY, "input"), (HEAD_KEY, "output")):
        rows = state.get(key, state[EMBEDDING_KEY])
        if len(rows) != end:
            raise ValueError(
                f"{key} has {len(rows)} rows, but the coordinates end at id {end - 1}. The split layout holds nothing "
                f"behind them: it takes exactly {end} rows. Resize the embeddings to {end} first, or stay folded."
            )
        if key in state:
            unfolded[key] = rows[:start].clone()
        for axis, table in zip(AXES, rows[start:].split(list(config.coordinate_sizes)), strict=True):
            unfolded[f"{TABLE_PREFIX}{axis}_{side}.weight"] = table.clone()
    return unfolded


class LlavaSTVocabularyMixin:
    """The one place where a `LlavaSTModel` reads rows of coordinates, whatever the layout."""

    def set_tied_tables(self) -> None:
        """Says which tables are one where the head is the input embedding."""
        self._tied_weights_keys = None
        if self.coordinates is not None:
            self._tied_weights_keys = {
                f"coordinates.{axis}_output.weight": f"coordinates.{axis}_input.weight" for axis in AXES
            }

    def input_rows(self) -> torch.Tensor:
        """Returns the rows by which coordinate tokens are read, all axes, (C, D)."""
        if self.coordinates is not None:
            return self.coordinates.rows("input")
        embedding, start = self.get_input_embeddings(), self.config.coordinate_token_start
        ids = torch.arange(start, start + self.config.num_coordinate_tokens, device=embedding.weight.device)
        # As a batch of one: hooks of training, such as the noise of NEFTune, expect (B, S).
        return embedding(ids[None])[0]

    def output_rows(self, output_rows: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the rows by which coordinate tokens are predicted, all axes.

        Args:
            output_rows: (C, D) those of the head, in the folded layout.

        Returns:
            (C, D); in the folded layout without a head the input rows, with a warning where they are not the same.
        """
        if self.coordinates is not None:
            return self.coordinates.rows("output")
        if output_rows is not None:
            return output_rows
        if not self.config.tie_word_embeddings:
            logger.warning_once(
                "Position embeddings take only the input rows of coordinates, because this model has no head. Pass "
                "output_rows, or use LlavaSTForConditionalGeneration."
            )
        return self.input_rows()

    def split_axes(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Splits (C, D) rows into one table per axis, propagated to neighbours where configured."""
        tables = rows.split(list(self.config.coordinate_sizes))
        return [propagate(table) if self.config.use_ntp else table for table in tables]

    def coordinate_tables(
        self, output_rows: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns the input and the output tables per axis, (M, D) each, as everything but a plain look-up reads them.

        Args:
            output_rows: (C, D) rows of the head, in the folded layout.

        Returns:
            Tables of times, heights and widths, of input and of output.
        """
        return self.split_axes(self.input_rows()), self.split_axes(self.output_rows(output_rows))

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Looks up (B, S) ids, coordinates in their tables; (B, S, D)."""
        config, embedding = self.config, self.get_input_embeddings()
        if not config.num_coordinate_tokens:
            return embedding(input_ids)
        start = config.coordinate_token_start
        if self.coordinates is None:
            embeds = embedding(input_ids)
            # Propagation changes gradients only.
            if not (config.use_ntp and torch.is_grad_enabled() and embedding.weight.requires_grad):
                return embeds
        else:
            beyond = (input_ids >= start) & (input_ids < start + config.num_coordinate_tokens)
            embeds = embedding(input_ids.masked_fill(beyond, 0))
        return place_coordinate_rows(embeds, input_ids, self.split_axes(self.input_rows()), start)


class LlavaSTLayoutMixin:
    """Changing the layout of a model with a head, and resizing its vocabulary."""

    def fold_coordinates(self) -> "LlavaSTLayoutMixin":
        """Moves the coordinate tables into embedding and head, in place.

        Returns:
            The model; nothing happens where it is folded already.
        """
        return self._change_layout("folded")

    def unfold_coordinates(self) -> "LlavaSTLayoutMixin":
        """Moves the coordinates' rows into six tables, as in the release, in place.

        Returns:
            The model; nothing happens where it is split already.

        Raises:
            ValueError: rows behind the coordinates.
        """
        return self._change_layout("split")

    def _change_layout(self, layout: str) -> "LlavaSTLayoutMixin":
        config = self.config
        if config.coordinate_layout == layout or not config.num_coordinate_tokens:
            config.coordinate_layout = layout
            return self
        old = self.model.language_model.embed_tokens
        names = (EMBEDDING_KEY, HEAD_KEY)
        state = {k: x for k, x in self.state_dict().items() if k in names or k.startswith(TABLE_PREFIX)}
        convert = fold_state_dict if layout == "folded" else unfold_state_dict
        state = convert(state, config)
        trained = {name: p.requires_grad for name, p in (("input", old.weight), ("output", self.lm_head.weight))}
        config.coordinate_layout = layout
        config.text_config.vocab_size = len(state[EMBEDDING_KEY])
        for module, key, side in ((old, EMBEDDING_KEY, "input"), (self.lm_head, HEAD_KEY, "output")):
            module.weight = nn.Parameter(state[key], requires_grad=trained[side])
        old.num_embeddings = self.lm_head.out_features = config.text_config.vocab_size
        self.model.coordinates = None
        if layout == "split":
            self.model.coordinates = LlavaSTCoordinates(config).to(old.weight.device, old.weight.dtype)
            for name, table in self.model.coordinates.named_parameters():
                table.data = state[TABLE_PREFIX + name]
                table.requires_grad_(trained["output" if "output" in name else "input"])
        self.model.set_tied_tables()
        self.tie_weights()
        return self

    @contextmanager
    def all_tokens_counted(self) -> Iterator[None]:
        """Lets the text configuration count coordinates too, in either layout.

        Beam search and scores of beams take the number of columns from there. Several threads may be inside.
        """
        text_config, total = self.config.text_config, self.config.num_logits
        with _COUNTING:
            inside, own = getattr(text_config, "_all_tokens_counted", (0, text_config.vocab_size))
            text_config._all_tokens_counted, text_config.vocab_size = (inside + 1, own), total
        try:
            yield
        finally:
            with _COUNTING:
                inside, own = text_config._all_tokens_counted
                if inside > 1:
                    text_config._all_tokens_counted = (inside - 1, own)
                else:
                    del text_config._all_tokens_counted
                    text_config.vocab_size = own

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes embedding and head as upstream does; ids of coordinates stay what they are.

        Args:
            new_num_tokens: wanted rows.
            pad_to_multiple_of: as upstream.
            mean_resizing: as upstream.

        Returns:
            The input embedding.

        Raises:
            ValueError: the split layout, whose matrices end where coordinates begin, or so few rows that coordinates
                would be cut off.
        """
        config = self.config
        nothing = new_num_tokens is None and pad_to_multiple_of is None
        if config.num_coordinate_tokens and not nothing:
            if config.coordinate_layout == "split":
                raise ValueError(
                    "In the split layout the ids of coordinates follow the last row of the embedding, so it cannot be "
                    "resized. Call model.fold_coordinates() first; ids stay what they are."
                )
            end = config.coordinate_token_start + config.num_coordinate_tokens
            if new_num_tokens is not None and new_num_tokens < end:
                raise ValueError(
                    f"{new_num_tokens} rows would cut off coordinates; their last id is {end - 1}. Keep {end}."
                )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
