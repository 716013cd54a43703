"""Rows of the five formats: told apart, read, written and brought back, and refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longvideo.evaluation.corpus.st_align import from_st_align
from longvideo.processing.llava_st.coordinate_text_llava_st import find_coordinates
from longvideo.trainers.data import FORMATS, BadRowError, convert_file, detect_format, read_row, write_row
from longvideo.trainers.data.coordinates import as_numbers
from longvideo.trainers.data.formats import possible_formats
from tests.trainers.data_rows import (
    ANSWER,
    CANNOT,
    QUESTION,
    REFUSED,
    ROWS,
    SPOKEN,
    TURNS,
    VARIANTS,
    VIDEO,
    ours,
    text,
)

PAIRS = [(one, other) for one in FORMATS for other in FORMATS if one != other]


@pytest.mark.parametrize(
    ("name", "row", "expected"), [(n, r, e) for n, _, r, e in VARIANTS], ids=[v[1] for v in VARIANTS]
)
def test_every_variant_is_found_and_read(name: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(row)
    suffix = ".json" if name == "sharegpt" else ".jsonl"
    assert detect_format([row], suffix=suffix) == name
    assert read_row(row, name) == expected
    assert json.dumps(row) == before, "reading changed the row"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_found_and_read_back(name: str) -> None:
    for what, row in ROWS.items():
        reason = CANNOT[name].get(what)
        if reason is not None:
            with pytest.raises(ValueError, match=reason):
                write_row(row, name)
            continue
        written, lost = write_row(row, name)
        assert read_row(json.loads(json.dumps(written)), name) == row, what
        assert lost == [], what
        assert name in possible_formats(written, suffix=FORMATS[name].suffix), what


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[f"{one}-{other}" for one, other in PAIRS])
def test_files_go_from_each_format_to_each_other_and_back(one: str, other: str, tmp_path: Path) -> None:
    """What both formats can express comes back equal; the rest is reported, and the counts add up."""
    first, second, third = (
        tmp_path / f"{number}{FORMATS[name].suffix}" for number, name in enumerate((one, other, one))
    )
    for kind in ("messages", "prompt"):
        rows = {what: row for what, row in ROWS.items() if kind in row and what not in CANNOT[one]}
        shared = [what for what in rows if what not in CANNOT[other]]
        if not rows or not shared:
            assert kind == "prompt" or {one, other} & {"st_align"}
            continue
        write_file(first, [write_row(row, one)[0] for row in rows.values()])
        report = convert_file(first, second, to=other, format=one)
        assert report.num_in == len(rows) == report.num_out + len(report.problems)
        assert len(report.problems) == len(rows) - len(shared)
        back = convert_file(second, third, to=one, format=other)
        assert (back.num_in, back.problems) == (report.num_out, [])
        expected = [write_row(rows[what], one)[0] for what in shared]
        assert read_file(third) == expected


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")


def read_file(path: Path) -> list[dict[str, Any]]:
    words = path.read_text(encoding="utf-8")
    return json.loads(words) if path.suffix == ".json" else [json.loads(line) for line in words.splitlines()]


def test_st_align_says_what_the_benchmark_reader_says() -> None:
    entry = next(row for name, _, row, _ in VARIANTS if name == "st_align")
    theirs = from_st_align(entry, "stvg", num_frames=100)
    mine = read_row(entry, "st_align")["messages"]
    assert [message["content"][-1] for message in mine] == [m["content"][-1] for m in theirs["messages"]]
    assert len(find_coordinates(mine[1]["content"][0]["text"])) == 2 + 2 * 5


def test_tubes_are_taught_at_the_frames_that_are_looked_at() -> None:
    """A split of 991 frames is seen at every tenth: frame 25 has a box that is never taught."""
    entry = next(row for name, _, row, _ in VARIANTS if name == "st_align")
    boxes = {"20": [0, 0, 64, 48], "25": [0, 0, 64, 48], "990": [0, 0, 64, 48]}
    meta = {**entry["meta"], "split": [0, 990], "spatial_token": {"<bboxes>": boxes, "<region>": [0, 0, 9, 9]}}
    answer = read_row({**entry, "meta": meta}, "st_align")["messages"][1]["content"][0]["text"]
    assert [part.split(">")[0] for part in answer.split("TEMP-OUTPUT")[3:]] == ["0.020", "1.000"]
    meta["spatial_token"]["<bboxes>"] = {"25": [0, 0, 64, 48]}
    with pytest.raises(ValueError, match="no box of its tube lies at one of the 100 sampled frames"):
        read_row({**entry, "meta": meta}, "st_align")


def test_boxes_in_pixels_need_the_size_of_their_picture(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}],
        "images": ["a.png"],
        "objects": {"ref": [], "bbox": [[20, 50, 100, 100]]},
    }
    answer = read_row(row, "ms_swift", settings={"root": lambda path: str(tmp_path / path)})["messages"][1]
    values = [entry.value for entry in find_coordinates(answer["content"][0]["text"])]
    assert values == [0.1, 0.5, 0.5, 1.0]  # 20 / 200, 50 / 100, 100 / 200, 100 / 100
    with pytest.raises(ValueError, match="the medium cannot be read"):
        read_row(row, "ms_swift")


def test_values_with_more_digits_keep_them() -> None:
    row = {"video": "a.mp4", "conversations": [{"from": "human", "value": "At <t0.123456>?"}, SPOKEN[1]]}
    assert write_row(ours(text("At <TEMP-INPUT0.123456>?")), "llava")[0]["variables"]["temporal_input_locations"] == [
        0.123456
    ]
    row["conversations"][0]["value"] = "At <TEMP-INPUT>?"
    row["variables"] = {"temporal_input_locations": [0.123456]}
    assert "<TEMP-INPUT0.123456>" in str(read_row(row, "llava"))


def test_plain_fractions_for_models_without_coordinates() -> None:
    words = "During {<TEMP-INPUT0.200>,<TEMP-INPUT0.4>} at [<WIDTH-OUTPUT0.100><HEIGHT-OUTPUT1>]"
    assert as_numbers(words) == "During {0.200,0.4} at [0.100, 1]"


@pytest.mark.parametrize("words", ["<h1>Title</h1>", "</h1><h2>Part</h2>", "List<t1> of <w2>, at <t0.4>"])
def test_short_forms_in_rows_are_text(words: str) -> None:
    """They are for questions that people type; in rows they would eat what looks like them."""
    assert as_numbers(words) == words
    row = ours(VIDEO, text(words), answer=words)
    for name in ("llava", "trl", "ms_swift", "sharegpt"):
        written, _ = write_row(row, name)
        assert read_row(written, name, suffix=".json" if name == "sharegpt" else "") == row, name
    marked = ours(VIDEO, text(f"{words} <TEMP-INPUT0.500>"))
    written, _ = write_row(marked, "llava")
    assert written["variables"]["temporal_input_locations"] == [0.5] and read_row(written, "llava") == marked


FILM = {"videos": ["a.mp4"]}
SPOKEN_ROW = {"video": "a.mp4", "conversations": SPOKEN}
WRONG: list[tuple[str, Any, str]] = [
    ("llava", [1], "expected a JSON object"),
    ("llava", {"a": 1}, r"looks like no known format \(its keys: \['a'\]\)"),
    ("llava", {"messages": TURNS, "label": True}, "a row of ms_swift in a file of llava"),
    ("sharegpt", {"messages": TURNS, "rejected_response": "x"}, "a row of ms_swift in a file of sharegpt"),
    ("trl", {"video": "a.mp4", "conversations": SPOKEN}, "a row of llava in a file of trl"),
    ("llava", {"video": "a.mp4", "conversations": []}, "no `conversations`"),
    ("llava", {"video": "a.mp4", "conversations": [{"from": "human"}]}, r"conversations\[0\] is"),
    ("llava", {"video": ["a.mp4", "b.mp4"], "conversations": SPOKEN}, "texts have 1 <video> and the row has 2 videos"),
    ("llava", {"image": "a.png", "conversations": SPOKEN}, "texts have 1 <video> and the row has 0 videos"),
    ("llava", {"video": {"a": 1}, "conversations": SPOKEN}, "unknown keys"),
    ("llava", {"video": "a.mp4", "start": 3, "end": 2, "conversations": SPOKEN}, "from 3 s to 2.0 s"),
    ("llava", {"video": "a.mp4", "start": "1", "conversations": SPOKEN}, "no number of seconds"),
    ("llava", {"video": "a.mp4", "conversations": SPOKEN[:1]}, "no answer"),
    ("llava", {"video": "a.mp4", "conversations": [{"from": "robot", "value": "x"}, *SPOKEN]}, "'robot' is unknown"),
    ("llava", {**SPOKEN_ROW, "variables": {"temporal_input_locations": [0.1]}}, "left over"),
    ("st_align", {"video_path": "a.mp4", "meta": {}, "conversations": SPOKEN}, "no meta.split"),
    ("st_align", {"video_path": 3, "meta": {"split": [0, 9]}, "conversations": SPOKEN}, "a video is 3"),
    ("trl", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "has no source"),
    ("trl", {"messages": [{"role": "user", "content": [{"type": "sound", "path": "a"}]}]}, "expected the type"),
    ("trl", {"messages": [{"role": "user", "content": [{"type": "video", "path": "a", "foo": 1}]}]}, "unknown keys"),
    ("trl", {"messages": [{"role": "user", "content": [{"type": "video", "path": "a", "url": "b"}]}]}, "several"),
    ("trl", {"chosen": [TURNS[1]], "rejected": [TURNS[1]]}, "no messages|is empty"),
    ("trl", {"prompt": QUESTION, "chosen": "", "rejected": ANSWER}, "is empty"),
    ("ms_swift", {"messages": TURNS, **FILM, "label": False}, "judged bad"),
    ("trl", {"prompt": QUESTION, "completion": ANSWER, "label": False}, "judged bad"),
    ("trl", {"prompt": QUESTION, "completion": ANSWER, "label": 3}, "classification"),
    ("trl", {"messages": [TURNS[1], *TURNS], **FILM}, "begins with what the assistant says"),
    ("trl", {"prompt": TURNS, "chosen": ANSWER, "rejected": REFUSED, **FILM}, "prompt ends with what the assistant"),
    ("trl", {"messages": [{"role": "user", "content": [{**VIDEO, "fps": 1, "nframes": 4}]}]}, "both fps and nframes"),
    ("llava", {"video": "a.mp4", "conversations": [{"from": "gpt", "value": "Hi"}, *SPOKEN]}, "begins with what"),
    ("sharegpt", {"conversations": SPOKEN, **FILM, "chosen": SPOKEN[1], "rejected": SPOKEN[1]}, "prompt ends with"),
    ("ms_swift", {"messages": [TURNS[0], {**TURNS[1], "loss": False}], **FILM}, "loss false"),
    ("ms_swift", {"messages": [{"role": "system", "content": "A"}, *TURNS], **FILM, "system": "B"}, "another system"),
    ("ms_swift", {"messages": TURNS, **FILM, "audios": ["a.wav"]}, "`audios`"),
    ("ms_swift", {"messages": TURNS, **FILM, "rejected_messages": TURNS, "rejected_videos": ["b.mp4"]}, "differ"),
    ("ms_swift", {"messages": TURNS, **FILM, "objects": {"bbox": [[0, 0, 1, 1]]}}, "0 <bbox> and objects has 1"),
    ("sharegpt", {"conversations": SPOKEN[:1], **FILM, "chosen": SPOKEN[1]}, "one of chosen and rejected"),
    ("sharegpt", {"messages": TURNS, **FILM, "kto_tag": False}, "judged bad"),
    ("sharegpt", {"conversations": [{"from": "human", "value": QUESTION}, SPOKEN[1]], **FILM}, "0 <video>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), WRONG, ids=[reason for _, _, reason in WRONG])
def test_rows_that_cannot_be_used_say_why(name: str, row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_row(row, name)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("ms_swift", {"messages": TURNS, **FILM}),
        ("ms_swift", {"messages": TURNS, **FILM, "rejected_messages": [TURNS[0], {**TURNS[1], "content": REFUSED}]}),
        ("trl", {"messages": TURNS, **FILM}),
        ("trl", {"prompt": QUESTION, "completion": ANSWER}),
        ("trl", {"prompt": QUESTION, "chosen": ANSWER, "rejected": REFUSED, **FILM}),
        ("sharegpt", {"messages": TURNS, **FILM}),
        ("llava", SPOKEN_ROW),
    ],
)
def test_the_column_system_is_the_first_message(name: str, row: dict[str, Any]) -> None:
    plain, read = read_row(row, name), read_row({**row, "system": "Be short."}, name)
    kind = "messages" if "messages" in plain else "prompt"
    system = {"role": "system", "content": [text("Be short.")]}
    assert read == {**plain, kind: [system, *plain[kind]]}


def test_two_answers_alike_share_their_question() -> None:
    both = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    read = read_row({"chosen": both, "rejected": both}, "trl")
    answer = [{"role": "assistant", "content": [text(ANSWER)]}]
    assert (read["prompt"][0]["role"], read["chosen"], read["rejected"]) == ("user", answer, answer)


def test_what_the_reference_says_is_kept() -> None:
    said = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    row = read_row({"prompt": QUESTION, "chosen": ANSWER, "rejected": REFUSED, **said}, "trl")
    assert said.items() <= row.items() and said.items() <= write_row(row, "trl")[0].items()
    assert write_row(row, "ms_swift")[1] == ["column 'ref_chosen_logps'", "column 'ref_rejected_logps'"]


def test_tubes_of_a_model_that_looks_at_other_frames() -> None:
    """20 frames of a split of 201 are none of the 100 that the release looks at, but for the first and the last."""
    entry = next(row for name, _, row, _ in VARIANTS if name == "st_align")
    frames = [round(at / 19 * 200) for at in range(20)]
    boxes = {str(frame): [0, 0, 64, 48] for frame in frames}
    meta = {**entry["meta"], "split": [0, 200], "spatial_token": {"<bboxes>": boxes, "<region>": [0, 0, 9, 9]}}

    def boxes_of(meta: dict[str, Any], **settings: Any) -> int:
        answer = read_row({**entry, "meta": meta}, "st_align", settings=settings)["messages"][1]
        return answer["content"][0]["text"].count("<WIDTH-OUTPUT") // 2

    lost: list[str] = []
    assert boxes_of(meta, lost=lost.extend) < 20 and "the 100 frames" in lost[0]
    lost.clear()
    assert boxes_of(meta, num_frames=20, lost=lost.extend) == boxes_of({**meta, "num_frames": 20}) == 20
    assert lost == []


def test_what_a_conversion_leaves_out_is_named(tmp_path: Path) -> None:
    rows = [
        {"messages": ours({"type": "video", "path": "a.mp4", "fps": 2}, text(QUESTION))["messages"], "source": "web"},
        {"messages": ours({"type": "video", "path": "a.mp4", "start": 1}, text(QUESTION))["messages"]},
    ]
    write_file(tmp_path / "a.jsonl", rows)
    report = convert_file(tmp_path / "a.jsonl", tmp_path / "b.jsonl", to="ms-swift")
    assert report.lost == {"fps of a video": 1, "column 'source'": 1}
    assert [(problem.line, "no place for the cut" in problem.reason) for problem in report.problems] == [(2, True)]
    assert (report.num_in, report.num_out) == (2, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jsonl", "b.jsonl"]


def test_a_conversion_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a.jsonl", [{"messages": TURNS, "videos": ["a.mp4"]}, {"messages": 3}])
    target = tmp_path / "b.json"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(BadRowError, match=r"a\.jsonl:2: "):
        convert_file(tmp_path / "a.jsonl", target, to="llava", on_error="raise")
    with pytest.raises(ValueError, match="No row could be written as st_align"):
        convert_file(tmp_path / "a.jsonl", target, to="st_align")
    with pytest.raises(ValueError, match="over itself"):
        convert_file(tmp_path / "a.jsonl", tmp_path / "a.jsonl", to="llava")
    with pytest.raises(ValueError, match="'csv' is unknown"):
        convert_file(tmp_path / "a.jsonl", target, to="csv")
    assert target.read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_paths_follow_the_file_into_another_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    rows = [
        {"video": "v/a.mp4", "conversations": SPOKEN},
        {"video": "/data/a.mp4", "conversations": SPOKEN},
        {"video": "https://example.org/a.mp4", "conversations": SPOKEN},
    ]
    write_file(tmp_path / "in" / "a.json", rows)
    convert_file(tmp_path / "in" / "a.json", tmp_path / "out" / "b.jsonl", to="ms_swift")
    videos = [row["videos"][0] for row in read_file(tmp_path / "out" / "b.jsonl")]
    assert videos == ["../in/v/a.mp4", "/data/a.mp4", "https://example.org/a.mp4"]
