"""The needle table: what its videos show, that each setting switches its stage, the command."""

import json

import numpy as np
import pytest
import torch

from longvideo.evaluation import needle_table
from longvideo.evaluation.corpus.render import draw_letter
from longvideo.evaluation.needle_table import (
    SETTINGS,
    Found,
    answer_settings,
    evaluate,
    format_table,
    main,
    needle_items,
    render_item,
    stage_fields,
    summarize,
)
from longvideo.modeling.longvu.temporal_reduction import survivors, thin_evenly
from tests.tiny import tiny_videochat_flash_model
from tests.tiny_longvu import tiny_longvu_config, tiny_longvu_model
from tests.tiny_longvu_processor import tiny_longvu_processor

# Frames of 12 or 6 tokens: beside the question about 18 frames fit at the full grid and 37 at the low one.
CONTEXT = 320
NUM_FRAMES = 64


@pytest.fixture(scope="module")
def model():
    return tiny_longvu_model(context_length=CONTEXT, vision_chunk_size=64)


@pytest.fixture(scope="module")
def processor():
    return tiny_longvu_processor()


def found(setting: str, num_frames: int, chosen: int, needle_tokens: int = 12) -> Found:
    return Found(setting, num_frames, 0, 1, chosen, 5, needle_tokens, 20, 4, 100, "mix")


@pytest.mark.parametrize("needle_frames", [1, 3])
def test_a_letter_is_shown_for_the_frames_asked_for(needle_frames) -> None:
    items = needle_items(6, NUM_FRAMES, needle_frames=needle_frames)
    places = set()
    for item in items:
        frames = render_item(item, 28)
        assert frames.shape == (NUM_FRAMES, 28, 28, 3)
        letter = draw_letter(item.questions[0].answer, (28, 28))
        shown = np.nonzero((frames == letter).all((1, 2, 3)))[0]
        assert len(shown) == needle_frames and shown[-1] - shown[0] == needle_frames - 1
        places.add(int(shown[0]))
    assert len(places) > 3 and len({item.questions[0].answer for item in items}) == 6
    assert items == needle_items(6, NUM_FRAMES, needle_frames=needle_frames)


@pytest.mark.parametrize(("threshold", "modes"), [(0.95, ("mix", "mix")), (0.98, ("low", "stc"))])
def test_every_setting_switches_its_stage(model, processor, monkeypatch, threshold, modes) -> None:
    """Few enough kept frames are raised by the question; more than fit at the low grid go through compression."""
    model.config.dino_threshold = threshold
    before = model.config.to_dict()
    reads, read_prompt = [], needle_table.read_prompt
    monkeypatch.setattr(
        needle_table, "read_prompt", lambda model, *args: reads.append(read_prompt(model, *args)) or reads[-1]
    )
    item = needle_items(1, NUM_FRAMES)[0]
    results = answer_settings(model, processor, item)
    assert model.config.to_dict() == before
    assert tuple(x.setting for x in results) == SETTINGS
    none, dino, query, stc = seen = [read.video_selections[0] for read in reads]

    similarity = none.dino_similarity
    assert len(similarity) == NUM_FRAMES
    alive = survivors(similarity, window=16, threshold=threshold).nonzero()[:, 0]
    fields = stage_fields(model.config, CONTEXT - 8 - 225, (28, 28))
    full, low = fields["none"]["max_kept_frames"], fields["+ query"]["max_kept_frames"]
    assert (full, low) == (225 // 12, 225 // 6)
    # The question's own length makes one frame more or less.
    assert abs(len(none.kept_frames) - full) <= 1 and len(alive) > full + 1

    assert torch.equal(none.kept_frames, thin_evenly(NUM_FRAMES, len(none.kept_frames)))
    assert torch.equal(dino.kept_frames, alive[thin_evenly(len(alive), len(none.kept_frames))])
    for selection in (none, dino):
        assert selection.mode == "full" and selection.full_resolution.all() and selection.query_scores is None
    assert torch.equal(query.kept_frames, alive[thin_evenly(len(alive), len(query.kept_frames))])
    assert len(query.kept_frames) == len(alive) or abs(len(query.kept_frames) - low) <= 1
    assert (query.mode, stc.mode) == modes
    assert bool(query.full_resolution.any()) == (query.mode == "mix") and not query.full_resolution.all()
    assert torch.equal(stc.kept_frames, alive)
    if stc.mode == "stc":
        per_frame = torch.bincount(stc.token_frame, minlength=len(alive))
        assert per_frame.max() == 6 and per_frame.min() < 6
    for selection, read, result in zip(seen, reads, results, strict=True):
        assert read.attention_mask.shape[1] <= CONTEXT - 8
        needle = selection.kept_frames[selection.token_frame] == result.needle_frame
        assert result.needle_tokens == int(needle.sum())
        assert (result.mode, result.visual_tokens) == (selection.mode, len(selection.token_frame))


def test_videos_that_fit_at_the_low_grid_only(model, processor) -> None:
    """The original rule leaves them alone where there is a low grid; the settings without one still have to reduce."""
    model.config.dino_threshold = 0.98
    by_setting = {x.setting: x for x in answer_settings(model, processor, needle_items(1, 30)[0])}
    for setting in SETTINGS[:2]:
        assert by_setting[setting].mode == "full" and by_setting[setting].kept_frames < 25
    for setting in SETTINGS[2:]:
        assert by_setting[setting].mode == "mix" and by_setting[setting].kept_frames == 30


def test_summary_and_table() -> None:
    results = [found(setting, 64, i % 2) for setting in SETTINGS for i in range(10)]
    results += [found(setting, 256, 1, needle_tokens=i % 4) for setting in SETTINGS for i in range(4)]
    summary = summarize(results)
    assert list(summary) == list(SETTINGS) and list(summary["none"]) == [64, 256]
    cell = summary["+ query"][64]
    # Tabulated to four digits.
    assert cell["accuracy"] == 0.5 and cell["interval_95"] == pytest.approx([0.2366, 0.7634], abs=6e-5)
    assert summary["DINOv2"][256]["needle_seen"] == 0.75 and cell["modes"] == {"mix": 10}
    lines = format_table(summary).splitlines()
    assert lines[1].split() == ["none", "50.0", "%", "(23.7", "-", "76.3)", "100.0", "%", "(51.0", "-", "100.0)"]
    assert lines[8].split() == ["DINOv2", "100", "%", "20.0", "100.0", "75", "%", "20.0", "100.0"]


def test_command(model, processor, tmp_path, capsys) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "needle.json"
    arguments = ["--model", str(tmp_path / "model"), "--num", "1", "--frames", "48", "32", "--json", str(out)]
    assert main([*arguments, "--context-length", "300"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["settings"]["context_length"] == 300 and len(written["answers"]) == 8
    assert [line.split("  ")[0] for line in printed.splitlines()[1:5]] == list(SETTINGS)
    assert list(written["summary"]["none"]) == ["32", "48"]
    assert main(["--model", str(tmp_path / "absent")]) == 2
    assert "needle_table: error:" in capsys.readouterr().err


def test_what_cannot_be_measured(model, processor) -> None:
    with pytest.raises(ValueError, match="needle of 16 frames does not fit into a video of 16"):
        needle_items(1, 16, needle_frames=16)
    with pytest.raises(ValueError, match="settings are those of LongVU; 'videochat_flash' has no such stages"):
        evaluate(tiny_videochat_flash_model(), processor, 1)
    with pytest.raises(ValueError, match="Videos of 8 frames are shorter than a window of 16"):
        evaluate(model, processor, 1, frames=(8, 64))
    with pytest.raises(ValueError, match="unknown form 'free'"):
        evaluate(model, processor, 1, form="free")
    with pytest.raises(ValueError, match="has one grid"):
        stage_fields(tiny_longvu_config(highres=False), 40, (1, 1))
    with pytest.raises(ValueError, match="leaves 2 beside the question, not enough for one frame"):
        stage_fields(tiny_longvu_config(), 110, (1, 1))
