"""Coordinate tables, position embeddings, injection and loss of LLaVA-ST against naive loops."""

import pytest
import torch
from torch.nn import functional as F

from longvideo.modeling.llava_st.coordinate_loss_llava_st import coordinate_cross_entropy, coordinate_targets
from longvideo.modeling.llava_st.coordinates_llava_st import (
    add_lape,
    average_tables,
    find_bins,
    inject_coordinates,
    interpolate_rows,
    interpolate_table,
    join_coordinate_logits,
    lape_addition,
    lape_parts,
    place_coordinate_rows,
    propagate,
)
from tests.reference.llava_st_coordinates import (
    naive_embedding,
    naive_inject,
    naive_lape,
    naive_loss,
    naive_propagate,
    naive_resample,
)

WIDTH = 5
# Ids 0..9 are words, then input and output template of each axis in turn, then the coordinate tokens, then one word.
INPUTS, OUTPUTS, START = (10, 12, 14), (11, 13, 15), 16
SIZES = (7, 4, 4)
COLUMN_STARTS = (16, 23, 27)
VOCABULARY = 32


def make_tables(sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    """Random tables in double precision, so that only mistakes are left to see."""
    return [torch.randn(size, WIDTH, dtype=torch.float64, requires_grad=True) for size in sizes]


def make_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples with words, templates of all kinds and coordinate tokens, and a value for every template."""
    ids = torch.tensor([[1, *INPUTS, *OUTPUTS, 16, 22, 23, 26, 27, 30, 31], [*OUTPUTS, *OUTPUTS, *INPUTS, *range(5)]])
    # Rows, ties between two rows, edges, values outside, and values that a float cannot hold.
    values = torch.tensor([0, 1 / 12, 0.5, 0.3, 1 / 6, 1, 0, *[0.0] * 7, 0.999, -0.5, 1.5, 1, 0.7, 1 / 3, 0.1, 1, 0])
    return ids, torch.cat([values, torch.zeros(5)]).view(2, 14)


def assert_same_gradients(actual: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    direction = torch.randn(wanted.shape, dtype=wanted.dtype)
    grads = [torch.autograd.grad((x * direction).sum(), inputs) for x in (actual, wanted)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)  # shares of rows are float32, gradients of size 1 to 30


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_propagation_equals_loops(rows: int) -> None:
    (table,) = make_tables((rows,))
    actual, wanted = propagate(table), naive_propagate(table)
    assert torch.equal(actual, table)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)  # the original's rounding, in double precision
    assert_same_gradients(actual, wanted, [table])
    gradient = torch.randn_like(table)
    near = torch.tensor([[2.0 ** -abs(i - j) for j in range(rows)] for i in range(rows)], dtype=torch.float64)
    (actual_gradient,) = torch.autograd.grad(propagate(table), table, gradient)
    torch.testing.assert_close(actual_gradient, gradient + near @ gradient, rtol=0, atol=1e-12)  # as above


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_propagation_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    table = (100 * torch.randn(100, 8)).to(dtype)
    table[40:60] = 60000  # sums over neighbours are beyond the range of float16
    table.requires_grad_()
    gradient = torch.ones(100, 8, dtype=dtype)
    assert torch.equal(propagate(table), table)
    (actual,) = torch.autograd.grad(propagate(table), table, gradient)
    assert actual.dtype == dtype
    near = sum(2.0 ** -abs(50 - j) for j in range(100))
    # One rounding of each summand and of the sum, numbers up to 4.
    assert actual[50, 0].item() == pytest.approx(1 + near, abs=0.004 if dtype == torch.float16 else 0.03)


def test_autocast_keeps_gradients_wide() -> None:
    table = torch.randn(100, 8, requires_grad=True)
    gradient = torch.randn(100, 8)
    wanted = torch.autograd.grad(propagate(table), table, gradient)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        effective = propagate(table)
        assert interpolate_table(table, 27).dtype == torch.float32
    assert torch.equal(torch.autograd.grad(effective, table, gradient)[0], wanted)


def test_propagation_costs_nothing_without_gradients() -> None:
    (table,) = make_tables((3,))
    with torch.no_grad():
        assert propagate(table) is table
    assert propagate(table.detach()).data_ptr() == table.data_ptr()


@pytest.mark.parametrize(("rows", "size"), [(100, 27), (100, 100), (7, 3), (3, 7), (2, 1), (1, 4), (9, 10), (31, 18)])
def test_resampling_equals_loops(rows: int, size: int) -> None:
    (table,) = make_tables((rows,))
    actual, wanted = interpolate_table(table, size), naive_resample(table, size)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)  # sums in another order, in double precision
    assert_same_gradients(actual, wanted, [table])
    torch_rows = F.interpolate(table.detach().T[None], size=size, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(actual.detach(), torch_rows, rtol=0, atol=1e-12)  # as above
    half = interpolate_table(table.detach().half(), size)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), wanted.detach(), rtol=0, atol=4e-3)  # rounded before and after, 11 bits


@pytest.mark.parametrize(("frames", "grid"), [(7, 3), (7, 4), (1, 1), (3, 5), (12, 2)])
@pytest.mark.parametrize("image", [False, True])
def test_lape_equals_loops(frames: int, grid: int, image: bool) -> None:
    inputs, outputs = make_tables(), make_tables()
    features = torch.randn(frames, grid, grid, WIDTH, dtype=torch.float64, requires_grad=True)
    averages = [average_tables(*pair) for pair in zip(inputs, outputs, strict=True)]
    image_row = 0 if image else None
    actual = features + lape_addition(*averages, frames, grid, image_row=image_row)
    wanted = naive_lape(features, inputs, outputs, image)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)  # sums in another order, in double precision
    assert_same_gradients(actual, wanted, [features, *inputs, *outputs])

    parts = lape_parts(*averages, num_frames=frames, grid=grid, image_row=image_row)
    flat = features.flatten(1, 2)
    chunks = [add_lape(flat[i : i + 2], parts, first_frame=i) for i in range(0, frames, 2)]
    torch.testing.assert_close(torch.cat(chunks).view_as(actual), actual, rtol=0, atol=1e-12)  # as above
    assert add_lape(flat.half(), parts).dtype == torch.float16


def test_lape_refuses_other_frame_counts_as_released() -> None:
    tables = make_tables()
    sizes = {"num_frames": 5, "grid": 3, "interpolate_frames": False}
    with pytest.raises(ValueError, match=r"5 frames for 7 temporal rows.*lape_interpolate_frames"):
        lape_parts(*tables, **sizes)
    assert lape_parts(*tables, **sizes, image_row=0).temporal_FD.shape == (5, WIDTH)
    exact = lape_parts(*tables, **{**sizes, "num_frames": 7})
    assert torch.equal(exact.temporal_FD, tables[0])
    with pytest.raises(ValueError, match="to 0 rows"):
        lape_parts(*tables, num_frames=0, grid=3)
    with pytest.raises(ValueError, match=r"2 frames from frame 6 with 9 patches.*7 frames with 9"):
        add_lape(torch.randn(2, 9, WIDTH), exact, first_frame=6)
    with pytest.raises(ValueError, match="with 8 patches"):
        add_lape(torch.randn(2, 8, WIDTH), exact)


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_interpolated_rows_equal_loops(rows: int) -> None:
    (table,) = make_tables((rows,))
    numbers = [0.0, 1.0, 0.5, 1 / 3, 0.123, 0.999, -2.0, 7.0, 1 / 6, float("inf")]
    actual = interpolate_rows(table, torch.tensor(numbers))
    wanted = torch.stack([naive_embedding(table, number) for number in numbers])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=5e-5)  # coordinates in float32, times up to 99 rows
    direction = torch.randn_like(wanted)
    grads = [torch.autograd.grad((x * direction).sum(), table)[0] for x in (actual, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=5e-5)  # as above
    assert interpolate_rows(table, torch.zeros(0)).shape == (0, WIDTH)
    half = interpolate_rows(table.half(), torch.tensor(numbers))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), wanted, rtol=0, atol=4e-3)  # rounded before and after, 11 bits


def test_bins_of_rows_and_ties() -> None:
    low, high, fraction = find_bins(torch.tensor([0.0, 0.25, 0.375, 1.0, 1.5]), 5)
    assert low.tolist() == [0, 1, 1, 4, 4]
    assert high.tolist() == [0, 1, 2, 4, 4]
    assert fraction.tolist() == [0, 0, 0.5, 0, 0]
    with pytest.raises(ValueError, match="not a number"):
        find_bins(torch.tensor([0.0, float("nan")]), 5)


@pytest.mark.parametrize("inject_width_inputs", [True, False])
def test_injection_equals_loops(inject_width_inputs: bool) -> None:
    ids, values = make_tokens()
    tables = make_tables()
    embeds = torch.randn(*ids.shape, WIDTH, dtype=torch.float64, requires_grad=True)
    templates = {OUTPUTS[axis]: axis for axis in range(3)} | {INPUTS[axis]: axis for axis in range(3)}
    if not inject_width_inputs:
        del templates[INPUTS[2]]
    options = {"tables": tables, "input_ids_of_axes": INPUTS, "output_ids_of_axes": OUTPUTS}
    actual = inject_coordinates(embeds, ids, values, **options, inject_width_inputs=inject_width_inputs)
    wanted = naive_inject(embeds, ids.tolist(), values.tolist(), tables, templates)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-6)  # shares of rows are float32
    assert_same_gradients(actual, wanted, [embeds, *tables])
    assert torch.equal(actual[1, 9:], embeds[1, 9:])

    assert inject_coordinates(embeds, ids, None, **options) is embeds
    words = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(inject_coordinates(embeds[:1, :3], words, torch.rand(1, 3), **options), embeds[:1, :3])
    with pytest.raises(ValueError, match=r"\(2, 14\), got \(2, 13\)"):
        inject_coordinates(embeds, ids, values[:, 1:], **options)
    with pytest.raises(ValueError, match="not a number"):
        inject_coordinates(embeds, ids, values.masked_fill(ids == INPUTS[0], float("nan")), **options)
    nowhere = values.masked_fill(ids < 10, float("nan"))  # at words, values are not read
    assert torch.isfinite(inject_coordinates(embeds, ids, nowhere, **options)).all()


def test_coordinate_tokens_get_the_rows_of_the_tables() -> None:
    ids, _ = make_tokens()
    tables = make_tables()
    embeds = torch.randn(*ids.shape, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = [row for table in tables for row in table]
    wanted = [
        rows[token - START] if START <= token < START + 15 else embeds[b, s]
        for b, sample in enumerate(ids.tolist())
        for s, token in enumerate(sample)
    ]
    actual = place_coordinate_rows(embeds, ids, tables, START)
    assert torch.equal(actual, torch.stack(wanted).view_as(embeds))
    assert_same_gradients(actual, torch.stack(wanted).view_as(embeds), [embeds, *tables])
    assert place_coordinate_rows(embeds.half(), ids, tables, START).dtype == torch.float16


@pytest.mark.parametrize("columns", [START, START + 15, VOCABULARY])
def test_coordinate_logits_stand_in_their_columns(columns: int) -> None:
    tables = make_tables()
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(2, 3, columns, dtype=torch.float64)
    actual = join_coordinate_logits(head, hidden, tables, START)
    assert actual.shape[-1] == max(columns, START + 15)
    assert torch.equal(actual[..., :START], head[..., :START])
    assert torch.equal(actual[..., START + 15 :], head[..., START + 15 :])
    for table, start in zip(tables, COLUMN_STARTS, strict=True):
        columns_of_axis = actual[..., start : start + len(table)]
        torch.testing.assert_close(columns_of_axis, hidden @ table.T, rtol=0, atol=1e-12)  # another product's order
    with pytest.raises(ValueError, match=r"15 columns.*column 16"):
        join_coordinate_logits(head[..., :15], hidden, tables, START)


LOSS_OPTIONS = {"output_ids_of_axes": OUTPUTS, "num_rows": SIZES, "column_starts": COLUMN_STARTS}
OUTPUT_BINS = {OUTPUTS[axis]: (SIZES[axis], COLUMN_STARTS[axis]) for axis in range(3)}


def make_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels with masked positions, ordinary ones and output templates, and their coordinates."""
    ids, values = make_tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[0, 4:7] = torch.tensor([OUTPUTS[0], OUTPUTS[1], OUTPUTS[2]])
    values[0, 4:7] = torch.tensor([0.3, 0.5, 0.9])  # 1.8 rows, a tie of 1.5 rows, 2.7 rows
    labels[1, :6] = torch.tensor([OUTPUTS[0], -100, OUTPUTS[2], OUTPUTS[0], OUTPUTS[1], OUTPUTS[2]])
    values[1, :6] = torch.tensor([0.4, 0.4, 0.6, 0.1, 1.5, 1 / 3])  # the first two are no targets, then edge and row
    logits = 3 * torch.randn(*ids.shape, VOCABULARY, dtype=torch.float64)
    return logits.float().requires_grad_(), labels, values


@pytest.mark.parametrize("reduction", ["token_mean", "sample_sum"])
def test_loss_equals_dense_targets(reduction: str) -> None:
    logits, labels, values = make_labels()
    actual = coordinate_cross_entropy(logits, labels, values, **LOSS_OPTIONS, reduction=reduction)
    wide = logits.detach().double().requires_grad_()
    wanted = naive_loss(wide, labels.tolist(), values.tolist(), OUTPUT_BINS, reduction)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=0)  # a mean of about 20 terms in float32
    actual.backward()
    wanted.backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=0, atol=2e-6)  # shares and softmax in float32

    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:], F.pad(values, (0, 1))[:, 1:]
    options = {**LOSS_OPTIONS, "reduction": reduction, "shift": False}
    torch.testing.assert_close(coordinate_cross_entropy(logits, *shifted, **options), actual, rtol=1e-6, atol=0)


def test_loss_of_ordinary_labels_is_plain_cross_entropy() -> None:
    logits, labels, _ = make_labels()
    for template in OUTPUTS:
        labels = labels.masked_fill(labels == template, -100)
    actual = coordinate_cross_entropy(logits, labels, None, **LOSS_OPTIONS)
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = F.cross_entropy(*flat)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)  # float32 sums in another order
    count = torch.tensor(31)
    actual = coordinate_cross_entropy(logits, labels, None, **LOSS_OPTIONS, num_items_in_batch=count)
    torch.testing.assert_close(actual, F.cross_entropy(*flat, reduction="sum") / 31, rtol=1e-6, atol=0)  # as above
    half = coordinate_cross_entropy(logits.half(), labels, None, **LOSS_OPTIONS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=2e-3, atol=0)  # logits rounded to 11 bits


def test_parts_of_a_batch_add_up() -> None:
    logits, labels, values = make_labels()
    count = int((labels[:, 1:] != -100).sum())
    whole = coordinate_cross_entropy(logits, labels, values, **LOSS_OPTIONS)
    rows = [(logits[i : i + 1], labels[i : i + 1], values[i : i + 1]) for i in range(2)]
    parts = [coordinate_cross_entropy(*row, **LOSS_OPTIONS, num_items_in_batch=count) for row in rows]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)  # float32 sums in another order
    released = {**LOSS_OPTIONS, "reduction": "sample_sum"}
    parts = [coordinate_cross_entropy(*row, **released) for row in rows]
    whole = coordinate_cross_entropy(logits, labels, values, **released)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)  # as above


@pytest.mark.parametrize("reduction", ["token_mean", "sample_sum"])
def test_nothing_labelled_gives_zero_with_a_gradient(reduction: str) -> None:
    logits, labels, values = make_labels()
    labels = torch.full_like(labels, -100)
    loss = coordinate_cross_entropy(logits, labels, values, **LOSS_OPTIONS, reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    labels[0, 3] = 1  # one sample without labels adds nothing
    options = {**LOSS_OPTIONS, "reduction": reduction}
    loss = coordinate_cross_entropy(logits, labels, values, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, 2], torch.tensor(1)), rtol=1e-6, atol=0)  # float32


def test_targets_follow_explicit_columns() -> None:
    labels = torch.tensor([OUTPUTS[0], OUTPUTS[1], OUTPUTS[2], 3, 20])
    values = torch.tensor([0.25, 0.5, 1.0, 0.5, 0.5])
    options = {"output_ids_of_axes": OUTPUTS, "num_rows": SIZES, "column_starts": (100, 10, 50)}
    low, high, fraction = coordinate_targets(labels, values, **options)
    assert low.tolist() == [101, 11, 53, 3, 20] and high.tolist() == [102, 12, 53, 3, 20]
    assert fraction.tolist() == [0.5, 0.5, 0, 0, 0]
    low, high, fraction = coordinate_targets(labels, values, **options, soft=False)
    assert low.tolist() == high.tolist() == [102, 12, 53, 3, 20]  # the upper one of two at equal distance
    assert not fraction.any()
    below = torch.tensor([0.24, 0.4, 0.9, 0.0, 0.0])
    assert coordinate_targets(labels, below, **options, soft=False)[0].tolist() == [101, 11, 53, 3, 20]


def test_no_dense_target_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows of labelled positions are widened: 2 of 12 here."""
    seen = []
    plain = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda x, y, **kwargs: seen.append((x.shape, y.shape)) or plain(x, y, **kwargs)
    )
    labels = torch.full((2, 6), -100)
    labels[0, 3], labels[1, 5] = OUTPUTS[0], 2
    coordinate_cross_entropy(torch.randn(2, 6, VOCABULARY), labels, torch.rand(2, 6), **LOSS_OPTIONS)
    assert seen == [((2, VOCABULARY), (2,))]


def test_loss_errors() -> None:
    logits, labels, values = make_labels()
    with pytest.raises(ValueError, match="token_mean, sample_sum, got 'mean'"):
        coordinate_cross_entropy(logits, labels, values, **LOSS_OPTIONS, reduction="mean")
    with pytest.raises(ValueError, match=r"\(2, 14\) do not fit logits of shape \(2, 3, 32\).*logits_to_keep"):
        coordinate_cross_entropy(logits[:, :3], labels, values, **LOSS_OPTIONS)
    with pytest.raises(ValueError, match=r"got \(2, 4\)"):
        coordinate_cross_entropy(logits, labels, values[:, :4], **LOSS_OPTIONS)
    with pytest.raises(ValueError, match=r"output template of id 1\d.*coordinate_values"):
        coordinate_cross_entropy(logits, labels, None, **LOSS_OPTIONS)
