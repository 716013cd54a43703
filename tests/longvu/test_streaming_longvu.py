"""Videos of LongVU window by window: more survivors than may stay, and windows that can be read again."""

import pytest
import torch

from tests.tiny_longvu import tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor
from tests.videos import make_video

NUM_FRAMES, KEPT = 45, 10


class Windows:
    """Windows of 7 frames that count how often they are read."""

    def __init__(self, pixels):
        self.pixels, self.passes = pixels, 0

    def __iter__(self):
        self.passes += 1
        for piece in self.pixels.split(7):
            yield {"pixel_values_videos": piece, "pixel_values_videos_dino": piece}

    def again(self):
        return iter(self)


@pytest.fixture
def model():
    """Every frame survives, 10 may stay."""
    return tiny_longvu_model(dino_threshold=2.0, max_kept_frames=KEPT)


@pytest.fixture
def seen(model):
    """Frames per call of SigLIP."""
    counts = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return counts


def test_too_many_survivors_are_read_again_and_few_reach_siglip(model, seen):
    pixels = torch.randn(NUM_FRAMES, 3, 28, 28)
    expected = model.encode_video(pixels, pixels, torch.tensor([NUM_FRAMES]))
    seen.clear()
    windows = Windows(pixels)
    encoded = model.encode_video(windows=windows, num_frames=NUM_FRAMES)
    assert windows.passes == 2 and sum(seen) <= 2 * KEPT
    assert torch.equal(encoded.visuals[0].kept_frames, expected.visuals[0].kept_frames)
    assert len(encoded.visuals[0].kept_frames) == KEPT and encoded.key == expected.key
    # fp32, other numbers of frames per tower call
    assert torch.allclose(encoded.visuals[0].features, expected.visuals[0].features, atol=1e-5)


def test_windows_that_cannot_be_read_again_give_the_same(model, seen):
    pixels = torch.randn(NUM_FRAMES, 3, 28, 28)
    again = model.encode_video(windows=Windows(pixels), num_frames=NUM_FRAMES)
    seen.clear()
    once = model.encode_video(windows=iter(Windows(pixels)), num_frames=NUM_FRAMES)
    assert sum(seen) == NUM_FRAMES and torch.equal(once.visuals[0].kept_frames, again.visuals[0].kept_frames)
    # fp32, other numbers of frames per tower call
    assert torch.allclose(once.visuals[0].features, again.visuals[0].features, atol=1e-5)


def test_few_survivors_are_read_once(model):
    model.config.dino_threshold = -2.0  # the middle frame of each window of 16 only
    windows = Windows(torch.randn(NUM_FRAMES, 3, 28, 28))
    encoded = model.encode_video(windows=windows, num_frames=NUM_FRAMES)
    assert windows.passes == 1 and encoded.visuals[0].kept_frames.tolist() == [8, 24, 38]


def test_windows_of_a_file_start_again(model, tmp_path):
    path = str(make_video(tmp_path / "clip.mp4", 24, 8))
    processor = tiny_longvu_processor()
    windows = processor.iterate_windows(path, 5, num_frames=12, start=0.5)
    first = [window["pixel_values_videos"] for window in windows]
    second = [window["pixel_values_videos"] for window in windows.again()]
    assert [len(piece) for piece in first] == [5, 5, 2] and list(windows) == []
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
