"""Pixels of both towers and sizes against recordings of the original code; sizes are read from each case."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_longvu_processor import tiny_longvu_processor

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
CASES = sorted(path.parent for path in (GOLDEN / "longvu").glob("*/cases/*/inputs.safetensors"))
# fp32 on CPU: the same bytes after PIL, so that only the order of two float operations differs.
PIXEL_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES or [None], ids=lambda path: path.name if path else "absent")
def case(request: pytest.FixtureRequest) -> dict:
    if request.param is None:
        pytest.skip(f"no inputs.safetensors below {GOLDEN / 'longvu'}; set LONGVIDEO_GOLDEN to the recordings")
    towers = request.param.parents[1] / "checkpoint" / "towers"
    settings = {name: json.loads((towers / name / "preprocessor_config.json").read_text()) for name in TOWERS}
    return {"inputs": load_file(request.param / "inputs.safetensors"), "settings": settings}


TOWERS = ("siglip", "dinov2")


def processor_of(case: dict):
    """A processor with the sizes, means and deviations of the case."""
    inputs, settings = case["inputs"], case["settings"]
    if "frames" not in inputs:
        pytest.skip("the case has no source frames")
    processor = tiny_longvu_processor(inputs["pixel_values_siglip"].shape[-1], inputs["pixel_values_dino"].shape[-1])
    for part in (processor.image_processor, processor.video_processor):
        for name in ("image_mean", "image_std"):
            setattr(part, name, settings["siglip"][name])
            setattr(part, f"dino_{name}", settings["dinov2"][name])
    return processor


def assert_same_pixels(siglip: torch.Tensor, dino: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(siglip, inputs["pixel_values_siglip"], atol=PIXEL_TOLERANCE, rtol=0)
    torch.testing.assert_close(dino, inputs["pixel_values_dino"], atol=PIXEL_TOLERANCE, rtol=0)


def test_video_pixels(case):
    processor, inputs = processor_of(case), case["inputs"]
    outputs = processor.video_processor(inputs["frames"], return_tensors="pt")
    assert_same_pixels(outputs["pixel_values_videos"], outputs["pixel_values_videos_dino"], inputs)
    assert outputs["video_num_frames"].tolist() == [len(inputs["frames"])]
    # Recorded with either order, as the name of the case tells; each is what one of the two settings gives.
    given = inputs["image_sizes"].tolist()
    orders = {
        order: processor.video_processor(inputs["frames"], video_size_order=order, return_tensors="pt")["video_sizes"]
        for order in ("original", "width_height")
    }
    assert given in [sizes.tolist() for sizes in orders.values()]
    height, width = inputs["frames"].shape[1:3]
    assert orders["original"].tolist() == [[height, width]]


def test_windows_of_pixels(case):
    processor, inputs = processor_of(case), case["inputs"]
    windows = list(processor.iterate_windows(inputs["frames"], 5))
    assert_same_pixels(
        *(torch.cat([part[name] for part in windows]) for name in ("pixel_values_videos", "pixel_values_videos_dino")),
        inputs,
    )


def test_image_pixels(case):
    processor, inputs = processor_of(case), case["inputs"]
    outputs = processor.image_processor([frame.numpy() for frame in inputs["frames"]], return_tensors="pt")
    assert_same_pixels(outputs["pixel_values"], outputs["pixel_values_dino"], inputs)
    height, width = inputs["frames"].shape[1:3]
    assert outputs["image_sizes"].tolist() == [[width, height]] * len(inputs["frames"])
