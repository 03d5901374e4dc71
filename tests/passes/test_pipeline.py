"""Pipelines as text: they print, parse, and say what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import PassError
from fpcompiler.passes import (
    PASSES,
    Pass,
    PassContext,
    default_pipeline,
    parse_pipeline,
    pass_text,
    pipeline_text,
)
from fpcompiler.passes.cleanup import Cse
from fpcompiler.passes.fold_constants import FoldConstants
from fpcompiler.passes.insert_quantize import InsertQuantize
from fpcompiler.passes.lower_gemm import LowerGemm
from fpcompiler.passes.normalize import Normalize
from fpcompiler.passes.quantize_weights import QuantizeWeights


@dataclass(frozen=True)
class Options(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "options"
    text: str = ""
    number: int = 3
    ratio: float = 0.5
    flag: bool = False

    def run(self, program: object, context: PassContext) -> None:
        """Do nothing."""


KNOWN = {**PASSES, "options": Options}

passes = st.one_of(
    st.sampled_from([Cse(), Normalize()]),
    st.builds(FoldConstants, st.integers(0, 2**40)),
    st.builds(InsertQuantize, st.text()),
    st.builds(QuantizeWeights, st.sampled_from(["max", "mse"])),
    st.builds(LowerGemm, st.text()),
    st.builds(Options, st.text(), st.integers(), st.floats(allow_nan=False), flag=st.booleans()),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(passes, max_size=5).map(tuple))
def test_the_text_of_a_pipeline_parses_back(pipeline: tuple[Pass, ...]) -> None:
    text = pipeline_text(pipeline)
    assert parse_pipeline(text, KNOWN) == pipeline
    assert pipeline_text(parse_pipeline(text, KNOWN)) == text


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet='csenormaliz,{}="\\ 1', max_size=30))
def test_any_text_is_a_pipeline_or_a_pass_error(text: str) -> None:
    try:
        pipeline = parse_pipeline(text, KNOWN)
    except PassError:
        return
    assert parse_pipeline(pipeline_text(pipeline), KNOWN) == pipeline


def test_the_text_shows_only_what_differs_from_the_defaults() -> None:
    assert pass_text(Options()) == "options"
    assert pass_text(Options("a b", 4, 1e-5, True)) == (
        'options{text="a b" number=4 ratio=1e-05 flag=true}'
    )
    assert pass_text(InsertQuantize('w4a6; "x": skip')) == (
        r'insert-quantize{scheme="w4a6; \"x\": skip"}'
    )


def test_spaces_and_quotes_are_read() -> None:
    text = '  cse , options { number = 7  text="a, {b} \\" \\\\" flag=true } '
    assert parse_pipeline(text, KNOWN) == (Cse(), Options('a, {b} " \\', 7, flag=True))
    assert parse_pipeline("") == ()
    assert parse_pipeline("   ") == ()


def test_the_default_pipeline() -> None:
    assert pipeline_text(default_pipeline("w4a8", "reference", "mse")) == (
        "cse,normalize,fold-constants,insert-quantize{scheme=w4a8},cse,quantize-weights{clip=mse},"
        "lower-gemm,canonicalize,group-heads,fuse-quantize,fuse-epilogue,"
        "fuse-residual,symbol-dce"
    )


def test_every_pass_is_found_by_its_own_name() -> None:
    assert {name: kind.name for name, kind in PASSES.items()} == {name: name for name in PASSES}
    assert all((kind.__doc__ or "").strip() for kind in PASSES.values())


ERRORS = {
    "normalise": "There is no pass 'normalise'. Did you mean normalize? Passes: "
    f"{', '.join(KNOWN)}.",
    "cse,": "the pipeline 'cse,' ends too early",
    "cse normalize": "the pipeline 'cse normalize' has 'normalize' where ',' should be",
    "options{number=3": "the pipeline 'options{number=3' ends too early",
    "options{number 3}": "the pipeline 'options{number 3}' has '3' where '=' should be",
    "options{number=3 number=4}": "the pipeline 'options{number=3 number=4}' gives the option "
    "'number' twice",
    "options{numbr=3}": "options has no option 'numbr'; its options: text, number, ratio, flag.",
    "cse{x=1}": "cse has no option 'x'; its options: none.",
    "options{number=many}": "options: number must be int, not 'many'",
    "options{ratio=half}": "options: ratio must be float, not 'half'",
    "options{flag=yes}": "options: flag must be true or false, not 'yes'",
    "quantize-weights{clip=best}": "quantize-weights: clip must be one of max, mse: 'best'",
    'cse{"': "the pipeline 'cse{\"' cannot be read at '\"'",
    "cse;normalize": "the pipeline 'cse;normalize' cannot be read at ';normalize'",
}


@pytest.mark.parametrize(("text", "message"), ERRORS.items(), ids=ERRORS.keys())
def test_errors_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_pipeline(text, KNOWN)
    assert str(caught.value) == message
