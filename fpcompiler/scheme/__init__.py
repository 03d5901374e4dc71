r"""Schemes: which number format each layer's weights and activations get.

The exact form is what is printed, stored in artifacts and parsed back::

    w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=f6E2M3FN@block32:f8E8M0FNU,skip=lm_head

``a=none`` leaves the activations as they are. ``skip`` lists patterns of layers that stay in high
precision, separated by ``|``; without it these are the usual output heads, and ``skip=none`` means
no layer at all. Rules follow, each after a ``;``::

    w4a6,skip=lm_head; *.down_proj: w4a8; layers.0.*: skip; re:.*\.[qk]_proj: a=none

Rules are ordered and later ones win, over ``skip`` too. What a rule leaves out is as before the
first ``;``. A pattern is a glob, compared with the whole module path and with its last part;
``re:`` and a regular expression for the whole path; or ``role:`` and a name of :class:`Role`, for
layers that are the same part of a model, whatever they are called::

    w4a6; role:ffn-in: w=f4E3M0FN@block128:f32; role:attention-out: w4a8

A pattern that contains a space or one of ``, ; : | = '`` stands in single quotes, with ``''`` for a
quote inside.

A name of :data:`PRESETS` stands for the ``w`` and ``a`` of its row, and in front of all rules for
the ``skip`` and the rules of its row too. A recipe says the same as a mapping, or as a YAML or JSON
file::

    scheme: w4a6              # or weights: and activations:
    skip: [lm_head]
    rules:
      - {match: "*.down_proj", scheme: w4a8}
      - {match: "layers.0.*", skip: true}
"""

from __future__ import annotations

from fpcompiler.scheme.layer import LayerScheme, Match, Rule
from fpcompiler.scheme.patterns import pattern_matches
from fpcompiler.scheme.presets import DEFAULT_SKIP, PRESETS, Preset
from fpcompiler.scheme.roles import Role
from fpcompiler.scheme.scheme import Scheme

__all__ = [
    "Scheme",
    "LayerScheme",
    "Rule",
    "Match",
    "Role",
    "Preset",
    "PRESETS",
    "DEFAULT_SKIP",
    "pattern_matches",
]
