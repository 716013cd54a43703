"""Accuracy and Wilson's interval against known values."""

import pytest

from longvideo.evaluation.metrics import accuracy, wilson_interval


def test_accuracy() -> None:
    assert accuracy([True, False, True, True]) == 0.75
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # 10 and 50 as in the usual tables of the score interval; 0 and all right have the closed form z^2 / (n + z^2).
    [
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval_known_values(right: int, total: int, low: float, high: float) -> None:
    # Four printed digits.
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_narrows_and_checks() -> None:
    wide, narrow = wilson_interval(50, 100, confidence=0.99), wilson_interval(50, 100, confidence=0.5)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    for right, total in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected 0 <= right <= total"):
            wilson_interval(right, total)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, confidence=95)
