"""Searches for formats, clips and block scales, by the error that they make."""

from fpcompiler.numerics.search.block_scales import search_block_scales
from fpcompiler.numerics.search.faithful import (
    GAMMAS,
    FaithfulOptions,
    Order,
    search_layer_faithful,
)
from fpcompiler.numerics.search.formats import bias_of, finite_format, largest_of, paper_formats
from fpcompiler.numerics.search.grid import ACTIVATION_GRID, WEIGHT_GRID, Grid
from fpcompiler.numerics.search.layer import SearchOptions, search_layer
from fpcompiler.numerics.search.problem import Choice
from fpcompiler.numerics.search.result import SearchResult
from fpcompiler.numerics.search.scaled import quantize_packed_with_scale, quantize_with_scale
from fpcompiler.numerics.search.shared import Decision, search_shared

__all__ = [
    "search_layer",
    "SearchOptions",
    "SearchResult",
    "Choice",
    "Grid",
    "WEIGHT_GRID",
    "ACTIVATION_GRID",
    "search_shared",
    "Decision",
    "search_layer_faithful",
    "FaithfulOptions",
    "Order",
    "GAMMAS",
    "search_block_scales",
    "quantize_with_scale",
    "quantize_packed_with_scale",
    "paper_formats",
    "finite_format",
    "bias_of",
    "largest_of",
]
