"""Rows of the five formats for the tests of `trainers/data`, and the same rows in our form."""

from typing import Any

QUESTION, ANSWER, REFUSED = "What is that?", "A cat.", "A dog."


def text(words: str) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": words}


def ours(*content: dict[str, Any], answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    """A row in our form with one question and one answer."""
    user = {"role": "user", "content": [*content]}
    return {**more, "messages": [user, {"role": "assistant", "content": [text(answer)]}]}


def pair(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row in our form with a chosen and a rejected answer."""
    return {
        **more,
        "prompt": [{"role": "user", "content": [*content]}],
        "chosen": [{"role": "assistant", "content": [text(ANSWER)]}],
        "rejected": [{"role": "assistant", "content": [text(REFUSED)]}],
    }


VIDEO = {"type": "video", "path": "a.mp4"}
IMAGE = {"type": "image", "path": "a.png"}
FRAMES = {"type": "video", "video": ["f/0.png", "f/1.png"]}
CUT = {**VIDEO, "start": 1.0, "end": 2.5}
SPLIT = {**VIDEO, "split": [4, 54]}

# Ours, by what is special about them.
ROWS: dict[str, dict[str, Any]] = {
    "video": ours(VIDEO, text(QUESTION), id="7"),
    "address": ours({"type": "video", "url": "https://example.org/a.mp4"}, text(QUESTION)),
    "data uri": ours({"type": "image", "url": "data:image/png;base64,AAAA"}, text(QUESTION)),
    "frames": ours(FRAMES, text(QUESTION)),
    "unmarked frames": ours({"type": "video", "video": ["f/0", "f/1"]}, text(QUESTION)),
    "videos": ours(VIDEO, {"type": "video", "path": "b.mp4"}, FRAMES, text("Which is longer?")),
    "inside": ours(text("Is the first, "), VIDEO, text(", like "), IMAGE, IMAGE, text("\nor not?")),
    "leading breaks": ours(VIDEO, IMAGE, text("\n\nand?")),
    "media alone": ours(VIDEO),
    "text": ours(text(QUESTION)),
    "turns": {
        "messages": [
            {"role": "system", "content": [text("Be short.")]},
            {"role": "user", "content": [VIDEO, text("One?")]},
            {"role": "assistant", "content": [text("Yes.")]},
            {"role": "user", "content": [text("Two?")]},
            {"role": "assistant", "content": [text("No.\nNever.")]},
        ]
    },
    "cut": ours(CUT, text(QUESTION)),
    "cut start": ours({**VIDEO, "start": 1.5}, text(QUESTION)),
    "cuts": ours(CUT, {**VIDEO, "start": 4.0}, text(QUESTION)),
    "split": ours(SPLIT, text(QUESTION)),
    "times": ours(
        SPLIT,
        text("In the time range {<TEMP-INPUT0.200>,<TEMP-INPUT0.400>}, what happens?"),
        answer="It ends in <TEMP-OUTPUT0.600>.",
    ),
    "tube": ours(
        SPLIT,
        text("Where is [<WIDTH-INPUT0.100>,<HEIGHT-INPUT0.200>,<WIDTH-INPUT0.300>,<HEIGHT-INPUT0.400>]?"),
        answer="During the span of {<TEMP-OUTPUT0.000><TEMP-OUTPUT0.020>}: <TEMP-OUTPUT0.000>:"
        "[<WIDTH-OUTPUT0.000><HEIGHT-OUTPUT0.000><WIDTH-OUTPUT0.500><HEIGHT-OUTPUT1.000>] <TEMP-OUTPUT0.020>:"
        "[<WIDTH-OUTPUT0.100><HEIGHT-OUTPUT0.250><WIDTH-OUTPUT0.500><HEIGHT-OUTPUT1.000>]",
        meta={"width": 640, "height": 480},
    ),
    "pair": pair(VIDEO, text(QUESTION), id="p"),
    "text pair": pair(text(QUESTION)),
    "frames pair": pair(FRAMES, IMAGE, text(QUESTION)),
}
# Why a format cannot hold a row; all others come back as they were.
NO_CUT = "no place for the cut"
CANNOT: dict[str, dict[str, str]] = {
    "llava": {
        **dict.fromkeys(["pair", "text pair", "frames pair"], "no place for a refused answer"),
        "cuts": "several videos have a cut",
    },
    "st_align": {
        **dict.fromkeys(["pair", "text pair", "frames pair"], "no place for a refused answer"),
        **dict.fromkeys(
            ["data uri", "frames", "unmarked frames", "videos", "inside", "leading breaks", "text", "cuts"],
            "one video file",
        ),
        **dict.fromkeys(["video", "address", "media alone", "turns"], "needs the first and last frame"),
        **dict.fromkeys(["cut", "cut start"], "cut in seconds"),
    },
    "trl": {},
    "ms_swift": dict.fromkeys(["cut", "cut start", "cuts", "split", "times", "tube"], NO_CUT),
    "sharegpt": dict.fromkeys(["cut", "cut start", "cuts", "split", "times", "tube"], NO_CUT),
}

TAGGED = f"<video>{QUESTION}"
TURNS = [{"role": "user", "content": TAGGED}, {"role": "assistant", "content": ANSWER}]
SPOKEN = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
# Rows as the formats have them: format, what is special, the row, and the same in our form.
VARIANTS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llava", "video", {"id": 7, "video": "a.mp4", "conversations": SPOKEN}, ROWS["video"]),
    (
        "llava",
        "image tag for a video",
        {"video": "a.mp4", "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, SPOKEN[1]]},
        ours(VIDEO, text(QUESTION)),
    ),
    (
        "llava",
        "no tag",
        {"video": "a.mp4", "conversations": [{"from": "human", "value": QUESTION}, SPOKEN[1]]},
        ours(VIDEO, text(QUESTION)),
    ),
    ("llava", "frames", {"video": ["f/0.png", "f/1.png"], "conversations": SPOKEN}, ROWS["frames"]),
    ("llava", "cut", {"video": "a.mp4", "start": 1, "end": 2.5, "conversations": SPOKEN}, ROWS["cut"]),
    (
        "llava",
        "variables",
        {
            "video": "a.mp4",
            "meta": {"split": [4, 54]},
            "conversations": [
                {"from": "human", "value": "<video>\nIn the time range {<TEMP-INPUT>,<TEMP-INPUT>}, what happens?"},
                {"from": "gpt", "value": "It ends in <TEMP-OUTPUT>."},
            ],
            "variables": {
                "temporal_input_locations": [0.2, 0.4],
                "temporal_output_locations": [0.6],
                "spatial_height_input_locations": [],
            },
        },
        ROWS["times"],
    ),
    (
        "st_align",
        "names",
        {
            "video_path": "a.mp4",
            "meta": {
                "width": 640,
                "height": 480,
                "split": [4, 54],
                "spatial_token": {
                    "<region>": [64, 96, 128, 96],
                    "<bboxes>": {"4": [0, -3, 320, 500], "5": [64, 120, 256, 360], "90": [0, 0, 1, 1]},
                },
                "time_token": {"<s>": 4, "<e>": 5},
            },
            "conversations": [
                {"from": "human", "value": "<video>\nWhere is <region>?"},
                {"from": "gpt", "value": "From <s> to <e>: <bboxes>"},
            ],
        },
        ROWS["tube"],
    ),
    ("trl", "columns", {"messages": [{"role": "user", "content": QUESTION}, TURNS[1]], "videos": ["a.mp4"]}, None),
    ("trl", "prompt and completion", {"prompt": QUESTION, "completion": ANSWER, "image": "a.png"}, None),
    (
        "trl",
        "conversational pair",
        {
            "prompt": [{"role": "user", "content": [{"type": "video"}, text(QUESTION)]}],
            "chosen": [TURNS[1]],
            "rejected": [{"role": "assistant", "content": REFUSED}],
            "videos": ["a.mp4"],
        },
        pair(VIDEO, text(QUESTION)),
    ),
    ("trl", "text pair", {"prompt": QUESTION, "chosen": ANSWER, "rejected": REFUSED}, ROWS["text pair"]),
    (
        "trl",
        "implicit prompt",
        {
            "chosen": [{"role": "user", "content": QUESTION}, TURNS[1]],
            "rejected": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REFUSED}],
            "video": "a.mp4",
        },
        pair(VIDEO, text(QUESTION)),
    ),
    ("ms_swift", "video alias", {"messages": TURNS, "video": "a.mp4"}, ours(VIDEO, text(QUESTION))),
    ("ms_swift", "frames", {"messages": TURNS, "videos": [["f/0.png", "f/1.png"]]}, ROWS["frames"]),
    (
        "ms_swift",
        "rejected response",
        {"id": "p", "messages": TURNS, "videos": ["a.mp4"], "rejected_response": REFUSED},
        ROWS["pair"],
    ),
    (
        "ms_swift",
        "rejected messages",
        {
            "id": "p",
            "messages": TURNS,
            "videos": ["a.mp4"],
            "rejected_messages": [TURNS[0], {"role": "assistant", "content": REFUSED}],
            "rejected_videos": ["a.mp4"],
        },
        ROWS["pair"],
    ),
    ("ms_swift", "good label", {"messages": TURNS, "videos": ["a.mp4"], "label": True}, ours(VIDEO, text(QUESTION))),
    (
        "ms_swift",
        "objects",
        {
            "messages": [
                {"role": "user", "content": "<image>Find the <ref-object>."},
                {"role": "assistant", "content": "<bbox> or <bbox>"},
            ],
            "images": ["a.png"],
            "objects": {"ref": ["cat"], "bbox": [[0.1, 0.2, 0.5, 1], [0.25, 0.5]], "bbox_type": "norm1"},
        },
        ours(
            IMAGE,
            text("Find the cat."),
            answer="[<WIDTH-OUTPUT0.100><HEIGHT-OUTPUT0.200><WIDTH-OUTPUT0.500><HEIGHT-OUTPUT1.000>] or "
            "[<WIDTH-OUTPUT0.250><HEIGHT-OUTPUT0.500>]",
        ),
    ),
    ("sharegpt", "messages", {"id": "7", "messages": TURNS, "videos": ["a.mp4"]}, ROWS["video"]),
    (
        "sharegpt",
        "conversations",
        {"system": "Be short.", "conversations": SPOKEN, "videos": ["a.mp4"]},
        {"messages": [{"role": "system", "content": [text("Be short.")]}, *ours(VIDEO, text(QUESTION))["messages"]]},
    ),
    (
        "sharegpt",
        "ranking",
        {
            "id": "p",
            "conversations": SPOKEN[:1],
            "chosen": {"from": "gpt", "value": ANSWER},
            "rejected": {"from": "gpt", "value": REFUSED},
            "videos": ["a.mp4"],
        },
        ROWS["pair"],
    ),
]
_COLUMNS = ours(VIDEO, text(QUESTION)), ours(IMAGE, text(QUESTION))
VARIANTS = [
    (name, what, row, expected or _COLUMNS[what == "prompt and completion"]) for name, what, row, expected in VARIANTS
]
