"""The scheme of a whole model: a default, what is skipped, and rules."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fpcompiler.errors import FormatError, OptionError
from fpcompiler.operand import Operand
from fpcompiler.scheme.layer import LayerScheme, Match, Rule
from fpcompiler.scheme.patterns import check_pattern, pattern_matches, quote
from fpcompiler.scheme.presets import DEFAULT_SKIP, find_preset
from fpcompiler.scheme.roles import Role
from fpcompiler.scheme.text import recipe_of


@dataclass(frozen=True)
class Scheme:
    """What each layer is quantized to; ``fpcompiler.scheme`` describes its text.

    Attributes:
        base: For every layer that nothing else matches.
        skip: Patterns of layers that stay in high precision, by default the usual output heads.
        rules: Exceptions in order; the last one that matches wins.
    """

    base: LayerScheme
    skip: tuple[str, ...] = DEFAULT_SKIP
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Check the patterns."""
        for pattern in self.skip:
            check_pattern(pattern)

    @classmethod
    def of(cls, value: Scheme | str | Mapping[str, Any] | os.PathLike[str]) -> Scheme:
        """Return the scheme that a value stands for.

        Args:
            value: A scheme, its text, a recipe, or the path of a ``.yaml`` or ``.json`` recipe.

        Raises:
            FormatError: If a text or a recipe means nothing.
            OptionError: If a recipe is malformed or unreadable, or the value is of another type.
        """
        if isinstance(value, Scheme):
            return value
        if isinstance(value, str) and not value.lower().endswith((".yaml", ".yml", ".json")):
            return cls.parse(value)
        if isinstance(value, str | os.PathLike | Mapping):
            return cls.from_recipe(value)
        raise OptionError(
            f"a scheme cannot be a {type(value).__name__}; give a Scheme, its text such as "
            "'w4a6', a recipe as a dict, or the path of a .yaml or .json recipe."
        )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme that a text describes: a preset's name or the exact form.

        Raises:
            FormatError: If the text means nothing; an unknown name gets the nearest valid ones.
        """
        return _build(recipe_of(text))

    @classmethod
    def from_recipe(cls, recipe: str | os.PathLike[str] | Mapping[str, Any]) -> Scheme:
        """Return the scheme of a recipe: a mapping, or the path of a YAML or JSON file.

        Raises:
            FormatError: If an operand, a pattern or a scheme's name means nothing.
            OptionError: If the file cannot be read, or a key is unknown or has a value of a wrong
                type.
        """
        if isinstance(recipe, Mapping):
            return _build(recipe)
        path = Path(recipe)
        try:
            return _build(_read_recipe(path))
        except (FormatError, OptionError) as error:
            error.add_note(f"in the recipe {path}")
            raise

    def to_recipe(self) -> dict[str, Any]:
        """Return the recipe that :meth:`from_recipe` turns into this scheme; it holds only JSON."""
        rules = [{"match": rule.pattern, **_layer_recipe(rule.layer)} for rule in self.rules]
        return {
            "weights": str(self.base.weight or "none"),
            "activations": str(self.base.activation or "none"),
            "skip": list(self.skip),
            "rules": rules,
        }

    def for_layer(self, path: str, role: str = Role.OTHER) -> Match:
        """Return what the scheme says about the layer at a module path, with a role.

        A shared module has one path per call site; ask with the first.
        """
        for rule in reversed(self.rules):
            if pattern_matches(rule.pattern, path, role):
                return Match(
                    rule.layer.weight, rule.layer.activation, f"rule {quote(rule.pattern)}"
                )
        for pattern in self.skip:
            if pattern_matches(pattern, path, role):
                return Match(None, None, f"skip={quote(pattern)}")
        return Match(self.base.weight, self.base.activation, "base")

    def unmatched_rules(self, roles: Mapping[str, str]) -> tuple[str, ...]:
        """Return the patterns of rules that match none of a model's layers: mistyped, probably.

        Args:
            roles: The role of each layer by its module path.
        """
        layers = roles.items()
        patterns = (rule.pattern for rule in self.rules)
        return tuple(p for p in patterns if not any(pattern_matches(p, *layer) for layer in layers))

    def __str__(self) -> str:
        """Return the exact form, which parses back to this scheme."""
        base = f"w={self.base.weight or 'none'},a={self.base.activation or 'none'}"
        skip = "|".join(map(quote, self.skip)) or "none"
        return "; ".join([f"{base},skip={skip}", *map(str, self.rules)])


def _read_recipe(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the recipe: {error}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        hint = "(in YAML, a pattern that starts with * must stand in quotes)"
        raise OptionError(f"the recipe does not parse: {error} {hint}") from None
    if not isinstance(data, Mapping):
        raise OptionError("a recipe is a mapping with scheme, weights, activations, skip, rules.")
    return data


def _build(recipe: Mapping[str, Any]) -> Scheme:
    _check_keys(recipe, ("scheme", "weights", "activations", "skip", "rules"), "a recipe")
    base = _build_layer(recipe, None)
    skip, known = _preset_parts(recipe)
    skip, rules = recipe.get("skip", skip), recipe.get("rules") or []
    if not isinstance(skip, list) or not all(isinstance(item, str) for item in skip):
        raise OptionError(f"skip must be a list of patterns, not {skip!r}.")
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise OptionError(f"rules must be a list of mappings, not {rules!r}.")
    return Scheme(base, tuple(skip), tuple(_build_rule(rule, base) for rule in [*known, *rules]))


def _preset_parts(recipe: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the ``skip`` and the rules of the scheme that a recipe names, if any."""
    preset = find_preset(recipe["scheme"]) if "scheme" in recipe else None
    if preset is None:
        return list(DEFAULT_SKIP), []
    skip = DEFAULT_SKIP if preset.skip is None else preset.skip
    return list(skip), [{"match": match, "weights": text} for match, text in preset.rules]


def _build_rule(rule: Mapping[str, Any], base: LayerScheme) -> Rule:
    _check_keys(rule, ("match", "skip", "scheme", "weights", "activations"), "a rule")
    pattern, skip = rule.get("match"), rule.get("skip", False)
    if not isinstance(pattern, str):
        raise OptionError(f"the rule {dict(rule)!r} needs match: and a pattern.")
    if not isinstance(skip, bool):
        raise OptionError(f"the rule for {pattern!r}: skip must be true or false, not {skip!r}.")
    if skip == bool(rule.keys() & {"scheme", "weights", "activations"}):
        raise OptionError(f"the rule for {pattern!r} needs either skip: true or formats.")
    return Rule(pattern, LayerScheme() if skip else _build_layer(rule, base))


def _build_layer(fields: Mapping[str, Any], base: LayerScheme | None) -> LayerScheme:
    """Return what ``scheme``, ``weights`` and ``activations`` say; the base fills the gaps."""
    for key in ("scheme", "weights", "activations"):
        if not isinstance(fields.get(key, ""), str):
            raise OptionError(f"{key} must be a text, not {fields[key]!r}.")
    start = _preset_layer(fields["scheme"]) if "scheme" in fields else base
    if start is None and "weights" not in fields:
        raise FormatError(
            "a scheme needs a format for the weights: write w=FORMAT@SCALE, or a name."
        )
    start = start or LayerScheme()
    weight = _operand(fields["weights"]) if "weights" in fields else start.weight
    if "activations" in fields:
        return LayerScheme(weight, _operand(fields["activations"]))
    return LayerScheme(weight, start.activation if weight else None)


def _layer_recipe(layer: LayerScheme) -> dict[str, Any]:
    if layer.weight is None:
        return {"skip": True}
    return {"weights": str(layer.weight), "activations": str(layer.activation or "none")}


def _operand(text: str) -> Operand | None:
    return None if text.strip().lower() == "none" else Operand.parse(text)


def _preset_layer(name: str) -> LayerScheme:
    row = find_preset(name)
    return LayerScheme(_operand(row.weight), _operand(row.activation))


def _check_keys(fields: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in fields:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
        raise OptionError(f"{what} has no key {key!r}; the nearest is {near[0]!r}.")
