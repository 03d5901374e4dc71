"""Records CUDA graphs with torch.

A capture that CUDA itself ends, because the host waited for the GPU, leaves torch's allocator and
its generator of random numbers in the middle of it. So the run before is watched for operators
that wait, and nothing is captured if there was one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from fpcompiler.errors import FpcompilerError
from fpcompiler.runtime.cuda.flags import is_capturing
from fpcompiler.runtime.cuda.graphs import Run
from fpcompiler.runtime.garbage import uncollected
from fpcompiler.runtime.instructions import STEP_ERRORS

_WAITING_TAGS: Final = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_INDEXING: Final = frozenset(
    {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}
)
_CHECKING: Final = frozenset({"fpc::quantize", "fpc::fused_quantize", "fpc::encode", "fpc::fold"})
"""Operators without a kernel: they look at values from Python."""

_MASKS: Final = (torch.bool, torch.uint8)


def why_waits(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return why an operator cannot be recorded; empty if nothing is known against it."""
    name, overload = function.name().partition(".")[0], function.name()
    if name in _CHECKING:
        return f"{overload} has no kernel for this GPU and checks its values on the CPU"
    if name in _INDEXING:
        indices = (index for index in args[1] if index is not None)
        masked = any(index.dtype in _MASKS for index in indices)
        return f"the size of what {overload} reads depends on a mask" if masked else ""
    if not _WAITING_TAGS.isdisjoint(function.tags):
        return f"the result or the size of {overload} depends on values"
    places = {tensor.device.type for tensor in args if isinstance(tensor, Tensor)}
    places |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
    copies = name in ("aten::_to_copy", "aten::copy_") and len(places) > 1
    return f"{overload} copies between the CPU and the GPU" if copies else ""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operator of torch that runs in its thread.

    Attributes:
        reason: Why the first one that cannot be recorded cannot; empty without one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason = ""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note what cannot be recorded, and run it."""
        kwargs = kwargs or {}
        self.reason = self.reason or why_waits(func, args, kwargs)
        return func(*args, **kwargs)


@final
class _Lane:
    """Where the graphs of a GPU are recorded, and whose turn it is.

    cuBLAS has one workspace for each stream, so graphs that were recorded on the same stream may
    not run at the same time, whichever models they are of. Torch has 32 streams, so that two of
    its own may be the same too.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.lock = threading.RLock()
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


_LANES: Final[dict[torch.device, _Lane]] = {}
_MAKING: Final = threading.Lock()


def _lane_of(device: torch.device) -> _Lane:
    """Return the only one of a device, whichever threads ask for it at the same time."""
    with _MAKING:
        if device not in _LANES:
            _LANES[device] = _Lane(device)
        return _LANES[device]


@final
class CudaReplay:
    """A graph, where it reads and where it writes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], results: list[Any], nbytes: int
    ) -> None:
        self._graph, self._inputs, self._results = graph, inputs, results
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """Memory that recording it took."""
        return self._nbytes

    def __call__(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Replay on the current stream."""
        for own, leaf in zip(self._inputs, leaves, strict=True):
            own.copy_(leaf)
        self._graph.replay()
        return list(self._results)


@final
class CudaRecorder:
    """See :class:`~fpcompiler.runtime.cuda.graphs.Recorder`.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._lane = _lane_of(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def memory(self) -> int:
        """Bytes of the device."""
        return torch.cuda.get_device_properties(self._device).total_memory

    def busy(self) -> bool:
        """Return whether a graph is recorded already, or operators are watched."""
        watched = _get_current_dispatch_mode() is not None
        return watched or is_capturing(self._device)

    def settings(self) -> Hashable:
        """Return what chooses the kernels of torch's operators, as far as users change it."""
        return (
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            torch.backends.cuda.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
        )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the last turn, on the host and on the GPU."""
        with self._lane.lock:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._lane.done)
            try:
                yield
            finally:
                self._lane.done.record(stream)

    def warm_up(self, leaves: Sequence[Tensor], run: Run, steps: Run) -> tuple[list[Any], str]:
        """Run on the stream of captures: libraries get their workspaces, modules are loaded.

        What torch.compile made is not watched: it does not run while something watches.
        """
        current, side = torch.cuda.current_stream(self._device), self._lane.stream
        whole = [leaf.contiguous() for leaf in leaves]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            with Watch() as watch:
                results = steps(whole)
            if run != steps and not watch.reason:
                results = run(whole)
        current.wait_stream(side)
        for result in results:
            if isinstance(result, Tensor):
                result.record_stream(current)
        return results, watch.reason

    def record(self, leaves: Sequence[Tensor], run: Run) -> CudaReplay | str:
        """Return a graph, or the first line of what torch said when it failed."""
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._lane.stream), uncollected():
                inputs, results = self._capture(graph, leaves, run)
        except (FpcompilerError, *STEP_ERRORS) as error:
            self._repair()
            self.renew()
            # What failed in the capture, not that the capture could not be ended.
            cause = error if isinstance(error, FpcompilerError) else error.__context__ or error
            return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        grown = torch.cuda.memory_reserved(self._device) - before
        return CudaReplay(graph, inputs, results, max(0, grown))

    def settle(self) -> None:
        """Wait for the last turn."""
        torch.cuda.synchronize(self._device)

    def renew(self) -> None:
        """Use another pool from now on; torch frees the old one with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()

    def fresh(self) -> CudaRecorder:
        """Return one with a pool of its own."""
        return CudaRecorder(self._device)

    def _capture(
        self, graph: torch.cuda.CUDAGraph, leaves: Sequence[Tensor], run: Run
    ) -> tuple[list[Tensor], list[Any]]:
        # Tensors of inference mode could not be written to in calls outside of it. What other
        # threads do meanwhile is none of this capture's business.
        with torch.inference_mode(False), torch.no_grad():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                contiguous = torch.contiguous_format
                inputs = [torch.empty_like(leaf, memory_format=contiguous) for leaf in leaves]
                return inputs, run(inputs)
            finally:
                graph.capture_end()

    def _repair(self) -> None:
        """Undo what a capture that CUDA ended has left behind."""
        index = self._device.index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:
            return  # The capture ended as it should; an operator had failed within.
        torch._C._cuda_releasePool(index, self._pool)
        # One that succeeds brings the generator of random numbers back.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._lane.stream):
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._device)
            graph.capture_end()
