"""Runs compiled models: no part of the compiler is imported, and no code from an artifact runs."""
