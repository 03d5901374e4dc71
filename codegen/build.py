"""Compiled kernels, each once: a cache of folders named by a hash of all that went into them.

``<cache>/kernels/<key>/`` holds ``kernel.so``, ``kernel.o``, ``kernel.cu``, ``build.log`` and
``metadata.json``. It is written under another name and renamed, so that a folder with that name is
complete; a lock keeps two from making it at once. What failed is left in ``<cache>/failed/<key>/``
for people to read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fpcompiler.codegen.kernel import BuiltKernel, KernelSource
from fpcompiler.codegen.nvcc import Cost, Nvcc, find_nvcc
from fpcompiler.codegen.slots import available_memory, locked, slot, slot_count
from fpcompiler.errors import OptionError, TargetError
from fpcompiler.options import Options

__all__ = ["KernelCache"]

_LOG: Final = logging.getLogger("fpcompiler.codegen")
_ERRORS_SHOWN: Final = 5
_RESOURCES: Final = re.compile(
    r"Compiling entry function '(?P<function>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelCache:
    """The kernels that one compiler made, in a folder.

    Attributes:
        folder: Where they are; several processes may use it at once.
        nvcc: The compiler. Another one makes other kernels, in the same folder.
    """

    folder: Path
    nvcc: Nvcc

    @classmethod
    def from_options(cls, options: Options) -> KernelCache:
        """Return the cache of the user's settings.

        Raises:
            DependencyError: If there is no nvcc.
        """
        return cls(options.cache, find_nvcc(options))

    def find(self, source: KernelSource) -> BuiltKernel | None:
        """Return a kernel that is there and undamaged, or None. Compiles nothing.

        Raises:
            TargetError: If this compiler does not know the architecture.
        """
        return self._read(self._key(source))

    def build(self, source: KernelSource) -> BuiltKernel:
        """Return a kernel, compiled if it is not there.

        Raises:
            TargetError: If it does not compile, with the first errors and the files to look at, or
                the compiler does not know the architecture.
            OptionError: If the folder cannot be written.
        """
        key = self._key(source)
        found = self._read(key)
        if found is not None:
            return found
        self.require_folder()
        with locked(self.folder / "locks" / key):
            # Whoever held the lock before may have built it.
            return self._read(key) or self._compile(source, key)

    def stream(self, sources: Sequence[KernelSource]) -> Iterator[tuple[KernelSource, BuiltKernel]]:
        """Yield kernels as soon as they are there, compiling as many at once as memory holds.

        If one fails, those that have started are finished and no others are started.

        Args:
            sources: What to build; equal ones are compiled once.

        Raises:
            TargetError: As :meth:`build`.
            OptionError: As :meth:`build`.
        """
        workers = min(slot_count(available_memory()[0]), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(self.build, source): source for source in sources}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def build_all(self, sources: Sequence[KernelSource]) -> list[BuiltKernel]:
        """Return kernels in order; otherwise as :meth:`stream`."""
        built = {source.text: kernel for source, kernel in self.stream(sources)}
        return [built[source.text] for source in sources]

    def require_folder(self) -> None:
        """Make the folder, or raise if nothing can be written there.

        Raises:
            OptionError: With the variable that names another one.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise OptionError(
                f"compiled kernels cannot be kept in {self.folder}: {error.strerror}. Point "
                "FPC_CACHE to a folder that can be written."
            ) from error

    def _key(self, source: KernelSource) -> str:
        return source.key(self.nvcc.flags(source.arch), self.nvcc.toolchain)

    def _read(self, key: str) -> BuiltKernel | None:
        folder = self.folder / "kernels" / key
        library = folder / "kernel.so"
        try:
            metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            intact = metadata["sha256"] == _sha256(library)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged
        return BuiltKernel(library, metadata, cached=True) if intact else None

    def _compile(self, source: KernelSource, key: str) -> BuiltKernel:
        # On the same file system as the final place, or renaming would not be atomic.
        building = self.folder / "building" / key
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir(parents=True)
        # A new name, because a compiler of that process may still write to the old one.
        work = Path(tempfile.mkdtemp(dir=building))
        try:
            metadata = self._compile_in(work, source, key)
            if metadata is None:
                raise _failure(source, _move(work, self.folder / "failed" / key))
            final = _move(work, self.folder / "kernels" / key)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        _LOG.info("%s: compiled in %.1f s of CPU", source.name, metadata["cost"]["seconds"])
        return BuiltKernel(final / "kernel.so", metadata, cached=False)

    def _compile_in(self, work: Path, source: KernelSource, key: str) -> dict[str, Any] | None:
        """Compile in a folder; return the metadata, or None if the compiler failed."""
        (work / "kernel.cu").write_text(source.text, encoding="utf-8")
        with slot(self.folder / "slots"):
            compiled = self.nvcc.compile(source, work)
        linked = compiled and self.nvcc.link(work)
        if compiled is None or linked is None:
            return None
        metadata = self._metadata(source, key, work, compiled, linked)
        text = json.dumps(metadata, indent=1, sort_keys=True)
        (work / "metadata.json").write_text(text + "\n", encoding="utf-8")
        return metadata

    def _metadata(
        self, source: KernelSource, key: str, work: Path, compiled: Cost, linked: Cost
    ) -> dict[str, Any]:
        return {
            "name": source.name,
            "arch": source.arch,
            "description": dict(source.description),
            "key": key,
            "sha256": _sha256(work / "kernel.so"),
            "bytes": (work / "kernel.so").stat().st_size,
            "toolchain": self.nvcc.toolchain,
            "headers": source.headers,
            "flags": list(self.nvcc.flags(source.arch)),
            "resources": _resources((work / "build.log").read_text(encoding="utf-8")),
            "cost": {
                "seconds": round(compiled.seconds + linked.seconds, 1),
                "peak_mb": max(compiled.peak_mb, linked.peak_mb),
            },
        }


def _resources(log: str) -> list[dict[str, Any]]:
    """Return what ptxas says of each GPU function; sizes are in bytes of one thread."""
    rows = (match.groupdict() for match in _RESOURCES.finditer(log))
    return [
        {key: value if key in ("function", "arch") else int(value) for key, value in row.items()}
        for row in rows
    ]


def _failure(source: KernelSource, folder: Path) -> TargetError:
    log, file = folder / "build.log", folder / "kernel.cu"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b(error|fatal|killed)\b", line, re.IGNORECASE)]
    shown = "\n".join(f"    {line[:300]}" for line in (errors or lines[-3:])[:_ERRORS_SHOWN])
    return TargetError(
        f"{source.name} does not compile for {source.arch}:\n{shown}\n"
        f"The whole log is {log}, the source {file}. If nvcc was killed, memory was short: one "
        "takes up to 6.1 GB."
    )


def _move(work: Path, final: Path) -> Path:
    """Give a finished folder its name, in place of what has that name."""
    # What lies here is loaded: nobody else may put anything there.
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if final.exists():  # damaged, or of an earlier failure; its lock is ours
        shutil.rmtree(final)
    return work.rename(final)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
