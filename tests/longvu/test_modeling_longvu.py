"""LongVU as users meet it: batches, chunks, streams, caches, images, features encoded once, budgets, refusals."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
)

from longvideo.modeling.layers.feature_files import video_source_key
from longvideo.modeling.longvu.configuration_longvu import ORIGINAL_BEHAVIOURS, LongVUConfig
from longvideo.modeling.longvu.encoded_video_longvu import LongVUEncodedVideo
from longvideo.modeling.longvu.modeling_longvu import LongVUForConditionalGeneration, LongVUModel
from longvideo.modeling.longvu.vision_longvu import LongVUDinov2Embeddings
from tests.tiny_longvu import tiny_longvu_config, tiny_longvu_model

IMAGE, VIDEO = 3, 4
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_longvu_model()


def frames(num_frames: int, seed: int = 0, alike: float = 0.0) -> torch.Tensor:
    """Noise frames; `alike` from 0 (all different) to 1 (all the same)."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, 3, 28, 28, generator=generator)
    return alike * still + (1 - alike) * torch.randn(num_frames, 3, 28, 28, generator=generator)


def video(num_frames: int, size: tuple[int, int] = (1, 1), **kwargs) -> dict:
    pixels = frames(num_frames, **kwargs)
    return {
        "pixel_values_videos": pixels,
        "pixel_values_videos_dino": pixels.flip(-1),
        "video_num_frames": torch.tensor([num_frames]),
        "video_sizes": torch.tensor([size]),
    }


def image(size: tuple[int, int] = (1, 1), seed: int = 0) -> dict:
    pixels = frames(1, seed=seed)
    return {"pixel_values": pixels, "pixel_values_dino": pixels.flip(-1), "image_sizes": torch.tensor([size])}


def prompt(length: int = 16, at: int | None = 4, token: int = VIDEO, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(10, 250, (1, length), generator=torch.Generator().manual_seed(seed))
    if at is not None:
        ids[0, at] = token
    return ids


def pad_rows(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        here = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[i, here], mask[i, here] = row[0], 1
    return ids, mask


def merge(*parts: dict) -> dict:
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


# ---------------------------------------------------------------- which frames and grids


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_frames", "options", "mode", "tokens_per_frame"),
    [
        (1, {}, "full", [12]),
        (8, {}, "full", [12]),
        (10, {}, "mix", None),
        (16, {}, "low", [6]),
        (30, {"dino_threshold": 2.0}, "stc", None),
        (30, {"dino_threshold": 2.0, "highres": False}, "stc", None),
        (1, {"highres": False}, "full", [12]),
    ],
)
def test_mode_follows_the_room_beside_the_text(num_frames, options, mode, tokens_per_frame):
    # 120 positions, 15 for the text and 8 for new tokens: 97 for the video, 8 full or 16 low frames.
    model = tiny_longvu_model(**options)
    output = model(input_ids=prompt(), **video(num_frames))
    selection = output.video_selections[0]
    assert selection.mode == mode
    assert len(selection.kept_frames) == num_frames
    assert output.logits.shape[1] == 15 + len(selection.token_frame) <= 120 - 8
    counts = selection.token_frame.bincount(minlength=num_frames).tolist()
    if tokens_per_frame is not None:
        assert set(counts) == set(tokens_per_frame)
    if mode == "mix":
        assert [{True: 12, False: 6}[x] for x in selection.full_resolution.tolist()] == counts
        # (97 - 10 * 6) // (12 - 6)
        assert int(selection.full_resolution.sum()) == 6
        assert set(selection.query_scores.topk(6).indices.tolist()) == set(
            selection.full_resolution.nonzero()[:, 0].tolist()
        )
    assert (selection.token_grid_index == -1).any()
    assert selection.token_is_full.tolist() == selection.full_resolution[selection.token_frame].tolist()


@torch.no_grad()
@pytest.mark.parametrize("rule", ["original", "paper"])
@pytest.mark.parametrize("alike", [1.0, 0.0])
def test_frames_all_the_same_or_all_different(rule, alike):
    model = tiny_longvu_model(temporal_reduction=rule)
    for num_frames in (1, 7, 40):
        selection = model(input_ids=prompt(), **video(num_frames, alike=alike)).video_selections[0]
        reduces = rule == "paper" or num_frames > 16
        if alike == 1.0 and reduces:
            window = {"original": 16, "paper": 8}[rule]
            assert len(selection.kept_frames) == -(-num_frames // window)
        elif not reduces:
            assert len(selection.kept_frames) == num_frames
        assert 1 <= len(selection.kept_frames) <= num_frames
        assert selection.dino_similarity.shape == (num_frames,)


@torch.no_grad()
def test_the_question_chooses_the_frames(model):
    # The frames with the highest mean dot product of low-grid tokens and question embeddings.
    ids, pixels = prompt(), video(10)
    output = model(input_ids=ids, **pixels)
    visual = model.get_video_features(**pixels).visuals[0]
    low = model.model._renderer().tokens(visual, full=False)
    question = model.get_input_embeddings()(ids[0, 5:])
    scores = torch.einsum("fvd,ld->f", low, question) / (low.shape[1] * len(question))
    # Sums of a few hundred products in another order.
    torch.testing.assert_close(output.video_selections[0].query_scores, scores, atol=1e-4, rtol=1e-4)
    others = [model(input_ids=torch.cat([ids[:, :5], prompt(11, None, seed=s)], 1), **pixels) for s in (1, 2, 3)]
    chosen = {tuple(o.video_selections[0].full_resolution.tolist()) for o in (output, *others)}
    assert len(chosen) > 1


@torch.no_grad()
@pytest.mark.parametrize(("size", "tokens"), [((16, 9), 4), ((9, 16), 6), ((4, 3), 12), ((100, 1), 4)])
def test_landscape_and_portrait_frames_lose_their_padding(model, size, tokens):
    few = model(input_ids=prompt(), **video(2, size)).video_selections[0]
    assert few.token_frame.bincount().tolist() == [tokens] * 2
    # A low grid that would not be smaller than the full one is not taken.
    many = model(input_ids=prompt(), **video(60, size)).video_selections[0]
    assert int(many.token_frame.bincount().max()) <= tokens
    assert many.full_resolution.any() == (tokens <= 6)


@torch.no_grad()
def test_frame_positions_change_the_tokens_of_later_frames():
    pixels = video(3)
    plain = tiny_longvu_model().get_video_features(**pixels).pooler_output[0].unflatten(0, (3, 12))
    for rule in ("original", "paper"):
        moved = tiny_longvu_model(frame_pos=True, frame_pos_rule=rule).get_video_features(**pixels).pooler_output[0]
        shift = moved.unflatten(0, (3, 12)) - plain
        assert not torch.equal(shift[0], shift[1])
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=0)  # sums in fp32


# ---------------------------------------------------------------- towers


@torch.no_grad()
def test_siglip_features_are_those_before_the_last_norm(model):
    pixels = frames(2)
    tower = model.model.vision_tower
    assert isinstance(tower.post_layernorm, torch.nn.Identity)
    assert not hasattr(tower, "head")
    hidden = tower(pixels, output_hidden_states=True)
    assert torch.equal(hidden.hidden_states[-1], hidden.last_hidden_state)


@torch.no_grad()
def test_position_table_of_dinov2_is_resized_by_factor_or_to_size():
    by_factor, to_size = tiny_longvu_model(), tiny_longvu_model(dino_position_interpolation="size")
    embeddings = by_factor.model.dino_tower.embeddings
    assert type(embeddings) is LongVUDinov2Embeddings
    assert type(to_size.model.dino_tower.embeddings) is not LongVUDinov2Embeddings
    to_size.load_state_dict(by_factor.state_dict())
    tokens = torch.zeros(1, 50, 32)
    ours = embeddings.interpolate_pos_encoding(tokens, 28, 28)
    theirs = to_size.model.dino_tower.embeddings.interpolate_pos_encoding(tokens, 28, 28)
    table = embeddings.position_embeddings[:, 1:].view(1, 10, 10, 32).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(table, scale_factor=7.1 / 10, mode="bicubic")
    assert torch.equal(ours[:, 1:], wanted.flatten(2).transpose(1, 2))
    assert (ours - theirs).abs().max() > 0.01
    # The table's own size is taken as it is.
    assert embeddings.interpolate_pos_encoding(torch.zeros(1, 101, 32), 40, 40) is embeddings.position_embeddings


@torch.no_grad()
def test_chunked_equals_unchunked(model):
    pixels = {**video(30, (16, 9)), "video_num_frames": torch.tensor([19, 11]), "video_sizes": None}
    outputs = []
    for chunk_size in (1, 3, 5, 64):
        model.config.vision_chunk_size = chunk_size
        outputs.append(model.get_video_features(**pixels))
    model.config.vision_chunk_size = 4
    for other in outputs[1:]:
        for ours, theirs in zip(outputs[0].visuals, other.visuals, strict=True):
            assert torch.equal(ours.kept_frames, theirs.kept_frames)
            # Batched products round differently.
            torch.testing.assert_close(ours.features, theirs.features, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dinov2_sees_all_frames_and_siglip_kept_ones(monkeypatch):
    seen = {}
    for cap, expected in ((400, None), (5, 5)):
        model = tiny_longvu_model(max_kept_frames=cap)
        seen.update({"vision_tower": 0, "dino_tower": 0})
        for name in list(seen):
            tower = getattr(model.model, name)
            forward = tower.forward

            def count(pixels, *args, name=name, forward=forward, **kwargs):
                seen[name] += len(pixels)
                return forward(pixels, *args, **kwargs)

            monkeypatch.setattr(tower, "forward", count)
        selection = model(input_ids=prompt(), **video(60)).video_selections[0]
        assert seen["vision_tower"] == len(selection.kept_frames)
        # Past the cap the few that stay are encoded again instead of keeping what all of them gave.
        assert seen["dino_tower"] == (60 if expected is None else 60 + expected)
        if expected is not None:
            assert len(selection.kept_frames) == expected


@torch.no_grad()
def test_flat_and_stacked_frames_give_the_same_features(model):
    pixels = {name: x for name, x in video(6).items() if name.startswith("pixel")}
    stacked = {name: x.unflatten(0, (2, 3)) for name, x in pixels.items()}
    flat = model.get_video_features(**pixels, video_num_frames=torch.tensor([3, 3])).pooler_output
    assert all(map(torch.equal, flat, model.get_video_features(**stacked).pooler_output))


# ---------------------------------------------------------------- batches


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_left_padded_batch_of_videos_images_and_text_equals_singles(model, options):
    rows = [
        (prompt(20, 6, seed=1), video(30, (16, 9), seed=1)),
        (prompt(9, 2, seed=2), video(10, seed=2)),
        (prompt(7, None, seed=3), {}),
        (prompt(12, 3, IMAGE, seed=4), image((9, 16), seed=4)),
        (prompt(30, 1, seed=5), video(1, seed=5)),
    ]
    ids, mask = pad_rows([row for row, _ in rows])
    pixels = merge(*(x for _, x in rows))
    together = model.generate(input_ids=ids, attention_mask=mask, **pixels, **GREEDY, **options)
    per_row = options.get("num_return_sequences", 1)
    for i, (row, own) in enumerate(rows):
        alone = model.generate(input_ids=row, **own, **GREEDY, **options)
        ours = together[i * per_row : (i + 1) * per_row, ids.shape[1] :]
        assert ours.tolist() == alone[:, row.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_chooses_as_singles_do_on_both_padding_sides(model, side):
    rows = [(prompt(20, 6, seed=1), video(9, seed=1)), (prompt(9, 2, seed=2), video(9, seed=2))]
    ids, mask = pad_rows([row for row, _ in rows], side)
    together = model(input_ids=ids, attention_mask=mask, **merge(*(x for _, x in rows)))
    assert together.attention_mask[0 if side == "left" else 1].sum() <= together.logits.shape[1]
    for i, (row, own) in enumerate(rows):
        alone = model(input_ids=row, **own)
        ours, theirs = together.video_selections[i], alone.video_selections[0]
        assert ours.mode == theirs.mode
        assert torch.equal(ours.token_grid_index, theirs.token_grid_index)
        real = together.attention_mask[i].bool()
        # Padding changes the shapes of the products, not their sums.
        torch.testing.assert_close(together.logits[i, real], alone.logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_original_lets_the_first_sample_decide():
    rows = [(prompt(20, 6, seed=1), video(4, seed=1)), (prompt(9, 2, seed=2), video(12, seed=2))]
    ids, mask = pad_rows([row for row, _ in rows])
    pixels = merge(*(x for _, x in rows))
    each = tiny_longvu_model()(input_ids=ids, attention_mask=mask, **pixels).video_selections
    assert [x.mode for x in each] == ["full", "mix"]
    first = tiny_longvu_model(batch_decision_from_first=True)
    assert [x.mode for x in first(input_ids=ids, attention_mask=mask, **pixels).video_selections] == ["full", "stc"]


@torch.no_grad()
def test_several_videos_and_images_in_one_prompt_share_the_room(model):
    ids = prompt(20, None)
    ids[0, 3], ids[0, 7], ids[0, 11] = VIDEO, IMAGE, VIDEO
    pixels = merge(video(12, seed=1), video(6, seed=2), image())
    output = model(input_ids=ids, **pixels)
    assert [len(x.kept_frames) for x in output.video_selections] == [12, 1, 6]
    assert [x.mode for x in output.video_selections][1] == "low"
    assert output.logits.shape[1] <= 120 - 8
    lengths = [len(x.token_frame) for x in output.video_selections]
    assert output.logits.shape[1] == 17 + sum(lengths)
    assert model.generate(input_ids=ids, **pixels, **GREEDY).shape == (1, 25)


@torch.no_grad()
def test_images_come_at_the_low_grid_of_video_checkpoints_and_full_otherwise():
    ids = prompt(token=IMAGE)
    for options, tokens in (
        ({}, 6),
        ({"low_grid_images": False}, 12),
        ({"highres": False}, 12),
        ({"highres": False, "image_token_len": 36}, 42),
    ):
        model = tiny_longvu_model(**options)
        assert model(input_ids=ids, **image()).logits.shape[1] == 15 + tokens
        assert [len(x) for x in model.get_image_features(**image()).pooler_output] == [tokens]
    names = dict(tiny_longvu_model(highres=False, image_token_len=36).named_parameters())
    assert not any("pos_embed" in name for name in names)


# ---------------------------------------------------------------- budget


@torch.no_grad()
@pytest.mark.parametrize("anchor", ["first", "middle", "most_changed"])
@pytest.mark.parametrize("new_tokens", [1, 40, 80])
def test_context_length_is_never_exceeded(anchor, new_tokens):
    model = tiny_longvu_model(stc_anchor=anchor, drop_threshold=2.0, dino_threshold=2.0)
    for num_frames in (8, 17, 33):
        output = model.generate(
            input_ids=prompt(),
            **video(num_frames),
            **{**GREEDY, "max_new_tokens": new_tokens},
            return_dict_in_generate=True,
        )
        assert output.sequences.shape[1] == 16 + new_tokens
        # The last new token is not in the cache.
        assert 110 < output.past_key_values.get_seq_length() + 1 <= 120


def test_a_question_that_leaves_no_room_is_refused_with_numbers(model):
    ids = prompt(114)
    with pytest.raises(
        ValueError, match=r"sample 0 \(.*\) takes 113 positions and 8 are reserved .* context_length of 120"
    ):
        model(input_ids=ids, **video(4))
    with pytest.raises(ValueError, match="113 positions and 7 are reserved"):
        model.generate(input_ids=ids, **video(4), max_new_tokens=7)
    assert model.generate(input_ids=ids, **video(4), **{**GREEDY, "max_new_tokens": 6}).shape == (1, 120)
    with pytest.raises(ValueError, match="its images 6 and 8 are reserved"):
        model(input_ids=prompt(114, token=IMAGE), **image())
    ids, mask = pad_rows([prompt(20), prompt(114, seed=1)])
    with pytest.raises(ValueError, match=r"text of sample 1 \(.*\) takes 113"):
        model(input_ids=ids, attention_mask=mask, **merge(video(4), video(4)))


@torch.no_grad()
def test_original_behaviour_turns_on_everything_that_is_not_set():
    config = tiny_longvu_config(original_behaviour=True, forced_removal=False)
    on = {name: config.behaves(name) for name in ORIGINAL_BEHAVIOURS}
    assert on == {name: name != "forced_removal" for name in ORIGINAL_BEHAVIOURS}
    alone = tiny_longvu_config(fixed_reserve=True)
    assert [name for name in ORIGINAL_BEHAVIOURS if alone.behaves(name)] == ["fixed_reserve"]


@torch.no_grad()
def test_original_overflow_cuts_the_question():
    model = tiny_longvu_model(original_behaviour=True)
    # A text longer than the context: no room for the video, and the text itself is cut.
    output = model(input_ids=prompt(130), **video(4))
    assert output.logits.shape[1] == 120
    # Frames that do not fit stay at the full grid and lose tokens by force.
    output = model(input_ids=prompt(), **video(40))
    selection = output.video_selections[0]
    assert (selection.mode, bool(selection.full_resolution.all())) == ("stc", True)
    assert output.logits.shape[1] <= 120 - 8


@torch.no_grad()
def test_each_original_behaviour_changes_something():
    def look(**options):
        model = tiny_longvu_model(dino_threshold=2.0, drop_threshold=2.0, **options)
        found = []
        for num_frames, length in ((8, 16), (9, 16), (20, 16), (30, 16)):
            selection = model(input_ids=prompt(length), **video(num_frames)).video_selections[0]
            found.append((selection.mode, tuple(selection.token_frame.tolist()), selection.full_resolution.tolist()))
        return found

    plain = look()
    for name in ("forced_removal", "budget_without_newlines", "full_grid_beyond_limit"):
        assert look(**{name: True}) != plain, name
    ids, new = prompt(), {**GREEDY, "max_new_tokens": 40, "return_dict_in_generate": True}
    cached = [
        tiny_longvu_model(fixed_reserve=x).generate(input_ids=ids, **video(8), **new).past_key_values.get_seq_length()
        for x in (True, False)
    ]
    assert cached[0] > 120 >= cached[1]


@torch.no_grad()
def test_counting_to_the_padding_id_of_the_releases():
    # The id lies beyond the tiny vocabulary; masked positions are never looked up.
    ids = torch.cat([prompt(60), torch.full((1, 30), 151643)], 1)
    mask = (ids != 151643).long()
    kept = {}
    for option in (True, False):
        model = tiny_longvu_model(count_to_pad_id=option, budget_without_newlines=True)
        kept[option] = len(model(input_ids=ids, attention_mask=mask, **video(9)).video_selections[0].kept_frames)
        padded_by_other = ids.masked_fill(ids == 151643, 0)
        counted = model.model._read_texts(
            padded_by_other, torch.zeros(1, 90, 32), padded_by_other == VIDEO, mask.bool(), [0], 8
        )[0].num_counted
        assert counted == (90 if option else 60)
    assert kept[True] == kept[False]


# ---------------------------------------------------------------- generation


@torch.no_grad()
def test_ids_come_back_in_front_and_logits_are_those_of_the_last_position(model, monkeypatch):
    shapes = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[1]) or head(x))
    ids = prompt()
    out = model.generate(input_ids=ids, **video(9), **GREEDY)
    assert shapes == [1] * 5
    assert torch.equal(out[:, :16], ids)
    assert torch.equal(model.generate(ids, **video(9), **GREEDY), out)


@torch.no_grad()
def test_cached_generation_equals_greedy_steps_without_a_cache(model):
    ids, pixels = prompt(), video(9)
    out = model.generate(input_ids=ids, **pixels, **GREEDY)
    inserted, _ = model.model.insert_visuals(ids, None, model_inputs(pixels), num_new_tokens=5)
    embeds = inserted.inputs_embeds
    for step in range(5):
        token = model(inputs_embeds=embeds, use_cache=False).logits[:, -1].argmax(-1)
        assert int(token) == int(out[0, 16 + step])
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[:, None]], 1)
    assert torch.equal(model.generate(input_ids=ids, **pixels, **GREEDY, use_cache=False), out)


def model_inputs(pixels: dict):
    from longvideo.modeling.longvu.vision_longvu import VisualInputs

    return VisualInputs(**pixels)


@torch.no_grad()
def test_second_turn_on_a_cache_equals_the_whole_conversation(model):
    rows = [(prompt(20, 6, seed=1), video(5, seed=1)), (prompt(9, 2, seed=2), video(2, seed=2))]
    ids, mask = pad_rows([row for row, _ in rows])
    pixels = merge(*(x for _, x in rows))
    first = model.generate(input_ids=ids, attention_mask=mask, **pixels, **GREEDY, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(12, None, seed=3).expand(2, -1)], 1)
    whole_mask = torch.cat([mask, mask.new_ones(2, more.shape[1] - mask.shape[1])], 1)
    cache = first.past_key_values
    second = model.generate(input_ids=more, attention_mask=whole_mask, past_key_values=cache, **GREEDY)
    assert torch.equal(second[:, : more.shape[1]], more)
    for i, (row, own) in enumerate(rows):
        # The same visual tokens, text behind them, in one run over embeddings.
        inserted, _ = model.model.insert_visuals(row, None, model_inputs(own), num_new_tokens=5)
        tail = model.get_input_embeddings()(more[i : i + 1, ids.shape[1] :])
        embeds = torch.cat([inserted.inputs_embeds, tail], 1)
        alone = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **GREEDY)
        assert second[i, more.shape[1] :].tolist() == alone[0].tolist()


@torch.no_grad()
def test_second_turn_with_another_video(model):
    first = model.generate(input_ids=prompt(10), **video(2), **GREEDY, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(12, 3, seed=3)], 1)
    cache = first.past_key_values
    for num_frames, positions in ((30, (110, 120)), (3, (80, 90))):
        # A long video takes the room that the first turn left, and no more; the last new token is not in the cache.
        second = model.generate(
            input_ids=more,
            past_key_values=copy.deepcopy(cache),
            **video(num_frames, seed=2),
            **GREEDY,
            return_dict_in_generate=True,
        )
        assert second.sequences.shape[1] == more.shape[1] + 5
        assert positions[0] < second.past_key_values.get_seq_length() + 1 <= positions[1]
    third = torch.cat([second.sequences, prompt(3, None)], 1)
    assert model.generate(input_ids=third, past_key_values=second.past_key_values, **GREEDY).shape[1] == 40
    with pytest.raises(ValueError, match=r"The cache holds .* positions for 39 ids .* input_ids has 10"):
        model.generate(input_ids=prompt(10), past_key_values=second.past_key_values, **GREEDY)


@torch.no_grad()
def test_forward_goes_on_from_its_cache_with_the_mask_it_returned(model):
    ids, pixels = prompt(), video(9)
    first = model(input_ids=ids, **pixels, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    mask = torch.cat([first.attention_mask, torch.ones(1, 1, dtype=torch.long)], 1)
    second = model(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values)
    out = model.generate(input_ids=ids, **pixels, **{**GREEDY, "max_new_tokens": 8})
    assert [int(token), int(second.logits[:, -1].argmax())] == out[0, 16:18].tolist()
    with pytest.raises(ValueError, match=r"needs? \(batch, \d+\)"):
        model(
            input_ids=prompt(5, 2), attention_mask=torch.ones(1, 9), past_key_values=first.past_key_values, **video(1)
        )


@torch.no_grad()
def test_max_length_counts_visual_tokens(model):
    ids, pixels = prompt(), video(4)
    assert model.generate(input_ids=ids, **pixels, max_length=70, eos_token_id=None).shape[1] == 16 + 70 - 15 - 48
    with pytest.raises(ValueError, match="max_length is 40, but text and visual tokens already take 63"):
        model.generate(input_ids=ids, **pixels, max_length=40)


def test_chunked_prefill_is_refused(model):
    with pytest.raises(ValueError, match="prefill_chunk_size cannot be used"):
        model.generate(input_ids=prompt(), **video(2), prefill_chunk_size=4)


@torch.no_grad()
def test_logits_to_keep_counts_visual_tokens(model):
    inputs = {"input_ids": prompt(), **video(4)}
    whole = model(**inputs).logits
    # One product over all positions, one over three.
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5, rtol=1e-5)
    some = model(**inputs, logits_to_keep=torch.tensor([0, 30])).logits
    torch.testing.assert_close(some, whole[:, [0, 30]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    ids, pixels = prompt(), video(9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, **pixels).logits, model(input_ids=ids, **pixels).logits)
    new = model.generate(inputs_embeds=embeds, **pixels, **GREEDY)
    assert torch.equal(new, model.generate(input_ids=ids, **pixels, **GREEDY)[:, 16:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)


@torch.no_grad()
def test_placeholder_ids_may_lie_beyond_the_embedding_table():
    inside, beyond = tiny_longvu_model(), tiny_longvu_model(video_token_id=264, image_token_id=265)
    ids, pixels = prompt(), video(9)
    beyond_ids = ids.masked_fill(ids == VIDEO, 264)
    assert torch.equal(beyond(input_ids=beyond_ids, **pixels).logits, inside(input_ids=ids, **pixels).logits)
    assert torch.equal(
        beyond.generate(input_ids=beyond_ids, **pixels, **GREEDY)[:, 16:],
        inside.generate(input_ids=ids, **pixels, **GREEDY)[:, 16:],
    )


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}])
def test_penalties_pass_over_placeholders_beyond_the_table(options):
    inside, beyond = tiny_longvu_model(), tiny_longvu_model(image_token_id=265, video_token_id=264)
    ids, pixels = prompt(), video(9)
    expected = inside.generate(ids, **pixels, **GREEDY, **options)[:, 16:]
    assert VIDEO not in expected
    found = beyond.generate(ids.masked_fill(ids == VIDEO, 264), **pixels, **GREEDY, **options)[:, 16:]
    assert torch.equal(found, expected)


def test_lora_by_the_pattern_of_the_readme():
    peft = pytest.importorskip("peft")
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    assert pattern in (Path(__file__).parents[2] / "modeling" / "longvu" / "README.md").read_text()
    adapted = peft.get_peft_model(tiny_longvu_model(), peft.LoraConfig(target_modules=pattern))
    found = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert len(found) == 4 and all("language_model.layers" in name for name in found)


def test_assisted_decoding_with_videos_is_refused(model):
    given = {"input_ids": prompt(), **video(4), **GREEDY}
    for name, value in (("assistant_model", model), ("prompt_lookup_num_tokens", 3)):
        with pytest.raises(ValueError, match=f"{name} cannot be used with images or videos"):
            model.generate(**given, **{name: value})
    asked = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens cannot be used"):
        model.generate(input_ids=prompt(), **video(4), generation_config=asked)
    text = torch.tensor([[10, 11, 12, 10, 11, 12, 10, 11]])
    assert torch.equal(model.generate(text, **GREEDY, prompt_lookup_num_tokens=3), model.generate(text, **GREEDY))


# ---------------------------------------------------------------- encoding once, streams


@torch.no_grad()
@pytest.mark.parametrize("part", ["vision_tower", "dino_tower", "vision_sampler"])
def test_encoded_video_of_other_tower_weights_is_refused(part):
    model = tiny_longvu_model()
    encoded = model.encode_video(**video(4))
    assert model.generate(input_ids=prompt(), encoded_video=encoded, **GREEDY).shape[1] > 16
    list(getattr(model.model, part).parameters())[-1].view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="other weights or settings"):
        model.generate(input_ids=prompt(), encoded_video=encoded, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 9, 17, 20, 50])
def test_encoded_video_serves_many_questions(model, tmp_path, monkeypatch, num_frames):
    pixels = video(num_frames, (16, 12), alike=0.95)
    # Beside 59 tokens of text 9 and 17 frames are too many, beside 2 they are not.
    questions = [prompt(16, 4, seed=1), prompt(60, 4, seed=2), prompt(3, 0, seed=3)]
    expected = [model.generate(input_ids=ids, **pixels, **GREEDY) for ids in questions]
    selections = [model(input_ids=ids, **pixels).video_selections[0] for ids in questions]
    counts = [len(selection.kept_frames) for selection in selections]
    assert (counts[1] < counts[2]) == (num_frames in (9, 17)), counts
    encoded = model.encode_video(**pixels, source_key="a")
    assert encoded.num_frames == [num_frames]
    encoded.save(tmp_path / "video")
    loaded = LongVUEncodedVideo.load(tmp_path / "video", key={"model": model.encoding_key(), "source": "a"})
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: pytest.fail("the tower ran again"))
    for ids, answer, selection in zip(questions, expected, selections, strict=True):
        for source in (encoded, loaded):
            assert torch.equal(model.generate(input_ids=ids, encoded_video=source, **GREEDY), answer)
        seen = model(input_ids=ids, mm_encoder_outputs={"video": loaded.as_output()}).video_selections[0]
        assert torch.equal(seen.kept_frames, selection.kept_frames)
        assert torch.equal(seen.token_grid_index, selection.token_grid_index)
    with pytest.raises(ValueError, match="Both encoded_video and other video inputs"):
        model.generate(input_ids=questions[0], encoded_video=encoded, **pixels)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["original", "paper"])
@pytest.mark.parametrize("cap", [400, 7])
def test_stream_gives_what_all_pixels_give(rule, cap):
    model = tiny_longvu_model(temporal_reduction=rule, max_kept_frames=cap)
    pixels = video(50, (16, 9), alike=0.5)
    whole = model.encode_video(**pixels)

    def windows(lengths):
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            yield {name: x[here] for name, x in pixels.items() if name.startswith("pixel")}
            start += length

    for lengths in ([50], [16, 16, 16, 2], [1] * 50, [7, 30, 13]):
        streamed = model.encode_video(windows=windows(lengths), num_frames=50, video_size=(16, 9))
        assert streamed.key == whole.key
        ours, theirs = streamed.visuals[0], whole.visuals[0]
        assert torch.equal(ours.kept_frames, theirs.kept_frames)
        # Towers run on batches of other sizes.
        torch.testing.assert_close(ours.features, theirs.features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.dino_similarity, theirs.dino_similarity, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="announced with 60 frames, got 50"):
        model.encode_video(windows=windows([50]), num_frames=60)
    with pytest.raises(ValueError, match="announced with 40 frames"):
        model.encode_video(windows=windows([50]), num_frames=40)
    with pytest.raises(ValueError, match="num_frames must be the frames of the whole video"):
        model.encode_video(windows=windows([50]))
    with pytest.raises(ValueError, match="exactly one of pixel_values_videos and windows"):
        model.encode_video(**pixels, windows=windows([50]), num_frames=50)


@torch.no_grad()
def test_an_hour_streams_and_holds_one_window_of_pixels():
    model = tiny_longvu_model(vision_chunk_size=64)
    alive = []

    class Window(dict):
        """Counts how many windows are held at once."""

        def __init__(self, seed):
            pixels = frames(64 if seed < 56 else 16, seed=seed % 5, alike=0.9)
            super().__init__(pixel_values_videos=pixels, pixel_values_videos_dino=pixels)
            alive.append(1)

        def __del__(self):
            alive.pop()

    most = 0

    def windows():
        nonlocal most
        for seed in range(57):
            yield Window(seed)
            most = max(most, len(alive))

    encoded = model.encode_video(windows=windows(), num_frames=3600)
    assert most <= 2
    assert encoded.visuals[0].dino_similarity.shape == (3600,)
    assert len(encoded.visuals[0].kept_frames) <= 400
    assert model.generate(input_ids=prompt(), encoded_video=encoded, **GREEDY).shape == (1, 21)


def test_encoded_video_of_another_source_model_or_damaged_is_refused(model, tmp_path):
    encoded = model.encode_video(**video(4), source_key="a")
    encoded.save(tmp_path)
    with pytest.raises(ValueError, match="belongs to another source: stored a, expected b"):
        LongVUEncodedVideo.load(tmp_path, key={"source": "b"})
    for other in (tiny_longvu_model(seed=1), tiny_longvu_model(dino_threshold=0.5)):
        with pytest.raises(ValueError, match="other weights or settings"):
            other.generate(input_ids=prompt(), encoded_video=encoded)
    with pytest.raises(FileNotFoundError, match=r"encoded_video\.json is missing"):
        LongVUEncodedVideo.load(tmp_path / "none")
    tensors = load_file(tmp_path / "features.safetensors")
    tensors["features.0"] = tensors["features.0"] + 1
    save_file(tensors, tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match="the tensors are not those"):
        LongVUEncodedVideo.load(tmp_path)
    (tmp_path / "features.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        LongVUEncodedVideo.load(tmp_path)
    (tmp_path / "file").write_bytes(b"one")
    assert video_source_key(tmp_path / "file", fps=1) != video_source_key(tmp_path / "file", fps=2)


@torch.no_grad()
def test_encoder_outputs_in_place_of_pixels(model):
    ids, pixels = prompt(), video(9)
    features = model.get_video_features(**pixels)
    expected = model.generate(input_ids=ids, **pixels, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, mm_encoder_outputs={"video": features}, **GREEDY), expected)
    with pytest.raises(ValueError, match="Both pixels and encoded features"):
        model(input_ids=ids, **pixels, mm_encoder_outputs={"video": features})


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_finite_gradient(checkpointing):
    model = tiny_longvu_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.cat([prompt(20, 6, seed=1), prompt(20, 2, IMAGE, seed=2)])
    output = model(input_ids=ids, labels=ids, **merge(video(10), image()))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
def test_loss_is_over_text_only(model):
    ids, pixels = prompt(), video(4)
    labels = ids.masked_fill(torch.arange(16) < 8, -100)
    output = model(input_ids=ids, labels=labels, **pixels)
    assert output.labels.shape == output.logits.shape[:2] == (1, 63)
    assert output.labels[0, 4:52].eq(-100).all()
    assert output.labels[0, -11:].tolist() == labels[0, -11:].tolist()
    expected = torch.nn.functional.cross_entropy(output.logits[0, 54:62], ids[0, 8:])
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)  # the mean of other terms beside zeros
    text = model(input_ids=prompt(at=None), labels=prompt(at=None))
    assert torch.isfinite(text.loss) and torch.equal(text.labels, prompt(at=None))


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    inputs = {"input_ids": prompt(), **video(4)}
    half = tiny_longvu_model().to(torch.bfloat16)
    logits = model(**inputs).logits
    error = half(**inputs).logits.float() - logits
    # 8 bits of mantissa, 2 ** -8 = 0.004 per operation, over a few dozen operations in a row.
    assert error.abs().mean() < 0.05 * logits.abs().mean()


@torch.no_grad()
def test_eager_equals_sdpa():
    model = tiny_longvu_model()
    inputs = {"input_ids": prompt(), **video(9)}
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert model.model.dino_tower.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, sdpa, atol=1e-4, rtol=1e-4)  # two kernels in fp32


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_num_frames": torch.tensor([3])}, r"\[3\] must be .* add up to the 4 frames"),
        ({"video_num_frames": torch.tensor([4, 0])}, r"\[4, 0\] must be at least 1 each"),
        ({"video_num_frames": None}, "needs video_num_frames"),
        ({"pixel_values_videos_dino": None}, "without those for DINOv2"),
        ({"pixel_values_videos_dino": torch.zeros(3, 3, 28, 28)}, "SigLIP gets 4 frames but DINOv2 3"),
        ({"pixel_values_videos": torch.zeros(4, 3, 32, 32)}, r"expects frames of \(3, 28, 28\), got \(3, 32, 32\)"),
        ({"pixel_values_videos_dino": torch.zeros(4, 3, 30, 30)}, "side is a multiple of 4"),
        ({"pixel_values_videos_dino": torch.zeros(4, 3, 28, 32)}, "expects square frames"),
        ({"video_sizes": torch.tensor([[1, 1], [2, 2]])}, "for each of 1 videos"),
        ({"video_sizes": torch.tensor([[0, 5]])}, "positive width and height"),
    ],
)
def test_frames_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=prompt(), **{**video(4), **change})


def test_placeholders_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="1 video placeholder tokens but 0 videos"):
        model(input_ids=prompt())
    with pytest.raises(ValueError, match="0 video placeholder tokens but 1 videos"):
        model.generate(input_ids=prompt(at=None), **video(2))
    with pytest.raises(ValueError, match="1 image placeholder tokens but 0 images"):
        model(input_ids=prompt(token=IMAGE))
    two = prompt()
    two[0, 9] = VIDEO
    with pytest.raises(ValueError, match="2 video placeholder tokens but 1 videos"):
        model(input_ids=two, **video(2))
    with pytest.raises(ValueError, match=r"must be \(batch, sequence\)|needs? \(batch"):
        model(input_ids=prompt(), attention_mask=torch.ones(1, 1, 16, 16), **video(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_token_len": 10}, "square of a side that divides vision_grid_size 6, got 10"),
        ({"image_token_len": 16}, "square of a side that divides"),
        ({"lowres_token": 4}, "lowres_token 4 is larger than the side 3"),
        ({"connector_num_heads": 5}, "vision_hidden_size 32 is not a multiple of connector_num_heads 5"),
        ({"num_query_group": 2}, "one group of queries"),
        ({"stc_anchor": "last"}, "stc_anchor is 'last'; choose one of"),
        ({"temporal_reduction": "none"}, "temporal_reduction is 'none'"),
        ({"dino_position_interpolation": "bicubic"}, "dino_position_interpolation is 'bicubic'"),
        ({"vision_chunk_size": 0}, "vision_chunk_size must be at least 1, got 0"),
        ({"inference_max_length": 120}, "between 0 and context_length 120"),
    ],
)
def test_wrong_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_longvu_config(**kwargs)


# ---------------------------------------------------------------- loading


@torch.no_grad()
def test_save_and_load_through_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": prompt(), **video(9)}
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is LongVUForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is LongVUModel
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LongVUConfig
    assert (config.vision_config.model_type, config.dino_config.model_type) == ("siglip_vision_model", "dinov2")


@torch.no_grad()
def test_files_name_the_tower_as_its_own_repository_does(model, tmp_path):
    """Releases of transformers name DINOv2's modules differently; files must open in all of them."""
    model.save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if "dino_tower.encoder.layer.0." in name}
    parts = {name.split("layer.0.")[1].rsplit(".", 1)[0] for name in names}
    assert {"attention.attention.query", "attention.output.dense", "mlp.weights_in", "mlp.weights_out"} <= parts


@torch.no_grad()
def test_llama_with_tied_head_and_scaled_rope(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_longvu_model(text="llama", text_kwargs={"tie_word_embeddings": True, "rope_parameters": rope})
    assert model.config.tie_word_embeddings
    assert model.model.language_model.rotary_emb.rope_type == "llama3"
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LongVUForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = {"input_ids": prompt(), **video(9)}
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_published_sizes():
    """Parameters and tensors of the published Qwen2-7B checkpoint, beside the towers; without any memory."""
    with torch.device("meta"):
        model = LongVUForConditionalGeneration(LongVUConfig())
    own = {name: x for name, x in model.named_parameters() if "vision_tower" not in name and "dino_tower" not in name}
    assert (len(own), sum(x.numel() for x in own.values())) == (429, 7_671_665_664)


def test_selection_fields_are_pinned():
    from longvideo.modeling.longvu.insertion_longvu import LongVUSelection

    assert [field.name for field in dataclasses.fields(LongVUSelection)] == [
        "kept_frames",
        "dino_similarity",
        "mode",
        "full_resolution",
        "query_scores",
        "token_frame",
        "token_grid_index",
        "token_is_full",
    ]
