"""Progressive visual dropout: against the naive decoder, in batches, with beams, in training, and what it refuses."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen3Config

from longvideo.modeling.videochat_flash.visual_dropout import (
    ATTENTION_DECODERS,
    UNIFORM_DECODERS,
    VisualDropoutPlan,
    build_plan,
    find_query_rows,
    query_row_attention,
    top_indices,
    uniform_indices,
)
from tests.reference.visual_dropout import NaiveDropout, naive_attention_map, naive_uniform_indices
from tests.tiny import tiny_text_config, tiny_videochat_flash_config, tiny_videochat_flash_model

PLANS = [
    {"type": "uniform", "layers": [1], "ratios": [1.0, 0.5]},
    {"type": "attention", "layers": [2], "ratios": [1.0, 0.4]},
    {"type": "uniform0_attention", "layers": [1, 3], "ratios": [1.0, 0.75, 0.25]},
    {"type": "uniform1_attention", "layers": [1, 2, 3], "ratios": [1.0, 0.75, 0.5, 0.2]},
]
VIDEO = 4


@pytest.fixture(scope="module")
def model():
    return tiny_videochat_flash_model()


def prompt(num_frames: int, num_before: int, num_after: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 250, (num_before + num_after,), generator=generator)
    ids = torch.cat([text[:num_before], torch.full((4 * num_frames,), VIDEO), text[num_before:]])
    frames = torch.randn(num_frames, 3, 32, 32, generator=generator)
    return {"input_ids": ids[None], "pixel_values_videos": frames[None]}


def left_pad(prompts: list[dict]) -> dict:
    width = max(p["input_ids"].shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, p in enumerate(prompts):
        length = p["input_ids"].shape[1]
        ids[row, width - length :] = p["input_ids"][0]
        mask[row, width - length :] = 1
    frames = [p["pixel_values_videos"][0] for p in prompts if "pixel_values_videos" in p]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.cat(frames),
        "video_num_frames": torch.tensor([len(f) for f in frames]),
    }


def naive_stages(plan: dict) -> list[str]:
    uniform = {"uniform": 99, "attention": 0, "uniform0_attention": 1, "uniform1_attention": 2}[plan["type"]]
    return ["uniform" if stage < uniform else "attention" for stage in range(len(plan["layers"]))]


def spliced(model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
    features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0]
    visual = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    embeds = embeds.index_copy(0, visual, features)
    return embeds, visual.tolist()


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize("num_before", [1, 2, 7, 63, 64, 288])
def test_uniform_indices_against_the_loop(num_before):
    for num_keep in range(1, num_before + 1):
        kept = uniform_indices(num_before, num_keep).tolist()
        loop = naive_uniform_indices(num_before, num_keep)
        # Where the exact value is an integer, the float64 step may fall just below it, as the original's does.
        assert all(0 <= b - a <= 1 for a, b in zip(kept, loop, strict=True))
        assert sum(a != b for a, b in zip(kept, loop, strict=True)) <= num_keep // 8
        assert kept == sorted(set(kept))
        assert kept[-1] == (num_before - 1 if num_keep > 1 else 0)
    assert uniform_indices(num_before, 0).tolist() == []


def test_uniform_indices_keep_the_rounding_of_the_original():
    assert uniform_indices(288, 36)[15].item() == 122  # 123 in exact arithmetic


def test_top_indices_break_ties_by_position():
    assert top_indices(torch.tensor([0.1, 0.5, 0.5, 0.2, 0.5]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("config", [None, "llama", "qwen3"])
def test_query_rows_equal_the_full_map(config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 264, "head_dim": 8}
    text = {None: tiny_text_config(2), "llama": LlamaConfig(**sizes), "qwen3": Qwen3Config(**sizes)}[config]
    language_model = tiny_videochat_flash_model(text_config=text).model.language_model
    hidden = torch.randn(1, 13, 32)
    rows = torch.zeros(1, 13, dtype=torch.bool)
    rows[0, [6, 12]] = True
    cos_sin = language_model.rotary_emb(hidden, torch.arange(13)[None])
    layer = language_model.layers[1]
    scores = query_row_attention(layer, hidden, cos_sin, torch.ones(1, 13, dtype=torch.bool), rows)
    if config == "qwen3":  # normed heads: the loop does not know them, the layer itself does
        eager = language_model.layers[1]
        eager.self_attn.config._attn_implementation = "eager"
        mask = torch.full((13, 13), float("-inf")).triu(1)[None, None]
        full = eager.self_attn(layer.input_layernorm(hidden), position_embeddings=cos_sin, attention_mask=mask)[1][0]
    else:
        full = naive_attention_map(layer, hidden[0], text.rope_parameters["rope_theta"])
    # fp32 softmax over 13 keys.
    torch.testing.assert_close(scores[0], full[:, [6, 12]].mean((0, 1)), atol=1e-6, rtol=1e-5)


def test_query_rows_are_the_last_token_or_the_token_before_each_answer():
    valid = torch.tensor([[False, True, True, True, True, True]])
    assert find_query_rows(valid, None).tolist() == [[False] * 5 + [True]]
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9]])
    assert find_query_rows(valid, labels).tolist() == [[False, True, False, False, True, False]]
    right_padded = torch.tensor([[True, True, True, False]])
    assert find_query_rows(right_padded, None).tolist() == [[False, False, True, False]]


# ---------------------------------------------------------------- against the naive decoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["type"])
@torch.no_grad()
def test_prefill_and_decoding_equal_the_naive_decoder(model, plan, attention):
    model.set_attn_implementation(attention)
    inputs = prompt(8, 5, 9, seed=1)
    length = inputs["input_ids"].shape[1]
    naive = NaiveDropout(model.model.language_model, plan["layers"], naive_stages(plan), plan["ratios"])
    embeds, visual = spliced(model, inputs)
    hidden, history = naive(embeds, visual, [length - 1])

    output = model(**inputs, visual_dropout=plan)
    assert [stage.kept_sequence_indices[0].tolist() for stage in output.visual_dropout] == history
    for stage in output.visual_dropout:
        kept = [visual.index(i) for i in stage.kept_sequence_indices[0].tolist() if i in set(visual)]
        assert stage.kept_visual_indices[0].tolist() == kept
        assert stage.position_ids[0].tolist() == list(range(len(stage.kept_sequence_indices[0])))
    # Two attention kernels in fp32.
    torch.testing.assert_close(output.logits[0], model.lm_head(hidden), atol=1e-4, rtol=1e-4)

    answer = []
    for _ in range(6):
        hidden, _ = naive(embeds, visual, [length - 1])
        answer.append(int(model.lm_head(hidden[-1]).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([answer[-1]]))])
    generated = model.generate(
        **inputs, visual_dropout=plan, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generated[0, length:].tolist() == answer


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["type"])
@torch.no_grad()
def test_left_padded_batch_equals_singles(model, plan):
    model.set_attn_implementation("sdpa")
    singles = [prompt(8, 5, 9, 1), prompt(4, 3, 6, 2), prompt(16, 11, 4, 3)]
    batch = left_pad(singles)
    output = model(**batch, visual_dropout=plan, position_ids=None)
    for row, single in enumerate(singles):
        alone = model(**single, visual_dropout=plan)
        for ours, theirs in zip(output.visual_dropout, alone.visual_dropout, strict=True):
            assert torch.equal(ours.kept_visual_indices[row], theirs.kept_visual_indices[0])
        length = alone.logits.shape[1]
        # Batched and single products differ by fp32 rounding.
        torch.testing.assert_close(output.logits[row, -length:], alone.logits[0], atol=1e-4, rtol=1e-4)
    options = {
        "visual_dropout": plan,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, single in enumerate(singles):
        assert (
            together[row].tolist() == model.generate(**single, **options)[0, single["input_ids"].shape[1] :].tolist()
        )


@torch.no_grad()
def test_beams_equal_beams_of_singles(model):
    singles = [prompt(8, 5, 9, 1), prompt(4, 3, 6, 2)]
    batch = left_pad(singles)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["visual_dropout"] = PLANS[2]
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, single in enumerate(singles):
        assert (
            together[row].tolist() == model.generate(**single, **options)[0, single["input_ids"].shape[1] :].tolist()
        )


@torch.no_grad()
def test_cache_lengths_differ_per_layer_and_a_second_turn_continues(model):
    plan = PLANS[2]
    inputs = prompt(8, 5, 9, 1)
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, visual_dropout=plan, past_key_values=cache, use_cache=True)
    assert [cache.get_seq_length(i) for i in range(4)] == [46, 38, 38, 22]
    # A second turn of several tokens on the same cache drops nothing and equals token-by-token decoding.
    more = torch.tensor([[30, 31, 32]])
    many = model(input_ids=more, past_key_values=cache, use_cache=True).logits
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, visual_dropout=plan, past_key_values=cache, use_cache=True)
    single = [model(input_ids=more[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(3)]
    torch.testing.assert_close(many, torch.cat(single, 1), atol=1e-4, rtol=1e-4)  # fp32 rounding
    assert [cache.get_seq_length(i) for i in range(4)] == [49, 41, 41, 25]


@torch.no_grad()
def test_nothing_stays_on_the_model(model):
    text = torch.randint(10, 250, (1, 12))
    before = model(input_ids=text).logits
    model.generate(**prompt(8, 5, 9, 1), visual_dropout=PLANS[2], max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model(input_ids=text).logits, before)
    assert model(input_ids=text, visual_dropout=PLANS[2]).visual_dropout is None


@torch.no_grad()
def test_switch_by_configuration_and_by_call():
    config = {"mm_llm_compress": True, "llm_compress_type": "uniform", "llm_compress_layer_list": [2]}
    model = tiny_videochat_flash_model(**config, llm_image_token_ratio_list=[1.0, 0.5])
    inputs = prompt(8, 5, 9, 1)
    assert model(**inputs).logits.shape[1] == 30
    assert model(**inputs, visual_dropout=False).logits.shape[1] == 46
    assert model(**inputs, visual_dropout={"ratios": [1.0, 0.25]}).logits.shape[1] == 22
    model.config.mm_llm_compress = False
    assert model(**inputs).logits.shape[1] == 46
    assert model(**inputs, visual_dropout=True).logits.shape[1] == 30


@torch.no_grad()
def test_several_videos_and_images_in_one_prompt_are_one_row_of_visual_tokens(model):
    ids = torch.tensor([[11, *[VIDEO] * 16, 12, *[3] * 16, 13, *[VIDEO] * 32, 14, 15]])
    output = model(
        input_ids=ids,
        pixel_values_videos=torch.randn(12, 3, 32, 32),
        video_num_frames=torch.tensor([4, 8]),
        pixel_values=torch.randn(1, 3, 32, 32),
        visual_dropout={"type": "uniform", "layers": [1], "ratios": [1.0, 0.25]},
    )
    kept = output.visual_dropout[0].kept_visual_indices[0]
    assert kept.tolist() == uniform_indices(64, 16).tolist()
    assert output.logits.shape[1] == 16 + 5


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["type"])
def test_training_gathers_labels_and_reaches_every_parameter(plan):
    model = tiny_videochat_flash_model().train()
    batch = left_pad([prompt(8, 5, 9, 1), prompt(4, 3, 6, 2)])
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    for row in range(2):  # also two tokens in front of the video, which move when tokens behind them are dropped
        first = int((batch["input_ids"][row] == VIDEO).nonzero()[0])
        labels[row, first - 2 : first] = batch["input_ids"][row, first - 2 : first]
    output = model(**batch, labels=labels, visual_dropout=plan)
    answers = [labels[row][labels[row] != -100].tolist() for row in range(2)]
    assert [row[row != -100].tolist() for row in output.labels] == answers
    shifted = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, shifted)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_training_without_an_answer_does_not_reduce_by_attention():
    model = tiny_videochat_flash_model().train()
    batch = left_pad([prompt(8, 5, 9, 1), prompt(8, 5, 9, 2)])
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    labels[1] = -100
    stages = model(**batch, labels=labels, visual_dropout=PLANS[1]).visual_dropout
    assert [len(kept) for kept in stages[0].kept_visual_indices] == [12, 32]
    assert stages[0].scores[1] is None


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny_videochat_flash_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = prompt(8, 5, 9, 1)
        labels = inputs["input_ids"].clone()
        labels[:, :-5] = -100
        model(**inputs, labels=labels, visual_dropout=PLANS[2]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)  # recomputation rounds alike


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"type": "random"}, "type is 'random'; choose one of"),
        ({"type": "uniform", "layers": [1, 2], "ratios": [1.0, 0.5]}, "2 layers .* needs one ratio more"),
        ({"type": "uniform", "layers": [2, 1], "ratios": [1.0, 0.5, 0.2]}, "layers must rise"),
        ({"type": "attention", "layers": [4], "ratios": [1.0, 0.5]}, "after 4 layers .* decoder of 4 layers"),
        ({"type": "uniform", "layers": [0], "ratios": [1.0, 0.5]}, "after 0 layers"),
        ({"type": "uniform", "layers": [1], "ratios": [0.9, 0.5]}, "must start at 1.0"),
        ({"type": "uniform", "layers": [1, 2], "ratios": [1.0, 0.5, 0.7]}, "not rise"),
        ({"kind": "uniform"}, r"got \['kind'\] as well"),
    ],
)
def test_plans_that_do_not_fit_are_refused(wish, message):
    with pytest.raises(ValueError, match=message):
        build_plan(tiny_videochat_flash_config(), wish)


def test_plan_from_configuration():
    config = tiny_videochat_flash_config(num_hidden_layers=28)
    assert build_plan(config) is None
    assert build_plan(config, True) == VisualDropoutPlan("attention", (8, 16, 24), (1.0, 0.5, 0.25, 0.125))
    assert build_plan(config, {"layers": [], "ratios": [1.0]}) is None


def test_static_cache_chunked_prefill_and_attention_maps_are_refused(model):
    inputs = prompt(8, 5, 9, 1)
    with pytest.raises(ValueError, match="static cache cannot hold"):
        model.generate(**inputs, visual_dropout=PLANS[0], cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size=8 cannot be combined"):
        model.generate(**inputs, visual_dropout=PLANS[0], prefill_chunk_size=8, max_new_tokens=2)
    with pytest.raises(ValueError, match="Attention maps are not collected"):
        model(**inputs, visual_dropout=PLANS[0], output_attentions=True)


# ---------------------------------------------------------------- decoders

OWN_FIELDS = {
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "mistral": {"sliding_window": None},  # as from version 0.2 on
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
}


def model_with(decoder: str, **fields):
    """A tiny model with another decoder of four layers."""
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    text = {name: getattr(tiny_text_config(), name) for name in (*shared, "max_position_embeddings")}
    text |= {"model_type": decoder, "num_hidden_layers": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"pad_token_id": 0, **OWN_FIELDS.get(decoder, {}), **fields}
    return tiny_videochat_flash_model(text_config=text)


@torch.no_grad()
@pytest.mark.parametrize("decoder", UNIFORM_DECODERS)
def test_layers_one_by_one_are_the_decoder(decoder):
    model, inputs = model_with(decoder), prompt(8, 4, 6, seed=0)
    for kind in ("uniform", "attention") if decoder in ATTENTION_DECODERS else ("uniform",):
        keep_all = {"type": kind, "layers": [1, 2], "ratios": [1.0, 1.0, 1.0]}
        found = model(**inputs, visual_dropout=keep_all).logits
        assert torch.equal(found, model(**inputs).logits), kind  # the same operations


@torch.no_grad()
@pytest.mark.parametrize("decoder", ATTENTION_DECODERS)
def test_scores_are_the_attention_of_the_layer(decoder):
    model, inputs = model_with(decoder), prompt(4, 4, 6, seed=1)
    model.set_attn_implementation("eager")
    shown = model(**inputs, output_attentions=True, output_hidden_states=True)
    wish = {"type": "attention", "layers": [2], "ratios": [1.0, 0.5]}
    [stage] = model(**inputs, visual_dropout=wish).visual_dropout
    expected = shown.attentions[2][0, :, -1, 4:20].mean(0)
    torch.testing.assert_close(stage.scores[0], expected, atol=1e-6, rtol=1e-5)  # sums in another order


@torch.no_grad()
def test_sliding_windows_of_a_whole_decoder():
    model, inputs = model_with("mistral", sliding_window=8), prompt(8, 4, 6, seed=0)
    keep_all = {"type": "uniform", "layers": [1, 2], "ratios": [1.0, 1.0, 1.0]}
    assert torch.equal(model(**inputs, visual_dropout=keep_all).logits, model(**inputs).logits)
    new = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **new, visual_dropout=keep_all), model.generate(**inputs, **new))
    with pytest.raises(ValueError, match="next layer, which has sliding_attention"):
        model(**inputs, visual_dropout={**keep_all, "type": "attention"})


@pytest.mark.parametrize(
    ("decoder", "kind", "message"),
    [
        ("granite", "uniform", r"type 'granite', only with cohere, .*starcoder2\. Pass visual_dropout=False\."),
        ("olmo2", "attention", "decoder of type 'olmo2', only with gemma, llama"),
        ("cohere", "uniform0_attention", r"'cohere', only with gemma.*visual_dropout=False, or type 'uniform'"),
    ],
)
def test_decoders_that_were_not_compared_are_refused(decoder, kind, message):
    model, inputs = model_with(decoder), prompt(4, 4, 6, seed=0)
    with pytest.raises(ValueError, match=message):
        model(**inputs, visual_dropout={"type": kind, "layers": [1, 2], "ratios": [1.0, 0.5, 0.25]})
    assert model(**inputs).logits.shape[1] == 26
