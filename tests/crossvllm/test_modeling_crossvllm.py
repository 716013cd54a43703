"""The model as users meet it: the backbone's outputs, batches, caches, beams, encoded videos, refusals."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from longvideo.modeling.crossvllm.configuration_crossvllm import CrossVLLMConfig
from longvideo.modeling.crossvllm.encoded_video_crossvllm import CrossVLLMEncodedVideo
from longvideo.modeling.crossvllm.modeling_crossvllm import CrossVLLMForConditionalGeneration
from longvideo.modeling.crossvllm.vision_crossvllm import pool_patches
from tests.crossvllm.prompts_crossvllm import TOKENS, VIDEO, join, prompt
from tests.tiny_crossvllm import tiny_crossvllm_config, tiny_crossvllm_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Batched and single products sum in another order; float32 through two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BOTH = pytest.mark.parametrize("granularity", list(TOKENS))


@pytest.fixture(scope="module")
def model():
    return tiny_crossvllm_model()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A LLaVA-NeXT-Video of the same sizes, and the folder that it is saved in."""
    config = tiny_crossvllm_config(rope_factor=1)
    torch.manual_seed(0)
    upstream = LlavaNextVideoConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        video_token_index=config.video_token_id,
        image_grid_pinpoints=[[48, 96]],
    )
    for part in (upstream, upstream.text_config, upstream.vision_config):
        part.initializer_range = 0.2
    folder = tmp_path_factory.mktemp("backbone")
    model = LlavaNextVideoForConditionalGeneration(upstream).eval()
    model.save_pretrained(folder)
    return model, folder


# ---------------------------------------------------------------------- configuration


def test_defaults_are_the_numbers_of_the_paper():
    config = CrossVLLMConfig()
    assert [config.tokens_per_frame(name) for name in TOKENS] == [16, 144]
    assert [config.num_frames(name) for name in TOKENS] == [288, 32]
    assert [config.num_frames(name, training=True) for name in TOKENS] == [144, 16]
    rope = config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], config.text_config.max_position_embeddings) == ("linear", 2.0, 8192)
    again = CrossVLLMConfig.from_dict(config.to_dict()).text_config
    assert (again.rope_parameters["factor"], again.max_position_embeddings) == (2.0, 8192)


def test_positions_are_stretched_in_the_decoder():
    plain, stretched = (
        tiny_crossvllm_model(adapters=False, rope_factor=factor).model.language_model.rotary_emb.inv_freq
        for factor in (1, 2.0)
    )
    assert torch.equal(plain, 2 * stretched)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"coarse_stride": 5}, r"coarse_stride is 5, but a frame has 12 x 12 patches.*\[1, 2, 3, 4, 6, 12\]"),
        ({"fine_stride": 0}, "fine_stride is 0"),
        ({"default_granularity": "middle"}, "granularity is 'middle'; choose one of"),
        ({"spatial_pool_mode": "conv"}, "choose 'average' or 'max'"),
        ({"vision_feature_layer": -5}, "no output of a tower with 3 layers"),
        ({"fine_num_frames": 0}, "fine_num_frames must be at least 1"),
        ({"rope_factor": 0.5}, "rope_factor is 0.5"),
        ({"vision_kwargs": {"model_type": "siglip_vision_model"}}, "takes 'clip_vision_model'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        tiny_crossvllm_config(**kwargs)


# ---------------------------------------------------------------------- the backbone


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 3, 6, 12])
def test_it_gives_what_llava_next_video_gives_at_any_stride(backbone, stride):
    upstream, folder = backbone
    upstream.model.vision_resampler.pool.kernel_size = upstream.model.vision_resampler.pool.stride = stride
    options = {"rope_factor": 1, "coarse_stride": stride, "vision_chunk_size": 2}
    ours = CrossVLLMForConditionalGeneration.from_backbone_pretrained(folder, **options)
    ids = torch.cat([torch.tensor([[9, 8]]), torch.full((1, 3 * (12 // stride) ** 2), VIDEO), torch.tensor([[7]])], 1)
    pixels = torch.randn(1, 3, 3, 48, 48)
    expected = upstream(input_ids=ids, pixel_values_videos=pixels).logits
    # Pooled in two steps where the strides share a divisor, and the tower runs in chunks: float32 rounding.
    torch.testing.assert_close(ours(input_ids=ids, pixel_values_videos=pixels).logits, expected, **CLOSE)


@torch.no_grad()
def test_a_new_model_from_a_backbone_stretches_its_positions_and_copies_its_projector(backbone):
    upstream, folder = backbone
    ours = CrossVLLMForConditionalGeneration.from_backbone_pretrained(folder)
    assert torch.equal(
        2 * ours.model.language_model.rotary_emb.inv_freq, upstream.model.language_model.rotary_emb.inv_freq
    )
    projectors = ours.model.projectors
    assert torch.equal(projectors["coarse"].linear_1.weight, projectors["fine"].linear_1.weight)
    assert projectors["coarse"].linear_1.weight is not projectors["fine"].linear_1.weight
    assert ours.has_adapters
    assert not ours.training
    assert not any(parameter.is_meta for parameter in ours.parameters())


def test_another_backbone_is_refused(tmp_path):
    tiny_crossvllm_model(adapters=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'crossvllm'; CrossVLLM takes 'llava_next_video'"):
        CrossVLLMForConditionalGeneration.from_backbone_pretrained(tmp_path)


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize("stride", [1, 2, 3, 6])
def test_pooling_equals_a_loop_over_squares(mode, stride):
    patches = torch.randn(2, 36, 5)
    grid = patches.view(2, 6, 6, 5)
    rows = []
    for y in range(0, 6, stride):
        for x in range(0, 6, stride):
            square = grid[:, y : y + stride, x : x + stride].flatten(1, 2)
            rows.append(square.mean(1) if mode == "average" else square.amax(1))
    torch.testing.assert_close(
        pool_patches(patches, stride, mode), torch.stack(rows, 1), rtol=0, atol=1e-6
    )  # rounding


# ---------------------------------------------------------------------- batches, caches, generation


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_of_unequal_rows_equals_singles(model, granularity, side):
    rows = [
        prompt(3, "video2", 4, granularity=granularity, seed=1),
        prompt(2, "video3", 1, "video1", 5, granularity=granularity, seed=2),
        prompt(6, seed=3),
        prompt(1, "image", 2, "video1", 3, granularity=granularity, seed=4),
    ]
    batch = join(*rows, side=side)
    logits = model(**batch, granularity=granularity).logits
    for row, mask, found in zip(rows, batch["attention_mask"], logits, strict=True):
        torch.testing.assert_close(found[mask.bool()], model(**row, granularity=granularity).logits[0], **CLOSE)


@torch.no_grad()
def test_left_padded_batch_generates_what_singles_generate(model):
    rows = [prompt(3, f"video{n}", 4, seed=n) for n in (1, 3)]
    batch = model.generate(**join(*rows), **GREEDY)[:, -4:]
    assert batch.tolist() == [model.generate(**row, **GREEDY)[0, -4:].tolist() for row in rows]


@torch.no_grad()
def test_stacked_frames_with_padding_equal_flat_ones(model):
    rows = [prompt(3, "video1", 4, seed=1), prompt(3, "video3", 4, seed=2)]
    flat = join(*rows)
    stacked = torch.full((2, 3, 3, 48, 48), 9.0)
    stacked[0, :1], stacked[1] = rows[0]["pixel_values_videos"], rows[1]["pixel_values_videos"]
    assert torch.equal(model(**flat).logits, model(**{**flat, "pixel_values_videos": stacked}).logits)


@torch.no_grad()
@BOTH
def test_cached_generation_equals_uncached_chunked_and_beams_of_one(model, granularity):
    row = prompt(3, "video2", 4, granularity=granularity)
    plain = model.generate(**row, **GREEDY, granularity=granularity)
    assert plain.shape[1] == row["input_ids"].shape[1] + 4
    for options in ({"use_cache": False}, {"prefill_chunk_size": 5}):
        assert torch.equal(model.generate(**row, **GREEDY, granularity=granularity, **options), plain)
    one = model.generate(**row, **GREEDY, granularity=granularity, num_beams=2, num_return_sequences=2)
    assert len(one) == 2


@torch.no_grad()
def test_beams_of_a_batch_equal_beams_of_singles(model):
    rows = [prompt(3, "video1", 4, seed=1), prompt(3, "video2", 4, seed=2)]
    beams = {**GREEDY, "num_beams": 3}
    batch = model.generate(**join(*rows), **beams)[:, -4:]
    assert batch.tolist() == [model.generate(**row, **beams)[0, -4:].tolist() for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["itself", "crossvllm", "decoder", "lookup"])
@BOTH
def test_assisted_decoding_gives_what_plain_decoding_gives(model, granularity, kind):
    row = prompt(5, "video3", 2, "image", 4, granularity=granularity)
    options = {**GREEDY, "max_new_tokens": 9, "granularity": granularity}
    wanted = model.generate(**row, **options)
    assistants = {
        "itself": lambda: {"assistant_model": model},
        "crossvllm": lambda: {"assistant_model": tiny_crossvllm_model(seed=5)},
        "decoder": lambda: {"assistant_model": AutoModelForCausalLM.from_config(model.config.text_config).eval()},
        "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }
    assert torch.equal(model.generate(**row, **options, **assistants[kind]()), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_placeholder_that_the_model_writes_is_text(kind):
    model, row = tiny_crossvllm_model(), prompt(5)
    token = getattr(model.config, f"{kind}_token_id")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(token), 50.0))
    wanted = [*row["input_ids"][0].tolist(), *[token] * GREEDY["max_new_tokens"]]
    for use_cache in (True, False):
        assert model.generate(**row, **GREEDY, use_cache=use_cache)[0].tolist() == wanted
    with pytest.raises(ValueError, match=rf"holds \d {kind} placeholder tokens but no {kind} was given"):
        model.generate(input_ids=torch.tensor([wanted]), **GREEDY, use_cache=False)


@torch.no_grad()
def test_a_second_turn_with_a_new_video_goes_on_from_the_cache(model):
    first, second = prompt(2, "video2", 3, seed=1), prompt(2, "video1", 3, seed=2)
    cache = DynamicCache(config=model.model.language_model.config)
    answer = model.generate(**first, **GREEDY, past_key_values=cache)
    ids = torch.cat([answer, second["input_ids"]], 1)
    later = {name: second[name] for name in ("pixel_values_videos", "video_num_frames")}
    found = model.generate(ids, **later, **GREEDY, past_key_values=cache)
    whole = {name: torch.cat([first[name], second[name]]) for name in later}
    assert torch.equal(found, model.generate(ids, **whole, **GREEDY))


@torch.no_grad()
def test_embeddings_in_place_of_ids_and_text_alone(model):
    row = prompt(3, "video2", 4)
    embeds = model.get_input_embeddings()(row.pop("input_ids"))
    ids = prompt(3, "video2", 4)
    assert torch.equal(model(inputs_embeds=embeds, **row).logits, model(**ids).logits)
    text = torch.tensor([[9, 8, 7, 6]])
    plain = tiny_crossvllm_model(adapters=False)
    decoder = AutoModelForCausalLM.from_config(plain.config.text_config).eval()
    decoder.model.load_state_dict(plain.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(plain.lm_head.state_dict())
    assert torch.equal(plain(text).logits, decoder(text).logits)


@torch.no_grad()
def test_placeholder_ids_may_lie_beyond_the_embedding_table():
    model = tiny_crossvllm_model(adapters=False)
    row = prompt(3, "video2", 4)
    expected = model(**row).logits
    model.config.video_token_id = 5000
    row["input_ids"] = row["input_ids"].masked_fill(row["input_ids"] == VIDEO, 5000)
    assert torch.equal(model(**row).logits, expected)


@torch.no_grad()
def test_an_encoded_video_serves_both_granularities_from_memory_and_disk(model, tmp_path):
    coarse = prompt(3, "video1", 2, "video2", 4)
    fine = prompt(3, "video1", 2, "video2", 4, granularity="fine")
    encoded = model.encode_video(coarse["pixel_values_videos"], coarse["video_num_frames"], source_key="film")
    encoded.save(tmp_path)
    loaded = CrossVLLMEncodedVideo.load(tmp_path, key={"source": "film", "model": model.encoding_key()})
    for row, name in ((coarse, "coarse"), (fine, "fine")):
        expected = model(**row, granularity=name).logits
        answer = model.generate(**row, **GREEDY, granularity=name)
        for video in (encoded, loaded):
            given = {"input_ids": row["input_ids"], "encoded_video": video, "granularity": name}
            assert torch.equal(model(**given).logits, expected)
            assert torch.equal(model.generate(**given, **GREEDY), answer)
    other = tiny_crossvllm_model(seed=1)
    with pytest.raises(ValueError, match="model with other weights"):
        other(input_ids=coarse["input_ids"], encoded_video=encoded)
    with pytest.raises(ValueError, match="pass one of them"):
        model(**coarse, encoded_video=encoded)


@torch.no_grad()
def test_video_features_say_whose_they_are(model):
    row = prompt("video1", "video2")
    pixels, counts = row["pixel_values_videos"], row["video_num_frames"]
    kept = model.get_vision_features(pixels, counts)
    assert [tuple(x.shape) for x in kept] == [(1, 36, 24), (2, 36, 24)]
    for name, tokens in TOKENS.items():
        output = model.get_video_features(pixels, counts, granularity=name, output_tower_features=True)
        assert (output.granularity, output.num_frames) == (name, [1, 2])
        assert [tuple(x.shape) for x in output.pooler_output] == [(tokens, 32), (2 * tokens, 32)]
        assert output.last_hidden_state.shape == (3, 145, 24)
        again = model.get_video_features(vision_features=kept, granularity=name)
        assert all(map(torch.equal, again.pooler_output, output.pooler_output))
    output = model.get_video_features(pixels, counts)
    assert torch.equal(model(row["input_ids"], mm_encoder_outputs={"video": output}).logits, model(**row).logits)
    with pytest.raises(ValueError, match="have the granularity 'coarse', but 'fine' is active"):
        model(row["input_ids"], mm_encoder_outputs={"video": output}, granularity="fine")


# ---------------------------------------------------------------------- learning and types


@torch.no_grad()
def test_bfloat16_is_close_to_float32():
    model, half = tiny_crossvllm_model(), tiny_crossvllm_model().to(torch.bfloat16)
    row = prompt(3, "video2", 4)
    a, b = model(**row).logits, half(**row).logits.float()
    # bfloat16 keeps 8 bits; errors of some per cent over the layers, far below a wrong feature.
    assert (a - b).norm() < 0.1 * a.norm()


def test_mismatches_name_the_numbers(model):
    coarse, fine = prompt(3, "video2", 4), prompt(3, "video2", 4, granularity="fine")
    with pytest.raises(ValueError, match=r"holds 72 video placeholder tokens for 2 frames, those of.*'fine'"):
        model(**fine)
    with pytest.raises(ValueError, match="granularity='coarse'"):
        model.generate(**coarse, granularity="fine")
    with pytest.raises(ValueError, match="holds 8 video placeholder tokens but the video inputs give 4"):
        model(coarse["input_ids"], pixel_values_videos=coarse["pixel_values_videos"][None, :1])
    with pytest.raises(ValueError, match="8 video placeholder tokens but no video was given"):
        model(coarse["input_ids"])
    with pytest.raises(ValueError, match=r"shape \(2, 3, 47, 48\); the tower takes \(videos, frames, 3, 48, 48\)"):
        model(coarse["input_ids"], pixel_values_videos=coarse["pixel_values_videos"][:, :, 1:])
    with pytest.raises(ValueError, match="needs video_num_frames"):
        model(coarse["input_ids"], pixel_values_videos=coarse["pixel_values_videos"])
    with pytest.raises(ValueError, match="every video has at least one frame"):
        model.get_video_features(coarse["pixel_values_videos"], torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="does not fit pixel_values_videos"):
        model.get_video_features(coarse["pixel_values_videos"][None], torch.tensor([3]))
    with pytest.raises(ValueError, match="either pixel_values_videos or vision_features"):
        model.get_video_features()
    with pytest.raises(ValueError, match=r"shape \(2, 35, 24\); expected \(frames, 36, 24\)"):
        model.get_video_features(vision_features=[torch.zeros(2, 35, 24)])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
