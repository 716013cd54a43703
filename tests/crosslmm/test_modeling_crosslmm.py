"""The model as users meet it: visibility, batches, caches, chunks, beams, switches, loading, refusals."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.utils import logging

from longvideo.modeling.crosslmm.encoded_video_crosslmm import CrossLMMEncodedVideo
from longvideo.modeling.crosslmm.modeling_crosslmm import CrossLMMForConditionalGeneration
from tests.tiny_crosslmm import open_gates, tiny_crosslmm_config, tiny_crosslmm_model, tiny_decoder_config

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Batched and single products sum in another order; float32 through four layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IMAGE, VIDEO = 3, 4


@pytest.fixture(scope="module")
def model():
    return tiny_crosslmm_model()


def prompt(*parts: int | str, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of text lengths, "image" and "video<frames>", with random pixels; four placeholders per frame."""
    generator = torch.Generator().manual_seed(seed)
    ids, frames, images = [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(10, 250, (part,), generator=generator).tolist()
        elif part == "image":
            ids, images = ids + [IMAGE] * 4, images + 1
        else:
            frames.append(int(part.removeprefix("video")))
            ids += [VIDEO] * 4 * frames[-1]
    row = {"input_ids": torch.tensor([ids])}
    if frames:
        row["pixel_values_videos"] = torch.randn(sum(frames), 3, 32, 32, generator=generator)
        row["video_num_frames"] = torch.tensor(frames)
    if images:
        row["pixel_values"] = torch.randn(images, 3, 32, 32, generator=generator)
    return row


def join(*rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of different length as one left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    ids = [F.pad(row["input_ids"], (width - row["input_ids"].shape[1], 0)) for row in rows]
    masks = [F.pad(torch.ones_like(row["input_ids"]), (width - row["input_ids"].shape[1], 0)) for row in rows]
    batch = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    for name in ("pixel_values_videos", "video_num_frames", "pixel_values"):
        parts = [row[name] for row in rows if name in row]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def changed_pixels(row: dict, name: str = "pixel_values_videos", frame: int = -1) -> dict:
    pixels = row[name].clone()
    pixels[frame] = -pixels[frame]
    return {**row, name: pixels}


# ---------------------------------------------------------------------- who sees what


@torch.no_grad()
def test_text_before_a_video_sees_nothing_of_it_and_text_after_sees_all(model):
    row = prompt(3, "video2", 2, "image", 2)
    logits = model(**row).logits
    for name, start in (("pixel_values_videos", 3), ("pixel_values", 13)):
        other = model(**changed_pixels(row, name)).logits
        assert torch.equal(other[:, :start], logits[:, :start])
        assert not torch.isclose(other[:, start:], logits[:, start:]).all(-1).any()


@torch.no_grad()
def test_cross_attention_alone_carries_what_merging_loses(model):
    """Swapping pixels inside a merged region leaves the merged tokens alone, so only cross-attention can notice."""
    row = prompt(2, "video1", 2)
    output = model.get_video_features(row["pixel_values_videos"], row["video_num_frames"])
    output.memory = [output.memory[0].roll(1, dims=0) + 0.1]
    ids = row["input_ids"]
    given = {"video": model.get_video_features(row["pixel_values_videos"], row["video_num_frames"])}
    plain = tiny_crosslmm_model(gates=0.0)
    for each, same in ((model, False), (plain, True)):
        a = each(input_ids=ids, mm_encoder_outputs=given).logits
        b = each(input_ids=ids, mm_encoder_outputs={"video": output}).logits
        assert torch.equal(a, b) is same


@torch.no_grad()
@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_closed_gates_leave_the_decoder_bit_identical(text):
    fresh = tiny_crosslmm_model(gates=None, text=text)
    row = prompt(3, "video2", 4)
    embeds = fresh.model.embed_prompt(**row).embeds
    plain = AutoModelForCausalLM.from_config(fresh.config.text_config).eval()
    state = {k: v for k, v in fresh.model.language_model.state_dict().items() if "dual_cross_attention" not in k}
    plain.model.load_state_dict(state)
    plain.lm_head.load_state_dict(fresh.lm_head.state_dict())
    assert torch.equal(fresh(**row).logits, plain(inputs_embeds=embeds).logits)
    open_gates(fresh)
    assert not torch.allclose(fresh(**row).logits, plain(inputs_embeds=embeds).logits, atol=1e-3)


SWITCHES = [
    {},
    {"use_t2v": False},
    {"use_v2v": False},
    {"share_kv": True},
    {"kv_source": "encoder"},
    {"kv_source": "encoder", "share_kv": True},
    {"gate_mode": "residual"},
    {"v2v_scope": "frame"},
    {"cross_attention_frame_rope": True},
    {"cross_attention_interval": 1},
    {"cross_attention_layers": [1, 3]},
    {"init_from_self_attn": True},
    {"tokens_per_frame": 1},
    {"merge_mode": "bilinear_antialias", "projector_norm": "none"},
    {"cross_attention_interval": None},
    {"text": "qwen3"},
    {"text": "llama"},
    {"text": "mistral"},
    {"tie_word_embeddings": True},
]


@torch.no_grad()
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) or "defaults")
def test_every_switch_decodes_with_a_cache_as_without(switches):
    model = tiny_crosslmm_model(**switches)
    row = prompt(3, "video3", 2, "image", 3)
    if switches.get("tokens_per_frame") == 1:
        ids = row["input_ids"][0].tolist()
        row["input_ids"] = torch.tensor([ids[:3] + [VIDEO] * 3 + ids[15:17] + [IMAGE] + ids[21:]])
    batch = join(row, prompt(4, seed=1))
    cached = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(**batch, **GREEDY, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **CLOSE)
    if switches.get("cross_attention_interval", 2):
        assert any("dual_cross_attention" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------------- batches


ROWS = (
    prompt(5, "video3", 4, seed=1),
    prompt(2, "video1", 1, "image", 3, "video2", 6, seed=2),
    prompt(7, seed=3),
    prompt(1, "image", "image", 2, seed=4),
)


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, {"gate_mode": "residual", "share_kv": True}, {"v2v_scope": "frame"}])
def test_left_padded_batch_of_unequal_rows_equals_singles(switches):
    model = tiny_crosslmm_model(**switches)
    batch = join(*ROWS)
    logits = model(**batch).logits
    tokens = model.generate(**batch, **GREEDY)
    for i, row in enumerate(ROWS):
        length = row["input_ids"].shape[1]
        torch.testing.assert_close(logits[i, -length:], model(**row).logits[0], **CLOSE)
        assert torch.equal(tokens[i, -5:], model.generate(**row, **GREEDY)[0, -5:])


@torch.no_grad()
def test_right_padding_and_stacked_frames_with_padding_equal_singles(model):
    rows = [prompt(3, "video3", 4), prompt(2, "video1", 1, seed=1)]
    width = rows[0]["input_ids"].shape[1]
    ids = torch.cat([F.pad(row["input_ids"], (0, width - row["input_ids"].shape[1])) for row in rows])
    frames = [row["pixel_values_videos"] for row in rows]
    pixels = torch.stack([F.pad(x, (0,) * 7 + (3 - len(x),)) for x in frames])
    logits = model(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        pixel_values_videos=pixels,
        video_num_frames=torch.tensor([3, 1]),
    ).logits
    for i, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        torch.testing.assert_close(logits[i, :length], model(**row).logits[0], **CLOSE)


@torch.no_grad()
def test_text_alone_skips_cross_attention(model, monkeypatch):
    row = prompt(6)
    monkeypatch.setattr(
        "longvideo.modeling.crosslmm.dual_cross_attention.CrossLMMDualCrossAttention.forward",
        lambda *args, **kwargs: pytest.fail("cross-attention ran"),
    )
    assert model.generate(**row, **GREEDY).shape == (1, 11)


# ---------------------------------------------------------------------- caches


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 7, 11, 100])
def test_chunked_prefill_is_exact_at_any_boundary(model, size):
    batch = join(ROWS[0], ROWS[1])
    wanted = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    found = model.generate(
        **batch, **GREEDY, prefill_chunk_size=size, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), **CLOSE)


@torch.no_grad()
def test_pieces_of_a_prompt_by_hand(model):
    row = prompt(3, "video2", 2, "video1", 3)
    wanted = model(**row).logits
    whole, cache, logits = model.model.embed_prompt(**row), DynamicCache(config=model.config.text_config), []
    for start, end in ((0, 6), (6, 14), (14, 15), (15, 20)):
        piece = {"inputs_embeds": whole.embeds[:, start:end], "visual_mask": whole.visual_mask[:, start:end]}
        logits.append(model(**piece, visual_inputs=whole.visuals, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, **CLOSE)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_an_empty_cache_is_a_prefill(model):
    row = prompt(3, "video2", 2)
    cache = DynamicCache(config=model.config.text_config)
    torch.testing.assert_close(model(**row, past_key_values=cache).logits, model(**row).logits, **CLOSE)
    with pytest.raises(ValueError, match="8 video placeholder tokens but no video was given"):
        model(row["input_ids"], past_key_values=DynamicCache(config=model.config.text_config))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_placeholder_that_the_model_writes_is_text(kind):
    model, row = tiny_crosslmm_model(), prompt(5)
    token = getattr(model.config, f"{kind}_token_id")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(token), 50.0))
    wanted = [*row["input_ids"][0].tolist(), *[token] * GREEDY["max_new_tokens"]]
    for use_cache in (True, False):
        assert model.generate(**row, **GREEDY, use_cache=use_cache)[0].tolist() == wanted
    with pytest.raises(ValueError, match=rf"holds \d {kind} placeholder tokens but no {kind} was given"):
        model.generate(input_ids=torch.tensor([wanted]), **GREEDY, use_cache=False)


@torch.no_grad()
def test_a_second_turn_with_a_new_video_goes_on_from_the_cache(model):
    first, second = prompt(3, "video2", 2), prompt(2, "video1", 3, seed=1)
    cache = DynamicCache(config=model.config.text_config)
    answer = model.generate(**first, past_key_values=cache, **GREEDY)
    ids = torch.cat([answer, second["input_ids"]], dim=1)
    names = ("pixel_values_videos", "video_num_frames")
    both = {name: torch.cat([first[name], second[name]]) for name in names}
    wanted = model.generate(input_ids=ids, **both, **GREEDY)
    new = {name: second[name] for name in names}
    assert torch.equal(model.generate(input_ids=ids, **new, past_key_values=cache, **GREEDY), wanted)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_beams_and_several_answers(model, rows):
    batch = join(*ROWS[:rows])
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    wanted = model.generate(**batch, **options, use_cache=False)
    assert wanted.shape[0] == 2 * rows
    assert torch.equal(model.generate(**batch, **options), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["itself", "crosslmm", "decoder", "lookup"])
def test_assisted_decoding_gives_what_plain_decoding_gives(model, kind):
    row = prompt(5, "video3", 2, "image", 4)
    options = {**GREEDY, "max_new_tokens": 9}
    wanted = model.generate(**row, **options)
    assistants = {
        "itself": {"assistant_model": model},
        "crosslmm": {"assistant_model": tiny_crosslmm_model(seed=5, cross_attention_interval=1)},
        "decoder": {"assistant_model": AutoModelForCausalLM.from_config(tiny_decoder_config()).eval()},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }
    assert torch.equal(model.generate(**row, **options, **assistants[kind]), wanted)


@torch.no_grad()
def test_an_assistant_of_another_width_is_refused(model):
    other = tiny_crosslmm_model(text_kwargs={"hidden_size": 16})
    with pytest.raises(ValueError, match="The assistant's decoder has the width 16, this model's 32"):
        model.generate(**prompt(2, "video1", 2), **GREEDY, assistant_model=other)


@torch.no_grad()
def test_a_static_cache_is_refused_with_visuals_and_works_for_text(model):
    with pytest.raises(ValueError, match="CrossLMM cannot keep visual keys in a StaticCache"):
        model.generate(**prompt(2, "video1", 2), **GREEDY, cache_implementation="static")
    row = prompt(5)
    static = model.generate(**row, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**row, **GREEDY))


@torch.no_grad()
def test_generate_asks_for_logits_of_the_last_position_only_and_logits_to_keep(model):
    row = prompt(3, "video1", 4)
    whole = model(**row).logits
    # Some processors sum a product of fewer rows in another order; float32.
    torch.testing.assert_close(model(**row, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5, rtol=0)
    some = model(**row, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(some, whole[:, [1, 5]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    row = prompt(3, "video1", 2, "image", 2)
    ids = row.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, **row).logits, model(ids, **row).logits)
    new = model.generate(inputs_embeds=embeds, **row, **GREEDY)
    assert torch.equal(new, model.generate(ids, **row, **GREEDY)[:, ids.shape[1] :])


@torch.no_grad()
def test_placeholder_ids_may_lie_beyond_the_embedding_table(model):
    row = prompt(3, "video1", 2, "image", 2)
    far = tiny_crosslmm_model(image_token_id=1000, video_token_id=1001)
    ids = row["input_ids"].clone()
    ids[ids == IMAGE], ids[ids == VIDEO] = 1000, 1001
    assert torch.equal(far(**{**row, "input_ids": ids}).logits, model(**row).logits)


# ---------------------------------------------------------------------- encoded before


@torch.no_grad()
def test_encoded_video_serves_many_questions(model, tmp_path):
    row = prompt(3, "video3", 4)
    wanted, logits = model.generate(**row, **GREEDY), model(**row).logits
    video = model.encode_video(row["pixel_values_videos"], row["video_num_frames"], source_key="s")
    video.save(tmp_path)
    loaded = CrossLMMEncodedVideo.load(tmp_path, {"source": "s", "model": model.encoding_key()})
    assert torch.equal(model.generate(row["input_ids"], encoded_video=loaded, **GREEDY), wanted)
    assert torch.equal(model(row["input_ids"], encoded_video=loaded).logits, logits)
    with pytest.raises(ValueError, match="Both encoded_video and other video inputs"):
        model.generate(**row, encoded_video=loaded, **GREEDY)
    with pytest.raises(ValueError, match="other weights or settings"):
        tiny_crosslmm_model(seed=1).generate(row["input_ids"], encoded_video=loaded, **GREEDY)


# ---------------------------------------------------------------------- training


def labels_of(batch: dict) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["input_ids"] < 10, -100)


def test_every_parameter_gets_a_finite_gradient():
    model = tiny_crosslmm_model().train()
    batch = join(*ROWS)
    model(**batch, labels=labels_of(batch)).loss.backward()
    without = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    batch = join(ROWS[0], ROWS[1])
    found = []
    for checkpointing in (False, True):
        model = tiny_crosslmm_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**batch, labels=labels_of(batch)).loss
        loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters()} | {"loss": loss.detach()})
    for name, value in found[0].items():
        # The tower's chunks are recomputed in the same order, float32.
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_fresh_gates_learn_at_the_first_step_and_projections_at_the_second():
    model = tiny_crosslmm_model(gates=None).train()
    batch = join(*ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=labels_of(batch)).loss.backward()
        moved.append({name for name, x in model.named_parameters() if "dual" in name and x.grad.abs().sum() > 0})
        optimizer.step()
    assert moved[0] == {name for name in moved[0] if name.endswith("_gate")}
    assert len(moved[0]) == 4
    assert any("t2v.q_proj" in name for name in moved[1]) and any("v2v.v_proj" in name for name in moved[1])


# ---------------------------------------------------------------------- loading


class Noise:
    """Collects what transformers logs as a warning."""

    def __init__(self, monkeypatch):
        self.lines: list[str] = []
        logger = logging.get_logger("transformers.modeling_utils")
        monkeypatch.setattr(logger, "warning", lambda text, *args, **kwargs: self.lines.append(str(text)))


@torch.no_grad()
def test_save_load_and_shard_through_the_auto_classes(model, tmp_path, monkeypatch):
    noise = Noise(monkeypatch)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert noise.lines == []
    assert type(loaded) is CrossLMMForConditionalGeneration
    row = prompt(3, "video2", 3)
    assert torch.equal(loaded.eval()(**row).logits, model(**row).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"init_t2v_from_v2v": True}, {"share_kv": True}, {"gate_mode": "residual"}])
def test_a_stage_1_checkpoint_becomes_a_stage_2_model(tmp_path, monkeypatch, options):
    noise = Noise(monkeypatch)
    first = tiny_crosslmm_model(use_t2v=False, gates=0.7, **options)
    first.save_pretrained(tmp_path)
    second = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, use_t2v=True).eval()
    assert noise.lines == []
    assert second.config.use_t2v
    row = prompt(3, "video2", 3)
    # The new branch adds tanh(0) times attention, or takes 1 times the row and nothing else.
    torch.testing.assert_close(second(**row).logits, first(**row).logits, rtol=1e-6, atol=1e-6)
    for name, x in second.named_parameters():
        if name.endswith("t2v_gate"):
            assert x.item() == (1.0 if options.get("gate_mode") == "residual" else 0.0)
        elif "t2v.q_proj.weight" in name:
            assert 0.1 < x.std() < 0.3
            v2v = second.get_parameter(name.replace("t2v.", "v2v."))
            assert torch.equal(x, v2v) is bool(options.get("init_t2v_from_v2v"))
    open_gates(second)
    assert not torch.allclose(second(**row).logits, first(**row).logits, atol=1e-3)


def test_a_checkpoint_with_half_of_t2v_is_noisy(model, tmp_path, monkeypatch):
    noise = Noise(monkeypatch)
    state = {k: v for k, v in model.state_dict().items() if "layers.2.dual_cross_attention.t2v" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    CrossLMMForConditionalGeneration.from_pretrained(tmp_path)
    assert any("t2v" in line for line in noise.lines)


@torch.no_grad()
def test_new_layers_start_with_the_norm_of_their_layer_and_closed_gates(tmp_path):
    plain = tiny_crosslmm_model(cross_attention_interval=None)
    for layer in plain.model.language_model.layers:
        layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    plain.save_pretrained(tmp_path)
    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path, cross_attention_interval=2).eval()
    layer = model.model.language_model.layers[2]
    assert torch.equal(layer.dual_cross_attention.query_norm.weight, layer.post_attention_layernorm.weight)
    row = prompt(3, "video2", 3)
    assert torch.equal(model(**row).logits, plain(**row).logits)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_a_new_model_out_of_published_parts(tmp_path, whole, text):
    torch.manual_seed(3)
    config = tiny_crosslmm_config(text=text)
    config.vision_config.vision_use_head = True
    tower = SiglipVisionModel(config.vision_config)
    if whole:
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        both = SiglipModel.config_class(vision_config=config.vision_config.to_dict(), text_config=sizes)
        siglip = SiglipModel(both)
        tower = siglip.vision_model
        siglip.save_pretrained(tmp_path / "vision")
    else:
        tower.save_pretrained(tmp_path / "vision")
    plain = AutoModelForCausalLM.from_config(tiny_decoder_config(text, tie_word_embeddings=text == "qwen2")).eval()
    plain.save_pretrained(tmp_path / "text")
    settings = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tokens_per_frame": 4, "cross_attention_interval": 2}
    model = CrossLMMForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "vision"), str(tmp_path / "text"), **settings
    )
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert model.config.tie_word_embeddings is (text == "qwen2")
    row = prompt(3, "video2", 3)
    pixels = row["pixel_values_videos"]
    shown = model.get_video_features(pixels, row["video_num_frames"], output_tower_features=True).last_hidden_state
    states = tower.eval()(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(shown, states[-2], rtol=1e-5, atol=1e-5)  # chunks of another size, float32
    ids = prompt(6)["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.generate(**row, **GREEDY).shape == (1, 19)
    model.save_pretrained(tmp_path / "whole")
    again = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(again(**row).logits, model(**row).logits)


# ---------------------------------------------------------------------- numerics and refusals


@torch.no_grad()
def test_eager_equals_sdpa(model):
    row = join(ROWS[0], ROWS[1])
    eager = tiny_crosslmm_model()
    eager.set_attn_implementation("eager")
    mask = row["attention_mask"].bool()
    torch.testing.assert_close(eager(**row).logits[mask], model(**row).logits[mask], **CLOSE)


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    row = prompt(3, "video2", 4)
    half = tiny_crosslmm_model().to(torch.bfloat16)
    logits = half(**row).logits
    assert logits.dtype == torch.bfloat16
    wanted = model(**row).logits
    # Eight bits of mantissa through tower, projector and four layers.
    assert F.cosine_similarity(logits.float().flatten(), wanted.flatten(), dim=0) > 0.98


@torch.no_grad()
def test_mismatches_name_the_numbers(model):
    row = prompt(3, "video2", 3)
    with pytest.raises(ValueError, match="8 video placeholder tokens but the video inputs give 4 features"):
        model(row["input_ids"], pixel_values_videos=row["pixel_values_videos"][None, :1])
    with pytest.raises(ValueError, match="8 video placeholder tokens but no video was given"):
        model(row["input_ids"])
    with pytest.raises(ValueError, match="0 image placeholder tokens but the image inputs give 4"):
        model(**row, pixel_values=torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    encoded = {"video": model.get_video_features(row["pixel_values_videos"][None])}
    with pytest.raises(ValueError, match="Both pixels and encoded features were given for the videos"):
        model(**row, mm_encoder_outputs=encoded)
    encoded["video"].memory = None
    with pytest.raises(ValueError, match="hold no original tokens"):
        model(row["input_ids"], mm_encoder_outputs=encoded)


def test_a_decoder_of_other_parts_is_refused():
    with pytest.raises(ValueError, match="CrossLMM can patch"):
        tiny_crosslmm_model(text="gemma2")
