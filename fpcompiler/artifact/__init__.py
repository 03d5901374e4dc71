"""Artifacts: compiled models as one file, checked as a whole before anything in it is used.

A file is a zip of plain members, with the tensors' bytes in place so that they are mapped instead
of read. Nothing in it is code that loading executes, and nothing is unpacked to disk.
"""

from fpcompiler.artifact.check import check
from fpcompiler.artifact.manifest import FORMAT_VERSION, package_versions
from fpcompiler.artifact.store import Artifact, Golden, read, save

__all__ = ["Artifact", "Golden", "save", "read", "check", "package_versions", "FORMAT_VERSION"]
