"""Prompts with random pixels for `tests.tiny_crossvllm`, and batches of them."""

import torch
from torch.nn import functional as F

IMAGE, VIDEO, SIDE = 3, 4, 48
TOKENS = {"coarse": 4, "fine": 36}


def prompt(*parts: int | str, granularity: str = "coarse", seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of text lengths, "image" and "video<frames>" with the placeholders of a granularity."""
    generator = torch.Generator().manual_seed(seed)
    ids, frames, images = [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(10, 250, (part,), generator=generator).tolist()
        elif part == "image":
            ids, images = ids + [IMAGE] * 144, images + 1
        else:
            frames.append(int(part.removeprefix("video")))
            ids += [VIDEO] * TOKENS[granularity] * frames[-1]
    row = {"input_ids": torch.tensor([ids])}
    if frames:
        row["pixel_values_videos"] = torch.randn(sum(frames), 3, SIDE, SIDE, generator=generator)
        row["video_num_frames"] = torch.tensor(frames)
    if images:
        row["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return row


def join(*rows: dict[str, torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of different length as one padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    gaps = [width - row["input_ids"].shape[1] for row in rows]
    pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
    ids = [F.pad(row["input_ids"], pad) for row, pad in zip(rows, pads, strict=True)]
    masks = [F.pad(torch.ones_like(row["input_ids"]), pad) for row, pad in zip(rows, pads, strict=True)]
    batch = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    for name in ("pixel_values_videos", "video_num_frames", "pixel_values"):
        parts = [row[name] for row in rows if name in row]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
