"""Runs ONNX files of compiled models on onnxruntime, called like the models.

A file says of itself how it is called (:data:`METADATA`): a plan with one step, the whole graph. So
arguments are checked and results are nested as for an artifact. States (KV caches) are inputs and
outputs of the graph; they stay with onnxruntime from call to call.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import safetensors.torch
import torch
from torch import Tensor

from fpcompiler.arguments import PATH, require_type
from fpcompiler.artifact import Golden
from fpcompiler.errors import (
    ArtifactError,
    DependencyError,
    RunError,
    TargetError,
    first_line,
)
from fpcompiler.plan import Plan
from fpcompiler.runtime import inputs
from fpcompiler.runtime.devices import parse_device
from fpcompiler.runtime.tables import PlanTable, VerifyReport, VerifyRow
from fpcompiler.runtime.verify import judge, ratios
from fpcompiler.tree import unflatten

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "GOLDEN_SUFFIX",
    "METADATA",
    "METADATA_VERSION",
    "OnnxFacts",
    "OnnxModel",
    "golden_names",
    "load_onnx",
]

METADATA: Final = "fpcompiler"
"""The property of a file with what it says of itself, JSON."""
METADATA_VERSION: Final = 1
GOLDEN_SUFFIX: Final = ".golden.safetensors"
"""Of the file beside it with the recorded calls."""

_NOTHING: Final = (
    "nothing was compared: there is no {} beside the file. Put it there, or export the model again "
    "from an artifact that was compiled with example inputs"
)

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def golden_names(call: int, inputs: int, outputs: int) -> tuple[list[str], list[str]]:
    """Return the names of the tensors of a recorded call in the file beside."""
    return [f"{call}.in.{i}" for i in range(inputs)], [f"{call}.out.{i}" for i in range(outputs)]


@dataclass(frozen=True)
class OnnxFacts:
    """What a file says of itself.

    Attributes:
        plan: How it is called: a plan with one step.
        scheme: Exact text of the scheme.
        style: ``standard`` or ``portable``.
        noise: For each recorded call, the SQNR that changes of last bits alone lead to, in dB.
    """

    plan: Plan
    scheme: str
    style: str
    noise: tuple[float, ...]

    @classmethod
    def from_json(cls, text: str, path: Path) -> OnnxFacts:
        """Return what the property of a file says.

        Raises:
            ArtifactError: If it is not of this program, or of another version.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise _foreign(path, f"its property {METADATA!r} is no JSON") from error
        if not isinstance(data, dict) or data.get("version") != METADATA_VERSION:
            raise _foreign(path, "it was written by another version of fpcompiler")
        try:
            noise = [math.inf if value is None else float(value) for value in data["noise_db"]]
            texts = str(data["scheme"]), str(data["style"])
            return cls(Plan.from_json(data["plan"]), *texts, tuple(noise))
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(path, f"its property {METADATA!r} lacks {error}") from error


def load_onnx(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> OnnxModel:
    """Load an ONNX file that ``export`` of a compiled model wrote, to run it on onnxruntime.

    Args:
        path: The file.
        device: ``cpu``, or ``cuda`` if the onnxruntime that is installed has it.

    Raises:
        DependencyError: If onnxruntime is not installed.
        ArtifactError: If the file is none of ours, or has types that onnxruntime cannot run.
        TargetError: If onnxruntime does not run on the device.
    """
    require_type("the path", path, PATH, "that of a file, such as load('model.onnx')")
    return OnnxModel(Path(path), parse_device(device))


@final
class OnnxModel:
    """An ONNX file on onnxruntime; call it like the model that was compiled.

    Args:
        path: The file.
        device: Where it runs; results are on the CPU.

    Raises:
        DependencyError: If onnxruntime is not installed.
        ArtifactError: If the file is none of ours, or has types that onnxruntime cannot run.
        TargetError: If onnxruntime does not run on the device.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._runtime = _onnxruntime()
        self._path, self._device = path, device
        self._session = self._open()
        properties = self._session.get_modelmeta().custom_metadata_map
        if METADATA not in properties:
            raise _foreign(path, f"it has no property {METADATA!r}")
        self._facts = OnnxFacts.from_json(properties[METADATA], path)
        self._names = inputs.leaf_names(self._facts.plan.signature)
        self._state: dict[str, Any] = {}
        self.reset()

    @property
    def scheme(self) -> str:
        """Exact text of the scheme."""
        return self._facts.scheme

    @property
    def device(self) -> torch.device:
        """Where tensors of a call have to be; onnxruntime moves them if it runs elsewhere."""
        return torch.device("cpu")

    def plan(self) -> PlanTable:
        """Return what became of each layer when the model was compiled."""
        return PlanTable.of(self._facts.plan.layers, self.scheme)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the arguments of its ``forward``.

        Raises:
            RunError: If the arguments do not fit, or onnxruntime fails.
        """
        signature = self._facts.plan.signature
        return unflatten(signature.outputs, self.run_leaves(inputs.bind(signature, args, kwargs)))

    def run_leaves(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Run on tensors, one per input; return one value per leaf of the outputs.

        Raises:
            RunError: If the tensors do not fit, or onnxruntime fails.
        """
        plan = self._facts.plan
        inputs.check(plan, self._names, leaves, self.device)
        names = [placeholder.name for placeholder in plan.placeholders]
        feeds = {name: self._value(name, leaf) for name, leaf in zip(names, leaves, strict=True)}
        try:
            wanted = list(plan.steps[0].outs)
            results = self._session.run_with_ort_values(wanted, {**feeds, **self._state})
        except _errors(self._runtime) as error:
            raise RunError(f"onnxruntime failed: {first_line(error)}.") from error
        values = dict(zip(wanted, results, strict=True))
        self._state.update({past: values[present] for present, past in plan.stores})
        outputs = (values[out] if isinstance(out, str) else out for out in plan.outputs)
        return [_tensor(out) if hasattr(out, "numpy") else out for out in outputs]

    def reset(self) -> None:
        """Bring the states (KV caches) back to the initial ones."""
        # One that does not begin with zeros has its first value in the file, which onnxruntime
        # takes where none is given; then it is not among the inputs.
        self._state = {}
        for value in self._session.get_inputs():
            if value.name in self._facts.plan.state:
                zeros = torch.zeros(value.shape, dtype=_DTYPES[value.type])
                self._state[value.name] = self._value(value.name, zeros)

    def verify(self) -> VerifyReport:
        """Replay the recorded calls that are in the file beside, from the initial state.

        A report without any is not ok: nothing else is checked of an ONNX file.
        """
        golden = self._golden()
        if not golden:
            name = self._path.name + GOLDEN_SUFFIX
            return VerifyReport((VerifyRow("recorded calls", "failed", _NOTHING.format(name)),))
        before, rows = dict(self._state), []
        self.reset()
        for index, case in enumerate(golden):
            found = [torch.as_tensor(value) for value in self.run_leaves(case.inputs)]
            bits = all(map(torch.equal, case.outputs, found))
            noise = self._facts.noise[index] if index < len(self._facts.noise) else math.inf
            rows.append(judge(f"recorded call {index}", ratios(case.outputs, found), noise, bits))
        self._state = before
        return VerifyReport(tuple(rows))

    def __repr__(self) -> str:
        """Return one line with the scheme and the file."""
        return f"OnnxModel({self.scheme!r}, {self._path.name!r})"

    def _golden(self) -> list[Golden]:
        file = self._path.with_name(self._path.name + GOLDEN_SUFFIX)
        if not file.is_file():
            return []
        try:
            tensors = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(
                f"{file} cannot be read: {error}. Export the model again."
            ) from error
        plan, calls = self._facts.plan, list[Golden]()
        while f"{len(calls)}.out.0" in tensors:
            given, found = golden_names(len(calls), len(plan.placeholders), len(plan.outputs))
            calls.append(Golden(tuple(tensors[n] for n in given), tuple(tensors[n] for n in found)))
        return calls

    def _open(self) -> onnxruntime.InferenceSession:
        provider = _PROVIDERS.get(self._device.type)
        available = self._runtime.get_available_providers()
        if provider not in available:
            raise TargetError(
                f"the onnxruntime that is installed does not run on {self._device}; it has "
                f"{', '.join(available)}."
            )
        if not self._path.is_file():
            raise ArtifactError(f"there is no file {self._path}.")
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4  # What fails is raised; warnings are for its developers.
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            return self._runtime.InferenceSession(self._path, options, providers=[provider])
        except self._runtime.capi.onnxruntime_pybind11_state.InvalidProtobuf as error:
            raise ArtifactError(
                f"{self._path} is no whole ONNX file: {first_line(error)}. Write it with "
                "`fpcompiler export`; an artifact is loaded without a backend."
            ) from error
        except _errors(self._runtime) as error:
            raise ArtifactError(
                f"onnxruntime cannot run {self._path}: {first_line(error)}. It has no kernels for "
                "4- and 6-bit types, and few for bfloat16: export to onnx-portable, from a model "
                "in float32 or float16."
            ) from error

    def _value(self, name: str, tensor: Tensor) -> Any:
        if tensor.dtype == torch.bfloat16:
            raise RunError(
                f"input {name!r} is bfloat16, which cannot be passed to onnxruntime from Python. "
                "Compile the model in float32 or float16."
            )
        array = tensor.detach().contiguous().numpy()
        return self._runtime.OrtValue.ortvalue_from_numpy(array)


_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "the backend onnxruntime needs the package: pip install 'fpcompiler[onnx]'."
        ) from error
    return onnxruntime


def _errors(runtime: Any) -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises, which is derived from nothing of its own."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = (
        "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel",
        "NoSuchFile", "NotImplemented", "RuntimeException",
    )  # fmt: skip
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def _tensor(value: Any) -> Tensor:
    # The array lies in memory of onnxruntime, which another call may use again.
    return torch.from_numpy(value.numpy()).clone()


def _foreign(path: Path, cause: str) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be called like a model: {cause}. Write it with `fpcompiler export`, or run "
        "it with onnxruntime itself."
    )
