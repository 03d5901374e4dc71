"""Schemes: the text and recipe forms, which rule wins, and what is refused."""

import json

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpcompiler.errors import FormatError, FpcompilerError, OptionError
from fpcompiler.formats import FORMATS
from fpcompiler.operand import (
    BLOCK_SIZES,
    F32,
    Granularity,
    Operand,
    ScaleLevel,
    ScaleRounding,
)
from fpcompiler.scheme import (
    DEFAULT_SKIP,
    PRESETS,
    LayerScheme,
    Role,
    Rule,
    Scheme,
    pattern_matches,
)

W4 = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
EXACT = f"w={W4},a=f6E2M3FN@block32:f8E8M0FNU,skip=lm_head"


@st.composite
def operands(draw: st.DrawFn, outer: Granularity) -> Operand:
    spec = draw(st.sampled_from([spec for spec in FORMATS.values() if spec.signed]))
    first = ScaleLevel(draw(st.sampled_from([outer, Granularity.TENSOR])))
    scale = draw(st.sampled_from([F32, "f8E8M0FNU", "f8E4M3FN"]))
    rounding = None if scale == F32 else draw(st.sampled_from([None, *ScaleRounding]))
    block = ScaleLevel(Granularity.BLOCK, scale, draw(st.sampled_from(BLOCK_SIZES)), rounding)
    levels = [(), (first,), (block,)] + ([] if scale == F32 else [(first, block)])
    return Operand(spec, draw(st.sampled_from(levels)))


def layers() -> st.SearchStrategy[LayerScheme]:
    weights = operands(Granularity.ROW)
    activations = st.none() | operands(Granularity.TOKEN)
    return st.just(LayerScheme()) | st.builds(LayerScheme, weights, activations)


def patterns() -> st.SearchStrategy[str]:
    readable = st.text("ab.*?[]!'|,;:= \\()re", min_size=1, max_size=12)
    awkward = st.sampled_from(["none", "re", "re:", "re:.*", "skip", "''", "re:a|b", "*", "re:'"])
    roles = st.sampled_from(["role", "role:", "role:ffn-in", "role:other", "role:'"])
    return readable | awkward | roles | st.text(min_size=1, max_size=5)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    try:
        rules = draw(st.lists(st.builds(Rule, patterns(), layers()), max_size=3))
        return Scheme(draw(layers()), tuple(draw(st.lists(patterns(), max_size=3))), tuple(rules))
    except FormatError:  # a pattern that is blank or no regular expression
        assume(False)
        raise


@settings(deadline=None, max_examples=300)
@given(schemes())
def test_text_and_recipe_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.from_recipe(json.loads(json.dumps(scheme.to_recipe()))) == scheme
    assert Scheme.from_recipe(yaml.safe_load(yaml.safe_dump(scheme.to_recipe()))) == scheme


@settings(deadline=None, max_examples=300)
@given(st.text("w4a68-=,;:'|sre@/f2EMkip.* \n", max_size=40))
def test_any_text_parses_or_is_refused_as_a_format_error(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except FormatError as error:
        assert str(error)  # noqa: PT017 - either outcome is right, but nothing else
    else:
        assert Scheme.parse(str(scheme)) == scheme


def test_exact_form_of_the_documentation() -> None:
    scheme = Scheme.parse(EXACT)
    assert str(scheme) == EXACT
    assert scheme.skip == ("lm_head",)
    assert scheme.base.activation == Operand.parse("e2m3@block32:e8m0")


def test_default_exact_form_shows_what_is_skipped() -> None:
    text = str(Scheme.parse("w4a6"))
    assert text.startswith(f"w={W4},a=f6E2M3FN@block32:f8E8M0FNU,skip=lm_head|")
    assert all(pattern in text for pattern in DEFAULT_SKIP)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_round_trip(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme.base.weight) == PRESETS[name].weight
    assert str(scheme.base.activation or "none") == PRESETS[name].activation
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(name.upper().replace("-", "_")) == scheme


def test_ocp_presets_round_scales_down() -> None:
    for name in ("mxfp4", "mxfp6", "mxfp8", "w_mxfp4_a_mxfp6_e2m3", "w_mxfp4_a_mxfp6_e3m2"):
        for operand in (Scheme.parse(name).base.weight, Scheme.parse(name).base.activation):
            assert operand is not None
            assert operand.levels[-1].rounding is ScaleRounding.FLOOR


def test_later_rules_win_and_beat_skip() -> None:
    scheme = Scheme.parse(
        "w4a6; *.mlp.*: w4a8; *.down_proj: a=none; layers.0.*: skip; lm_head: w4a16"
    )
    assert scheme.for_layer("layers.3.mlp.up_proj").activation == Operand.parse("e4m3@block32:e8m0")
    down = scheme.for_layer("layers.3.mlp.down_proj")
    assert (str(down.weight), down.activation, down.rule) == (W4, None, "rule *.down_proj")
    assert scheme.for_layer("layers.0.mlp.down_proj").weight is None
    assert scheme.for_layer("lm_head").rule == "rule lm_head"
    assert scheme.for_layer("layers.3.self_attn.q_proj").rule == "base"
    assert scheme.for_layer("classifier").rule == "skip=classifier"


def test_a_rule_takes_what_it_leaves_out_from_the_base_only() -> None:
    scheme = Scheme.parse("w4a6; x: w4a8-row; x: a=e3m2@token:f32")
    assert str(scheme.for_layer("x").weight) == W4


def test_a_base_without_formats_quantizes_only_what_rules_name() -> None:
    scheme = Scheme.parse("w=none; *.mlp.*: w4a8")
    assert scheme.for_layer("a.attn.q").weight is None
    assert str(scheme.for_layer("a.mlp.up").weight) == W4
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head.dense", False),
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("down_*", "model.layers.0.mlp.down_proj", True),
        ("layers.0", "layers.01", False),
        ("layers.[01].*", "layers.1.up", True),
        ("Layers.*", "layers.1.up", False),
        (r"re:.*\.[qk]_proj", "a.q_proj", True),
        (r"re:[qk]_proj", "a.q_proj", False),
        (r"re:layers\.\d", "layers.12", False),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert pattern_matches(pattern, path) is expected


@pytest.mark.parametrize(
    ("path", "skipped"),
    [
        ("lm_head", True),
        ("language_model.lm_head", True),
        ("roberta.lm_head.decoder", True),
        ("cls.predictions.decoder", True),
        ("proj_out", True),
        ("model.proj_out", True),
        ("single_transformer_blocks.7.proj_out", False),
        ("final_layer.linear", True),
        ("layers.0.mlp.down_proj", False),
        ("0", False),
    ],
)
def test_output_heads_are_skipped_by_default(path: str, skipped: bool) -> None:
    assert (Scheme.parse("w4a6").for_layer(path).weight is None) is skipped


def test_skip_none_skips_nothing() -> None:
    assert Scheme.parse("w4a6,skip=none").skip == ()
    assert Scheme.parse("w4a6,skip='none'").skip == ("none",)


def test_unmatched_rules_are_reported() -> None:
    scheme = Scheme.parse("w4a6; *.down_prj: w4a8; *.up_proj: skip")
    layers = {"a.up_proj": "ffn-in", "a.down_proj": "ffn-out"}
    assert scheme.unmatched_rules(layers) == ("*.down_prj",)
    scheme = Scheme.parse("w4a6; role:ffn-in: w4a8; role:qkv: skip")
    assert scheme.unmatched_rules(layers) == ("role:qkv",)


def test_a_rule_names_a_role() -> None:
    scheme = Scheme.parse("w4a6,skip=role:head; *.fc1: w4a16; role:ffn-in: w=f4E3M0FN@block128:f32")
    for path in ("a.fc1", "b"):
        match = scheme.for_layer(path, "ffn-in")
        assert (str(match.weight), match.rule) == ("f4E3M0FN@block128:f32", "rule role:ffn-in")
    assert scheme.for_layer("a.fc1", "ffn-out").rule == "rule *.fc1"
    assert scheme.for_layer("x", "head").rule == "skip=role:head"
    assert scheme.for_layer("x").rule == "base"
    assert "; role:ffn-in: w=f4E3M0FN@block128:f32,a=" in str(scheme)


def test_a_module_that_is_called_role_needs_quotes() -> None:
    scheme = Scheme.parse("w4a6; 'role': skip")
    assert scheme.for_layer("a.role").weight is None
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("fp4dit", "f4E2M1FN", "f6E2M3FN"),
        ("fp4dit-w4a8", "f4E2M1FN", "f8E3M4FN"),
        ("fp4dit-sigma", "f4E1M2FN", "f6E2M3FN"),
        ("fp4dit-sigma-w4a8", "f4E1M2FN", "f8E3M4FN"),
    ],
)
def test_the_schemes_of_fp4dit(name: str, weight: str, activation: str) -> None:
    scheme = Scheme.parse(name)
    for role in Role:
        match = scheme.for_layer("any", role)
        if role in (Role.MODULATION, Role.EMBEDDING, Role.HEAD):
            assert (match.weight, match.activation) == (None, None)
            continue
        wanted = "f4E3M0FN" if role is Role.FFN_IN else weight
        assert str(match.weight) == f"{wanted}@block128:f32"
        assert str(match.activation) == f"{activation}@token:f32"


def test_a_named_scheme_with_rules_can_be_changed() -> None:
    scheme = Scheme.parse("fp4dit,a=none,skip=none; blocks.0.*: skip")
    assert scheme.skip == ()
    assert str(scheme.for_layer("x", "ffn-in").weight) == "f4E3M0FN@block128:f32"
    assert scheme.for_layer("x", "ffn-in").activation is None
    assert scheme.for_layer("blocks.0.fc1", "ffn-in").weight is None
    assert Scheme.from_recipe(
        {"scheme": "fp4dit", "activations": "none", "skip": [],
         "rules": [{"match": "blocks.0.*", "skip": True}]}
    ) == scheme  # fmt: skip
    # In a rule the name stands for its formats only.
    assert len(Scheme.parse("w4a6; x: fp4dit").rules) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a7", r"no scheme 'w4a7'\. Did you mean w4a8 or w4a6 or w4a4\?"),
        ("nvpf4", r"Did you mean nvfp4"),
        ("", r"no scheme ''"),
        ("w4a6,b=1", r"a scheme has w=, a= and skip=, not 'b'"),
        ("w4a6,w4a8", r"one name, first"),
        ("w=e2m1,w=e2m1", r"each of w, a, skip once"),
        ("a=e2m1", r"needs a format for the weights"),
        ("w=none,a=e2m1", r"cannot be quantized alone"),
        ("w=e2m1@token:f32", r"weights have rows: write row:f32"),
        ("w=e2m1,a=e2m3@row:f32", r"activations have tokens: write token:f32"),
        ("w=e9m9", r"no format 'e9m9'"),
        ("w4a6; down_proj", r"'down_proj' is no rule"),
        ("w4a6; x: skip=y", r"either PATTERN: skip or has w= and a= only"),
        ("w4a6,skip=", r"a pattern cannot be empty"),
        ("w4a6,skip='x", r"a quote is not closed"),
        ("w4a6,skip='x'y'z'", r"quotes stand around a whole pattern"),
        ("w4a6,skip=re:(", r"no regular expression"),
        (
            "w4a6; role:fnn-in: skip",
            r"no role 'fnn-in'\. Did you mean role:ffn-in\? Roles: ffn-in,",
        ),
        ("w4a6,skip=role:qvk", r"Did you mean role:qkv\?"),
        ("w4a6; role: skip", r"'role: skip' is no rule"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"scheme": "w4a6", "ignore": []}, r"no key 'ignore'; the nearest is"),
        ({"schema": "w4a6"}, r"no key 'schema'; the nearest is 'scheme'"),
        ({"scheme": 4}, r"scheme must be a text, not 4"),
        ({"scheme": "w4a6", "skip": "lm_head"}, r"skip must be a list"),
        ({"scheme": "w4a6", "rules": {"x": 1}}, r"rules must be a list"),
        ({"scheme": "w4a6", "rules": [{"skip": True}]}, r"needs match:"),
        ({"scheme": "w4a6", "rules": [{"match": "x"}]}, r"either skip: true or formats"),
        ({"scheme": "w4a6", "rules": [{"match": "x", "skip": 1}]}, r"must be true or false"),
        ({"scheme": "w4a6", "rules": [{"match": "x", "skip": True, "weights": "e2m1"}]}, r"either"),
        ({"scheme": "w4a6", "rules": [{"match": "x", "weigths": "e2m1"}]}, r"nearest is 'weights'"),
    ],
)
def test_refused_recipes(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Scheme.from_recipe(recipe)


RECIPE = """
scheme: w4a6
skip: [lm_head]
rules:
  - {match: "*.down_proj", scheme: w4a8}
  - {match: "layers.0.*", skip: true}
"""


def test_scheme_of_every_kind_of_value(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    expected = Scheme.parse("w4a6,skip=lm_head; *.down_proj: w4a8; layers.0.*: skip")
    as_json = tmp_path / "recipe.json"
    as_json.write_text(json.dumps(expected.to_recipe()))
    for value in (path, str(path), as_json, expected, str(expected), yaml.safe_load(RECIPE)):
        assert Scheme.of(value) == expected
    with pytest.raises(OptionError, match="a scheme cannot be a int"):
        Scheme.of(4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.yaml", None, "cannot read the recipe"),
        ("r.yaml", "rules:\n  - {match: *.down, skip: true}", "must stand in quotes"),
        ("r.json", "{", "does not parse"),
        ("r.yaml", "- w4a6", "a recipe is a mapping"),
        ("r.yaml", "scheme: w4a7", "no scheme 'w4a7'"),
    ],
)
def test_bad_recipe_files_are_named(tmp_path, name, text, message) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(FpcompilerError, match=message) as caught:
        Scheme.of(path)
    assert caught.value.__notes__ == [f"in the recipe {path}"]
