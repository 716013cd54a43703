"""Frame position encoding of LongVU against its formula."""

import math

import pytest
import torch

from longvideo.modeling.longvu.frame_position import add_frame_position, frame_position
from tests.reference.longvu_reduction import naive_frame_position


@pytest.mark.parametrize("rule", ["original", "paper"])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_encoding_equals_loops(width: int, rule: str) -> None:
    indices = [0, 1, 17, 399, 3599]
    wanted = torch.tensor([naive_frame_position(i, width, rule) for i in indices])
    # Angles up to 3,599 in float32 are exact to 2e-4.
    torch.testing.assert_close(frame_position(torch.tensor(indices), width, rule=rule), wanted, rtol=0, atol=5e-4)


def test_the_quirk_of_the_original() -> None:
    encoding = frame_position(torch.tensor([2]), 2)[0]
    torch.testing.assert_close(encoding, torch.tensor([math.sin(2), math.cos(math.sin(2))]), rtol=0, atol=1e-6)
    encoding = frame_position(torch.tensor([2]), 2, rule="paper")[0]
    torch.testing.assert_close(encoding, torch.tensor([math.sin(2), math.cos(2)]), rtol=0, atol=1e-6)  # float32
    assert frame_position(torch.tensor([0]), 4).tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_all_tokens_of_a_frame_get_its_encoding() -> None:
    tokens = torch.randn(3, 5, 8)
    indices = torch.tensor([4, 9, 30])
    moved = add_frame_position(tokens, indices)
    assert torch.equal(moved, tokens + frame_position(indices, 8)[:, None])
    assert add_frame_position(tokens.half(), indices).dtype == torch.float16
    with pytest.raises(ValueError, match="'cosine'"):
        frame_position(indices, 8, rule="cosine")
