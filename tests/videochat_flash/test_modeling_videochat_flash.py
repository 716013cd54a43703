"""The model as users meet it: batches, chunks, images, features encoded once, caches, loading, refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    GPT2Config,
    Qwen2ForCausalLM,
)

from longvideo.modeling.videochat_flash.configuration_videochat_flash import VideoChatFlashConfig
from longvideo.modeling.videochat_flash.encoded_video import EncodedVideo, video_source_key
from longvideo.modeling.videochat_flash.modeling_videochat_flash import (
    VideoChatFlashForConditionalGeneration,
    VideoChatFlashModel,
)
from longvideo.modeling.videochat_flash.vision_videochat_flash import arrange_image_tiles
from tests.tiny import tiny_text_config, tiny_videochat_flash_config, tiny_videochat_flash_model

IMAGE, VIDEO = 3, 4
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_videochat_flash_model()


def video_inputs(num_frames: int = 8, batch: int = 1) -> dict:
    ids = torch.randint(10, 250, (batch, 12 + 4 * num_frames))
    ids[:, 4 : 4 + 4 * num_frames] = VIDEO
    return {"input_ids": ids, "pixel_values_videos": torch.randn(batch, num_frames, 3, 32, 32)}


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize("tower", ["umt_vision_model", "internvideo2_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("encode_type", ["video_image", "image_video"])
@torch.no_grad()
def test_chunked_equals_unchunked(tower, encode_type):
    model = tiny_videochat_flash_model(tower=tower, vision_encode_type=encode_type)
    frames = torch.randn(20, 3, 32, 32)
    counts = torch.tensor([8, 12])
    outputs = []
    for chunk_size in (1, 2, 3, 100):
        model.config.vision_chunk_size = chunk_size
        outputs.append(model.get_video_features(frames, counts))
    assert [len(x) for x in outputs[0].pooler_output] == [32, 48]
    for other in outputs[1:]:
        for ours, theirs in zip(outputs[0].pooler_output, other.pooler_output, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # batched products round differently
        assert all(map(torch.equal, outputs[0].merge_groups, other.merge_groups))


@torch.no_grad()
def test_pixels_are_moved_a_chunk_at_a_time(monkeypatch):
    model = tiny_videochat_flash_model()
    inputs = video_inputs(20)
    moved, move = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if tensor.ndim >= 4 and tensor.shape[-3:] == (3, 32, 32):
            moved.append(tensor.shape[:-3].numel())
        return move(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    model.generate(**inputs, **GREEDY)
    model.encode_video(inputs["pixel_values_videos"])
    model.get_image_features(torch.randn(5, 3, 32, 32))
    # Two clips of four frames, or two images, at a time.
    assert moved and max(moved) == 8, moved


@torch.no_grad()
def test_flat_and_stacked_frames_give_the_same_features(model):
    frames = torch.randn(2, 8, 3, 32, 32)
    stacked = model.get_video_features(frames).pooler_output
    flat = model.get_video_features(frames.flatten(0, 1), torch.tensor([8, 8])).pooler_output
    assert all(map(torch.equal, stacked, flat))


@torch.no_grad()
def test_tower_features_come_only_when_asked_for(model):
    frames = torch.randn(1, 8, 3, 32, 32)
    assert model.get_video_features(frames).last_hidden_state is None
    shown = model.get_video_features(frames, output_tower_features=True)
    assert shown.last_hidden_state.shape == (2, 256, 32)
    assert shown.merged_tokens.shape == (2, 16, 32)
    assert shown.merged_sizes.sum(1).tolist() == [256, 256]
    recorded = model.get_video_features(frames, output_hidden_states=True)
    assert len(recorded.hidden_states) == 3
    for clip in range(2):
        groups = shown.merge_groups[0][clip]
        means = torch.stack([shown.last_hidden_state[clip][groups == g].mean(0) for g in range(16)])
        torch.testing.assert_close(shown.merged_tokens[clip], means, atol=1e-5, rtol=1e-5)  # sums in another order


def test_image_tiles_are_read_line_by_line_over_the_grid():
    # Two rows, three columns of tiles with 2 x 2 tokens; the value is the place in the whole grid.
    width, tiles = 6, []
    for row in range(2):
        for column in range(3):
            tiles.append([(2 * row + y) * width + 2 * column + x for y in range(2) for x in range(2)])
    whole = [100, 101, 102, 103]
    features = torch.tensor([whole, *tiles], dtype=torch.float32)[..., None]
    assert arrange_image_tiles(features, 2, 3)[:, 0].tolist() == whole + list(range(24))
    with pytest.raises(ValueError, match="tiles of 3 tokens cannot be laid out"):
        arrange_image_tiles(torch.zeros(2, 3, 1), 1, 1)


@torch.no_grad()
def test_image_counts(model):
    features = model.get_image_features(torch.randn(4, 3, 32, 32), torch.tensor([[1, 2], [0, 0]])).pooler_output
    assert [len(x) for x in features] == [48, 16]
    assert [len(x) for x in model.get_image_features(torch.randn(2, 3, 32, 32)).pooler_output] == [16, 16]
    with pytest.raises(ValueError, match="ask for 5 tiles, but pixel_values has 4"):
        model.get_image_features(torch.randn(4, 3, 32, 32), torch.tensor([[2, 2]]))


@pytest.mark.parametrize(
    ("frames", "counts", "message"),
    [
        ((1, 6, 3, 32, 32), None, "6 frames does not fill clips of 4 frames"),
        ((8, 3, 32, 32), None, "needs video_num_frames"),
        ((8, 3, 32, 32), [4, 8], "add up to 12 frames, but pixel_values_videos has 8"),
        ((1, 8, 3, 40, 40), None, r"expects \(clips, frames, 3, 32, 32\)"),
    ],
)
def test_frames_that_do_not_fit_are_refused(model, frames, counts, message):
    with pytest.raises(ValueError, match=message):
        model.get_video_features(torch.zeros(frames), None if counts is None else torch.tensor(counts))


def test_merging_needs_more_patches_than_tokens():
    model = tiny_videochat_flash_model(tokens_per_frame=16)
    with pytest.raises(ValueError, match="64 tokens and a target of 64"):
        model.get_image_features(torch.randn(1, 3, 32, 32))


# ---------------------------------------------------------------- text and vision


@torch.no_grad()
def test_left_padded_batch_of_unequal_videos_and_images_equals_singles(model):
    torch.manual_seed(1)
    long, short, plain = video_inputs(12), video_inputs(4), {"input_ids": torch.randint(10, 250, (1, 9))}
    image = {"input_ids": torch.cat([torch.full((1, 16), IMAGE), torch.randint(10, 250, (1, 5))], 1)}
    image["pixel_values"] = torch.randn(1, 3, 32, 32)
    rows = [long, short, plain, image]
    width = max(r["input_ids"].shape[1] for r in rows)
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for row, r in enumerate(rows):
        length = r["input_ids"].shape[1]
        ids[row, width - length :], mask[row, width - length :] = r["input_ids"], 1
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.cat([long["pixel_values_videos"][0], short["pixel_values_videos"][0]]),
        "video_num_frames": torch.tensor([12, 4]),
        "pixel_values": image["pixel_values"],
    }
    for options in (GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}):
        together = model.generate(**batch, **options)[:, width:]
        per_row = options.get("num_return_sequences", 1)
        for row, r in enumerate(rows):
            alone = model.generate(**r, **options)[:, r["input_ids"].shape[1] :]
            assert together[row * per_row : (row + 1) * per_row].tolist() == alone.tolist()


@torch.no_grad()
def test_cached_generation_equals_uncached(model):
    inputs = video_inputs()
    cached = model.generate(**inputs, **GREEDY)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))


@torch.no_grad()
def test_chunked_prefill_equals_whole_prefill(model):
    inputs = video_inputs()
    try:
        chunked = model.generate(**inputs, **GREEDY, prefill_chunk_size=10)
    except ValueError as error:
        # Releases before the encoder outputs were split with the prompt refuse it, and say so.
        assert re.search("placeholder|chunk", str(error)), error
        return
    assert torch.equal(chunked, model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_generate_asks_for_logits_of_the_last_position_only(model, monkeypatch):
    shapes = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[1]) or head(x))
    model.generate(**video_inputs(), **GREEDY)
    assert shapes == [1] * 5


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = video_inputs()
    whole = model(**inputs).logits
    # Some processors sum a product of fewer rows in another order; float32.
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5, rtol=0)
    some = model(**inputs, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(some, whole[:, [0, 7]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    inputs = video_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    frames = inputs["pixel_values_videos"]
    assert torch.equal(model(inputs_embeds=embeds, pixel_values_videos=frames).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**inputs, inputs_embeds=embeds)


@torch.no_grad()
def test_placeholder_ids_may_lie_beyond_the_embedding_table():
    torch.manual_seed(0)
    model = tiny_videochat_flash_model(video_token_id=264, image_token_id=265)
    inputs = video_inputs()
    beyond = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO, 264)}
    model.config.video_token_id = VIDEO
    inside = model(**inputs).logits
    model.config.video_token_id = 264
    assert torch.equal(model(**beyond).logits, inside)


def test_mismatches_name_the_numbers(model):
    inputs = video_inputs()
    with pytest.raises(ValueError, match=r"32 video placeholder tokens .* 16 features"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=torch.randn(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="32 video placeholder tokens but no video was given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"0 image placeholder tokens .* 16 features"):
        model(**inputs, pixel_values=torch.randn(1, 3, 32, 32))


def test_every_parameter_gets_a_finite_gradient():
    model = tiny_videochat_flash_model().train()
    inputs = video_inputs()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    inputs = video_inputs()
    half = tiny_videochat_flash_model().to(torch.bfloat16)
    # On noise the two types may merge other pairs, so tower and decoder are compared on either side of merging.
    exact = model.get_video_features(inputs["pixel_values_videos"], output_tower_features=True)
    rounded = half.get_video_features(inputs["pixel_values_videos"], output_tower_features=True)
    # 8 bits of mantissa, 2 ** -8 = 0.004 per operation, over a few dozen operations in a row.
    assert (exact.last_hidden_state - rounded.last_hidden_state.float()).abs().max() < 0.1
    del inputs["pixel_values_videos"]
    logits = model(**inputs, mm_encoder_outputs={"video": exact}).logits
    error = half(**inputs, mm_encoder_outputs={"video": exact}).logits.float() - logits
    assert error.abs().mean() < 0.05 * logits.abs().mean()


@torch.no_grad()
def test_eager_equals_sdpa():
    model = tiny_videochat_flash_model()
    inputs = video_inputs()
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, sdpa, atol=1e-4, rtol=1e-4)  # two kernels in fp32


# ---------------------------------------------------------------- assisted decoding, embeddings, penalties


LONG = {**GREEDY, "max_new_tokens": 12}


@pytest.mark.parametrize("kind", ["itself", "other", "decoder", "lookup"])
def test_assisted_decoding_gives_what_plain_decoding_gives(model, kind):
    inputs = video_inputs()
    # A prompt that repeats itself, so that prompt lookup proposes placeholders too.
    inputs["input_ids"][:, -8:] = inputs["input_ids"][:, :8]
    inputs["input_ids"][inputs["input_ids"] == VIDEO] = 11
    inputs["input_ids"][:, 4:36] = VIDEO
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, 2:4]
    given = {
        "itself": {"assistant_model": model},
        "other": {"assistant_model": tiny_videochat_flash_model(seed=1)},
        "decoder": {"assistant_model": Qwen2ForCausalLM(model.config.text_config).eval()},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[kind]
    plain = model.generate(**inputs, visual_dropout=False, **LONG)
    assert torch.equal(model.generate(**inputs, visual_dropout=False, **LONG, **given), plain)


@pytest.mark.parametrize("kind", ["uniform", "attention"])
def test_assisted_decoding_with_visual_dropout_is_refused(model, kind):
    plan = {"type": kind, "layers": [1], "ratios": [1.0, 0.5]}
    for name, given in (("assistant_model", model), ("prompt_lookup_num_tokens", 3)):
        with pytest.raises(ValueError, match=f"{name} cannot be combined with visual dropout"):
            model.generate(**video_inputs(), visual_dropout=plan, **GREEDY, **{name: given})
    asked = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens cannot be combined"):
        model.generate(**video_inputs(), visual_dropout=plan, generation_config=asked)
    with pytest.raises(ValueError, match="assistant_model cannot be combined"):
        inputs = video_inputs()
        model.generate(
            inputs["input_ids"],
            None,
            None,
            None,
            None,
            None,
            model,
            pixel_values_videos=inputs["pixel_values_videos"],
            visual_dropout=plan,
        )


def test_an_assistant_of_another_width_is_refused(model):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    assistant = tiny_videochat_flash_model(text_kwargs=sizes)
    with pytest.raises(ValueError, match="decoder has the width 16, this model's 32"):
        model.generate(**video_inputs(), **GREEDY, assistant_model=assistant)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_from_embeddings(model, options):
    for inputs in (video_inputs(batch=2), {"input_ids": torch.randint(10, 250, (2, 9))}):
        expected = model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **GREEDY, **options), expected)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}])
def test_penalties_pass_over_placeholders_beyond_the_table(options):
    inside, beyond = tiny_videochat_flash_model(), tiny_videochat_flash_model(image_token_id=264, video_token_id=265)
    inputs = video_inputs()
    ids = inputs.pop("input_ids")
    expected = inside.generate(ids, **inputs, **GREEDY, **options)
    assert VIDEO not in expected[0, ids.shape[1] :]
    found = beyond.generate(ids.masked_fill(ids == VIDEO, 265), **inputs, **GREEDY, **options)
    assert torch.equal(found[:, ids.shape[1] :], expected[:, ids.shape[1] :])


# ---------------------------------------------------------------- encoding once


@torch.no_grad()
def test_encoded_video_serves_many_questions(model, tmp_path, monkeypatch):
    inputs = video_inputs(8)
    frames = inputs.pop("pixel_values_videos")
    encoded = model.encode_video(frames, source_key="a")
    assert encoded.num_frames == [8]
    expected = model.generate(**inputs, pixel_values_videos=frames, **GREEDY)
    other = {"input_ids": inputs["input_ids"].flip(1)}
    expected_other = model.generate(
        **other, pixel_values_videos=frames, **GREEDY, visual_dropout={"layers": [1], "ratios": [1.0, 0.5]}
    )
    encoded.save(tmp_path / "video")
    loaded = EncodedVideo.load(tmp_path / "video", key={"model": model.encoding_key(), "source": "a"})
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: pytest.fail("the tower ran again"))
    for video in (encoded, loaded):
        assert torch.equal(model.generate(**inputs, encoded_video=video, **GREEDY), expected)
        assert torch.equal(
            model.generate(
                **other, encoded_video=video, **GREEDY, visual_dropout={"layers": [1], "ratios": [1.0, 0.5]}
            ),
            expected_other,
        )
    with pytest.raises(ValueError, match="Both encoded_video and other video inputs"):
        model.generate(**inputs, encoded_video=encoded, pixel_values_videos=frames)


def test_encoded_video_of_another_source_model_or_damaged_is_refused(model, tmp_path):
    encoded = model.encode_video(torch.randn(1, 4, 3, 32, 32), source_key="a")
    encoded.save(tmp_path)
    with pytest.raises(ValueError, match="belongs to another source: stored a, expected b"):
        EncodedVideo.load(tmp_path, key={"source": "b"})
    other = tiny_videochat_flash_model(seed=1)
    with pytest.raises(ValueError, match="other weights or settings"):
        other.generate(input_ids=torch.tensor([[10, *[VIDEO] * 16, 11]]), encoded_video=encoded)
    with pytest.raises(FileNotFoundError, match=r"encoded_video\.json is missing"):
        EncodedVideo.load(tmp_path / "none")
    tensors = load_file(tmp_path / "features.safetensors")
    tensors["features.0"] = tensors["features.0"] + 1
    save_file(tensors, tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match="the tensors are not those"):
        EncodedVideo.load(tmp_path)
    (tmp_path / "features.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        EncodedVideo.load(tmp_path)


@torch.no_grad()
def test_encoded_video_of_other_tower_weights_is_refused():
    model = tiny_videochat_flash_model()
    inputs = video_inputs(4)
    encoded = model.encode_video(inputs.pop("pixel_values_videos"))
    assert model.generate(**inputs, encoded_video=encoded, **GREEDY).shape == (1, 33)
    model.model.vision_tower.blocks[1].mlp.fc2.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="other weights or settings"):
        model.generate(**inputs, encoded_video=encoded, **GREEDY)


def test_source_key_sees_content_and_settings(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    keys = {video_source_key(tmp_path / name, fps=fps) for name in "ab" for fps in (1, 2)}
    assert len(keys) == 4
    assert video_source_key(tmp_path / "a", fps=1) in keys


@torch.no_grad()
def test_encoder_outputs_in_place_of_pixels(model):
    inputs = video_inputs()
    frames = inputs.pop("pixel_values_videos")
    features = model.get_video_features(frames)
    expected = model.generate(**inputs, pixel_values_videos=frames, **GREEDY)
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": features}, **GREEDY), expected)
    with pytest.raises(ValueError, match="Both pixels and encoded features"):
        model(**inputs, pixel_values_videos=frames, mm_encoder_outputs={"video": features})


# ---------------------------------------------------------------- configuration and loading


@torch.no_grad()
def test_save_and_load_through_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = video_inputs()
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is VideoChatFlashForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is VideoChatFlashModel
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is VideoChatFlashConfig
    assert config.vision_config.model_type == "umt_vision_model"


def test_sharded_saving(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tied_head_stays_tied(tmp_path):
    model = tiny_videochat_flash_model(text_kwargs={"tie_word_embeddings": True})
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = VideoChatFlashForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.resize_token_embeddings(300)
    assert loaded.lm_head.weight.shape == (300, 32)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_yarn_reaches_the_decoder(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
    config = tiny_videochat_flash_config(text_kwargs={"rope_parameters": yarn})
    config.save_pretrained(tmp_path)
    model = VideoChatFlashForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    rotary = model.model.language_model.rotary_emb
    assert rotary.rope_type == "yarn"
    plain = tiny_videochat_flash_model().model.language_model.rotary_emb
    assert not torch.allclose(rotary.inv_freq, plain.inv_freq)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"llm_compress_type": "best"}, "llm_compress_type is 'best'; choose one of"),
        ({"vision_encode_type": "video"}, "vision_encode_type is 'video'"),
        ({"vision_chunk_size": 0}, "vision_chunk_size must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_videochat_flash_config(**kwargs)


def test_a_decoder_of_another_family_is_refused():
    config = tiny_videochat_flash_config()
    config.text_config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=264)
    with pytest.raises(ValueError, match=r"type 'gpt2' has no layers, norm, rotary_emb.*Llama family"):
        VideoChatFlashForConditionalGeneration(config)


@torch.no_grad()
def test_llama_decoder_is_accepted():
    text = {"model_type": "llama", **tiny_text_config(2).to_diff_dict(), "head_dim": 8}
    text["model_type"] = "llama"
    text.pop("layer_types", None)
    model = tiny_videochat_flash_model(text_config=text, num_hidden_layers=2)
    plan = {"type": "uniform0_attention", "layers": [1], "ratios": [1.0, 0.5]}
    assert model(**video_inputs(), visual_dropout=plan).logits.shape[1] == 12 + 16
