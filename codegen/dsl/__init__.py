"""A second compiler for the same GEMMs: NVIDIA's CuTe DSL, where the extra ``dsl`` is installed."""
