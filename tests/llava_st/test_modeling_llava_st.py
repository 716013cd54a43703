"""The model as users meet it: visuals in their places, coordinates, batches, chunks, caches, loss, refusals."""

import pytest
import torch
from transformers import DynamicCache, SiglipVisionConfig, SiglipVisionModel

from longvideo.modeling.llava_st.coordinates_llava_st import interpolate_rows
from longvideo.modeling.llava_st.encoded_video_llava_st import LlavaSTEncodedVideo
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration
from longvideo.modeling.llava_st.splicing_llava_st import block_ids, token_id
from tests.tiny_llava_st import tiny_llava_st_config, tiny_llava_st_model

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYOUTS = ("folded", "split")


@pytest.fixture(scope="module")
def model():
    return tiny_llava_st_model()


def text(length: int) -> list[int]:
    return torch.randint(10, 250, (length,)).tolist()


def prompt(config, *parts: str | int | tuple[str, float]) -> dict:
    """A row of "video", "image", numbers of text tokens and (template, value), with random pixels."""
    ids, values, videos, images = [], [], 0, 0
    for part in parts:
        if isinstance(part, int):
            new = text(part)
        elif isinstance(part, tuple):
            new = [token_id(config, part[0])]
        else:
            new = block_ids(config, part)
            videos, images = videos + (part == "video"), images + (part == "image")
        ids += new
        values += [part[1]] if isinstance(part, tuple) else [0.0] * len(new)
    side = config.vision_config.image_size
    inputs = {"input_ids": torch.tensor([ids])}
    if any(isinstance(part, tuple) for part in parts):
        inputs["coordinate_values"] = torch.tensor([values])
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, config.num_frames, 3, side, side)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, side, side)
    return inputs


def mixed(config) -> dict:
    return prompt(config, 3, "video", 2, ("temporal_input", 0.3), ("width_input", 0.71), 4)


def join(rows: list[dict]) -> dict:
    """Rows of different length as one left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch = {"attention_mask": [torch.ones_like(row["input_ids"]) for row in rows]}
    batch["input_ids"] = [row["input_ids"] for row in rows]
    zeros = [torch.zeros(x.shape) for x in batch["input_ids"]]
    batch["coordinate_values"] = [row.get("coordinate_values", zero) for row, zero in zip(rows, zeros, strict=True)]
    batch = {k: torch.cat([torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in v]) for k, v in batch.items()}
    for name in ("pixel_values_videos", "pixel_values"):
        batch[name] = torch.cat([row[name] for row in rows if name in row])
    return batch


# ---------------------------------------------------------------- vision


@torch.no_grad()
def test_chunks_of_frames_give_the_same_features(model):
    frames, images = torch.randn(2, 6, 3, 32, 32), torch.randn(3, 3, 32, 32)
    found = []
    for size in (1, 4, 5, 100):
        model.config.vision_chunk_size = size
        found.append(
            [*model.get_video_features(frames).pooler_output, *model.get_image_features(images).pooler_output]
        )
    assert [len(x) for x in found[0]] == [14, 14, 16, 16, 16]
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # batched products round differently


@torch.no_grad()
def test_tower_gives_the_last_kept_layer_before_any_norm(model):
    config = model.config.vision_config
    whole = SiglipVisionConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers + 1})
    tower = SiglipVisionModel(whole).eval()
    missing = tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False).missing_keys
    assert all("layers.2" in name or "post_layernorm" in name for name in missing)
    images = torch.randn(2, 3, 32, 32)
    wanted = tower(images, output_hidden_states=True).hidden_states[-2]
    shown = model.get_image_features(images, output_tower_features=True)
    torch.testing.assert_close(shown.last_hidden_state, wanted, atol=1e-5, rtol=1e-5)  # the same layers, fp32
    assert shown.hidden_states is None
    assert model.get_image_features(images).last_hidden_state is None
    assert len(model.get_image_features(images, output_hidden_states=True).hidden_states) == 3


@torch.no_grad()
def test_positions_are_averages_of_input_and_output_rows():
    torch.manual_seed(2)
    model = tiny_llava_st_model(num_temporal_tokens=6, num_spatial_tokens=4, vision_chunk_size=4)
    shown = model.get_video_features(torch.randn(2, 6, 3, 32, 32), output_tower_features=True)
    start = model.config.coordinate_token_start
    rows = (model.get_input_embeddings().weight[start:] + model.lm_head.weight[start:]) / 2
    time, height, width = rows[:6], rows[6:10], rows[10:]
    wanted = time[:, None, None] + height[None, :, None] + width[None, None]
    added = (shown.positioned - shown.projected).view(2, 6, 4, 4, 32)
    torch.testing.assert_close(added, wanted.expand_as(added), atol=1e-5, rtol=1e-5)  # a sum and a difference
    image = model.get_image_features(torch.randn(1, 3, 32, 32), output_tower_features=True)
    torch.testing.assert_close(image.positioned - image.projected, wanted[:1].flatten(1, 2), atol=1e-5, rtol=1e-5)
    model.config.use_lape = False
    plain = model.get_video_features(torch.randn(1, 6, 3, 32, 32), output_tower_features=True)
    assert torch.equal(plain.positioned, plain.projected)


def test_other_numbers_of_frames_than_times_are_interpolated_or_refused():
    model = tiny_llava_st_model(num_frames=9)
    features = model.get_video_features(torch.randn(1, 9, 3, 32, 32)).pooler_output
    assert [len(x) for x in features] == [9 + 12]
    with pytest.raises(ValueError, match="num_frames 9 differs from num_temporal_tokens 6"):
        tiny_llava_st_config(num_frames=9, lape_interpolate_frames=False)


@torch.no_grad()
def test_a_video_is_its_fast_stream_then_its_slow_stream(model):
    frames = torch.randn(2, 6, 3, 32, 32)
    shown = model.get_video_features(frames, output_tower_features=True)
    assert shown.reduced.shape == (12, 4, 32)
    for pooled, fast, slow in zip(shown.pooler_output, shown.fast, shown.slow, strict=True):
        assert (fast.shape, slow.shape) == ((6, 1, 32), (2, 4, 32))
        assert torch.equal(pooled, torch.cat([fast.flatten(0, 1), slow.flatten(0, 1)]))
    released = tiny_llava_st_model(splice_fast_stream=False)
    released.load_state_dict(model.state_dict())
    for pooled, slow in zip(released.get_video_features(frames).pooler_output, shown.slow, strict=True):
        torch.testing.assert_close(pooled, slow.flatten(0, 1), atol=1e-6, rtol=1e-6)  # chunks of another size


@torch.no_grad()
def test_ablations_keep_the_numbers_of_tokens():
    frames = torch.randn(1, 6, 3, 32, 32)
    for options in ({"use_packer": False}, {"use_lape": False}, {"packer_query": "average"}):
        model = tiny_llava_st_model(**options)
        assert model.get_video_features(frames).pooler_output[0].shape == (14, 32)
        assert (model.model.packer is None) == (options == {"use_packer": False})
    small = tiny_llava_st_model(use_downsample_image=True)
    inputs = prompt(small.config, 2, "image", 3, "image", 2)
    assert inputs["input_ids"].shape[1] == 7 + 2 * 4
    assert small(**inputs).logits.isfinite().all()


# ---------------------------------------------------------------- visuals and coordinates in their places


@torch.no_grad()
def test_features_overwrite_whole_blocks(model):
    inputs = prompt(model.config, 2, "video", 1, "image", 2, "video", 1)
    video = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = model(**inputs, output_hidden_states=True).hidden_states[0][0]
    words = model.get_input_embeddings()(inputs["input_ids"])[0]
    wanted = [words[:2], video[0], words[16:17], image[0], words[33:35], video[1], words[49:]]
    assert torch.equal(embeds, torch.cat(wanted))
    model.config.splice_fast_stream = False
    try:
        embeds = model(**inputs, output_hidden_states=True).hidden_states[0][0]
    finally:
        model.config.splice_fast_stream = True
    wanted[1], wanted[5] = torch.cat([words[2:8], video[0][6:]]), torch.cat([words[35:41], video[1][6:]])
    assert torch.equal(embeds, torch.cat(wanted))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_take_the_place_of_templates(layout):
    model = tiny_llava_st_model(coordinate_layout=layout)
    names = [f"{axis}_{side}" for axis in ("temporal", "height", "width") for side in ("input", "output")]
    numbers = [0.0, 1.0, 0.31, 0.5, 0.87, -2.0]
    inputs = prompt(model.config, 2, *zip(names, numbers, strict=True), 2)
    tables = model.model.input_rows().split(model.config.coordinate_sizes)
    embeds = model(**inputs, output_hidden_states=True).hidden_states[0][0, 2:8]
    wanted = [interpolate_rows(tables[i // 2], torch.tensor([x]))[0] for i, x in enumerate(numbers)]
    assert torch.equal(embeds, torch.stack(wanted))
    # Half of the way between row 0 and the last of five rows is the middle row.
    assert torch.equal(wanted[3], tables[1][2])
    assert torch.equal(wanted[1], tables[0][-1])
    assert torch.equal(wanted[5], tables[2][0])
    own = model.get_input_embeddings()(inputs["input_ids"])[0, 2:8]
    model.config.inject_width_inputs = False
    released = model(**inputs, output_hidden_states=True).hidden_states[0][0, 2:8]
    assert torch.equal(released, torch.stack([*wanted[:4], own[4], wanted[5]]))
    del inputs["coordinate_values"]
    assert torch.equal(model(**inputs, output_hidden_states=True).hidden_states[0][0, 2:8], own)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    inputs = mixed(model.config)
    logits = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: x for name, x in inputs.items() if name != "input_ids"}
    assert torch.equal(model(inputs_embeds=embeds, **others).logits, logits)
    generated = model.generate(inputs_embeds=embeds, **others, **GREEDY)
    assert torch.equal(generated, model.generate(**inputs, **GREEDY)[:, -5:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**inputs, inputs_embeds=embeds)


@torch.no_grad()
@pytest.mark.parametrize("parts", [("video", 3), ("image", 3), (2, "image", 1, "video", "image", 4)])
def test_embeddings_of_tokens_with_equal_rows(parts):
    """The release trained none of the rows of images and of the slow block."""
    model = tiny_llava_st_model(splice_fast_stream=False)
    names = ("image_start", "image", "image_end", "slow_video_start", "slow_video_end", "temporal_input")
    rows = model.get_input_embeddings().weight
    rows[[token_id(model.config, name) for name in names]] = rows[20:40].mean(0)
    inputs = prompt(model.config, *parts, ("temporal_input", 0.3), 2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: x for name, x in inputs.items() if name != "input_ids"}
    assert torch.equal(model(inputs_embeds=embeds, **others).logits, model(**inputs).logits)
    rows[token_id(model.config, "height_input")] = rows[token_id(model.config, "temporal_input")]
    with pytest.raises(ValueError, match=r"2 kinds of coordinates.*pass input_ids in place of inputs_embeds"):
        model(inputs_embeds=embeds, **others)
    # Without values there is nothing to tell.
    del others["coordinate_values"], inputs["coordinate_values"]
    assert torch.equal(model(inputs_embeds=embeds, **others).logits, model(**inputs).logits)


@torch.no_grad()
def test_embeddings_that_may_be_an_image_or_a_video():
    model = tiny_llava_st_model()
    model.get_input_embeddings().weight[259:275] = 1.0
    inputs = prompt(model.config, "image", "image", "video", 2)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="Position 0 may begin an image or a video"):
        model(inputs_embeds=embeds, **inputs)


# ---------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("splice", [True, False])
def test_left_padded_batch_of_all_kinds_equals_singles(splice):
    model = tiny_llava_st_model(splice_fast_stream=splice)
    torch.manual_seed(1)
    config = model.config
    rows = [
        mixed(config),
        prompt(config, 1, "image", 2, ("height_input", 0.4), "video", 1, "image", 3),
        prompt(config, 6),
        prompt(config, "video", 2, "video", 3),
        prompt(config, 2, "image", ("width_input", 0.2), 1),
    ]
    batch, width = join(rows), max(row["input_ids"].shape[1] for row in rows)
    for options in (GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}):
        together = model.generate(**batch, **options)[:, width:]
        per_row = options.get("num_return_sequences", 1)
        for i, row in enumerate(rows):
            alone = model.generate(**row, **options)[:, row["input_ids"].shape[1] :]
            assert together[i * per_row : (i + 1) * per_row].tolist() == alone.tolist(), (i, options)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_uncached_and_chunked_prefill_give_the_same(layout):
    model = tiny_llava_st_model(coordinate_layout=layout)
    inputs = mixed(model.config)
    whole = model.generate(**inputs, **GREEDY)
    assert torch.equal(whole, model.generate(**inputs, **GREEDY, use_cache=False))
    # Chunks that end within the fast block, within the slow block and between template and text.
    for size in (1, 5, 7, 16, 100):
        assert torch.equal(whole, model.generate(**inputs, **GREEDY, prefill_chunk_size=size)), size
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    chunked = model.generate(**inputs, **beams, prefill_chunk_size=6)
    assert torch.equal(chunked, model.generate(**inputs, **beams))


@torch.no_grad()
def test_an_empty_cache_is_a_prefill(model):
    inputs = mixed(model.config)
    logits = model(**inputs, past_key_values=DynamicCache(config=model.config.text_config)).logits
    torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)  # the same sums
    with pytest.raises(ValueError, match="14 video positions but no video was given"):
        model(input_ids=inputs["input_ids"], past_key_values=DynamicCache(config=model.config.text_config))


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(model):
    first = mixed(model.config)
    cache = DynamicCache(config=model.config.text_config)
    # What the model says itself may not look like a visual.
    options = {
        **GREEDY,
        "suppress_tokens": sorted({*block_ids(model.config, "image"), *block_ids(model.config, "video")}),
    }
    ids = model.generate(**first, **options, past_key_values=cache)
    turn = prompt(model.config, 2, "image", ("height_input", 0.6), 3)
    whole = torch.cat([ids, turn["input_ids"]], dim=1)
    values = torch.zeros(whole.shape)
    values[:, : first["input_ids"].shape[1]] = first["coordinate_values"]
    values[:, ids.shape[1] :] = turn["coordinate_values"]
    images = {"pixel_values": turn["pixel_values"]}
    going_on = model.generate(input_ids=whole, coordinate_values=values, **images, **options, past_key_values=cache)
    anew = {"input_ids": whole, "coordinate_values": values, "pixel_values_videos": first["pixel_values_videos"]}
    assert torch.equal(going_on, model.generate(**anew, **images, **options))
    with pytest.raises(ValueError, match="Pass the ids of the whole conversation"):
        model.generate(**first, **GREEDY, past_key_values=cache)


@torch.no_grad()
def test_generate_asks_for_logits_of_the_last_position_only(model, monkeypatch):
    shapes = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[1]) or head(x))
    model.generate(**mixed(model.config), **GREEDY)
    assert shapes == [1] * 5


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = mixed(model.config)
    whole = model(**inputs).logits
    # The head multiplies matrices of another height.
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5, rtol=1e-5)
    some = model(**inputs, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(some, whole[:, [0, 7]], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- encoding once


@torch.no_grad()
def test_encoded_video_serves_many_questions(model, tmp_path, monkeypatch):
    inputs, other = mixed(model.config), prompt(model.config, 2, "video", 5)
    frames = inputs.pop("pixel_values_videos")
    other.pop("pixel_values_videos")
    encoded = model.encode_video(frames, source_key="a")
    assert (encoded.num_frames, len(encoded)) == ([6], 1)
    expected = [model.generate(**x, pixel_values_videos=frames, **GREEDY) for x in (inputs, other)]
    logits = model(**inputs, pixel_values_videos=frames).logits
    encoded.save(tmp_path / "video")
    loaded = LlavaSTEncodedVideo.load(tmp_path / "video", key={"model": model.encoding_key(), "source": "a"})
    features = model.get_video_features(frames)
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: pytest.fail("the tower ran again"))
    for video in (encoded, loaded):
        for question, answer in zip((inputs, other), expected, strict=True):
            assert torch.equal(model.generate(**question, encoded_video=video, **GREEDY), answer)
        assert torch.equal(model(**inputs, encoded_video=video).logits, logits)
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": features}, **GREEDY), expected[0])
    with pytest.raises(ValueError, match="Both encoded_video and other video inputs"):
        model.generate(**inputs, encoded_video=encoded, pixel_values_videos=frames)
    with pytest.raises(ValueError, match="Both pixels and encoded features"):
        model(**inputs, pixel_values_videos=frames, mm_encoder_outputs={"video": features})


def test_encoded_video_of_another_source_or_model_is_refused(model, tmp_path):
    encoded = model.encode_video(torch.randn(1, 6, 3, 32, 32), source_key="a")
    encoded.save(tmp_path)
    with pytest.raises(ValueError, match="belongs to another source: stored a, expected b"):
        LlavaSTEncodedVideo.load(tmp_path, key={"source": "b"})
    ids = prompt(model.config, 1, "video", 1)["input_ids"]
    for other in (tiny_llava_st_model(seed=1), tiny_llava_st_model(splice_fast_stream=False)):
        with pytest.raises(ValueError, match="other weights or settings"):
            other.generate(input_ids=ids, encoded_video=encoded)
    released = tiny_llava_st_model(splice_fast_stream=False)
    with pytest.raises(ValueError, match="14 video features were given; every video gives 8"):
        released(input_ids=ids, mm_encoder_outputs={"video": encoded.as_output()})


# ---------------------------------------------------------------- training


def taught(config) -> dict:
    inputs = prompt(
        config, 2, "video", 3, ("width_input", 0.2), 2, ("temporal_output", 0.33), ("height_output", 1.0), 3
    )
    labels = inputs["input_ids"].clone()
    labels[:, :19] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_has_two_targets_at_output_templates(layout):
    model = tiny_llava_st_model(coordinate_layout=layout)
    config, inputs = model.config, taught(model.config)
    output = model(**inputs)
    logs = output.logits[0, :-1].log_softmax(-1)
    start, losses = config.coordinate_token_start, []
    for place, label in enumerate(inputs["labels"][0, 1:].tolist()):
        if label == config.temporal_output_token_id:  # 0.33 of 5 steps is 1.65
            losses.append(-0.35 * logs[place, start + 1] - 0.65 * logs[place, start + 2])
        elif label == config.height_output_token_id:
            losses.append(-logs[place, start + 6 + 4])
        elif label != -100:
            losses.append(-logs[place, label])
    assert len(losses) == 8
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)  # fp32 sums
    parts = model(**inputs, num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(parts, output.loss / 2, atol=1e-6, rtol=1e-6)
    double = {name: torch.cat([x, x]) for name, x in inputs.items()}
    torch.testing.assert_close(model(**double).loss, output.loss, atol=1e-5, rtol=1e-5)
    config.sample_loss = "sample_sum"
    torch.testing.assert_close(model(**double).loss, 2 * output.loss, atol=1e-5, rtol=1e-5)
    del inputs["coordinate_values"]
    with pytest.raises(ValueError, match="no coordinate_values"):
        model(**inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_gets_a_finite_gradient(layout):
    model = tiny_llava_st_model(coordinate_layout=layout).train()
    model(**taught(model.config)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("options", [{}, {"splice_fast_stream": False}, {"use_downsample_image": True}])
def test_packers_that_add_nothing_get_gradients_of_zero(options, kind):
    """Processes that share gradients wait for those of every parameter."""
    if kind == "video" and "use_downsample_image" in options:
        options = {"splice_fast_stream": False, "num_temporal_tokens": 0, "num_spatial_tokens": 0}
    model = tiny_llava_st_model(**options)
    inputs = prompt(model.config, 2, kind, 4)
    quiet = model(**inputs).logits
    model.train()
    output = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(output.logits, quiet)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    is_whole = kind == "video" and model.config.splice_fast_stream
    assert any(p.grad.any() for p in model.model.packer.fast.parameters()) == is_whole
    # What is frozen is not run for it.
    for parameter in model.parameters():
        parameter.grad = None
    model.model.packer.requires_grad_(False)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.packer.parameters())


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llava_st_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**taught(model.config)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name
        )  # run twice, same sums


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    inputs = mixed(model.config)
    half = tiny_llava_st_model().to(torch.bfloat16)
    error = half(**inputs).logits.float() - model(**inputs).logits
    # 8 bits of mantissa, 2 ** -8 = 0.004 per operation, over a few dozen operations in a row.
    assert error.abs().mean() < 0.05 * model(**inputs).logits.abs().mean()


@torch.no_grad()
def test_eager_equals_sdpa():
    model = tiny_llava_st_model()
    inputs = mixed(model.config)
    sdpa = model(**inputs).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, sdpa, atol=1e-4, rtol=1e-4)  # two kernels in fp32


@torch.no_grad()
def test_packers_start_as_the_original_does():
    model = LlavaSTForConditionalGeneration(tiny_llava_st_config(packer_hidden_size=64, initializer_range=0.02))
    layer = model.model.packer.fast
    weight = layer.attn.in_proj_weight
    bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
    assert bound * 0.9 < weight.abs().max() <= bound
    assert 0.015 < layer.to_k[0].weight.std() < 0.025
    assert layer.attn.in_proj_bias.count_nonzero() == layer.to_q[2].bias.count_nonzero() == 0
    assert layer.ln_q.weight.eq(1).all()


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.zeros(1, 4, 3, 32, 32)}, "Videos of 4 frames were given.*takes 6 frames"),
        ({"pixel_values_videos": torch.zeros(1, 6, 3, 40, 40)}, r"has the shape \(1, 6, 3, 40, 40\)"),
        ({"pixel_values_videos": torch.zeros(2, 6, 3, 32, 32)}, "holds 14 video positions, but 2 videos of 6 frames"),
        ({"pixel_values_videos": None}, "14 video positions but no video was given"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "holds 0 image positions, but 1 images need 1 x 16 = 16"),
        ({"coordinate_values": torch.zeros(1, 3)}, r"one number for every token, \(1, 25\), got \(1, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, change, message):
    inputs = {**mixed(model.config), **change}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_torn_blocks_are_refused(model):
    inputs = mixed(model.config)
    inputs["input_ids"][0, 10], inputs["input_ids"][0, 20] = 100, model.config.video_token_id
    with pytest.raises(ValueError, match="torn or in another order"):
        model(**inputs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coordinate_layout": "both"}, "coordinate_layout is 'both'; choose one of"),
        ({"sample_loss": "mean"}, "sample_loss is 'mean'"),
        ({"vision_chunk_size": 0}, "vision_chunk_size must be at least 1, got 0"),
        ({"num_frames": 7}, "num_frames 7 is not a multiple of temporal_factor 3"),
        ({"spatial_factor": 3}, "grid of 4 x 4 patches cannot be divided twice by spatial_factor 3"),
        ({"packer_num_heads": 3}, "packer_hidden_size 16 is not a multiple of packer_num_heads 3"),
        ({"num_spatial_tokens": 0}, r"are \(6, 0\); both must be positive"),
        ({"text_kwargs": {"vocab_size": 280}}, "ids 275 to 290, but text_config.vocab_size is 280.*at least 291"),
        ({"text_kwargs": {"vocab_size": 280}, "coordinate_layout": "split"}, "280 and coordinate_token_start 275"),
        ({"image_lape_frame": 6}, "image_lape_frame 6 is no entry of the 6 times"),
    ],
)
def test_wrong_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_llava_st_config(**kwargs)
