"""The native library; everything else about the package is in pyproject.toml.

It is a plain shared library that ctypes loads: no Python, no PyTorch, so one wheel serves all of
their versions. Without a C++ compiler the package installs all the same and does without.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("fpcompiler/native/csrc")


class BuildLibrary(build_ext):
    """Give the library a name without the version of Python, and no init function."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the name of the file."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return what is exported beside what the sources say: nothing."""
        return []


class PlatformWheel(bdist_wheel):
    """Tag the wheel for any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its C interface and the platform."""
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "fpcompiler.native.libfpc",
    sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
    depends=sorted(str(path) for path in SOURCES.glob("*.h")),
    include_dirs=[str(SOURCES)],
    language="c++",
    # Instruction sets are chosen in the sources, per function. Contraction would fuse products
    # with sums, which rounds differently.
    extra_compile_args=[
        "-O3", "-g0", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=off",
        "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)  # fmt: skip

setup(
    ext_modules=[library] if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
