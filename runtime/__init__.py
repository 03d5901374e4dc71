"""Runs compiled models: no part of the compiler is imported.

No code from an artifact runs but compiled kernels for GPUs, see :mod:`fpcompiler.runtime.trust`.
"""
