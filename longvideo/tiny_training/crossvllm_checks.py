"""How both modules of a CrossVLLM do on a few held-out long videos, each asked once: for the log of training."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.corpus import Scene
from longvideo.evaluation.corpus.long_scenes import LongQuestion, long_items
from longvideo.evaluation.metrics import temporal_iou
from longvideo.processing.crossvllm.policies import coarse_prompt, fine_prompt, parse_coarse, parse_fine, plain_prompt
from longvideo.processing.crossvllm.segment_times import normalize_segment
from longvideo.tiny_training.crossvllm_rows import SceneEncoder, frame_indices

Item = tuple[Scene, LongQuestion]
AT_ONCE = 10


@torch.no_grad()
def write(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    texts: Sequence[str],
    granularity: str,
    segments: Sequence[tuple[float, float] | None],
) -> list[str]:
    """Lets a module write, most likely text first.

    Args:
        model: the model in evaluation mode.
        processor: of the model.
        items: scenes with their questions.
        texts: prompts of the module, one for each.
        granularity: "coarse" or "fine".
        segments: (start, end) in seconds, None for the whole video.

    Returns:
        One text each.
    """
    encoder, written = SceneEncoder(model, processor), []
    for begin in range(0, len(items), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        views = [
            (scene, frame_indices(scene, granularity, segment))
            for (scene, _), segment in zip(items[part], segments[part], strict=True)
        ]
        features = encoder(views)
        prompts = [
            processor.prompt_of(
                [{"role": "user", "content": [{"type": "video", "video": "-"}, {"type": "text", "text": text}]}],
                [len(seen)],
                granularity=granularity,
            )
            for text, seen in zip(texts[part], features, strict=True)
        ]
        tokens = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            vision_features=features,
            granularity=granularity,
            max_new_tokens=12,
            do_sample=False,
        )
        # With features alone the prompt is not repeated.
        ids = ids[:, tokens["input_ids"].shape[1] :] if ids.shape[1] > tokens["input_ids"].shape[1] else ids
        written += [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return written


def check_modules(model: PreTrainedModel, processor: ProcessorMixin, num: int) -> dict[str, float]:
    """Asks both modules about held-out scenes, each once.

    Args:
        model: the model in evaluation mode.
        processor: of the model.
        num: questions.

    Returns:
        Overlap of segments (`miou`, `overlaps`, and overlaps by kind), accuracy of answers from true segments and from
        those that were found, by kind too, and how often a wrong and a right segment were judged so.
    """
    items = long_items(num)
    questions = [found.question.question for _, found in items]
    truths = [found.segment for _, found in items]
    whole = [None] * num
    asked = [coarse_prompt(text, scene.duration) for (scene, _), text in zip(items, questions, strict=True)]
    segments, sums = [], defaultdict(list)
    for (scene, found), text in zip(items, write(model, processor, items, asked, "coarse", whole), strict=True):
        policy = parse_coarse(text)
        segment = normalize_segment(policy.t_start, policy.t_end, scene.duration)
        iou = 0.0 if segment is None else temporal_iou(segment, found.segment)
        sums["parsed"].append(segment is not None)
        sums["miou"].append(iou)
        for name in ("overlaps", f"overlaps_{found.question.kind}"):
            sums[name].append(iou > 0)
        segments.append(segment or (0.0, float(scene.duration)))
    plain = [plain_prompt(text) for text in questions]
    for name, cuts in (("true", truths), ("found", segments)):
        for (_, found), text in zip(items, write(model, processor, items, plain, "fine", cuts), strict=True):
            for key in (f"right_{name}", f"right_{name}_{found.question.kind}"):
                sums[key].append(text == found.question.answer)
    judged = [fine_prompt(text) for text in questions]
    moved = [_elsewhere(scene, segment) for (scene, _), segment in zip(items, truths, strict=True)]
    for name, cuts in (("accepts_true", truths), ("rejects_wrong", moved)):
        for text in write(model, processor, items, judged, "fine", cuts):
            sums[name].append(bool(parse_fine(text).reflection) == (name == "rejects_wrong"))
    return {name: round(sum(values) / len(values), 3) for name, values in sorted(sums.items())}


def _elsewhere(scene: Scene, segment: tuple[float, float]) -> tuple[float, float]:
    """A segment of ten seconds that does not touch another one."""
    start = 0.0 if segment[0] >= 10 else scene.duration - 10.0
    return start, start + 10.0
