"""Formats of different widths for different layers: what each costs, and what is best together."""

from fpcompiler.numerics.mixed.damage import model_damage, output_damage, stored_bits
from fpcompiler.numerics.mixed.frontier import Frontier, Point

__all__ = ["Frontier", "Point", "model_damage", "output_damage", "stored_bits"]
