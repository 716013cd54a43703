"""Files of rows as datasets: counts, lines and reasons of bad rows, lists of files, streams, and videos."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from longvideo.trainers import VideoSFTCollator
from longvideo.trainers.data import BadRowError, load_video_rows
from tests.trainers.data_rows import ANSWER, QUESTION, REFUSED, ROWS, SPOKEN, TURNS, ours, text
from tests.trainers.zoo import KINDS
from tests.videos import make_video, numbered_frame

LLAVA = {"video": "a.mp4", "conversations": SPOKEN}
SWIFT = {"messages": TURNS, "videos": ["a.mp4"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a film of 6 seconds, 8 frames each, and 12 of its frames as pictures."""
    make_video(tmp_path / "a.mp4", num_frames=48, fps=8)
    (tmp_path / "f").mkdir()
    for index in range(12):
        Image.fromarray(numbered_frame(index)).save(tmp_path / "f" / f"{index}.png")
    return tmp_path


def write(path: Path, content: Any) -> Path:
    """Write text as it is, other things as JSON; a list goes into a .jsonl row by row."""
    if not isinstance(content, str):
        is_lines = path.suffix == ".jsonl"
        content = "\n".join(map(json.dumps, content)) if is_lines else json.dumps(content, indent=1)
    path.write_text(content, encoding="utf-8")
    return path


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages without the None that a table writes for the keys that a block does not have."""
    return [
        {**entry, "content": [{k: v for k, v in block.items() if v is not None} for block in entry["content"]]}
        for entry in row["messages"]
    ]


def test_every_row_is_counted_with_file_line_and_reason(folder: Path) -> None:
    lines = [json.dumps(SWIFT), "", "{broken", json.dumps({**SWIFT, "videos": ["b.mp4"]}), json.dumps([1])]
    lines += [json.dumps({"messages": TURNS}), json.dumps(LLAVA), json.dumps({**SWIFT, "id": 5})]
    path = write(folder / "rows.jsonl", "\n".join(lines) + "\n")
    rows, report = load_video_rows(path)
    assert [row["id"] for row in rows] == ["rows.jsonl:1", "5"]
    assert messages_of(rows[0]) == ours({"type": "video", "path": str(folder / "a.mp4")}, text(QUESTION))["messages"]
    assert (report.num_in, report.num_out, report.formats) == (7, 2, {str(path): "ms_swift"})
    found = [(problem.file, problem.line, problem.reason) for problem in report.problems]
    expected = [
        "it is no JSON",
        "b.mp4",
        "expected a JSON object",
        "1 <video> and the row has 0",
        "a row of llava in a",
    ]
    assert [(file, line) for file, line, _ in found] == [(str(path), line) for line in (3, 4, 5, 6, 7)]
    for (_, _, reason), part in zip(found, expected, strict=True):
        assert part in reason
    with pytest.raises(BadRowError, match=r"rows\.jsonl:3: it is no JSON") as caught:
        load_video_rows(path, on_error="raise")
    assert caught.value.problem.line == 3
    unchecked, report = load_video_rows(path, check_media=False)
    assert (len(unchecked), report.num_in, report.num_out) == (3, 7, 3)


def test_lines_of_a_json_list_are_those_of_its_entries(folder: Path) -> None:
    rows = [LLAVA, {**LLAVA, "video": "b.mp4"}, LLAVA, {"video": "a.mp4"}]
    path = write(folder / "rows.json", rows)
    begins = [n for n, line in enumerate(path.read_text().splitlines(), 1) if line == " {"]
    loaded, report = load_video_rows(path)
    assert [row["id"] for row in loaded] == [f"rows.json:{begins[0]}", f"rows.json:{begins[2]}"]
    assert [problem.line for problem in report.problems] == [begins[1], begins[3]]
    cut = write(folder / "cut.json", json.dumps([LLAVA, LLAVA])[:-5])
    loaded, report = load_video_rows(cut)
    assert (len(loaded), report.num_in) == (1, 2) and "no JSON, and what follows" in report.problems[0].reason
    loaded, report = load_video_rows(write(folder / "open.json", json.dumps([LLAVA, LLAVA])[:-1]))
    assert (len(loaded), report.num_in) == (2, 3) and "cut short" in report.problems[0].reason
    loaded, report = load_video_rows(write(folder / "lines.json", "\n".join([json.dumps(SWIFT)] * 3)))
    assert (len(loaded), report.num_in, list(report.formats.values())) == (3, 3, ["sharegpt"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", [], "holds no rows"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", [{"a": 1}], r"no known format .*\['a'\]"),
        ("a.json", "\ufeff{", "it is no JSON"),
        ("a.csv", "a,b", "unknown ending"),
        ("a.yaml", "a: [", "is no yaml"),
        ("a.yaml", "a: 1", "no list `datasets`"),
        ("a.yaml", "datasets: [{json_path: b.json}]", "entry 1: no such file"),
        ("a.yaml", "datasets: [{json_path: ok.json, sampling_strategy: half}]", "expected all, first:N"),
        ("dataset_info.json", {"x": {"file_name": "ok.json"}}, "'alpaca'; only sharegpt"),
        ("a.jsonl", [{**SWIFT, "videos": ["b.mp4"]}], "No row can be used: 1 rows in, 0 rows out"),
    ],
)
def test_files_that_cannot_be_read_at_all(folder: Path, name: str, content: Any, reason: str) -> None:
    write(folder / "ok.json", [LLAVA])
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_video_rows(write(folder / name, content))


def test_wrong_options(folder: Path) -> None:
    path = write(folder / "a.json", [LLAVA])
    with pytest.raises(FileNotFoundError, match="No such data file"):
        load_video_rows(folder / "none.json")
    with pytest.raises(FileNotFoundError, match="media_root"):
        load_video_rows(path, media_root=folder / "none")
    with pytest.raises(ValueError, match="on_error='stop'"):
        load_video_rows(path, on_error="stop")
    with pytest.raises(ValueError, match="'alpaca' is unknown"):
        load_video_rows(path, format="alpaca")
    with pytest.raises(ValueError, match="save_to_disk"):
        load_video_rows(folder)


def test_lists_of_files_choose_rows_and_roots(folder: Path) -> None:
    (folder / "lists").mkdir()
    write(folder / "lists" / "ten.json", [{**LLAVA, "id": n} for n in range(10)])
    listed = """datasets:
- {json_path: ten.json, sampling_strategy: "first:2", data_root: ..}
- {json_path: ten.json, sampling_strategy: "end:20%", data_root: .., video_read_type: decord}
- {json_path: ten.json, sampling_strategy: "random:3", data_folder: ".."}
- {json_path: ten.json, data_folder: none}
"""
    rows, report = load_video_rows(write(folder / "lists" / "all.yaml", listed))
    assert [row["id"] for row in rows][:4] == ["0", "1", "8", "9"]
    drawn = [row["id"] for row in rows][4:]
    assert len(set(drawn)) == 3 and drawn == sorted(drawn)
    assert [row["id"] for row in load_video_rows(folder / "lists" / "all.yaml")[0]][4:] == drawn
    assert (report.num_in, report.num_out, len(report.problems)) == (17, 7, 10)


def test_dataset_info_maps_columns_and_tags(folder: Path) -> None:
    row = {"talk": [{"who": "U", "what": f"<video>{QUESTION}"}], "good": {"who": "A", "what": ANSWER}}
    row |= {"bad": {"who": "A", "what": REFUSED}, "films": ["a.mp4"], "sys": "Be short."}
    write(folder / "rows.json", [row])
    columns = {"messages": "talk", "videos": "films", "chosen": "good", "rejected": "bad", "system": "sys"}
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "ranking": True, "columns": columns, "tags": tags}
    info = write(folder / "dataset_info.json", {"mine": entry})
    for path in (folder / "rows.json", info):
        rows, report = load_video_rows(path)
        assert report.formats == {str(folder / "rows.json"): "sharegpt"}
        assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
        assert rows[0]["rejected"][0]["content"][0]["text"] == REFUSED
        assert rows[0]["prompt"][1]["content"][0]["path"] == str(folder / "a.mp4")


def test_datasets_tables_and_rows_in_memory(folder: Path) -> None:
    picture = Image.new("RGB", (8, 6), (255, 0, 0))
    table = datasets.Dataset.from_list([{"prompt": QUESTION, "completion": ANSWER, "images": [picture]}] * 2)
    for given in (table, table.to_iterable_dataset()):
        rows, report = load_video_rows(given)
        assert (len(rows), report.num_in, rows[1]["id"]) == (2, 2, "dataset:2")
        image = rows[0]["messages"][0]["content"][0]
        assert (image["type"], image["image"].size) == ("image", (8, 6))
    datasets.Dataset.from_list([{"id": "x", **SWIFT}]).to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_list([{"id": "y", **SWIFT}]).save_to_disk(folder / "saved")
    given = [folder / "rows.parquet", folder / "saved", [{"id": "z", **SWIFT}]]
    rows, report = load_video_rows(given, media_root=folder)
    assert [row["id"] for row in rows] == ["x", "y", "z"] and len(report.formats) == 3
    assert messages_of(rows[0]) == messages_of(rows[2])
    own = datasets.Dataset.from_list([ROWS["cut"], ROWS["frames"]])  # of our form, with the Nones of a table
    rows, _ = load_video_rows(own, check_media=False)
    assert messages_of(rows[0])[0]["content"][0]["start"] == 1.0
    assert messages_of(rows[1])[0]["content"][0].keys() == {"type", "video"}


def test_a_stream_counts_what_was_read_once_per_epoch(folder: Path) -> None:
    one = write(folder / "one.jsonl", [SWIFT, {**SWIFT, "videos": ["b.mp4"]}, SWIFT])
    two = write(folder / "two.json", [LLAVA, LLAVA])
    rows, report = load_video_rows([one, two], streaming=True)
    assert isinstance(rows, datasets.IterableDataset) and report.num_in == 0
    next(iter(rows))
    assert (report.num_in, report.num_out) == (1, 1)
    for _ in range(2):
        assert [row["id"] for row in rows] == ["one.jsonl:1", "one.jsonl:3", "two.json:2", "two.json:15"]
        assert (report.num_in, report.num_out, len(report.problems)) == (5, 4, 1)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == ["one.jsonl:1", "one.jsonl:3", "two.json:15", "two.json:2"]
    eager, _ = load_video_rows([one, two])
    assert [messages_of(row) for row in rows] == [messages_of(row) for row in eager]
    bad, _ = load_video_rows(one, streaming=True, on_error="raise")
    with pytest.raises(BadRowError, match=r"one\.jsonl:2"):
        list(bad)


def test_one_answer_and_two_answers_are_not_mixed(folder: Path) -> None:
    pairs = {**SWIFT, "rejected_response": REFUSED}
    rows, report = load_video_rows(write(folder / "a.jsonl", [pairs, SWIFT, pairs]))
    assert len(rows) == 2 and set(rows.column_names) == {"id", "prompt", "chosen", "rejected"}
    assert [(p.line, "other kind" in p.reason) for p in report.problems] == [(2, True)]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_reference_says_reaches_the_trainer(folder: Path, streaming: bool) -> None:
    row = {"prompt": QUESTION, "chosen": ANSWER, "rejected": REFUSED}
    said = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    rows, _ = load_video_rows(write(folder / "a.jsonl", [{**row, **said}, row]), streaming=streaming)
    first, second = rows
    assert said.items() <= first.items() and all(second[name] is None for name in said)
    rows, _ = load_video_rows(write(folder / "b.jsonl", [row]), streaming=streaming)
    assert not said.keys() & next(iter(rows)).keys()


def test_media_that_lie_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows").mkdir()
    path = write(folder / "rows" / "a.json", [LLAVA])
    with pytest.raises(ValueError, match="No row can be used"):
        load_video_rows(path)
    assert load_video_rows(path, media_root=folder)[1].num_out == 1
    monkeypatch.chdir(folder)
    assert load_video_rows(path)[0][0]["messages"][0]["content"][0]["path"] == str(folder / "a.mp4")


SOURCES: dict[str, tuple[Callable[[Path], Any], list[int]]] = {
    # What the row says, and the frames of which some must have been seen.
    "file": (lambda folder: {"videos": ["a.mp4"], "start": 2.0, "end": 3.0}, list(range(16, 24))),
    "end alone": (lambda folder: {"videos": ["a.mp4"], "end": 1.0}, list(range(8))),
    "folder": (lambda folder: {"videos": ["f"], "start": 4.0, "end": 8.0}, [4, 5, 6, 7]),
    "list of pictures": (lambda folder: {"videos": [[f"f/{n}.png" for n in range(6)]]}, list(range(6))),
    "data uri": (
        lambda folder: {
            "videos": ["data:video/mp4;base64," + base64.b64encode((folder / "a.mp4").read_bytes()).decode()],
            "start": 5.0,
        },
        list(range(40, 48)),
    ),
}


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_cuts_and_sources_reach_the_decoder_of_every_model(folder: Path, architecture: str, source: str) -> None:
    make, expected = SOURCES[source]
    path = write(folder / "rows.jsonl", [{"messages": TURNS, **make(folder)}])
    rows, _ = load_video_rows(path)
    processor = KINDS[architecture].processor()
    batch = VideoSFTCollator(processor)([rows[0]])
    assert batch["pixel_values_videos"].numel() > 0
    read = processor.apply_chat_template(
        messages_of(rows[0]),
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_metadata": True, "return_tensors": "pt"},
    )
    seen = set(map(int, read["video_metadata"][0].frames_indices))
    assert seen and seen <= set(expected)
    assert torch.equal(read["pixel_values_videos"].flatten(), batch["pixel_values_videos"].flatten())


@pytest.mark.parametrize("architecture", KINDS)
def test_several_videos_and_images_of_a_row(folder: Path, architecture: str) -> None:
    turns = [{"role": "user", "content": "<image><video>and <video>?"}, TURNS[1]]
    row = {"messages": turns, "videos": ["a.mp4", "f"], "images": ["f/3.png"], "end": [2.0, 4.0]}
    rows, _ = load_video_rows(write(folder / "rows.jsonl", [row]))
    kinds = [block["type"] for block in rows[0]["messages"][0]["content"]]
    assert kinds == ["image", "video", "text", "video", "text"]
    processor = KINDS[architecture].processor()
    batch = VideoSFTCollator(processor)([rows[0]])
    assert "pixel_values" in batch
    assert (batch["input_ids"] == processor.video_token_id).any() and (
        batch["input_ids"] == processor.image_token_id
    ).any()


ST_ALIGN = {
    "video_path": "a.mp4",
    "meta": {
        "width": 64,
        "height": 48,
        "split": [8, 28],
        "spatial_token": {"<bboxes>": {"8": [0, 0, 32, 24], "18": [16, 0, 32, 24]}},
        "time_token": {"<s>": 8, "<e>": 18},
    },
    "conversations": [
        {"from": "human", "value": "<video>\nFrom <s> to <e>, where is it?"},
        {"from": "gpt", "value": "<bboxes>"},
    ],
}


def test_st_align_reaches_llava_st_as_coordinates_and_split(folder: Path) -> None:
    rows, report = load_video_rows(write(folder / "stvg.json", [ST_ALIGN]))
    assert list(report.formats.values()) == ["st_align"]
    processor = KINDS["llava_st"].processor()
    batch = VideoSFTCollator(processor)([rows[0]])
    values = batch["coordinate_values"][0]
    # 8 and 18 of the split [8, 28]; boxes as left, top, right, bottom over 64 x 48 pixels.
    expected = [0.0, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.25, 0.0, 0.75, 0.5]
    assert [round(float(value), 3) for value in values[values > 0]] == [value for value in expected if value > 0]
    read = processor.apply_chat_template(
        messages_of(rows[0]),
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_metadata": True, "return_tensors": "pt"},
    )
    seen = read["video_metadata"][0].frames_indices
    assert (min(seen), max(seen)) == (8, 28)


def test_st_align_for_models_without_coordinates(folder: Path) -> None:
    path = write(folder / "stvg.json", [ST_ALIGN])
    rows, _ = load_video_rows(path)
    with pytest.raises(ValueError, match="split"):
        VideoSFTCollator(KINDS["videochat_flash"].processor())([rows[0]])
    rows, _ = load_video_rows(path, coordinates="numbers")
    video, question = messages_of(rows[0])[0]["content"]
    assert question["text"] == "In the time range {0.000,0.500}, where is it?"
    assert (video["start"], video["end"]) == (1.0, 29 / 8)  # frames 8 to 28 at 8 frames per second
    assert VideoSFTCollator(KINDS["videochat_flash"].processor())([rows[0]])["pixel_values_videos"].numel()
