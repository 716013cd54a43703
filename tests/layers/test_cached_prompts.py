"""How much of a prompt a cache holds already, and whose an encoded video is."""

import pytest
import torch

from longvideo.modeling.layers.cached_prompts import known_length
from longvideo.modeling.layers.feature_files import check_encoded_video, feature_key


@pytest.mark.parametrize(
    ("num_cached", "num_given", "num_masked", "expected"),
    [(0, 7, None, 0), (0, 7, 7, 0), (5, 7, None, 5), (5, 7, 7, 5), (5, 7, 12, 0), (5, 3, 8, 0)],
)
def test_a_mask_wider_than_the_ids_says_that_all_of_them_are_new(num_cached, num_given, num_masked, expected):
    assert known_length(num_cached, num_given, num_masked) == expected


@pytest.mark.parametrize(("num_given", "num_masked"), [(5, None), (4, None), (5, 5)])
def test_a_prompt_that_the_cache_holds_whole_is_refused(num_given, num_masked):
    with pytest.raises(ValueError, match=rf"The cache holds 5 positions, but the prompt has {num_given}\."):
        known_length(5, num_given, num_masked)


def test_an_encoded_video_stands_alone_and_is_of_this_model():
    key = feature_key("pixels", "model")
    assert key == {"pixels": "pixels", "model": "model"}
    assert feature_key("pixels", "model", "source") == {**key, "source": "source"}
    check_encoded_video(key, lambda: "model")
    for other in ({"pixels": torch.zeros(1)}, {"features": object()}):
        with pytest.raises(ValueError, match="Both encoded_video and other video inputs were given"):
            check_encoded_video(key, lambda: "model", **other)
    with pytest.raises(ValueError, match="other weights or settings"):
        check_encoded_video(key, lambda: "another")


def test_the_model_is_hashed_only_where_a_key_is_stored():
    check_encoded_video({}, lambda: pytest.fail("The model was hashed for nothing."))
