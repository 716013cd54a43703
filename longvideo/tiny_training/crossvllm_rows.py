"""What the tiny CrossVLLM is taught: questions about long scenes in either granularity, with features of the tower.

The tower is frozen behind its own lessons, and most frames of a long scene show nothing. So no video is written or
drawn whole: of the frames that a module sees each different picture is drawn and encoded once.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from longvideo.evaluation.corpus import Scene, render_frames
from longvideo.evaluation.corpus.long_scenes import (
    LONG_FPS,
    TIME_STEP,
    LongDifficulty,
    LongQuestion,
    long_questions,
    long_row,
    make_long_scene,
    render_long,
)
from longvideo.processing.crossvllm.policies import Rejected, coarse_prompt, fine_prompt, plain_prompt, policy_text
from longvideo.processing.crossvllm.source_frames import cut_of
from longvideo.processing.crossvllm.video_processing_crossvllm import spread_over
from longvideo.processing.shared.frame_sampling import covering_range
from longvideo.tiny_training.build_crossvllm import COARSE_FRAMES, FINE_FRAMES, NOT_SEEN
from longvideo.tiny_training.guided_attention import Guide
from longvideo.trainers.label_rules import IGNORE_INDEX

BATCH_SIZE = 16
MOST_TURNS = 4
# As many as the controller gives at its usual limit.
MOST_SENT_BACK = 3
# Forms of a row: "plain" questions (about all of a video, or about a segment that shows the answer or misses it),
# policies of P_c (about anything; the letter alone, in scenes that all have one; or a bare name as in temporal
# grounding), the judgements of P_f.
FORMS = ("plain_coarse", "plain_fine", "cut", "missed", "policy", "policy_letter", "policy_named", "judge")


@dataclass(frozen=True)
class CrossStage:
    """One stage of supervised training.

    Args:
        name: folder of its checkpoints.
        num_steps: optimizer steps.
        learning_rate: peak rate.
        shares: how often a batch is of which of FORMS, and the long scenes that its rows are made of, or their name.
        learns: "projectors", "base" (projectors and decoder), or a granularity.
        schedule: "linear" (down to zero) or "constant_with_warmup".
        looks: whether policies begin to look for what is named as plain answers do; see `begin_as_answers`.
        guided: weight of the loss that tells policies where to look; see `guided_attention`.
    """

    name: str
    num_steps: int
    learning_rate: float
    shares: tuple[tuple[str, float, str | LongDifficulty], ...]
    learns: str
    schedule: str = "linear"
    looks: bool = False
    guided: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """A row: what is seen of a scene in which granularity, and turns of text and answer.

    Args:
        scene: what the video shows.
        granularity: "coarse" or "fine".
        segment: (start, end) in seconds; None for the whole video.
        turns: texts and answers.
        events: for policies the (start, end) in seconds that each turn asks for.
    """

    scene: Scene
    granularity: str
    segment: tuple[float, float] | None
    turns: tuple[tuple[str, str], ...]
    events: tuple[tuple[float, float], ...] = ()


class CrossLessons(Dataset):
    """Rows of a stage, made when they are asked for; the same index always gives the same row.

    Args:
        stage: what to draw.
        first_seed: number of the first scene of the training split.
    """

    def __init__(self, stage: CrossStage, *, first_seed: int):
        self.stage, self.first_seed = stage, first_seed

    def __len__(self) -> int:
        return self.stage.num_steps * BATCH_SIZE

    def __getitem__(self, index: int) -> Lesson:
        seed = self.first_seed + index
        # Rows of a batch are of one form, hence of one granularity, and little is padded.
        shares, weights = self.stage.shares, [share for _, share, _ in self.stage.shares]
        form, _, difficulty = random.Random(f"crossvllm batch {seed // BATCH_SIZE}").choices(shares, weights)[0]
        rng = random.Random(f"crossvllm lesson {seed}")
        return make_lesson(make_long_scene(seed, difficulty=difficulty), form, rng)


def make_lesson(scene: Scene, form: str, rng: random.Random) -> Lesson:
    """Makes a row of a form.

    Args:
        scene: what the video shows.
        form: one of FORMS.
        rng: source of chance.

    Returns:
        The row.
    """
    asked = _one_of_each_event(scene, rng)
    if form.startswith("policy"):
        if form == "policy_letter":
            asked = [found for found in asked if found.question.kind == "needle"]
        if form == "policy_named":
            asked = [_by_name(scene, found, rng) for found in asked]
        asked = asked[:MOST_TURNS]
        turns = [(_policy_prompt(scene, found, rng), policy_text(*found.segment)) for found in asked]
        return Lesson(scene, "coarse", None, tuple(turns), tuple(found.segment for found in asked))
    if form.startswith("plain"):
        turns = [(plain_prompt(found.question.question), found.question.answer) for found in asked[:MOST_TURNS]]
        return Lesson(scene, form.removeprefix("plain_"), None, tuple(turns))
    chosen = asked[0]
    if form == "missed":
        # Nothing can be told from such a segment, so that all of them score alike when policies are compared.
        missed = wrong_segment(scene, chosen.segment, rng)
        return Lesson(scene, "fine", missed, ((chosen.question.question, chosen.question.answer),))
    same = [found for found in long_questions(scene) if found.segment == chosen.segment]
    segment = shift_segment(scene, chosen.segment, rng)
    if form == "cut":
        # The answer to one of the two names must not be read off a question about the other.
        turns = [chosen, *(x for x in same if x.question.kind == "direction" != chosen.question.kind)]
        return Lesson(scene, "fine", segment, tuple((x.question.question, x.question.answer) for x in turns))
    reflection = ""
    if rng.random() < 0.5:
        segment, reflection = wrong_segment(scene, chosen.segment, rng), NOT_SEEN
    answer = f'{{"reflection": "{reflection}", "answer": "{chosen.question.answer}"}}'
    return Lesson(scene, "fine", segment, ((fine_prompt(chosen.question.question), answer),))


def _one_of_each_event(scene: Scene, rng: random.Random) -> list[LongQuestion]:
    by_event: dict[tuple[float, float], list[LongQuestion]] = {}
    for found in long_questions(scene):
        by_event.setdefault(found.segment, []).append(found)
    asked = [rng.choice(some) for some in by_event.values()]
    rng.shuffle(asked)
    return asked


def _by_name(scene: Scene, found: LongQuestion, rng: random.Random) -> LongQuestion:
    """Asks for what is seen by nothing but a name of it: its shape, its colour, or that it is a letter."""
    return replace(found, question=replace(found.question, question=rng.choice(names_of(scene, found.segment))))


def names_of(scene: Scene, event: tuple[float, float]) -> list[str]:
    """Lists the words that name what is seen in an event.

    Args:
        scene: what the video shows.
        event: (start, end) in seconds of one thing.

    Returns:
        Its shape and its colour, or that it is a letter.
    """
    shapes = [name for actor in scene.actors if actor.enter == event[0] for name in (actor.shape, actor.colour)]
    return shapes or ["letter"]


def _policy_prompt(scene: Scene, found: LongQuestion, rng: random.Random) -> str:
    """P_c of training or of inference, in half of all cases with segments that were sent back, mostly other events."""
    if rng.random() < 0.45:
        return coarse_prompt(found.question.question, scene.duration, grounding_only=rng.random() < 0.5)
    others = sorted({other.segment for other in long_questions(scene)} - {found.segment})
    some = rng.sample(others, rng.randint(0, len(others)))
    # Other events are a step away from this one at least, and stay wrong when they are moved by half of it.
    sent_back = [seen if rng.random() < 0.6 else shift_segment(scene, seen, rng) for seen in some]
    if not sent_back or rng.random() < 0.25:
        sent_back.append(wrong_segment(scene, found.segment, rng))
    rejected = [Rejected(segment, NOT_SEEN) for segment in sent_back[:MOST_SENT_BACK]]
    return coarse_prompt(found.question.question, scene.duration, rejected=rejected)


def shift_segment(scene: Scene, segment: tuple[float, float], rng: random.Random) -> tuple[float, float]:
    """Moves the ends of a segment by a step or not, as the overview module may; it still shows most of its event."""
    start, end = (time + TIME_STEP * rng.choice((-1, 0, 0, 1)) for time in segment)
    start, end = max(start, 0.0), min(end, float(scene.duration))
    return (start, end) if end - start >= TIME_STEP else segment


def wrong_segment(scene: Scene, segment: tuple[float, float], rng: random.Random) -> tuple[float, float]:
    """Draws a segment that shows nothing of an event; half of them show another one."""
    others = sorted({found.segment for found in long_questions(scene)} - {segment})
    if others and rng.random() < 0.5:
        return shift_segment(scene, rng.choice(others), rng)
    steps = scene.duration // TIME_STEP
    while True:
        length = rng.choice((2, 3, 4))
        start = rng.randint(0, steps - length)
        drawn = (float(start * TIME_STEP), float((start + length) * TIME_STEP))
        if min(drawn[1], segment[1]) <= max(drawn[0], segment[0]):
            return drawn


def frame_indices(scene: Scene, granularity: str, segment: tuple[float, float] | None) -> list[int]:
    """Chooses the frames of a decoded long video as the processor does.

    Args:
        scene: what the video shows.
        granularity: "coarse" or "fine", which says how many.
        segment: (start, end) in seconds; None for the whole video.

    Returns:
        Zero-based indices at LONG_FPS frames per second.
    """
    start, end = cut_of(segment, float(scene.duration))
    first, count, _ = covering_range(scene.duration * LONG_FPS, float(LONG_FPS), start=start, end=end)
    wanted = COARSE_FRAMES if granularity == "coarse" else FINE_FRAMES
    return (spread_over(count, wanted) + first).tolist()


def different_frames(scene: Scene, indices: Sequence[int], size: int) -> tuple[torch.Tensor, list[int]]:
    """Draws each different picture among frames of a long video once.

    Args:
        scene: what the video shows.
        indices: zero-based indices at LONG_FPS frames per second.
        size: side in pixels.

    Returns:
        (U, size, size, 3) uint8 pictures, and for each frame which of them it is.
    """
    times, places, order = [], [], {}
    for index in indices:
        time = (index + 0.5) / LONG_FPS
        seen: tuple[Any, ...] = ()
        if scene.needle is not None and scene.needle.visible(time):
            seen = ("letter",)
        for actor in scene.actors:
            if not seen and actor.visible(time):
                seen = (actor.shape, *actor.position(time))
        if seen not in order:
            order[seen] = len(times)
            times.append(time)
        places.append(order[seen])
    return torch.from_numpy(render_frames(scene, times, size)), places


class SceneEncoder:
    """Gives the tower's features of long scenes.

    Args:
        model: a CrossVLLM; its tower stays as it is.
        processor: of the model.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model = model
        video_processor = processor.video_processor
        self.size = model.config.vision_config.image_size
        self.mean, self.std = (
            torch.tensor(values).view(3, 1, 1) for values in (video_processor.image_mean, video_processor.image_std)
        )

    @torch.no_grad()
    def __call__(self, views: Sequence[tuple[Scene, Sequence[int]]]) -> list[torch.Tensor]:
        """Encodes frames.

        Args:
            views: scenes, each with indices of frames at LONG_FPS frames per second.

        Returns:
            (T, P, E) features for each.
        """
        drawn = [different_frames(scene, indices, self.size) for scene, indices in views]
        frames = torch.cat([pictures for pictures, _ in drawn])
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features = self.model.get_vision_features(pixels[None])[0]
        parts = features.split([len(pictures) for pictures, _ in drawn])
        return [part[places] for part, (_, places) in zip(parts, drawn, strict=True)]


class LessonCollator:
    """Turns lessons into batches with features of the tower; answers alone are supervised.

    Args:
        model: the model that learns.
        processor: of the model.
        bf16: whether the tower computes in bfloat16.
        guided: whether to say where policies should look.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, bf16: bool = False, guided: bool = False):
        self.encoder, self.processor, self.bf16, self.guided = SceneEncoder(model, processor), processor, bf16, guided

    def __call__(self, rows: Sequence[Lesson]) -> dict[str, Any]:
        """Collates lessons of one granularity.

        Args:
            rows: the lessons.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, S), `vision_features` (per row (T, P, E)), `granularity`, and
            `guides` (of policies, where they are guided; else empty).
        """
        granularity = rows[0].granularity
        views = [(row.scene, frame_indices(row.scene, granularity, row.segment)) for row in rows]
        with torch.autocast(self.encoder.model.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(views)
        encoded = [self._tokens(row, len(seen)) for row, seen in zip(rows, features, strict=True)]
        length = max(len(ids) for ids, _ in encoded)
        ids_BS = torch.full((len(rows), length), self.processor.tokenizer.pad_token_id)
        mask_BS, labels_BS = torch.zeros_like(ids_BS), torch.full_like(ids_BS, IGNORE_INDEX)
        for place, (ids, labels) in enumerate(encoded):
            ids_BS[place, : len(ids)], labels_BS[place, : len(ids)] = torch.tensor(ids), torch.tensor(labels)
            mask_BS[place, : len(ids)] = 1
        batch = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
        guides = [
            guide
            for number, (row, (_, indices)) in enumerate(zip(rows, views, strict=True))
            if self.guided
            for guide in self._guides(number, row, indices)
        ]
        return {**batch, "vision_features": features, "granularity": granularity, "guides": guides}

    def _guides(self, number: int, row: Lesson, indices: Sequence[int]) -> Iterator[Guide]:
        """Yields where the first token of each policy of a row should look: at the name and at the frames."""
        tokenizer = self.processor.tokenizer
        for turn, event in enumerate(row.events):
            prompt = self._prompt(row, turn, len(indices))
            encoded = tokenizer(prompt, return_offsets_mapping=True)
            asked = prompt.rindex("Question: ")
            named = [x.span() for x in re.finditer(rf"\b({'|'.join(names_of(row.scene, event))})\b", prompt[asked:])]
            names = [
                place
                for place, (start, end) in enumerate(encoded["offset_mapping"])
                if any(start - asked < last and end - asked > first for first, last in named)
            ]
            visual = [
                place for place, x in enumerate(encoded["input_ids"]) if x == self.encoder.model.config.video_token_id
            ]
            each = len(visual) // len(indices)
            frames = [
                place
                for frame, index in enumerate(indices)
                if event[0] <= (index + 0.5) / LONG_FPS < event[1]
                for place in visual[frame * each : (frame + 1) * each]
            ]
            yield Guide(number, len(encoded["input_ids"]), tuple(names), tuple(frames))

    def _prompt(self, row: Lesson, turn: int, num_frames: int) -> str:
        """Everything before the answer of a turn."""
        messages: list[dict[str, Any]] = []
        visual: list[dict[str, Any]] = [{"type": "video", "video": "-"}]
        for text, answer in row.turns[: turn + 1]:
            messages.append({"role": "user", "content": [*visual, {"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            visual = []
        return self.processor.prompt_of(messages[:-1], [num_frames], granularity=row.granularity)

    def _tokens(self, row: Lesson, num_frames: int) -> tuple[list[int], list[int]]:
        ids, labels = [], []
        for turn, (_, answer) in enumerate(row.turns):
            # What stands before is spelled alike whatever follows: every turn begins and ends with a token of its own.
            before = self.processor.tokenizer(self._prompt(row, turn, num_frames))["input_ids"]
            after = self.processor.tokenizer(f" {answer}{self.processor.tokenizer.eos_token}")["input_ids"]
            labels += [IGNORE_INDEX] * (len(before) - len(ids)) + after
            ids = before + after
        return ids, labels


class LongQuestions(Dataset):
    """Rows of cross-granularity training, with decoded videos.

    The same row comes twice, for both modules: its video is the same object, so that no frame is encoded again.

    Args:
        num: rows.
        first_seed: number of the first scene of the training split.
        size: side of the frames in pixels.
        kept: rows that are kept.
    """

    def __init__(self, num: int, *, first_seed: int, size: int, kept: int = 32):
        self.num, self.first_seed, self.size, self.kept = num, first_seed, size, kept
        self._rows: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._rows:
            scene = make_long_scene(self.first_seed + index)
            found = random.Random(f"crossvllm question {scene.seed}").choice(long_questions(scene))
            while len(self._rows) >= self.kept:
                del self._rows[next(iter(self._rows))]
            self._rows[index] = long_row(scene, found, render_long(scene, self.size))
        return self._rows[index]
