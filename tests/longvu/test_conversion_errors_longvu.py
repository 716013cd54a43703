"""Original LongVU checkpoints that are not converted: damaged, of another size, or of another family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longvideo.conversion import convert_checkpoint
from tests.originals_longvu import DINO, SIGLIP, original_longvu, write_longvu_original, write_part


@pytest.mark.parametrize(("part", "number"), [(SIGLIP, 0), (DINO, 1)])
def test_a_tower_of_the_wrong_size(part: str, number: int, tmp_path: Path) -> None:
    states, configs = original_longvu()
    configs[part] = {**configs[part], "hidden_size": 64}
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    message = rf"{part} is 64 wide, but the checkpoint was trained with one of 32 \(mm_projector_aux_{number} "
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_a_tower_of_the_wrong_depth_lists_what_is_missing(tmp_path: Path) -> None:
    states, configs = original_longvu()
    configs[SIGLIP] = {**configs[SIGLIP], "num_hidden_layers": 3}
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    with pytest.raises(ValueError, match=r"(?s)not filled by any tensor.*model\.vision_tower\.encoder\.layers\.2"):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")


def test_towers_that_are_missing_swapped_or_no_folders(tmp_path: Path) -> None:
    states, configs = original_longvu()
    original, native = tmp_path / "original", tmp_path / "native"
    write_longvu_original(original, states=states, configs=configs, towers=False)
    for part in (SIGLIP, DINO):
        write_part(tmp_path / part, states[part], configs[part])
    siglip, dino = tmp_path / SIGLIP, tmp_path / DINO
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Path], type[Exception], str]] = [
        ({}, FileNotFoundError, r"does not hold the SigLIP tower.*google/siglip.*--vision-tower FOLDER"),
        ({"vision_tower": siglip}, FileNotFoundError, r"does not hold the DINOv2 tower.*--dino-tower FOLDER"),
        ({"vision_tower": dino, "dino_tower": siglip}, ValueError, r"towers/siglip has model_type 'dinov2'; expected"),
        (
            {"vision_tower": tmp_path / "none"},
            FileNotFoundError,
            r"--vision-tower: .*none does not exist.*hf download",
        ),
        ({"dino_tower": tmp_path / "file"}, ValueError, r"--dino-tower: .*file is a file; give the folder"),
        ({"dino_tower": tmp_path}, ValueError, "lie in one another; choose another destination"),
        ({"audio_tower": siglip}, ValueError, "--audio-tower was given, but"),
    ]
    for parts, error, message in cases:
        with pytest.raises(error, match=message):
            convert_checkpoint(original, native, parts=parts)
    (dino / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"dinov2 has no weights"):
        convert_checkpoint(original, native, parts={"vision_tower": siglip, "dino_tower": dino})
    (dino / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dinov2 has no config\.json"):
        convert_checkpoint(original, native, parts={"vision_tower": siglip, "dino_tower": dino})
    assert not native.exists()


CAMBRIAN_1 = ["siglip/CLIP-ViT-SO400M-14-384", "openai/clip-vit-large-patch14-336", "facebook/dinov2-giant-res378"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "cambrian_phi3"}, r"model_type 'cambrian_phi3'; originals that can be converted: .*longvu"),
        ({"model_type": "longvu"}, r"in the Transformers layout already .* --reverse"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"mm_projector_type 'mlp2x_gelu'; LongVU has 'sva'.*Cambrian-S"),
        ({"mm_projector_type": None}, r"mm_projector_type None; LongVU has 'sva'"),
        ({"mm_vision_tower_aux_list": CAMBRIAN_1}, r"has a SigLIP and a DINOv2 tower, in this order.*Cambrian-1"),
        ({"mm_vision_tower_aux_list": CAMBRIAN_1[:1]}, r"SigLIP and a DINOv2 tower, in this order"),
        ({"hidden_size": None}, r"lacks hidden_size; expected the config of a LongVU"),
        ({"hidden_size": "wide"}, r"(?s)value of the wrong type: .*hidden_size"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised weights"),
        ({"num_query_group": 2}, r"num_query_group 2; every published LongVU has one group"),
        ({"query_num_list": [36]}, r"image_token_len 9 and query_num_list \[36\]; expected the same number"),
        ({"image_token_len": 36, "query_num_list": [36]}, r"image_token_len 36, .*which is image_token_len 9\. Set"),
        ({"image_token_len": None, "query_num_list": None}, r"lacks image_token_len and query_num_list"),
        ({"mm_vision_tower_aux_token_len_list": [36, 64]}, r"\[36, 64\]; expected the same square number"),
        ({"vision_hidden_size": 34}, r"vision_hidden_size 34 is not a multiple"),
        ({"connector_depth": 3}, r"(?s)not filled by any tensor.*vision_sampler\.layers\.2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_longvu_original(tmp_path / "original", config=config)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_every_hole_is_listed_with_its_tower(tmp_path: Path) -> None:
    states, configs = original_longvu()
    del states[DINO]["layernorm.weight"]
    states[SIGLIP]["vision_model.encoder.layers.7.mlp.fc1.bias"] = torch.zeros(48)
    states[SIGLIP]["vision_model.extra"] = torch.zeros(2)
    states[""]["model.mm_projector.2.weight"] = torch.zeros(3, 3)
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
    text = str(caught.value)
    assert "model.dino_tower.layernorm.weight [32]" in text
    assert "towers/siglip/vision_model.extra [2]" in text
    assert "the config has no model.vision_tower.encoder.layers.7.mlp.fc1.bias" in text
    assert "model.mm_projector.2.weight: the file has [3, 3], config.json asks for [32, 32]" in text
    assert not (tmp_path / "native").exists()


def test_a_broken_tower_is_named(tmp_path: Path) -> None:
    states, configs = original_longvu()
    states[DINO]["encoder.layer.1.norm2.bias"][3] = float("nan")
    write_longvu_original(tmp_path / "original", states=states, configs=configs)
    message = r"towers/dinov2/encoder\.layer\.1\.norm2\.bias in .*towers/dinov2/model\.safetensors holds 1 values"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "original", tmp_path / "native")
