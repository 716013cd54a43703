"""Parity with the original LongVU: each recorded case is converted, loaded and compared tensor by tensor.

A group is a folder below `$LONGVIDEO_GOLDEN` with `checkpoint/` (original layout, towers in `checkpoint/towers/`) and
`cases/<case>/` with `inputs.safetensors`, `expected.safetensors` and `meta.json`, recorded from the original classes
on the CPU in float32 (meta.json says with which versions). Everything about a case is read from the case; a recorded
tensor that no comparison below knows is a failure. To renew: record the case again with the original code and replace
its folder.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.conversion import CONVERSIONS, convert_checkpoint
from longvideo.modeling.longvu import insertion_longvu
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration
from longvideo.modeling.longvu.spatial_compression import anchor_similarity, compress
from longvideo.modeling.longvu.sva_longvu import block_mask, resize_grid

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
MARKER = -200
# float32 on both sides: the order of summation differs (fused kernels, chunks), nothing else.
FEATURES_ATOL = 1e-4
LOGITS_ATOL = 5e-4
# Cosines of whole frames and of tokens are compared with thresholds; their errors are some units in the last place.
COSINE_ATOL = 1e-5
# Gradients add up some hundred positions; relative to the largest entry, with the features' tolerance.
GRADIENT_RTOL = 1e-4


def find_cases() -> list[Path]:
    """Every case below the recordings whose checkpoint is an original LongVU."""
    found = []
    for path in sorted(GOLDEN.rglob("checkpoint/config.json")):
        config = json.loads(path.read_text())
        known = config.get("model_type") in CONVERSIONS["longvu"].original_model_types
        if known and config.get("mm_projector_type") == "sva":
            found += sorted(meta.parent for meta in path.parent.parent.glob("cases/*/meta.json"))
    return found


CASES = find_cases()


@dataclass
class Run:
    """What passed between the model's modules in one forward pass.

    Args:
        output: the model's output.
        dino: (F, P, width) DINOv2's patches of all frames, video after video.
        siglip: (T, P, width) SigLIP's patches of the frames that were kept.
        grids: per tower (T, G * G, width) the common grid of kept frames.
        projected: per tower (T, G * G, E).
        masks: per sampler call the mask, or None.
        aggregated: (T, Q, E).
        compressed: per compressed video its tokens, the settings and the mask of kept tokens.
        inputs_embeds: (B, S', D).
    """

    output: Any = None
    dino: list[torch.Tensor] = field(default_factory=list)
    siglip: list[torch.Tensor] = field(default_factory=list)
    grids: tuple[list[torch.Tensor], ...] = ((), ())
    projected: tuple[list[torch.Tensor], ...] = ((), ())
    masks: list[torch.Tensor | None] = field(default_factory=list)
    aggregated: list[torch.Tensor] = field(default_factory=list)
    compressed: list[tuple[torch.Tensor, float, dict[str, Any], torch.Tensor]] = field(default_factory=list)
    inputs_embeds: torch.Tensor | None = None


@dataclass
class Case:
    """One recorded case, converted and loaded."""

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    original_config: dict[str, Any]
    model: LongVUForConditionalGeneration
    compared: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    run: Run | None = None

    def compare(self, name: str, actual: Callable[[], torch.Tensor], atol: float) -> None:
        """Compare with a recorded tensor, if there is one, of the first few items where only those were recorded."""
        if name not in self.expected:
            return
        expected, value = self.expected[name], actual()
        self.compared.add(name)
        if len(expected) in self.recorded_parts:
            value = value[: len(expected)]
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)} against {tuple(expected.shape)}"
        torch.testing.assert_close(
            value, expected, rtol=0, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )

    def compare_exactly(self, name: str, actual: Callable[[], torch.Tensor]) -> None:
        """Compare integers, if they were recorded."""
        if name in self.expected:
            self.compared.add(name)
            assert actual().long().tolist() == self.expected[name].long().tolist(), name

    @property
    def recorded_parts(self) -> set[int]:
        """Numbers of frames to which recordings of this case were cut."""
        words = {"two": 2, "2": 2}
        meanings = " ".join(entry["meaning"] for entry in self.meta["expected"].values())
        found = re.findall(r"[( ]first (\d+|two)\b", meanings)
        return {words.get(number) or int(number) for number in found}

    @property
    def is_image(self) -> bool:
        """Whether the pixels were given on the original's image path."""
        return "image path" in self.meta["image_input_form"]


def load_case(folder: Path, checkpoint: Path, work: Path) -> Case:
    """Convert with the real conversion, the case's overrides in the config, and load with from_pretrained."""
    meta = json.loads((folder / "meta.json").read_text())
    config = {**json.loads((checkpoint / "config.json").read_text()), **meta["config_overrides"]}
    source = work / "original"
    source.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (source / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(source, work / "converted")
    model = LongVUForConditionalGeneration.from_pretrained(work / "converted", dtype=torch.float32)
    return Case(
        folder=folder,
        meta=meta,
        inputs=load_file(folder / "inputs.safetensors"),
        expected=load_file(folder / "expected.safetensors"),
        original_config=config,
        model=model.eval(),
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: f"{folder.parents[1].name}-{folder.name}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each case once for all tests of this file."""
    folder = request.param
    yield load_case(folder, folder.parents[1] / "checkpoint", tmp_path_factory.mktemp("golden"))


def visual_entries(case: Case, tower: str) -> list[torch.Tensor]:
    """The recorded pixels of a tower, one entry (frames, 3, S, S) per visual, in the order of the original's list."""
    prefix = f"pixel_values_{tower}"
    names = sorted(
        (name for name in case.inputs if name.startswith(prefix)),
        key=lambda name: [int(number) for number in re.findall(r"\d+", name[len(prefix) :])],
    )
    tensors = [case.inputs[name] for name in names]
    if len(tensors) > 1:
        return [tensor.flatten(0, -4) if tensor.ndim > 4 else tensor for tensor in tensors]
    pixels, num_entries = tensors[0], len(case.inputs["image_sizes"])
    if pixels.ndim == 5:
        return list(pixels)
    if case.is_image:
        return list(pixels.split(1))
    for name, value in case.inputs.items():
        if "frame" in name and value.ndim == 1 and len(value) == num_entries and int(value.sum()) == len(pixels):
            return list(pixels.split(value.tolist()))
    return list(pixels.split(len(pixels) // num_entries))


def used_entries(case: Case) -> list[int]:
    """The entries that are looked at: the original gives a sample without a placeholder one entry all the same."""
    used, next_entry = [], 0
    for row in case.inputs["input_ids"]:
        count = int((row == MARKER).sum())
        used += range(next_entry, next_entry + count)
        next_entry += max(count, 1)
    return used


def model_inputs(case: Case) -> dict[str, torch.Tensor]:
    """The recorded inputs as ours."""
    config, used = case.model.config, used_entries(case)
    ids = case.inputs["input_ids"]
    placeholder = config.image_token_id if case.is_image else config.video_token_id
    inputs = {"input_ids": ids.masked_fill(ids == MARKER, placeholder)}
    inputs["attention_mask"] = case.inputs.get("attention_mask", torch.ones_like(ids)).long()
    if "labels" in case.inputs:
        inputs["labels"] = case.inputs["labels"]
    siglip, dino = ([visual_entries(case, tower)[i] for i in used] for tower in ("siglip", "dino"))
    sizes = case.inputs["image_sizes"][used]
    if not used:
        return inputs
    if case.is_image:
        visual = {"pixel_values": torch.cat(siglip), "pixel_values_dino": torch.cat(dino), "image_sizes": sizes}
    else:
        visual = {
            "pixel_values_videos": torch.cat(siglip),
            "pixel_values_videos_dino": torch.cat(dino),
            "video_num_frames": torch.tensor([len(frames) for frames in siglip]),
            "video_sizes": sizes,
        }
    return {**inputs, **visual}


@torch.no_grad()
def record(case: Case) -> Run:
    """Run the case once and note what passes between the modules."""
    if case.run is not None:
        return case.run
    model, run = case.model.model, Run(grids=([], []), projected=([], []))

    def take(values: list, pick: Callable[[tuple, dict, Any], Any]) -> Callable:
        return lambda _module, args, kwargs, output: values.append(pick(args, kwargs, output))

    def note_embeddings(_module: torch.nn.Module, _args: tuple, kwargs: dict) -> None:
        run.inputs_embeds = kwargs["inputs_embeds"]

    def note_compression(tokens: torch.Tensor, threshold: float, **settings: Any) -> torch.Tensor:
        keep = compress(tokens, threshold, **settings)
        run.compressed.append((tokens, threshold, settings, keep))
        return keep

    hooks = [
        model.vision_tower.register_forward_hook(
            take(run.siglip, lambda _a, _k, output: output.last_hidden_state), with_kwargs=True
        ),
        model.dino_tower.register_forward_hook(
            take(run.dino, lambda _a, _k, output: output.last_hidden_state[:, 1:]), with_kwargs=True
        ),
        model.vision_sampler.register_forward_hook(
            take(run.aggregated, lambda _a, _k, output: output), with_kwargs=True
        ),
        model.vision_sampler.register_forward_hook(
            take(run.masks, lambda args, kwargs, _o: args[2] if len(args) > 2 else kwargs.get("mask_FGG")),
            with_kwargs=True,
        ),
        model.language_model.register_forward_pre_hook(note_embeddings, with_kwargs=True),
    ]
    for tower, projector in enumerate(model.vision_projectors):
        hooks.append(projector.register_forward_hook(take(run.grids[tower], lambda a, _k, _o: a[0]), with_kwargs=True))
        hooks.append(
            projector.register_forward_hook(take(run.projected[tower], lambda _a, _k, o: o), with_kwargs=True)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(insertion_longvu, "compress", note_compression)
        run.output = case.model(**model_inputs(case), return_dict=True)
    for hook in hooks:
        hook.remove()
    case.run = run
    return run


def all_frames(case: Case, run: Run) -> torch.Tensor:
    """DINOv2's patches of every input frame; frames that were read again come behind and are left out."""
    total = sum(len(visual_entries(case, "dino")[i]) for i in used_entries(case))
    return torch.cat(run.dino)[:total]


def sampler_mask(case: Case, run: Run) -> torch.Tensor:
    """(Q, r * r) what the first frame's queries may attend to in either tower."""
    config = case.model.config
    mask = run.masks[0]
    if mask is None:
        mask = torch.ones(1, config.vision_grid_size, config.vision_grid_size, dtype=torch.bool)
    return block_mask(mask, config.grid_size)[0]


def selections(run: Run) -> tuple[Any, ...]:
    """What was chosen per visual."""
    return run.output.video_selections


def frames_in_batch(run: Run) -> torch.Tensor:
    """For every visual token the place of its frame among the kept frames of all samples."""
    start, frames = 0, []
    for selection in selections(run):
        frames.append(selection.token_frame + start)
        start += len(selection.kept_frames)
    return torch.cat(frames)


def compare_compression(case: Case, run: Run) -> None:
    """Compare cosines and masks; recordings are numbered by sample."""
    samples = [i for i, selection in enumerate(selections(run)) if selection.mode == "stc"]
    assert len(samples) == len(run.compressed)
    for sample, (tokens, threshold, settings, final) in zip(samples, run.compressed, strict=True):
        cosine, is_anchor = anchor_similarity(tokens, settings["window"], anchor=settings["anchor"])
        cosine[is_anchor] = torch.nan
        by_similarity = compress(tokens, threshold, window=settings["window"], anchor=settings["anchor"])
        case.compare(f"stc_cosine_{sample}", lambda value=cosine: value, COSINE_ATOL)
        case.compare_exactly(f"stc_keep_mask_similarity_{sample}", lambda value=by_similarity: value)
        case.compare_exactly(f"stc_keep_mask_final_{sample}", lambda value=final: value)


def rows_without_padding(case: Case, values: torch.Tensor, recorded: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Ours and the recorded one row by row: we pad on the left, the original on the right."""
    mask = case.run.output.attention_mask.bool()
    assert len(mask) == len(values) == len(recorded)
    assert int(mask.sum(1).max()) == recorded.shape[1], "the longest sequence differs"
    return [(row[keep], other[: int(keep.sum())]) for row, keep, other in zip(values, mask, recorded, strict=True)]


def compare_rows(case: Case, name: str, values: torch.Tensor, atol: float) -> None:
    """Compare a tensor over the whole sequence, padding left out."""
    if name in case.expected:
        case.compared.add(name)
        for ours, recorded in rows_without_padding(case, values, case.expected[name]):
            torch.testing.assert_close(ours, recorded, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


@torch.no_grad()
def test_towers_and_temporal_reduction(case: Case) -> None:
    case.done.add("test_towers_and_temporal_reduction")
    run, side = record(case), case.model.config.vision_grid_size
    frames = all_frames(case, run)
    grids = resize_grid(frames, side)
    case.compare("dino_raw_first2", lambda: frames, FEATURES_ATOL)
    case.compare("dino_features", lambda: grids, FEATURES_ATOL)
    # A sum over a whole frame: the error of a value times the root of their number.
    case.compare("dino_feature_sum", lambda: grids.sum((1, 2)), FEATURES_ATOL * grids[0].numel() ** 0.5)
    case.compare("siglip_raw_first2", lambda: torch.cat(run.siglip), FEATURES_ATOL)
    case.compare("siglip_features", lambda: torch.cat(run.grids[0]), FEATURES_ATOL)
    similarity = [selection.dino_similarity for selection in selections(run)]
    case.compare("dino_window_mean_similarity", lambda: torch.cat(similarity), COSINE_ATOL)
    kept = [selection.kept_frames for selection in selections(run)]
    case.compare_exactly("kept_frame_indices", lambda: torch.cat(kept))
    case.compare_exactly("kept_frame_counts", lambda: torch.tensor([len(frames) for frames in kept]))


@torch.no_grad()
def test_connector(case: Case) -> None:
    case.done.add("test_connector")
    run, model = record(case), case.model.model
    for tower, name in enumerate(("siglip", "dino")):
        case.compare(f"aux_proj_{name}_first2", lambda i=tower: torch.cat(run.projected[i]), FEATURES_ATOL)
        case.compare_exactly(f"sva_mask_{name}_frame0", lambda: sampler_mask(case, run))
    aggregated = torch.cat(run.aggregated)
    low = resize_grid(aggregated, case.model.config.lowres_token)
    case.compare("sva_output", lambda: aggregated, FEATURES_ATOL)
    case.compare("projected_high", lambda: model.multi_modal_projector(aggregated), FEATURES_ATOL)
    case.compare("projected_low", lambda: model.multi_modal_projector(low), FEATURES_ATOL)


@torch.no_grad()
def test_choice_of_tokens(case: Case) -> None:
    case.done.add("test_choice_of_tokens")
    run = record(case)
    chosen = selections(run)
    scores = [x.query_scores for x in chosen if x.query_scores is not None]
    full = [x.full_resolution.nonzero()[:, 0] for x in chosen if x.mode == "mix"]
    case.compare("query_frame_scores", lambda: torch.cat(scores), FEATURES_ATOL)
    case.compare_exactly("query_selected_frames", lambda: torch.cat(full))
    compare_compression(case, run)
    case.compare_exactly("visual_token_frame", lambda: frames_in_batch(run))
    case.compare_exactly("visual_token_grid_index", lambda: torch.cat([x.token_grid_index for x in chosen]))
    case.compare_exactly("visual_token_is_full_grid", lambda: torch.cat([x.token_is_full for x in chosen]))
    case.compare_exactly("visual_token_counts", lambda: torch.tensor([len(x.token_frame) for x in chosen]))


@torch.no_grad()
def test_sequence_logits_and_loss(case: Case) -> None:
    case.done.add("test_sequence_logits_and_loss")
    run = record(case)
    lengths = [entry["sequence_length"] for entry in case.meta.get("trace", []) if "sequence_length" in entry]
    if len(lengths) == len(case.inputs["input_ids"]):
        assert run.output.attention_mask.sum(1).tolist() == lengths
    compare_rows(case, "inputs_embeds", run.inputs_embeds, FEATURES_ATOL)
    compare_rows(case, "logits", run.output.logits, LOGITS_ATOL)
    if "labels_out" in case.expected:
        compare_rows(case, "labels_out", run.output.labels, 0)
        if "loss" in case.expected:
            case.compare("loss", lambda: run.output.loss[None], LOGITS_ATOL)


def test_gradients(case: Case) -> None:
    """Not every recording has gradients."""
    case.done.add("test_gradients")
    names = [name for name in case.expected if name.startswith("grad.")]
    if names:
        rename = CONVERSIONS["longvu"].key_map(case.original_config).rename
        case.model.zero_grad()
        case.model(**model_inputs(case), return_dict=True).loss.backward()
        parameters = dict(case.model.named_parameters())
        for name in names:
            gradient = parameters[rename(name[len("grad.") :])].grad
            case.compare(name, lambda value=gradient: value, GRADIENT_RTOL * case.expected[name].abs().max().item())


@torch.no_grad()
def test_generation(case: Case) -> None:
    case.done.add("test_generation")
    if "generated_ids" not in case.expected:
        return
    record(case)
    inputs = {name: value for name, value in model_inputs(case).items() if name != "labels"}
    # The recordings were made without ids that end an answer.
    case.model.generation_config.eos_token_id = None
    expected = case.expected["generated_ids"]
    output = case.model.generate(**inputs, max_new_tokens=expected.shape[1], do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    lengths = case.run.output.attention_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        # The original pads on the right, and lets a shorter sample go on from behind its padding.
        if length == int(lengths.max()):
            assert new[row].tolist() == expected[row].tolist()
    case.compared.add("generated_ids")


def test_everything_recorded_was_compared(case: Case) -> None:
    """No recorded tensor may go unnoticed; comparisons that ran in another process are made here."""
    tests = (
        test_towers_and_temporal_reduction,
        test_connector,
        test_choice_of_tokens,
        test_sequence_logits_and_loss,
        test_gradients,
        test_generation,
    )
    for compare in tests:
        if compare.__name__ not in case.done:
            compare(case)
    left = set(case.expected) - case.compared
    assert not left, f"recorded but not compared: {sorted(left)}"


def swapped_copy(checkpoint: Path, target: Path, first: str, second: str) -> None:
    """Copy a checkpoint with two tensors of equal shape exchanged."""
    target.mkdir()
    (target / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (target / "towers").symlink_to((checkpoint / "towers").resolve(), target_is_directory=True)
    state = load_file(checkpoint / "model.safetensors")
    assert state[first].shape == state[second].shape and not torch.equal(state[first], state[second])
    state[first], state[second] = state[second], state[first]
    save_file(state, target / "model.safetensors")


@pytest.mark.skipif(not CASES, reason="no recorded cases")
def test_a_swapped_pair_of_weights_is_seen(tmp_path: Path) -> None:
    folder = CASES[0]
    first = "model.vision_sampler_0.layers.0.cross_attn.k_proj_0.1.weight"
    swapped_copy(folder.parents[1] / "checkpoint", tmp_path / "swapped", first, first.replace("proj_0", "proj_1"))
    (tmp_path / "work").mkdir()
    case = load_case(folder, tmp_path / "swapped", tmp_path / "work")
    test_towers_and_temporal_reduction(case)
    with pytest.raises(AssertionError, match="sva_output"):
        test_connector(case)
