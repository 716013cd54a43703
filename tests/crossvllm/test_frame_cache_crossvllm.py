"""A frame goes through the tower once, whatever granularity or round asks for it."""

import pytest
import torch

from longvideo.modeling.crossvllm.frame_cache_crossvllm import FrameFeatureCache
from tests.crossvllm.prompts_crossvllm import prompt
from tests.tiny_crossvllm import tiny_crossvllm_model

# The tower's products depend on how many frames go in together; float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_crossvllm_model()


@pytest.fixture
def frames_run(model):
    """Numbers of frames that went through the tower, call by call."""
    counts = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    yield counts
    handle.remove()


@torch.no_grad()
def test_coarse_and_fine_share_the_frames_that_both_see(model, frames_run):
    film = torch.randn(12, 3, 48, 48)
    cache = FrameFeatureCache()
    rounds = [("coarse", [0, 4, 8]), ("fine", [4, 5, 6]), ("coarse", [0, 4, 8]), ("fine", [8, 9])]
    for granularity, indices in rounds:
        row = prompt(2, f"video{len(indices)}", 3, granularity=granularity)
        pixels = film[indices]
        expected = model(row["input_ids"], pixel_values_videos=pixels[None], granularity=granularity).logits
        frames_run.clear()
        seen = len(cache)
        features = model.get_vision_features(pixels[None], cache=cache, sources=["film"], frame_indices=[indices])
        assert sum(frames_run) == len(cache) - seen
        frames_run.clear()
        given = {"input_ids": row["input_ids"], "vision_features": features, "granularity": granularity}
        torch.testing.assert_close(model(**given).logits, expected, **CLOSE)
        model.generate(**given, **GREEDY)
        assert frames_run == []
    assert (len(cache), cache.misses, cache.hits) == (6, 6, 5)


@torch.no_grad()
def test_a_batch_of_videos_asks_for_each_frame_once(model, frames_run):
    film, other = torch.randn(5, 3, 48, 48), torch.randn(5, 3, 48, 48)
    pixels, counts = torch.cat([film[[0, 2]], other[[2]], film[[2, 3]]]), torch.tensor([2, 1, 2])
    cache = FrameFeatureCache(device="cpu")
    names = {"sources": ["film", "other", "film"], "frame_indices": [[0, 2], [2], [2, 3]]}
    found = model.get_vision_features(pixels, counts, cache=cache, **names)
    assert sum(frames_run) == 4
    for a, b in zip(found, model.get_vision_features(pixels, counts), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert cache.missing("film", [3, 1, 1, 0]) == [1]
    assert torch.equal(cache.gather("film", [3, 0]), torch.stack([found[2][1], found[0][0]]))
    cache.clear("film")
    assert len(cache) == 1


@torch.no_grad()
def test_a_small_cache_forgets_what_was_unused_for_longest(model):
    film = torch.randn(6, 3, 48, 48)
    cache = FrameFeatureCache(max_frames=2)
    names = {"sources": ["film"], "frame_indices": [[0, 1, 2, 3]]}
    found = model.get_vision_features(film[None, :4], cache=cache, **names)[0]
    torch.testing.assert_close(found, model.get_vision_features(film[None, :4])[0], **CLOSE)
    assert [("film", i) in cache for i in range(4)] == [False, False, True, True]
    cache.gather("film", [2])
    cache.put(("film", 9), found[0])
    assert [("film", i) in cache for i in (2, 3, 9)] == [True, False, True]
    with pytest.raises(ValueError, match=r"Frames \[3\] of 'film' are not in the cache"):
        cache.gather("film", [2, 3])
    with pytest.raises(ValueError, match="max_frames is 0"):
        FrameFeatureCache(max_frames=0)


@torch.no_grad()
def test_frames_of_another_tower_and_half_given_names_are_refused(model):
    film = torch.randn(1, 2, 3, 48, 48)
    cache = FrameFeatureCache()
    names = {"sources": ["film"], "frame_indices": [[0, 1]]}
    model.get_vision_features(film, cache=cache, **names)
    other = tiny_crossvllm_model(seed=1, adapters=False)
    with pytest.raises(ValueError, match="encoded by another tower"):
        other.get_vision_features(film, cache=cache, **names)
    cache.clear()
    other.get_vision_features(film, cache=cache, **names)
    with pytest.raises(ValueError, match="needs sources"):
        model.get_vision_features(film, cache=FrameFeatureCache(), sources=["film"])
    with pytest.raises(ValueError, match=r"frame_indices of \[1\] frames were given for videos of \[2\]"):
        model.get_vision_features(film, cache=FrameFeatureCache(), sources=["film"], frame_indices=[[0]])


@torch.no_grad()
def test_encoding_a_video_can_use_the_cache(model, frames_run):
    film = torch.randn(1, 3, 3, 48, 48)
    cache = FrameFeatureCache()
    names = {"cache": cache, "sources": ["film"], "frame_indices": [[0, 5, 9]]}
    first = model.encode_video(film, **names)
    frames_run.clear()
    second = model.encode_video(film, **names)
    assert frames_run == []
    assert torch.equal(first.features[0], second.features[0])
