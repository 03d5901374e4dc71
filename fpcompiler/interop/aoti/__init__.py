"""Packages of AOTInductor: compiled models that C++ and Python run without fpcompiler."""
