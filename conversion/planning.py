"""The plan of a conversion: one row per source tensor, and every hole, from the headers alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from longvideo.conversion.parts import SourceCheckpoint
from longvideo.conversion.report import ConversionReport, TensorRow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def plan_rows(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    rename: Callable[[str], str | None],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Fill the report with one row per source tensor, and with every hole, from the headers alone."""
    for info in checkpoint.infos.values():
        try:
            target = rename(info.name)
        except KeyError:
            report.unused.append(f"{info.name} {list(info.shape)}")
            continue
        if target is not None and target not in expected:
            report.unused.append(f"{info.name} {list(info.shape)} (the config has no {target})")
            continue
        if target is not None and expected[target] != info.shape:
            report.misshapen.append(
                f"{info.name}: the file has {list(info.shape)}, config.json asks for {list(expected[target])}"
            )
        report.rows.append(TensorRow(info, target, report.dtype))
    filled = {row.target for row in report.rows}
    report.missing += [f"{name} {list(shape)}" for name, shape in expected.items() if name not in filled]


def settle_tied_weights(
    report: ConversionReport,
    checkpoint: SourceCheckpoint,
    config: "PreTrainedConfig",
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Accept an absent `lm_head.weight` when the embeddings are tied, and untie when two differing ones are stored."""
    if not config.get_text_config().tie_word_embeddings:
        return
    head = rename("lm_head.weight")
    absent = [name for name in report.missing if name.startswith(f"{head} ")]
    if absent:
        report.missing.remove(absent[0])
        report.notes.append(f"{head} is not stored: the config ties it to the input embeddings.")
        return
    rows = {row.target: row.source for row in report.kept}
    embedding = next((name for name in rows if name and name.endswith("embed_tokens.weight")), None)
    if report.direction == "reverse" or embedding is None or head not in rows:
        return
    if not torch.equal(checkpoint.read(rows[head].name), checkpoint.read(rows[embedding].name)):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        report.notes.append(
            "the config ties the output to the input embeddings but the files hold two different matrices; both are "
            "kept and tie_word_embeddings is set to false."
        )
