"""Wrong inputs that only a model with two granularities can get: settings, adapters, processors, broken numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from longvideo import cli
from longvideo.pipelines import load_pipeline
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.videos import make_video

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "crossvllm"
    tiny_crossvllm_model(text_kwargs={"max_position_embeddings": 4096}).save_pretrained(folder)
    tiny_crossvllm_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=48))


@pytest.fixture
def fail(video, capsys):
    """Run `longvideo ask`; return the one line it prints."""

    def call(folder: Path, *words: str) -> str:
        code = cli.main(["ask", video, "What?", "--model", str(folder), "--device", "cpu", *words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and "Traceback" not in err, err
        (line,) = [line for line in err.splitlines() if line.startswith("longvideo ask: error: ")]
        return line

    return call


def changed(folder: Path, tmp_path: Path, name: str, **changes: object) -> Path:
    copy = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**settings, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coarse_stride": 5}, ("coarse_stride is 5", "12 x 12 patches", "[1, 2, 3, 4, 6, 12]")),
        ({"fine_num_frames": 0}, ("fine_num_frames", "at least 1")),
        ({"default_granularity": "medium"}, ("'medium'", "coarse")),
        ({"spatial_pool_mode": "conv"}, ("'conv'", "average")),
    ],
)
def test_settings_that_do_not_fit(fail, good, tmp_path, changes, words) -> None:
    line = fail(changed(good, tmp_path, "config.json", **changes))
    assert all(word in line for word in words), line


def test_processor_and_model_that_differ(fail, good, tmp_path) -> None:
    # 36 tokens for each of four frames, where the model makes 9.
    line = fail(changed(good, tmp_path, "processor_config.json", fine_stride=4), "--granularity", "fine")
    assert "36" in line and "144" in line
    tokenizer = json.loads((good / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    shutil.rmtree(tmp_path / "model")
    folder = shutil.copytree(good, tmp_path / "model")
    processor = tiny_crossvllm_processor()
    processor.tokenizer.add_tokens([f"word{number}" for number in range(300 - len(ids))])
    processor.save_pretrained(folder)
    assert "ids up to 299, the crossvllm model embeds 264" in fail(folder)


def test_an_adapter_is_missing(fail, good, tmp_path) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    shutil.rmtree(folder / "adapters" / "fine")
    assert "fine" in fail(folder)


def test_broken_numbers_are_found_in_both_granularities(good, video) -> None:
    pipe = load_pipeline(str(good), device="cpu")
    with torch.no_grad():
        pipe.model.model.projectors["fine"].linear_2.bias[3] = float("nan")
    for granularity in (None, "fine"):
        with pytest.raises(ValueError, match=r"NaN or infinite values in: model\.projectors\.fine\.linear_2\.bias"):
            pipe(video, "What?", granularity=granularity, max_new_tokens=2)


def test_times_of_a_single_look(good, video) -> None:
    pipe = load_pipeline(str(good), device="cpu")
    times = pipe(video, "What?", granularity="fine", max_new_tokens=2, return_timings=True)["timings"]
    assert set(times) == {"decode", "encode", "generate"} and min(times.values()) > 0
