"""Frame indices, pixels, ids and coordinate values against recordings of the original code, sizes read from each."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from longvideo.processing.llava_st.coordinate_text_llava_st import find_coordinates
from longvideo.processing.llava_st.tokenizer_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, coordinate_token_fields
from tests.tiny_llava_st_processor import tiny_llava_st_processor

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
CASES = sorted(path.parent for path in (GOLDEN / "llava_st").rglob("inputs.safetensors"))
# fp32 on CPU: the same bytes after PIL, so that only the order of two float operations differs.
PIXEL_TOLERANCE = 1e-5
# float32 against the float64 of the recordings.
VALUE_TOLERANCE = 1e-7
LIST_TOKENS = {
    f"{name}_{way}_locations": f"<{axis}-{way.upper()}>"
    for name, axis in (("temporal", "TEMP"), ("spatial_height", "HEIGHT"), ("spatial_width", "WIDTH"))
    for way in ("input", "output")
}


@pytest.fixture(scope="module", params=CASES or [None], ids=lambda path: path.name if path else "absent")
def case(request: pytest.FixtureRequest) -> dict:
    if request.param is None:
        pytest.skip(f"no inputs.safetensors below {GOLDEN / 'llava_st'}; set LONGVIDEO_GOLDEN to the recordings")
    meta = json.loads((request.param / "meta.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(request.param / "checkpoint")
    return {"meta": meta, "inputs": load_file(request.param / "inputs.safetensors"), "tokenizer": tokenizer}


def runtime_number(meta: dict, name: str) -> int:
    """A size that the original sets at run time, with what the recording put in its place."""
    for _, _, line, _ in meta["literal_substitutions"]:
        match = re.fullmatch(rf"self\.{name} = (\d+)", line)
        if match:
            return int(match[1])
    pytest.skip(f"the case does not say {name}")


def processor_of(case: dict):
    meta = case["meta"]
    cfg = meta["case"]["cfg"]
    return tiny_llava_st_processor(
        num_frames=cfg["frames"],
        temporal_factor=cfg["frames"] // runtime_number(meta, "slow_frame_num"),
        spatial_factor=cfg["grid"] // math.isqrt(runtime_number(meta, "slow_token_num")),
        side=cfg["vision"]["image_size"],
        patch_size=cfg["vision"]["patch_size"],
        tokenizer=case["tokenizer"],
    )


def messages_of(case: dict, question: str) -> list[dict]:
    facts, frames = case["meta"]["case"], case["inputs"]["raw_frames_uint8"]
    block = {"type": "image", "image": frames[0].numpy()}
    if facts["modality"] == "video":
        block = {"type": "video", "video": frames.numpy()}
        if facts.get("split"):
            block["split"] = facts["split"]
    return [{"role": "user", "content": [block, {"type": "text", "text": question}]}]


def ask(processor, messages: list[dict], *, answered: bool = False, **processor_kwargs):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=not answered,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, **processor_kwargs},
    )


def assert_values(outputs, tokenizer, inputs: dict[str, torch.Tensor], prefix: str) -> None:
    ids, values = outputs["input_ids"], outputs["coordinate_values"]
    is_template = torch.zeros_like(ids, dtype=torch.bool)
    for name, token in LIST_TOKENS.items():
        here = ids == tokenizer.convert_tokens_to_ids(token)
        is_template |= here
        expected = inputs[f"{prefix}{name}"].float()
        torch.testing.assert_close(values[here], expected, atol=VALUE_TOLERANCE, rtol=0)
    assert not values[~is_template].any()


def test_inputs(case):
    processor, inputs, facts = processor_of(case), case["inputs"], case["meta"]["case"]
    outputs = ask(processor, messages_of(case, facts["query"]))
    pixels = outputs["pixel_values"] if facts["modality"] == "image" else outputs["pixel_values_videos"][0]
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=PIXEL_TOLERANCE, rtol=0)
    assert torch.equal(outputs["input_ids"], inputs["input_ids"])
    assert_values(outputs, case["tokenizer"], inputs, "var.")
    if "frame_indices" in inputs:
        assert outputs["video_metadata"][0].frames_indices == inputs["frame_indices"].tolist()


def test_template_tokens_with_lists(case):
    """The formatted prompt of the release, whose values stand in lists, gives the same."""
    processor, inputs, meta = processor_of(case), case["inputs"], case["meta"]
    question = meta["prompt_after_format"]
    variables = {name: list(values) for name, values in meta["variables"].items()}
    outputs = ask(processor, messages_of(case, question), variables=variables)
    assert torch.equal(outputs["input_ids"], inputs["input_ids"])
    assert_values(outputs, case["tokenizer"], inputs, "var.")


def test_answer_that_is_taught(case):
    processor, inputs, facts = processor_of(case), case["inputs"], case["meta"]["case"]
    if "train" not in facts:
        pytest.skip("the case has no training part")
    messages = messages_of(case, facts["query"])
    messages.append({"role": "assistant", "content": [{"type": "text", "text": facts["train"]["answer"]}]})
    outputs = ask(processor, messages, answered=True)
    assert torch.equal(outputs["input_ids"], inputs["train.input_ids"])
    assert_values(outputs, case["tokenizer"], inputs, "train.var.")
    assert case["meta"]["train"]["answer_after_format"] == re.sub(
        r"(-(?:IN|OUT)PUT)[^>]*>",
        r"\1>",
        processor.apply_chat_template(messages).split("assistant\n")[-1].removesuffix("<|im_end|>\n"),
    )
    assert len(find_coordinates(case["meta"]["train"]["answer_after_format"])) == sum(
        len(values) for values in case["meta"]["train"]["variables"].values()
    )


def test_token_ids(case):
    cfg, meta = case["meta"]["case"]["cfg"], case["meta"]
    fields = coordinate_token_fields(case["tokenizer"], cfg["frames"], cfg["spatial_tokens"])
    recorded = meta["special_ids"]
    visual = {name: recorded[f"{token.strip('<>')}_token"] for name, token in VISUAL_TOKENS.items()}
    templates = {
        name: recorded[f"{'' if name.startswith('temporal') else 'spatial_'}{name}"] for name in TEMPLATE_TOKENS
    }
    assert {name: fields[name] for name in (*visual, *templates)} == {**visual, **templates}
    start = fields["coordinate_token_start"]
    spatial = start + cfg["frames"]
    places = {"TEMP-000": start, "HEIGHT-000": spatial, "WIDTH-000": spatial + cfg["spatial_tokens"]}
    assert meta["coordinate_ids"] == places
    assert start == meta["vocab_size"] and len(case["tokenizer"]) == meta["len_tokenizer"]
