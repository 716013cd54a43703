"""Parity with the original VideoChat-Flash: each recorded case is converted, loaded and compared tensor by tensor.

A case is a folder below `$LONGVIDEO_GOLDEN` with `checkpoint/` (original layout), `inputs.safetensors`,
`expected.safetensors` and `meta.json`, recorded from the original classes on the CPU in float32 (`how_made` in
meta.json says with which versions). Everything about a case is read from the case; a recorded tensor that no
comparison below knows is a failure. To renew: record the case again with the original code and replace its folder.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.conversion import CONVERSIONS, convert_checkpoint
from longvideo.modeling.videochat_flash.modeling_videochat_flash import VideoChatFlashForConditionalGeneration

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
MARKER = -200
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# float32 on both sides: the order of summation differs (fused kernels, chunks), nothing else.
FEATURES_ATOL = 1e-4
LOGITS_ATOL = 5e-4
# Attention shares of single tokens are about 1/S (0.01), so the features' tolerance would let everything pass.
SCORES_ATOL = 1e-6
# Gradients add up some hundred positions; relative to the largest entry, with the features' tolerance.
GRADIENT_RTOL = 1e-4


def find_cases() -> list[Path]:
    """Every folder below the recordings whose checkpoint is an original VideoChat-Flash."""
    found = []
    for path in sorted(GOLDEN.rglob("checkpoint/config.json")):
        config = json.loads(path.read_text())
        known = config.get("model_type") in CONVERSIONS["videochat_flash"].original_model_types
        if known and str(config.get("mm_projector_type", "")).startswith("tome"):
            found.append(path.parent.parent)
    return found


CASES = find_cases()


@dataclass
class Case:
    """One recorded case, converted and loaded."""

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    original_config: dict[str, Any]
    model: VideoChatFlashForConditionalGeneration
    compared: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def compare(self, name: str, actual: torch.Tensor, atol: float) -> None:
        """Compare with a recorded tensor and note that it was looked at."""
        expected = self.expected[name]
        self.compared.add(name)
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")

    def compare_exactly(self, name: str, actual: torch.Tensor) -> None:
        """Compare integers."""
        self.compared.add(name)
        assert actual.tolist() == self.expected[name].tolist(), name

    def names(self, prefix: str) -> list[str]:
        """Recorded names with a prefix, without it."""
        return [name[len(prefix) :] for name in self.expected if name.startswith(prefix)]


def load_case(folder: Path, checkpoint: Path, work: Path) -> Case:
    """Convert with the real conversion, load with from_pretrained."""
    convert_checkpoint(checkpoint, work / "converted")
    model = VideoChatFlashForConditionalGeneration.from_pretrained(work / "converted", dtype=torch.float32)
    return Case(
        folder=folder,
        meta=json.loads((folder / "meta.json").read_text()),
        inputs=load_file(folder / "inputs.safetensors"),
        expected=load_file(folder / "expected.safetensors"),
        original_config=json.loads((checkpoint / "config.json").read_text()),
        model=model.eval(),
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each case once for all tests of this file."""
    yield load_case(request.param, request.param / "checkpoint", tmp_path_factory.mktemp("golden"))


def normalise(pixels_FHWC: torch.Tensor) -> torch.Tensor:
    """(F, H, W, 3) uint8 to (F, 3, H, W): /255, mean and standard deviation."""
    scaled = pixels_FHWC.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def is_video(case: Case, media: str) -> bool:
    """Whether the medium was recorded as frames of a video (else as tiles of an image)."""
    return f"{media}.frames_uint8" in case.inputs


def media_pixels(case: Case, media: str) -> torch.Tensor:
    """Normalised frames or tiles of a recorded medium."""
    return normalise(case.inputs[f"{media}.frames_uint8" if is_video(case, media) else f"{media}.image_uint8"])


def best_grid(size: list[int], pinpoints: list[list[int]], side: int) -> tuple[int, int]:
    """(rows, columns) for an image of (width, height): most effective pixels, then least waste, the first wins."""

    def rank(candidate: list[int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return effective, -(candidate[0] * candidate[1] - effective)

    width, height = max(pinpoints, key=rank)
    return height // side, width // side


def visual_inputs(case: Case, run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Model inputs for the medium of a run; none for a text-only run."""
    if not run.get("media"):
        return {}
    pixels = media_pixels(case, run["media"])
    if is_video(case, run["media"]):
        return {"pixel_values_videos": pixels[None]}
    side = case.model.config.vision_config.image_size
    grid = (0, 0)
    if len(pixels) > 1:
        grid = best_grid(run["image_sizes"][0], case.original_config["image_grid_pinpoints"], side)
    return {"pixel_values": pixels, "image_grids": torch.tensor([grid])}


def expand_marker(case: Case, run: dict[str, Any], ids: torch.Tensor, fill: int | None = None) -> torch.Tensor:
    """Replace the marker by one entry per visual token: placeholder ids, or `fill`."""
    config = case.model.config
    prompt = case.inputs[f"{run['prompt']}.input_ids"][0].tolist()
    if MARKER not in prompt:
        return ids
    at = prompt.index(MARKER)
    if fill is None:
        fill = config.video_token_id if is_video(case, run["media"]) else config.image_token_id
    count = run.get("num_visual_tokens", config.tokens_per_clip * visual_blocks(case, run))
    block = torch.full((1, count), fill, dtype=ids.dtype)
    return torch.cat([ids[:, :at], block, ids[:, at + 1 :]], dim=1)


def visual_blocks(case: Case, run: dict[str, Any]) -> int:
    """Clips of the video or tiles of the image of a run."""
    pixels = media_pixels(case, run["media"])
    return len(pixels) // case.model.config.mm_local_num_frames if is_video(case, run["media"]) else len(pixels)


def dropout_of(run: dict[str, Any]) -> dict[str, Any] | bool:
    """The run's settings as the per-call argument."""
    overrides = run["config_overrides"]
    if not overrides["mm_llm_compress"]:
        return False
    return {
        "type": overrides["llm_compress_type"],
        "layers": overrides["llm_compress_layer_list"],
        "ratios": overrides["llm_image_token_ratio_list"],
    }


def inference_runs(case: Case) -> dict[str, dict[str, Any]]:
    """Runs in eval mode."""
    return {name: run for name, run in case.meta["runs"].items() if not run.get("training_forward")}


def compare_stages(case: Case, name: str, stages: tuple[Any, ...]) -> None:
    """Compare what every dropout stage kept, and the scores of the attention stages."""
    recorded = {int(m[1]) for m in (re.match(r"drop(\d+)\.", key) for key in case.names(f"{name}/")) if m}
    assert recorded == set(range(len(stages)))
    attention = 0
    for i, stage in enumerate(stages):
        values = {
            "kept_visual_indices": stage.kept_visual_indices[0],
            "kept_sequence_indices": stage.kept_sequence_indices[0],
            "position_ids_after": stage.position_ids[0][None],
        }
        if stage.labels is not None:
            values["labels_after"] = stage.labels[0][None]
        for what in case.names(f"{name}/drop{i}."):
            case.compare_exactly(f"{name}/drop{i}.{what}", values[what])
        if stage.kind == "attention" and stage.scores[0] is not None:
            if f"{name}/attention_select{attention}.scores" in case.expected:
                case.compare(f"{name}/attention_select{attention}.scores", stage.scores[0], SCORES_ATOL)
            attention += 1


@torch.no_grad()
def test_tower_merging_and_projector(case: Case) -> None:
    case.done.add("test_tower_merging_and_projector")
    for media in sorted({key.partition(".")[0] for key in case.inputs if key.endswith("_uint8")}):
        pixels = media_pixels(case, media)
        if is_video(case, media):
            output = case.model.get_video_features(pixels[None], output_tower_features=True, return_dict=True)
        else:
            # One image per tile: tiles are recorded before they are rearranged into a grid.
            output = case.model.get_image_features(pixels, output_tower_features=True, return_dict=True)
        projected = torch.cat(output.pooler_output)
        values = {
            "vision_features": output.last_hidden_state,
            "merged_tokens": output.merged_tokens,
            "merged_sizes": output.merged_sizes[..., None].float(),
            "projector_output": projected.unflatten(0, (-1, case.model.config.tokens_per_clip)),
        }
        corner = case.expected.get(f"{media}.pixel_values_first_frame_corner48")
        if corner is not None:
            values["pixel_values_first_frame_corner48"] = pixels[:1, :, : corner.shape[2], : corner.shape[3]]
        names = case.names(f"{media}.")
        assert set(names) <= set(values)
        for name in names:
            case.compare(f"{media}.{name}", values[name], 0.0 if name == "merged_sizes" else FEATURES_ATOL)


@torch.no_grad()
def test_forward(case: Case) -> None:
    case.done.add("test_forward")
    config = case.model.config
    for name, run in inference_runs(case).items():
        for key, value in run["config_overrides"].items():
            setattr(config, key, value)
        ids = expand_marker(case, run, case.inputs[f"{run['prompt']}.input_ids"])
        output = case.model(
            input_ids=ids, use_cache=True, output_hidden_states=True, return_dict=True, **visual_inputs(case, run)
        )
        lengths = [output.past_key_values.get_seq_length(i) for i in range(config.text_config.num_hidden_layers)]
        assert lengths == run["kv_cache_length_per_layer_after_prefill"], name
        assert ids.shape[1] == run["sequence_length_after_splice"]
        case.compare(f"{name}/inputs_embeds", output.hidden_states[0], FEATURES_ATOL)
        for what in case.names(f"{name}/hidden_states."):
            case.compare(f"{name}/hidden_states.{what}", output.hidden_states[int(what)], FEATURES_ATOL)
        if f"{name}/logits" in case.expected:
            case.compare(f"{name}/logits", output.logits, LOGITS_ATOL)
        if f"{name}/logits_last32" in case.expected:
            case.compare(f"{name}/logits_last32", output.logits[:, -32:], LOGITS_ATOL)
        compare_stages(case, name, output.visual_dropout or ())


@torch.no_grad()
def test_generation(case: Case) -> None:
    case.done.add("test_generation")
    for name, run in inference_runs(case).items():
        case.model.config.mm_llm_compress = False
        ids = expand_marker(case, run, case.inputs[f"{run['prompt']}.input_ids"])
        output = case.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=run["generated_new_tokens"],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            visual_dropout=dropout_of(run),
            **visual_inputs(case, run),
        )
        case.compare_exactly(f"{name}/generated_ids", output.sequences[:, ids.shape[1] :])
        case.compare(f"{name}/generation_logits", torch.stack(output.logits, dim=1), LOGITS_ATOL)


def test_training(case: Case) -> None:
    case.done.add("test_training")
    rename = CONVERSIONS["videochat_flash"].key_map(case.original_config).rename
    runs = {name: run for name, run in case.meta["runs"].items() if run.get("training_forward")}
    for name, run in runs.items():
        case.model.zero_grad()
        case.model.train()
        ids = expand_marker(case, run, case.inputs[f"{run['prompt']}.input_ids"])
        labels = expand_marker(case, run, case.inputs[f"{name}.labels"], fill=-100)
        output = case.model(
            input_ids=ids, labels=labels, visual_dropout=dropout_of(run), return_dict=True, **visual_inputs(case, run)
        )
        output.loss.backward()
        case.model.eval()
        case.compare(f"{name}/loss", output.loss.detach()[None], LOGITS_ATOL)
        case.compare(f"{name}/logits", output.logits.detach(), LOGITS_ATOL)
        compare_stages(case, name, output.visual_dropout or ())
        parameters = dict(case.model.named_parameters())
        for what in case.names(f"{name}/grad."):
            expected = case.expected[f"{name}/grad.{what}"]
            gradient = parameters[rename(what)].grad
            case.compare(f"{name}/grad.{what}", gradient, GRADIENT_RTOL * expected.abs().max().item())


def test_everything_recorded_was_compared(case: Case) -> None:
    """No recorded tensor may go unnoticed; comparisons that ran in another process are made here."""
    for compare in (test_tower_merging_and_projector, test_forward, test_generation, test_training):
        if compare.__name__ not in case.done:
            compare(case)
    left = set(case.expected) - case.compared
    assert not left, f"recorded but not compared: {sorted(left)}"


def swapped_copy(folder: Path, target: Path, first: str, second: str) -> None:
    """Copy a checkpoint with two tensors of equal shape exchanged."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    assert state[first].shape == state[second].shape and not torch.equal(state[first], state[second])
    state[first], state[second] = state[second], state[first]
    save_file(state, target / "model.safetensors")


@pytest.mark.skipif(not CASES, reason="no recorded cases")
def test_a_swapped_pair_of_weights_is_seen(tmp_path: Path) -> None:
    folder = CASES[0]
    keys = load_file(folder / "checkpoint" / "model.safetensors")
    first = next(key for key in keys if key.endswith("layers.0.self_attn.q_proj.weight"))
    swapped_copy(folder / "checkpoint", tmp_path / "swapped", first, first.replace("q_proj", "o_proj"))
    case = load_case(folder, tmp_path / "swapped", tmp_path)
    with pytest.raises(AssertionError, match=r"logits|hidden_states"):
        test_forward(case)
