"""The text of the option for attention: which passes it stands for, and what it refuses."""

import pytest

from fpcompiler.errors import FormatError, OptionError, PassError
from fpcompiler.passes import pipeline_text
from fpcompiler.passes.attention_option import attention_passes

FP8, FP4 = "f8E4M3FN@token:f32", "f4E2M1FN@token:f32"


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (FP8, "quantize-attention"),
        (FP4, f'quantize-attention{{operand="{FP4}"}}'),
        (f"qkv={FP8}", "quantize-attention"),
        (f"weights={FP4}", f'quantize-attention{{operand="" weights="{FP4}"}}'),
        (f"cache={FP4}", f'quantize-cache{{operand="{FP4}"}}'),
        (
            f"weights={FP4}, qkv = {FP8} ,cache={FP8}",
            f'quantize-cache,quantize-attention{{weights="{FP4}"}}',
        ),
    ],
)
def test_a_text_stands_for_passes(text: str, passes: str) -> None:
    assert pipeline_text(attention_passes(text)) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"chache={FP8}", "there is no part 'chache'. Did you mean cache?"),
        (f"qkv={FP8},{FP8}", f"there is no part '{FP8}'"),
        (f"qkv={FP8},", "there is no part ''"),
        (f"qkv={FP8},qkv={FP8}", "the part qkv is given twice"),
        ("weights=", "the part weights has no operand"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        attention_passes(text)
    assert message in str(caught.value)
    assert "qkv=OPERAND,weights=OPERAND,cache=OPERAND" in str(caught.value)


def test_operands_that_mean_nothing_and_no_operand_are_refused() -> None:
    with pytest.raises(FormatError, match="no format 'f5'"):
        attention_passes("cache=f5@token:f32")
    with pytest.raises(FormatError, match="no format 'f5'"):
        attention_passes(f"qkv={FP8},weights=f5")
    with pytest.raises(PassError, match="nothing to quantize"):
        attention_passes("")


@pytest.mark.parametrize("level", ["tensor:f32", "row:f32", "tensor:f32/block16:f8E4M3FN"])
def test_tokens_of_a_cache_cannot_share_a_scale(level: str) -> None:
    with pytest.raises(PassError, match="a new token would change for all"):
        attention_passes(f"cache=f4E2M1FN@{level}")
