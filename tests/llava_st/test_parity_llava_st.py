"""Parity with the original LLaVA-ST: each recorded case is converted, loaded and compared tensor by tensor.

A case is a folder below `$LONGVIDEO_GOLDEN` with `checkpoint/` (original layout), `inputs.safetensors`,
`expected.safetensors` and `meta.json`, recorded from the original classes on the CPU in float32 (meta.json says with
which versions and which of their constants were replaced). A folder with `expected_merged.safetensors` holds a stage-1
model, later stages and what the original merged from them. Everything about a case is read from the case; a recorded
tensor that no comparison below knows is a failure. To renew: record the case again with the original code and replace
its folder.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.conversion import CONVERSIONS, convert_checkpoint, reverse_checkpoint
from longvideo.conversion.llava_st_config import EMBEDDING, HEAD, TABLES
from longvideo.modeling.llava_st.coordinates_llava_st import average_tables
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from tests.originals import assert_same_bits, read_weights

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
# float32 on both sides: the order of summation differs (fused kernels, chunks, a convolution), nothing else.
FEATURES_ATOL = 1e-4
LOGITS_ATOL = 5e-4
# A merged weight is one product of matrices added to a weight of about 1.
MERGE_ATOL = 1e-6
# Gradients add up some hundred positions; relative to the largest entry, with the features' tolerance.
GRADIENT_RTOL = 1e-4
AXES = {"temporal": "temporal", "height": "spatial_height", "width": "spatial_width"}
PACKERS = {"packer_s_first": "spatial", "packer_t_slow": "temporal", "packer_s_fast": "fast"}
# Recorded for some frames only, which meta.json names.
CUT_TENSORS = ("tower_features", "projected", "lape_added", "packer_s_first_attn_branch")


def is_llava_st(folder: Path) -> bool:
    """Whether a folder holds an original LLaVA-ST."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    return config.get("model_type") == "llava_qwen" and config.get("mm_resampler_type") == "fast_slow_resampler"


def find_cases() -> list[Path]:
    """Every case below the recordings whose checkpoint is an original LLaVA-ST."""
    found = [meta.parent for meta in sorted(GOLDEN.rglob("meta.json"))]
    return [folder for folder in found if is_llava_st(folder / "checkpoint")]


def find_merges() -> list[Path]:
    """Every folder below the recordings with what the original merged from stages."""
    return [path.parent for path in sorted(GOLDEN.rglob("expected_merged.safetensors"))]


CASES, MERGES = find_cases(), find_merges()


@dataclass
class Run:
    """What passed through the model.

    Args:
        embeddings: inputs of the decoder, one per forward pass.
        hidden: its outputs after the last norm.
        logits: (B, S, V).
        features: what the vision half returned.
        branches: per packer what is added to its queries.
    """

    embeddings: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    features: Any
    packed: dict[str, torch.Tensor]
    branches: dict[str, torch.Tensor]


@dataclass
class Case:
    """One recorded case, converted and loaded."""

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    model: LlavaSTForConditionalGeneration
    compared: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)
    run: Run | None = None

    def compare(self, name: str, actual: Callable[[], torch.Tensor], atol: float) -> None:
        """Compare with a recorded tensor, if there is one, of the frames that were kept."""
        if name not in self.expected:
            return
        expected, value = self.expected[name], actual()
        self.compared.add(name)
        kept = self.meta["case"].get("keep_frames")
        if name in CUT_TENSORS and kept is not None:
            value = value[kept]
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)} against {tuple(expected.shape)}"
        self.worst[name] = float((value - expected).abs().max())
        torch.testing.assert_close(value, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")

    @property
    def is_image(self) -> bool:
        """Whether the visual is an image."""
        return self.meta["case"]["modality"] == "image"

    def model_inputs(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The recorded inputs as ours; the training twin has a prefix."""
        ids, pixels = self.inputs[f"{prefix}input_ids"], self.inputs["pixel_values"]
        visual = {"pixel_values": pixels} if self.is_image else {"pixel_values_videos": pixels[None]}
        return {"input_ids": ids, "coordinate_values": self.coordinate_values(ids, prefix), **visual}

    def coordinate_values(self, ids: torch.Tensor, prefix: str) -> torch.Tensor:
        """(B, S) every list's values at its template's positions, in order of appearance."""
        values = torch.zeros(ids.shape)
        for axis, original in AXES.items():
            for side in ("input", "output"):
                mask = ids == getattr(self.model.config, f"{axis}_{side}_token_id")
                listed = self.inputs.get(f"{prefix}var.{original}_{side}_locations", torch.zeros(0))
                assert int(mask.sum()) == len(listed)
                values[mask] = listed.float()
        return values


def prepare_source(checkpoint: Path, work: Path, change: dict[str, Any]) -> Path:
    """Copy a recorded checkpoint by links, with entries of its config changed."""
    config = {**json.loads((checkpoint / "config.json").read_text()), **change}
    source = work / "original"
    source.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (source / path.name).symlink_to(path.resolve())
    (source / "config.json").write_text(json.dumps(config))
    return source


def load_case(folder: Path, checkpoint: Path, work: Path, coordinates: str) -> Case:
    """Convert with the real conversion and load with from_pretrained.

    The numbers of heads are the only sizes that neither config.json nor the weights tell; they are those of the case.
    """
    meta = json.loads((folder / "meta.json").read_text())
    sizes = meta["case"]["cfg"]
    heads = {
        "vision_tower_overrides": {"num_attention_heads": sizes["vision"]["num_attention_heads"]},
        "packer_overrides": {"num_heads": sizes["packer_heads"]},
    }
    source = prepare_source(checkpoint, work, heads)
    convert_checkpoint(source, work / "converted", options={"coordinates": coordinates})
    model = LlavaSTForConditionalGeneration.from_pretrained(work / "converted", dtype=torch.float32).eval()
    # The recordings were made without ids that end an answer.
    model.generation_config.eos_token_id = None
    inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    return Case(folder=folder, meta=meta, inputs=inputs, expected=expected, model=model)


def layouts(folder: Path) -> tuple[str, ...]:
    """The layouts in which a case can be loaded; before stage 2 there are no coordinates."""
    with_coordinates = json.loads((folder / "meta.json").read_text())["case"]["cfg"].get("lape", True)
    return ("folded", "split") if with_coordinates else ("none",)


PARAMS = [(folder, layout) for folder in CASES for layout in layouts(folder)]


@pytest.fixture(scope="module", params=PARAMS, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each case once for all tests of this file."""
    folder, layout = request.param
    yield load_case(folder, folder / "checkpoint", tmp_path_factory.mktemp("golden"), layout)


@torch.no_grad()
def record(case: Case) -> Run:
    """Run the case once and note what passes between the modules."""
    if case.run is not None:
        return case.run
    model, noted = case.model.model, {}

    def note_decoder(_module: torch.nn.Module, _args: tuple, kwargs: dict, output: Any) -> None:
        noted["embeddings"], noted["hidden"] = kwargs["inputs_embeds"], output.last_hidden_state

    hook = model.language_model.register_forward_hook(note_decoder, with_kwargs=True)
    logits = case.model(**case.model_inputs()).logits
    hook.remove()
    pixels = case.inputs["pixel_values"]
    encode = case.model.get_image_features if case.is_image else case.model.get_video_features
    features = encode(pixels if case.is_image else pixels[None], output_tower_features=True, return_dict=True)
    # An image does not pass the packers on its way to the decoder; the original runs them all the same.
    packed, branches = {"spatial": model.packer.spatial(features.positioned)}, {}
    for name in ("temporal", "fast"):
        packed[name] = getattr(model.packer, name)(packed["spatial"])
    for name, source in (
        ("spatial", features.positioned),
        ("temporal", packed["spatial"]),
        ("fast", packed["spatial"]),
    ):
        layer, parts = getattr(model.packer, name), []
        hook = layer.to_out.register_forward_hook(lambda _m, _a, output, into=parts: into.append(output))
        layer(source)
        hook.remove()
        branches[name] = torch.cat(parts)
    case.run = Run(**noted, logits=logits, features=features, packed=packed, branches=branches)
    return case.run


def test_ids_of_tokens(case: Case) -> None:
    config, recorded = case.model.config, case.meta["special_ids"]
    for name, token_id in recorded.items():
        ours = name.replace("_token_id", "").replace("_token", "").replace("spatial_", "")
        for short, long in (("im_", "image_"), ("vid_", "video_"), ("_patch", "")):
            ours = ours.replace(short, long)
        assert getattr(config, f"{ours}_token_id") == token_id, name
    if config.num_coordinate_tokens:
        assert list(config.coordinate_starts) == list(case.meta["coordinate_ids"].values())
    assert config.num_logits == case.meta["len_tokenizer"]


@torch.no_grad()
def test_vision(case: Case) -> None:
    case.done.add("test_vision")
    run = record(case)
    case.compare("tower_features", lambda: run.features.last_hidden_state, FEATURES_ATOL)
    case.compare("projected", lambda: run.features.projected, FEATURES_ATOL)
    case.compare("lape_added", lambda: run.features.positioned, FEATURES_ATOL)
    if not case.model.config.num_coordinate_tokens:
        return
    inputs, outputs = case.model.model.coordinate_tables(case.model.output_rows())
    for axis, one, two in zip(AXES, inputs, outputs, strict=True):
        case.compare(f"lape_table_{axis}_avg", lambda a=one, b=two: average_tables(a, b), FEATURES_ATOL)


@torch.no_grad()
def test_packers(case: Case) -> None:
    case.done.add("test_packers")
    run = record(case)
    for recorded, name in PACKERS.items():
        case.compare(recorded, lambda n=name: run.packed[n], FEATURES_ATOL)
        case.compare(f"{recorded}_attn_branch", lambda n=name: run.branches[n], FEATURES_ATOL)


@torch.no_grad()
def test_sequence_and_logits(case: Case) -> None:
    case.done.add("test_sequence_and_logits")
    run = record(case)
    case.compare("inputs_embeds", lambda: run.embeddings, FEATURES_ATOL)
    case.compare("last_hidden_state", lambda: run.hidden, FEATURES_ATOL)
    last = next((int(name.removeprefix("logits_last")) for name in case.expected if name.startswith("logits_last")), 0)
    case.compare(f"logits_last{last}", lambda: run.logits[:, -last:], LOGITS_ATOL)
    case.compare("logits_argmax_all", lambda: run.logits.argmax(-1), 0)


@torch.no_grad()
def test_generation(case: Case) -> None:
    case.done.add("test_generation")
    expected = case.expected.get("greedy_ids")
    if expected is not None:
        case.compared.add("greedy_ids")
        inputs = case.model_inputs()
        output = case.model.generate(**inputs, max_new_tokens=expected.shape[1], do_sample=False)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def gradients(model: LlavaSTForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The gradients of embedding, head and tables by the original's names, without "model." and ".weight"."""
    conversion, config = CONVERSIONS["llava_st"], model.config
    rename = conversion.key_map({}).inverse().rename
    found = {}
    for name, parameter in model.named_parameters():
        original = rename(name)
        if original in (EMBEDDING, HEAD, *TABLES):
            found[original] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for join in conversion.joins(config):
        pieces = found.pop(join.name).split([rows for _, rows in join.pieces])
        found |= {name: piece for (name, _), piece in zip(join.pieces, pieces, strict=True)}
    return {name.removeprefix("model.").removesuffix(".weight"): value for name, value in found.items()}


def test_training(case: Case) -> None:
    """Not every recording was trained."""
    case.done.add("test_training")
    recorded = [name for name in case.expected if name.startswith("train.")]
    if not recorded:
        return
    case.model.train()
    case.model.zero_grad()
    output = case.model(**case.model_inputs("train."), labels=case.inputs["train.labels"])
    output.loss.backward()
    case.model.eval()
    case.compare("train.loss", lambda: output.loss.detach()[None], LOGITS_ATOL)
    last = max((int(name.rpartition("last")[2]) for name in recorded if "logits_last" in name), default=0)
    case.compare(f"train.logits_last{last}", lambda: output.logits[:, -last:].detach(), LOGITS_ATOL)
    found = gradients(case.model)
    for name in recorded:
        if name.startswith("train.grad."):
            module = name.removeprefix("train.grad.")
            value = found[module.removesuffix("_rownorm")]
            value = value.norm(dim=-1) if module.endswith("_rownorm") else value
            case.compare(name, lambda v=value: v, GRADIENT_RTOL * case.expected[name].abs().max().item())
    case.model.zero_grad()


def test_everything_recorded_was_compared(case: Case) -> None:
    """No recorded tensor may go unnoticed; comparisons that ran in another process are made here."""
    for compare in (test_vision, test_packers, test_sequence_and_logits, test_generation, test_training):
        if compare.__name__ not in case.done:
            compare(case)
    left = set(case.expected) - case.compared
    assert not left, f"recorded but not compared: {sorted(left)}"
    print("largest differences:", json.dumps(case.worst))


@pytest.mark.parametrize("folder", MERGES, ids=lambda folder: folder.name)
def test_stages_are_merged_as_the_original_does(folder: Path, tmp_path: Path) -> None:
    base = next(
        path for path in sorted(folder.iterdir()) if is_llava_st(path) and (path / "model.safetensors").exists()
    )
    stages = sorted(path.parent for path in folder.rglob("adapter_config.json"))
    meta, stored = json.loads((folder / "meta.json").read_text()), load_file(base / "model.safetensors")
    # Weights do not depend on the numbers of heads, which nothing here tells.
    heads = {"vision_tower_overrides": {"num_attention_heads": 1}, "packer_overrides": {"num_heads": 1}}
    source = prepare_source(base, tmp_path, heads)
    convert_checkpoint(source, tmp_path / "merged", options={"lora_stages": tuple(stages)})
    reverse_checkpoint(tmp_path / "merged", tmp_path / "back")
    merged, expected = read_weights(tmp_path / "back"), load_file(folder / "expected_merged.safetensors")
    assert set(stored) | set(expected) == set(merged)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=0, atol=MERGE_ATOL, msg=lambda text, n=name: f"{n}: {text}"
        )
    same = meta["tensors_bitwise_equal_to_stage1"]
    assert_same_bits({name: merged[name] for name in same}, {name: stored[name] for name in same})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in meta["config_after"]} == meta["config_after"]
    assert config["vocab_size"] == meta["merged_vocab_size"]
    native = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert native["text_config"]["vocab_size"] == meta["len_tokenizer"]


@pytest.mark.skipif(not CASES, reason="no recorded cases")
def test_a_swapped_pair_of_weights_is_seen(tmp_path: Path) -> None:
    folder = CASES[0]
    first = "model.vision_resampler.token_packer.devide_attention.to_k.2.weight"
    second = first.replace("to_k", "to_v")
    state = load_file(folder / "checkpoint" / "model.safetensors")
    assert state[first].shape == state[second].shape and not torch.equal(state[first], state[second])
    state[first], state[second] = state[second], state[first]
    swapped = prepare_source(folder / "checkpoint", tmp_path, {})
    (swapped / "model.safetensors").unlink()
    save_file(state, swapped / "model.safetensors")
    (tmp_path / "work").mkdir()
    case = load_case(folder, swapped, tmp_path / "work", "folded")
    test_vision(case)
    with pytest.raises(AssertionError, match="packer_s_first"):
        test_packers(case)
