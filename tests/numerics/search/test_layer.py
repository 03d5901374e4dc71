"""The default search: never worse than rounding to nearest, and the same in every unit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import FormatError, NumericsError, OptionError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.numerics.search import (
    Choice,
    Grid,
    SearchOptions,
    SearchResult,
    paper_formats,
    quantize_with_scale,
    search_layer,
    search_layer_faithful,
)
from fpcompiler.operand import Granularity, Operand, ScaleLevel
from tests.models import normal

FOUR = paper_formats(4)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tensors of a layer, and formats to choose among."""

    x: Tensor
    w: Tensor
    fisher: Tensor | None
    weights: tuple[FloatSpec, ...]
    activations: tuple[FloatSpec, ...]

    def search(self, **options: object) -> SearchResult:
        return search_layer(
            self.x, self.w, self.weights, self.activations, fisher=self.fisher,
            options=SearchOptions(**options),
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layers with outliers, rows and channels of zeros, and few or many tokens."""
    tokens, inputs, outputs = (draw(st.integers(1, top)) for top in (60, 40, 8))
    seed = draw(st.integers(0, 1 << 16))
    x, w = normal(tokens, inputs, seed=seed), normal(outputs, inputs, seed=seed + 1)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, inputs - 1))] *= draw(st.sampled_from([0.0, 30.0, 3000.0]))
    if draw(st.booleans()):
        w[draw(st.integers(0, outputs - 1))] *= draw(st.sampled_from([0.0, 1e-4, 50.0]))
    if draw(st.booleans()):
        w[:, draw(st.integers(0, inputs - 1))] *= draw(st.sampled_from([0.0, 100.0]))
    fisher = normal(tokens, outputs, seed=seed + 2).square() if draw(st.booleans()) else None
    choices = st.lists(st.sampled_from([*FOUR, *paper_formats(6)]), min_size=1, max_size=3)
    weights, activations = draw(choices), draw(st.one_of(st.just([]), choices))
    return Case(x, w, fisher, tuple(dict.fromkeys(weights)), tuple(dict.fromkeys(activations)))


def values(x: Tensor, choice: Choice | None) -> Tensor:
    """Return what a choice makes of ``x``, fp64."""
    if choice is None:
        return x.double()
    codes, operand = quantize_with_scale(x, choice.scale, choice.spec), row(choice.spec)
    return dequantize(codes, (choice.scale,), operand).double()


def row(spec: FloatSpec) -> Operand:
    return Operand(spec, (ScaleLevel(Granularity.ROW),))


def rtn_values(x: Tensor, spec: FloatSpec | None, granularity: Granularity) -> Tensor:
    if spec is None:
        return x.double()
    operand = Operand(spec, (ScaleLevel(granularity),))
    return dequantize(*quantize(x, operand), operand).double()


def root_mean_square(case: Case, xq: Tensor, wq: Tensor) -> float:
    """Return the root of the loss, in fp64."""
    squares = (xq @ wq.T - case.x.double() @ case.w.double().T).square()
    return float((squares if case.fisher is None else squares * case.fisher).mean().sqrt())


def rounding(case: Case) -> float:
    """Return how far a root of a loss that the search computes in fp32 may be off.

    A sum of K products is off by K * 2**-24 times the sum of their magnitudes, and each factor by
    one rounding. Quantized values are at most twice the largest of their group, in a row as well.
    """
    factor = case.x.abs().amax() * case.w.abs().amax() * 4
    fisher = 1.0 if case.fisher is None else math.sqrt(float(case.fisher.amax()))
    k = case.x.shape[1]
    return float(factor) * 2 * k * (k + 3) * 2.0**-24 * fisher


@settings(deadline=None, max_examples=40)
@given(cases())
def test_never_worse_than_rounding_to_nearest_in_any_pair_of_formats(case: Case) -> None:
    found = case.search(rounds=2)
    own = root_mean_square(case, values(case.x, found.activation), values(case.w, found.weight))
    slack = rounding(case)
    assert math.sqrt(found.loss) == pytest.approx(own, abs=slack)
    assert found.loss <= found.rtn_loss
    for weight, activation in itertools.product(case.weights, case.activations or (None,)):
        xq = rtn_values(case.x, activation, Granularity.TENSOR)
        rtn = root_mean_square(case, xq, rtn_values(case.w, weight, Granularity.ROW))
        name = activation.name if activation else ""
        assert math.sqrt(found.rtn[weight.name, name]) == pytest.approx(rtn, abs=slack)
        assert own <= rtn + 2 * slack


@settings(deadline=None, max_examples=15)
@given(cases(), st.integers(-40, 40), st.integers(-40, 40))
def test_another_power_of_two_as_unit_changes_nothing(case: Case, i: int, j: int) -> None:
    first = case.search(rounds=2)
    other = dataclasses.replace(case, x=case.x * 2.0**i, w=case.w * 2.0**j).search(rounds=2)
    assert other.weight.spec is first.weight.spec
    # A row of zeros has scale 1 in every unit.
    expected = torch.where(case.w.any(1, keepdim=True), first.weight.scale * 2.0**j, 1.0)
    assert torch.equal(other.weight.scale, expected)
    assert other.loss == first.loss * 4.0 ** (i + j)
    if first.activation is not None and case.x.any():
        assert other.activation.spec is first.activation.spec
        assert torch.equal(other.activation.scale, first.activation.scale * 2.0**i)


def layer(tokens: int = 300, inputs: int = 48, outputs: int = 16) -> tuple[Tensor, Tensor]:
    x = normal(tokens, inputs, seed=3)
    x[:, 5] *= 40
    return x, normal(outputs, inputs, seed=4) ** 3


def test_other_units_give_nearly_the_same() -> None:
    x, w = layer()
    first, other = search_layer(x, w, FOUR, FOUR), search_layer(x * 1.7, w * 0.3, FOUR, FOUR)
    torch.testing.assert_close(other.weight.scale, first.weight.scale * 0.3)
    torch.testing.assert_close(other.activation.scale, first.activation.scale * 1.7)
    assert other.loss == pytest.approx(first.loss * 0.51**2, rel=1e-4)


@pytest.mark.parametrize("activations", [(), FOUR], ids=["weights", "both"])
@pytest.mark.parametrize("tokens", [40, 300])
def test_clips_help_and_beat_the_published_search(tokens: int, activations: tuple) -> None:
    x, w = layer(tokens)
    found = search_layer(x, w, FOUR, activations)
    assert found.loss < 0.9 * found.rtn_loss
    assert found.loss < search_layer_faithful(x, w, FOUR, activations).loss


def test_the_result_is_in_the_form_of_quantize() -> None:
    x, w = layer()
    found = search_layer(x, w, FOUR, FOUR)
    _, (scale,) = quantize(w, row(FOUR[0]))
    assert (found.weight.scale.shape, found.weight.scale.dtype) == (scale.shape, scale.dtype)
    assert found.activation is not None
    assert found.activation.scale.shape == (1, 1)
    assert found.weight_clip.shape == (16,)
    assert torch.equal(found.weight_clip, found.weight.scale[:, 0] * found.weight.spec.max)
    assert found.activation_clip == found.activation.scale.item() * found.activation.spec.max
    names = [spec.name for spec in FOUR]
    assert list(found.by_weight) == list(found.by_activation) == names
    assert set(found.rtn) == set(itertools.product(names, names))
    with pytest.raises(TypeError):
        found.rtn["f4E2M1FN", ""] = 0.0  # type: ignore[index]


def test_inputs_that_stay_as_they_are() -> None:
    x, w = layer()
    found = search_layer(x, w, FOUR)
    assert found.activation is found.activation_clip is None
    assert dict(found.by_activation) == {}
    assert found.loss == pytest.approx(min(found.by_weight.values()), rel=1e-4)
    assert set(found.rtn) == {(spec.name, "") for spec in FOUR}


def test_weights_of_one_for_all_errors_are_no_weights() -> None:
    x, w = layer()
    plain = search_layer(x, w, FOUR, FOUR)
    ones = search_layer(x, w, FOUR, FOUR, fisher=torch.ones(300, 16))
    assert (ones.weight.spec, ones.activation.spec) == (plain.weight.spec, plain.activation.spec)
    assert ones.loss == pytest.approx(plain.loss, rel=1e-3)
    # Few tokens are multiplied directly either way, so that all bits are the same.
    few = [search_layer(x[:40], w, FOUR, FOUR, fisher=f) for f in (None, torch.ones(40, 16))]
    assert torch.equal(few[0].weight.scale, few[1].weight.scale)
    assert few[0].loss == few[1].loss


def test_weights_of_errors_decide_what_is_kept() -> None:
    x, w = layer()
    fisher = torch.ones(300, 16)
    fisher[:, 3], fisher[150:] = 1e6, 0.0
    found = search_layer(x, w, FOUR, FOUR, fisher=fisher)
    case = Case(x, w, fisher, FOUR, FOUR)
    plain = search_layer(x, w, FOUR, FOUR)
    own, other = (
        root_mean_square(case, values(x, r.activation), values(w, r.weight)) for r in (found, plain)
    )
    assert own < other


@pytest.mark.parametrize("max_bytes", [1, 20_000, 60_000], ids=["one", "direct", "sums"])
def test_chunks_make_no_difference(max_bytes: int) -> None:
    x, w = layer(80)
    whole = search_layer(x, w, FOUR, FOUR)
    parts = search_layer(x, w, FOUR, FOUR, options=SearchOptions(max_bytes=max_bytes))
    assert (parts.weight.spec, parts.activation.spec) == (whole.weight.spec, whole.activation.spec)
    # Sums in another order decide between clips whose losses are equal but for their last bits.
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_their_fp32_values(dtype: torch.dtype) -> None:
    x, w = (tensor.to(dtype) for tensor in layer())
    found, same = search_layer(x, w, FOUR, FOUR), search_layer(x.float(), w.float(), FOUR, FOUR)
    assert torch.equal(found.weight.scale, same.weight.scale)
    assert torch.equal(found.activation.scale, same.activation.scale)
    assert found.loss == same.loss


def test_a_sample_of_the_tokens_is_enough_and_nothing_is_random() -> None:
    x, w = layer(2000)
    found, again = (
        search_layer(x, w, FOUR, FOUR, options=SearchOptions(sample=200)) for _ in range(2)
    )
    assert torch.equal(found.weight.scale, again.weight.scale)
    assert found.loss == again.loss
    assert found.loss <= search_layer(x, w, FOUR, FOUR).loss * 1.05


def test_a_grid_without_clips_is_rounding_to_nearest() -> None:
    x, w = layer()
    none = Grid(coarse=1, last=0)
    options = SearchOptions(weight_grid=none, activation_grid=none)
    found = search_layer(x, w, FOUR, FOUR, options=options)
    assert found.loss == found.rtn_loss
    _, (scale,) = quantize(w, row(found.weight.spec))
    assert torch.equal(found.weight.scale, scale)


@pytest.mark.parametrize("spec", [s for s in FORMATS.values() if s.signed], ids=str)
def test_every_format_with_a_sign(spec: FloatSpec) -> None:
    x, w = layer(60)
    found = search_layer(x, w, [spec], [spec])
    assert found.weight.spec is spec
    assert 0 < found.loss <= found.rtn_loss


def test_numbers_at_the_ends_of_fp32() -> None:
    x, w = layer(60)
    for c in (2.0**100, 2.0**-100):
        found = search_layer(x * c, w * c, FOUR, FOUR)
        assert 0 < found.loss <= found.rtn_loss < math.inf


def test_zeros() -> None:
    for x, w in ((torch.zeros(4, 3), normal(2, 3)), (normal(4, 3), torch.zeros(2, 3))):
        found = search_layer(x, w, FOUR, FOUR)
        assert (found.loss, found.rtn_loss) == (0.0, 0.0)


@pytest.mark.parametrize("search", [search_layer, search_layer_faithful])
def test_what_cannot_be_searched(search) -> None:
    x, w = layer(10)
    nan = torch.full_like(x, torch.nan)
    for arguments, fisher, text in (
        ((nan, w, FOUR), None, "layer 'up': the calibration input holds NaN/Inf"),
        ((x, w * torch.inf, FOUR), None, "layer 'up': the weight holds NaN/Inf"),
        ((x, w, FOUR), nan[:, :16], "layer 'up': the tensor of Fisher weights holds NaN/Inf"),
        ((x, w, FOUR), -torch.ones(10, 16), "layer 'up': Fisher weights are squared gradients"),
        ((x, w, FOUR), torch.ones(10, 3), r"the shapes are \[\[10, 48\], \[16, 48\], \[10, 3\]\]"),
        ((x[:, :3], w, FOUR), None, "layer 'up': a search needs inputs"),
        ((x[:0], w, FOUR), None, "none of them empty"),
        ((x, w.int(), FOUR), None, "floating-point tensors on one device, not torch.float32 on"),
    ):
        with pytest.raises(NumericsError, match=text):
            search(*arguments, fisher=fisher, layer="up")
    with pytest.raises(FormatError, match="layer 'up': a search needs at least one weight format"):
        search(x, w, [], layer="up")
    with pytest.raises(FormatError, match="layer 'up': f8E8M0FNU has no sign"):
        search(x, w, FOUR, [FORMATS["f8E8M0FNU"]], layer="up")


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="at least one round, token and byte, not rounds=3, sam"):
        SearchOptions(sample=0)
    for coarse, last, first in ((3, 1, 0), (0, 1, 0), (4, -1, 0), (4, 1, 1)):
        with pytest.raises(OptionError, match="a distance that is a power of two"):
            Grid(coarse, last, first)
