"""Every entry of metrics.json: metrics, converters and parsers against recordings of the released functions.

The file holds {function, args, kwargs} with `result` or the class that it `raises`. AssertionError, ZeroDivisionError,
UnboundLocalError and errors of evaluated text are ValueErrors here; all others may also keep their class.
"""

import builtins
import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from longvideo.evaluation.grounding_records import original_table, score_records
from longvideo.evaluation.metrics import box_iou, temporal_iou
from longvideo.processing.llava_st import original_answers_llava_st as originals

pytestmark = pytest.mark.golden

GOLDEN = Path(os.environ.get("LONGVIDEO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
FILE = GOLDEN / "llava_st" / "metrics.json"
ENTRIES = json.loads(FILE.read_text())["cases"] if FILE.is_file() else [None]
# Both sides compute in double precision and may add in another order.
TOLERANCE = 1e-9


def _records(task: str) -> Callable[..., Any]:
    def evaluate(results: list, **kwargs: Any) -> Any:
        return original_table(score_records(results, task, captions=False, **kwargs), task)

    return evaluate


def _eval_stvg(results: list, task: str = "stvg", num_frames: int = 100) -> Any:
    return _records(task)(results, num_frames=num_frames)


# Name of a released function -> ours with the same arguments.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "temporal_iou": lambda A, B: temporal_iou(A, B, mode="original"),
    "iou": lambda box1, box2: box_iou(box1, box2, mode="original"),
    "parse_span_from_text": lambda s: originals.original_span(s),
    "parse_box_from_text": lambda text: originals.original_box(text),
    "parse_stpair_from_text": lambda text: originals.original_pairs(text),
    "parse_float_from_text": lambda s, peer_str="Ends in", post_str="": originals.original_float(
        s, before=peer_str, after=post_str
    ),
    "replace_and_normalize": lambda input_str, return_token=False: originals.original_convert(
        input_str, return_token=return_token
    ),
    "format_box_in_text": lambda text, pad_proc=False, **kwargs: originals.original_format_box(
        text, pad_proc=pad_proc, **kwargs
    ),
    "format_span_in_text": lambda text, in_out: originals.original_format_span(text, in_out=in_out),
    "format_float_in_text": lambda text, in_out: originals.original_format_float(text, in_out=in_out),
    "bbox_post_refine": lambda bbox, height, width: originals.original_unpad_box(bbox, height, width),
    "seperate_token_number": lambda text, token: originals.original_separate(text, token),
    "get_variables": lambda conversations: originals.original_variables(conversations),
    "filter_svg_bboxes_according_to_frame_id": lambda bboxes, frame_id: originals.original_filter_tube(
        bboxes, frame_id
    ),
    "demo_parse_inputs": lambda inputs: originals.original_shorthand(inputs),
    "demo_format_text": lambda text, mode: originals.original_shorthand(text, mode),
    "demo_parse_results": lambda outputs, task: originals.original_results(outputs, task),
    "demo_format_conversations": lambda conversations: originals.original_conversations(conversations),
    "position_transfer": lambda value, num_tokens: originals.original_position(value, num_tokens),
    "eval_rec": _records("rec"),
    "eval_tvg": _records("tvg"),
    "eval_stvg": _eval_stvg,
}


def _decoded(value: Any) -> Any:
    """The file's form of mappings with keys that are not strings, back to mappings."""
    if isinstance(value, dict):
        if set(value) == {"__dict_items__"}:
            return {_decoded(key): _decoded(item) for key, item in value["__dict_items__"]}
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _assert_equal(actual: Any, expected: Any, place: str = "result") -> None:
    if isinstance(expected, dict):
        assert isinstance(actual, Mapping) and set(actual) == set(expected), f"{place}: {actual} != {expected}"
        for key in expected:
            _assert_equal(actual[key], expected[key], f"{place}[{key!r}]")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), f"{place}: {actual} != {expected}"
        for i, item in enumerate(expected):
            _assert_equal(actual[i], item, f"{place}[{i}]")
    elif isinstance(expected, float | int) and not isinstance(expected, bool):
        assert actual == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE), place
    else:
        assert actual == expected, place


def _errors(name: str) -> tuple[type[Exception], ...]:
    ours_only = ("AssertionError", "ZeroDivisionError", "UnboundLocalError", "NameError", "SyntaxError")
    same = getattr(builtins, name, None)
    return (ValueError,) if name in ours_only or same is None else (ValueError, same)


def _id(entry: dict[str, Any] | None) -> str:
    return "absent" if entry is None else f"{entry['id']}-{entry['function']}"


@pytest.mark.parametrize("entry", ENTRIES, ids=_id)
def test_entry(entry: dict[str, Any] | None) -> None:
    if entry is None:
        pytest.skip(f"no {FILE}; set LONGVIDEO_GOLDEN to the recordings")
    name = entry["function"]
    assert name in FUNCTIONS, f"{name} of the released scripts has no counterpart here"
    args, kwargs = _decoded(copy.deepcopy(entry["args"])), _decoded(copy.deepcopy(entry["kwargs"]))
    if "raises" in entry:
        with pytest.raises(_errors(entry["raises"])) as raised:
            FUNCTIONS[name](*args, **kwargs)
        assert len(str(raised.value)) > 20 or type(raised.value) is not ValueError, "the error says too little"
        return
    expected = _decoded(entry["result"])
    if name == "eval_stvg":
        expected = {**expected, "caption_score": {}}
    _assert_equal(FUNCTIONS[name](*args, **kwargs), expected)


CAPTIONED = [entry for entry in ENTRIES if entry and isinstance(entry.get("result"), dict)]
CAPTIONED = [entry for entry in CAPTIONED if entry["result"].get("caption_score")] or [None]


@pytest.mark.parametrize("entry", CAPTIONED, ids=_id)
def test_captions_of_entry(entry: dict[str, Any] | None) -> None:
    if entry is None:
        pytest.skip(f"no entries with caption scores in {FILE}")
    if find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        pytest.skip("caption metrics need pycocoevalcap (extra 'captions') and Java")
    args, kwargs = _decoded(entry["args"]), _decoded(entry["kwargs"])
    bound = dict(zip(("results", "task", "num_frames"), args, strict=False)) | kwargs
    task = bound.get("task", "stvg")
    scores = score_records(bound["results"], task, num_frames=bound.get("num_frames", 100))
    # Three printed digits; METEOR's Java prints its own.
    expected = _decoded(entry["result"]["caption_score"])
    actual = original_table(scores, task)["caption_score"]
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, abs=1.1e-3), key
