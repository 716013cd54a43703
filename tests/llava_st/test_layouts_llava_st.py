"""Folded and split vocabularies: the same model in two layouts, saved, resized, tied, and with adapters of PEFT."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from longvideo.modeling.llava_st.configuration_llava_st import LlavaSTConfig
from longvideo.modeling.llava_st.layout_llava_st import fold_state_dict, unfold_state_dict
from longvideo.modeling.llava_st.modeling_llava_st import LlavaSTForConditionalGeneration, LlavaSTModel
from longvideo.modeling.llava_st.splicing_llava_st import block_ids
from tests.tiny_llava_st import tiny_llava_st_config, tiny_llava_st_model

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYOUTS = ("folded", "split")
TIED = {"text_kwargs": {"tie_word_embeddings": True}}


def question(config) -> dict:
    """Every kind of position: both visuals, templates, discrete coordinates, text."""
    start = config.coordinate_token_start
    templates = [*config.input_template_ids, *config.output_template_ids]
    ids = [
        11,
        *block_ids(config, "video"),
        40,
        *block_ids(config, "image"),
        *templates,
        start,
        start + 9,
        start + 15,
        41,
    ]
    torch.manual_seed(4)
    ids = torch.tensor([ids])
    return {
        "input_ids": ids,
        "coordinate_values": torch.rand(ids.shape),
        "pixel_values_videos": torch.randn(1, 6, 3, 32, 32),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def both(**kwargs) -> tuple[LlavaSTForConditionalGeneration, LlavaSTForConditionalGeneration]:
    """A folded model and the same one split."""
    folded, split = tiny_llava_st_model(**kwargs), tiny_llava_st_model(**kwargs)
    assert split.unfold_coordinates() is split
    return folded, split


@pytest.mark.parametrize("options", [{}, TIED, {"splice_fast_stream": False, "inject_width_inputs": False}])
def test_both_layouts_compute_the_same(options):
    folded, split = both(**options)
    inputs = question(folded.config)
    assert split.config.text_config.vocab_size == split.lm_head.out_features == 275
    assert folded.config.num_logits == split.config.num_logits == 291
    labels = {"labels": inputs["input_ids"]}
    outputs = [model(**inputs, **labels) for model in (folded, split)]
    assert outputs[0].logits.shape[-1] == 291
    # Columns of another matrix product.
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-5, rtol=1e-5)
    for generation in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "prefill_chunk_size": 9}):
        assert torch.equal(split.generate(**inputs, **generation), folded.generate(**inputs, **generation))
    beams = {**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    scores = []
    for model in (folded, split):
        found = model.generate(**inputs, **beams)
        scores.append(model.compute_transition_scores(found.sequences, found.scores, found.beam_indices))
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=1e-5)
    assert split.config.text_config.vocab_size == 275
    for output in outputs:
        output.loss.backward()
    embedding = folded.get_input_embeddings().weight.grad
    head = folded.lm_head.weight.grad
    tables = {name: table.grad for name, table in split.model.coordinates.named_parameters()}
    inside = [embedding[275:281], embedding[281:286], embedding[286:]]
    for axis, rows in zip(("temporal", "height", "width"), inside, strict=True):
        # Sums over the same positions in another order.
        torch.testing.assert_close(tables[f"{axis}_input.weight"], rows, atol=1e-5, rtol=1e-4)
    if "text_kwargs" not in options:
        torch.testing.assert_close(tables["temporal_output.weight"], head[275:281], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(split.lm_head.weight.grad, head[:275], atol=1e-5, rtol=1e-4)


def test_neighbours_get_a_share_of_the_gradient():
    gradients = []
    for use_ntp in (False, True):
        model = tiny_llava_st_model(use_ntp=use_ntp)
        ids = torch.tensor([[20, 21, 275 + 2, 22]])
        model(input_ids=ids, labels=torch.tensor([[-100, -100, 275 + 2, 22]])).loss.backward()
        gradients.append((model.get_input_embeddings().weight.grad[275:281], model.lm_head.weight.grad[275:281]))
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    spread = torch.eye(6) + 0.5**distance
    for plain, propagated in zip(*gradients, strict=True):
        torch.testing.assert_close(propagated, spread @ plain, atol=1e-6, rtol=1e-5)  # a product in fp32
    assert gradients[0][0].any(dim=1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("options", [{}, TIED])
def test_changing_the_layout_there_and_back_is_exact(options):
    model = tiny_llava_st_model(**options)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(bool(options))
    split = model.unfold_coordinates().state_dict()
    assert {name for name in split if "coordinates" in name} == {
        f"model.coordinates.{axis}_{side}.weight"
        for axis in ("temporal", "height", "width")
        for side in ("input", "output")
    }
    tables = model.model.coordinates
    assert tables.width_input.weight.requires_grad
    assert tables.width_output.weight.requires_grad == bool(options)
    assert (tables.width_output.weight is tables.width_input.weight) == bool(options)
    model.fold_coordinates()
    assert model.model.coordinates is None
    assert model.get_input_embeddings().num_embeddings == 291
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(options)


def test_state_dicts_are_converted_without_a_model():
    folded, split = both()
    ours, theirs = folded.state_dict(), split.state_dict()
    for made, wanted in (
        (unfold_state_dict(ours, folded.config), theirs),
        (fold_state_dict(theirs, split.config), ours),
    ):
        assert set(made) == set(wanted)
        assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    short = {**theirs, "model.coordinates.height_output.weight": torch.empty(0, 32)}
    with pytest.raises(ValueError, match=r"height_output\.weight is \(0, 32\); expected \(5, 32\)"):
        fold_state_dict(short, split.config)
    key = "model.language_model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has 270 rows.*begin at id 275"):
        fold_state_dict({**theirs, key: theirs[key][:270]}, split.config)


# ---------------------------------------------------------------- saving, loading, resizing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, TIED])
@torch.no_grad()
def test_save_and_load_through_the_auto_classes(layout, options, tmp_path):
    model = tiny_llava_st_model(coordinate_layout=layout, **options)
    model.save_pretrained(tmp_path)
    inputs = question(model.config)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is LlavaSTForConditionalGeneration
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert loaded.config.coordinate_layout == layout
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == bool(options)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (type(config), config.coordinate_layout) == (LlavaSTConfig, layout)
    other = loaded.fold_coordinates() if layout == "split" else loaded.unfold_coordinates()
    other.save_pretrained(tmp_path / "other")
    again = LlavaSTForConditionalGeneration.from_pretrained(tmp_path / "other")
    # Columns of another matrix product.
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_without_a_head_takes_the_rows_of_one(tmp_path):
    model = tiny_llava_st_model()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is LlavaSTModel
    inputs = question(model.config)
    wanted = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(bare(**inputs, output_rows=model.output_rows()).last_hidden_state, wanted)
    assert not torch.equal(bare(**inputs).last_hidden_state, wanted)


@pytest.mark.parametrize("options", [{}, TIED])
@torch.no_grad()
def test_resizing_a_folded_vocabulary_keeps_the_coordinates(options):
    model = tiny_llava_st_model(**options)
    inputs = question(model.config)
    before = model(**inputs).logits
    model.resize_token_embeddings(300)
    assert model.lm_head.weight.shape == (300, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(options)
    after = model(**inputs).logits
    torch.testing.assert_close(after[..., :291], before, atol=1e-5, rtol=1e-5)  # a wider product
    with pytest.raises(ValueError, match="280 rows would cut off coordinates; their last id is 290"):
        model.resize_token_embeddings(280)
    with pytest.raises(ValueError, match="has 300 rows, but the coordinates end at id 290"):
        model.unfold_coordinates()
    model.resize_token_embeddings(291)
    model.unfold_coordinates()
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)


def test_a_split_vocabulary_asks_to_be_folded_before_resizing():
    model = tiny_llava_st_model(coordinate_layout="split")
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    for kwargs in ({"new_num_tokens": 300}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match=r"Call model\.fold_coordinates\(\) first"):
            model.resize_token_embeddings(**kwargs)
    model.fold_coordinates().resize_token_embeddings(pad_to_multiple_of=8)
    assert model.get_input_embeddings().num_embeddings == 296


@torch.no_grad()
def test_a_model_without_coordinates_is_an_ordinary_one():
    model = tiny_llava_st_model(num_temporal_tokens=0, num_spatial_tokens=0)
    config = model.config
    ids = torch.tensor([[11, *block_ids(config, "video"), 40, *config.input_template_ids, 41]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 6, 3, 32, 32)}
    output = model(**inputs, coordinate_values=torch.rand(ids.shape), labels=ids)
    assert torch.equal(output.logits, model(**inputs).logits)
    assert output.logits.shape[-1] == 275
    assert output.loss.isfinite()
    model.resize_token_embeddings(291)
    config.num_temporal_tokens, config.num_spatial_tokens = 6, 5  # stage 2 begins
    config.check_tables()
    assert model(**inputs).logits.shape[-1] == 291


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_trains_and_generates(layout, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llava_st_model(coordinate_layout=layout)
    inputs = question(model.config)
    before = model.generate(**inputs, **GREEDY)
    whole = ["packer", "embed_tokens"] + (["coordinates"] if layout == "split" else [])
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            task_type="CAUSAL_LM",
            target_modules=r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)(_proj)",
            modules_to_save=whole,
        ),
    )
    assert torch.equal(adapted.generate(**inputs, **GREEDY), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    for part in whole:
        assert any(f"{part}.modules_to_save" in name for name in trained), part
    assert not any("vision_tower" in name or "lm_head" in name for name in trained)
    optimizer.step()
    with torch.no_grad():
        wanted = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    fresh = tiny_llava_st_model(coordinate_layout=layout)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, wanted)
        merged = loaded.merge_and_unload()
        # Products with merged matrices.
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    assert merged.generate(**inputs, **GREEDY).shape == before.shape


def test_single_rows_of_coordinates_can_be_trained():
    peft = pytest.importorskip("peft")
    model = tiny_llava_st_model()
    inputs = question(model.config)
    rows = list(range(275, 291))
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=2, target_modules=["down_proj"], trainable_token_indices={"embed_tokens": rows, "lm_head": rows}
        ),
    )
    frames = {"pixel_values_videos": inputs["pixel_values_videos"]}
    with torch.no_grad():
        before = model.get_video_features(**frames).pooler_output[0]
        rows_before = model.model.input_rows(), model.output_rows().clone()
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1
        after = model.get_video_features(**frames).pooler_output[0]
        for found, row in zip((model.model.input_rows(), model.output_rows()), rows_before, strict=True):
            torch.testing.assert_close(found, row + 1, atol=1e-5, rtol=1e-5)  # a sum in fp32
    # Position embeddings see rows that an adapter trains, on both sides.
    assert not torch.allclose(before, after)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    deltas = [p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert len(deltas) == 2
    assert all(p.grad.abs().sum() > 0 for p in deltas)


def test_position_embeddings_see_lora_on_the_head():
    peft = pytest.importorskip("peft")
    model = tiny_llava_st_model()
    inputs = question(model.config)
    torch.manual_seed(5)
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    rows = model.output_rows()
    rows.sum().backward()
    assert model.lm_head.lora_B["default"].weight.grad[275:].abs().sum() > 0
    with torch.no_grad(), adapted.disable_adapter():
        before, plain = model.output_rows().clone(), adapted(**inputs).logits
    with torch.no_grad():
        wanted = adapted(**inputs).logits
        assert not torch.allclose(rows, before) and not torch.allclose(wanted, plain)
        adapted.merge_adapter()
        # Sums in another order, as in the next line.
        torch.testing.assert_close(model.output_rows(), rows, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapted(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    other = peft.get_peft_model(tiny_llava_st_model(), peft.LoraConfig(**settings, use_dora=True))
    with pytest.raises(ValueError, match=r"'default' changes rows of coordinates.*no DoRA"), torch.no_grad():
        other(**inputs)


def test_tables_that_do_not_fit_the_configuration_are_refused():
    config = tiny_llava_st_config()
    config.num_temporal_tokens = 7
    with pytest.raises(ValueError, match=r"ids 275 to 291, but text_config\.vocab_size is 291"):
        LlavaSTForConditionalGeneration(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_on_embeddings(layout):
    """NEFTune's hook counts positions and widths, so it takes batches only."""

    def add_noise(module, args, output):
        return output + torch.rand(output.shape) * 5 / (output.size(1) * output.size(2)) ** 0.5

    model = tiny_llava_st_model(coordinate_layout=layout).train()
    inputs = question(model.config)
    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    noisy = model(**inputs, labels=inputs["input_ids"])
    noisy.loss.backward()
    handle.remove()
    assert noisy.loss.isfinite() and not torch.equal(model(**inputs).logits, noisy.logits)
