"""Wrong inputs from the command line and the pipeline: one clear line, exit code 2, never a trace of internals."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo import cli
from longvideo.pipelines import check_checkpoint, load_pipeline
from tests.tiny import tiny_videochat_flash_model, tiny_videochat_flash_processor
from tests.tiny_crosslmm import tiny_crosslmm_model
from tests.tiny_crosslmm_processor import tiny_crosslmm_processor
from tests.tiny_crossvllm import tiny_crossvllm_model
from tests.tiny_crossvllm_processor import tiny_crossvllm_processor
from tests.videos import make_sound, make_video

QUESTION = "What happens?"
MAKERS = {
    "videochat_flash": (tiny_videochat_flash_model, tiny_videochat_flash_processor),
    "crosslmm": (tiny_crosslmm_model, tiny_crosslmm_processor),
    "crossvllm": (partial(tiny_crossvllm_model, adapters=False), tiny_crossvllm_processor),
}
BREAKABLE = {
    "videochat_flash": ("language_model.layers.2.mlp.up_proj", "vision_tower.blocks.1.mlp.fc1"),
    "crosslmm": ("language_model.layers.2.dual_cross_attention.t2v.k_proj", "vision_tower.encoder.layers.0.mlp.fc1"),
    "crossvllm": ("language_model.layers.0.mlp.up_proj", "vision_tower.encoder.layers.0.mlp.fc1"),
}
PROJECTOR = {"crossvllm": "model.projectors.coarse.linear_1.weight"}
# What is about the frames of one look; CrossVLLM takes several, unless it is told so.
ONE_LOOK = {"crossvllm": ("--granularity", "coarse")}


def save(model_type, folder, **kwargs):
    make_model, make_processor = MAKERS[model_type]
    make_model().save_pretrained(folder, **kwargs)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(MAKERS))
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def good(model_type, tmp_path_factory):
    return save(model_type, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def sharded(model_type, tmp_path_factory):
    return save(model_type, tmp_path_factory.mktemp("checkpoint") / "sharded", max_shard_size="50KB")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=48)


@pytest.fixture
def fail_with(video, capsys):
    """Run `longvideo ask` with something wrong in it; return the one line it prints."""

    def call(model, *words, video=video, question=QUESTION):
        code = cli.main(["ask", str(video), question, "--model", str(model), "--device", "cpu", *words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err and "site-packages" not in err
        lines = [line for line in err.splitlines() if line.startswith("longvideo ask: error: ")]
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.fixture
def fail(good, fail_with):
    """The same with a good model, unless another one is named."""

    def call(*words, model=good, **kwargs):
        return fail_with(model, *words, **kwargs)

    return call


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_no_such_video(fail):
    line = fail(video="missing.mp4")
    assert "No such video file: 'missing.mp4'" in line and "existing file" in line


def test_directory_in_place_of_a_video(fail, tmp_path):
    assert str(tmp_path) in fail(video=tmp_path)


def test_empty_file(fail, tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "is empty (0 bytes)" in fail(video=path)


def test_text_file_in_place_of_a_video(fail, tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("no video at all")
    assert "notes.mp4" in fail(video=path)


def test_truncated_video(fail, video, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(video.read_bytes()[:600])
    assert "cut.mp4" in fail(video=path)


def test_sound_only(fail, tmp_path):
    line = fail(video=make_sound(tmp_path / "song.mp4"))
    assert "song.mp4" in line and "video" in line


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question(fail, question):
    assert "The question is empty" in fail(question=question)


def test_window_outside_the_video(fail, model_type):
    # The clip lasts 6 s.
    line = fail("--start", "60", "--end", "70", *ONE_LOOK.get(model_type, ()))
    assert "60" in line and "6" in line


def test_too_many_tokens(fail, model_type):
    # 2048 positions; the prompt itself fits.
    line = fail("--max-new-tokens", "2000", "--num-frames", "8", *ONE_LOOK.get(model_type, ()))
    assert "at most 2048" in line and "2000" in line
    assert "num_frames=" in line or "lower max_new_tokens" in line


def test_unknown_model(fail):
    line = fail(model="no-such-name/no-such-model")
    assert "no-such-name/no-such-model" in line and "neither a folder here nor" in line


def test_no_such_model_folder(fail, tmp_path):
    assert "No such model folder" in fail(model=tmp_path / "nothing")


def test_file_in_place_of_a_model(fail, video):
    assert "is a file; a model is a folder" in fail(model=video)


def test_folder_without_config(fail, tmp_path):
    assert "has no config.json" in fail(model=tmp_path)


def test_broken_config(fail, good, tmp_path):
    folder = copy(good, tmp_path)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in fail(model=folder)


def test_another_architecture(fail, good, tmp_path):
    folder = copy(good, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    line = fail(model=folder)
    assert "'llava'" in line and "videochat_flash" in line


@pytest.mark.parametrize("original", ["videochat_flash_qwen", "cambrian_qwen", "cambrian_llama"])
def test_original_checkpoint_points_to_convert(fail, good, tmp_path, original):
    folder = copy(good, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": original}))
    assert "longvideo convert" in fail(model=folder)


def convert_with_towers(folder, capsys, *words):
    """Convert an original LongVU with something wrong about its towers; return the one line that is printed."""
    from tests.originals_longvu import original_longvu, write_longvu_original, write_part

    states, configs = original_longvu()
    write_longvu_original(folder / "original", states=states, configs=configs, towers=False)
    for part in ("towers/siglip", "towers/dinov2"):
        write_part(folder / part, states[part], configs[part])
    small = "towers/dinov2"
    write_part(folder / "small", states[small], {**configs[small], "hidden_size": 24})
    code = cli.main(["convert", str(folder / "original"), str(folder / "native"), *(w.format(folder) for w in words)])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("longvideo convert: error: "), err
    assert not (folder / "native").exists()
    return lines[0]


def test_a_tower_folder_of_the_wrong_size(tmp_path, capsys):
    line = convert_with_towers(tmp_path, capsys, "--vision-tower", "{}/towers/siglip", "--dino-tower", "{}/small")
    assert "towers/dinov2 is 24 wide" in line and "one of 32" in line


def test_no_tower_folder(tmp_path, capsys):
    line = convert_with_towers(tmp_path, capsys, "--dino-tower", "{}/towers/dinov2")
    assert "does not hold the SigLIP tower" in line and "--vision-tower FOLDER" in line


def test_tower_folders_the_wrong_way_round(tmp_path, capsys):
    words = ("--vision-tower", "{}/towers/dinov2", "--dino-tower", "{}/towers/siglip")
    assert "has model_type 'dinov2'; expected 'siglip_vision_model'" in convert_with_towers(tmp_path, capsys, *words)


def test_no_processor(fail, good, tmp_path):
    folder = copy(good, tmp_path)
    (folder / "processor_config.json").unlink()
    assert "has no processor_config.json" in fail(model=folder)


def test_no_weights(fail, good, tmp_path):
    folder = copy(good, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in fail(model=folder)


def test_missing_shard(fail, sharded, tmp_path):
    folder = copy(sharded, tmp_path)
    check_checkpoint(folder)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    line = fail(model=folder)
    assert gone.name in line and "lacks 1 of" in line


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_weights_that_are_no_safetensors(fail, good, tmp_path, content):
    folder = copy(good, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert "model.safetensors' is not a readable safetensors file" in fail(model=folder)


def test_missing_weight(fail, good, model_type, tmp_path):
    name = PROJECTOR.get(model_type, "model.multi_modal_projector.linear_1.weight")
    folder = change_weights(copy(good, tmp_path), lambda weights: weights.pop(name))
    line = fail(model=folder)
    assert name in line and "1 missing, for example" in line


def test_weight_of_another_shape(fail, good, model_type, tmp_path):
    name = PROJECTOR.get(model_type, "model.multi_modal_projector.linear_1.weight")

    def widen(weights):
        weights[name] = torch.zeros(32, 33)

    wanted = tuple(load_file(good / "model.safetensors")[name].shape)
    line = fail(model=change_weights(copy(good, tmp_path), widen))
    assert f"1 of another shape, for example {name} is (32, 33) instead of {wanted}" in line


@pytest.mark.parametrize("place", ["decoder", "tower", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_name_the_layer(fail, good, model_type, tmp_path, place, value):
    decoder, tower = (f"model.{part}.weight" for part in BREAKABLE[model_type])
    name = {"decoder": decoder, "tower": tower, "head": "lm_head.weight"}[place]

    def spoil(weights):
        weights[name].view(-1)[7] = value

    line = fail(model=change_weights(copy(good, tmp_path), spoil))
    assert name in line and "NaN or infinite" in line
    assert "layers.1." not in line


def test_overflow_without_broken_weights_points_to_the_dtype(good, video):
    pipe = load_pipeline(good, device="cpu")
    with torch.no_grad():
        pipe.model.lm_head.weight.mul_(1e38)
        pipe.model.model.language_model.norm.weight.mul_(1e5)
    with pytest.raises(ValueError, match="all its weights are finite"):
        pipe(str(video), QUESTION, max_new_tokens=2)


@pytest.fixture(scope="module")
def crosslmm(tmp_path_factory):
    return save("crosslmm", tmp_path_factory.mktemp("checkpoint") / "crosslmm")


def change_json(folder, name, **changes):
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cross_attention_interval": 5}, ("cross_attention_interval is 5", "4 layers", "Choose 1 to 4")),
        ({"cross_attention_interval": 0}, ("cross_attention_interval is 0", "4 layers")),
        ({"cross_attention_layers": [0, 4]}, ("[0, 4]", "layers from 0 to 3")),
        ({"tokens_per_frame": 25}, ("tokens_per_frame is 25", "4 x 4 tokens per frame")),
        ({"tokens_per_frame": 3}, ("tokens_per_frame is 3", "square")),
        ({"merge_mode": "mean"}, ("merge_mode is 'mean'", "average")),
        ({"vision_feature_layer": -5}, ("vision_feature_layer -5", "3 layers")),
    ],
)
def test_settings_of_crosslmm_that_do_not_fit(fail_with, crosslmm, tmp_path, changes, words):
    line = fail_with(change_json(copy(crosslmm, tmp_path), "config.json", **changes))
    assert all(word in line for word in words), line


def test_a_decoder_that_cannot_be_patched(fail_with, crosslmm, tmp_path):
    folder = copy(crosslmm, tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    line = fail_with(change_json(folder, "config.json", text_config={**text, "model_type": "gemma2"}))
    # Four norms in place of two.
    assert "Gemma2DecoderLayer" in line and "pre_feedforward_layernorm" in line and "Llama" in line


def test_processor_and_model_that_differ(fail_with, crosslmm, tmp_path):
    folder = change_json(copy(crosslmm, tmp_path), "processor_config.json", tokens_per_frame=1)
    # 6 frames in 6 s.
    line = fail_with(folder)
    assert "6" in line and "24" in line and "placeholder" in line
    settings = json.loads((crosslmm / "processor_config.json").read_text())
    video = {**settings["video_processor"], "size": {"height": 48, "width": 48}}
    line = fail_with(change_json(folder, "processor_config.json", tokens_per_frame=4, video_processor=video))
    assert "(1, 6, 3, 48, 48)" in line and "3, 32, 32)" in line
    line = fail_with(change_json(folder, "processor_config.json", tokens_per_frame=8))
    assert "tokens_per_frame=8, expected a square number" in line


def test_pipeline_calls_without_sense(good, video):
    pipe = load_pipeline(good, device="cpu")
    path = str(video)
    for call, text in (
        (lambda: pipe(), "Nothing to ask about"),
        (lambda: pipe(path), "no question was given"),
        (lambda: pipe(path, 3), "got int"),
        (lambda: pipe([path, path], ["a", "b", "c"]), "2 videos were given with 3 questions"),
        (lambda: pipe(path, QUESTION, image=path), "Both video= and image="),
        (lambda: pipe([]), "An empty list"),
        (lambda: pipe(3, QUESTION), "A int cannot be used as video"),
        (lambda: pipe({"question": QUESTION}), "exactly one of the keys"),
        (lambda: pipe([path, path]), "no question was given"),
        (lambda: pipe([{"role": "user", "content": [{"type": "video", "video": path}]}]), "holds no text"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
