"""Weights of four bits in onnxruntime and OpenVINO.

All copies of a weight are in one graph and a run multiplies with all of them, as in a model: many
sessions would have many pools of threads, which disturb each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.benchmarks.cpu_linear.problem import (
    Builder,
    Problem,
    Work,
    imported,
    nibbles,
    require_multiple,
    signed_blocks,
)
from fpcompiler.numerics import quantize
from fpcompiler.operand import Operand


def onnxruntime_int4(block: int) -> Builder:
    """Return a builder of MatMulNBits with inputs quantized to int8 (accuracy level 4)."""

    def build(problem: Problem) -> Work:
        imported("onnx")
        imported("onnxruntime")
        n, k = problem.weight.shape
        require_multiple("K", k, block)
        values, scale = signed_blocks(problem.weight, block)
        packed, scales = nibbles(values + 8), scale.flatten(1)
        size = packed.nbytes + scales.nbytes
        count = problem.copies(size)
        weights = [
            (problem.rolled(packed, i), problem.rolled(scales, i).reshape(-1)) for i in range(count)
        ]
        session = _session(weights, n, k, block, problem.threads)
        binding, first = _bound(session, problem.x, n, count)
        return Work(
            lambda i: session.run_with_iobinding(binding),
            lambda: torch.from_numpy(first.numpy()),
            size,
            count,
            count,
        )

    return build


def _session(weights: list[tuple[Any, Any]], n: int, k: int, block: int, threads: int) -> Any:
    onnx, runtime = imported("onnx"), imported("onnxruntime")
    make, array, kind = onnx.helper, onnx.numpy_helper.from_array, onnx.TensorProto.FLOAT
    settings = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4}
    nodes, constants, outputs = [], [], []
    for i, (packed, scales) in enumerate(weights):
        names = ["x", f"codes{i}", f"scales{i}"]
        nodes.append(
            make.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **settings)
        )
        constants += [array(packed, names[1]), array(scales, names[2])]
        outputs.append(make.make_tensor_value_info(f"y{i}", kind, ["M", n]))
    inputs = [make.make_tensor_value_info("x", kind, ["M", k])]
    graph = make.make_graph(nodes, "layers", inputs, outputs, constants)
    versions = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=versions, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bound(session: Any, x: Tensor, n: int, count: int) -> tuple[Any, Any]:
    """Return memory for the input and all outputs, and the first output."""
    value = imported("onnxruntime").OrtValue
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value.ortvalue_from_numpy(x.numpy()))
    outputs = [
        value.ortvalue_from_numpy(np.empty((len(x), n), dtype=np.float32)) for _ in range(count)
    ]
    for i, output in enumerate(outputs):
        binding.bind_ortvalue_output(f"y{i}", output)
    return binding, outputs[0]


def openvino_int4(problem: Problem, block: int = 32) -> Work:
    """Build OpenVINO's product of int4 weights and inputs that it quantizes in groups of 32."""
    imported("openvino")
    require_multiple("K", problem.weight.shape[1], block)
    values, scale = signed_blocks(problem.weight, block)
    return _openvino(problem, "i4", nibbles(values), scale)


def openvino_f4e2m1(problem: Problem, block: int = 32) -> Work:
    """Build OpenVINO's product of bf16 and E2M1."""
    imported("openvino")
    require_multiple("K", problem.weight.shape[1], block)
    codes, (scale,) = quantize(problem.weight, Operand.parse(f"f4E2M1FN@block{block}:f32"))
    blocks = codes.view(len(codes), -1, block)
    return _openvino(problem, "f4e2m1", nibbles(blocks), scale[..., None])


def _openvino(problem: Problem, kind: str, packed: Tensor, scale: Tensor) -> Work:
    """Build from codes ``[N, blocks, block / 2]`` and scales ``[N, blocks, 1]``."""
    openvino = imported("openvino")
    scales = scale.half()
    size = packed.nbytes + scales.nbytes
    count = problem.copies(size)
    weights = [(problem.rolled(packed, i), problem.rolled(scales, i)) for i in range(count)]
    compiled = _compiled(weights, kind, problem)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(problem.x.numpy()))
    # It reads the codes where they are: `weights` must live as long as the request.
    return Work(
        lambda i: (request.infer(), weights)[0],
        lambda: torch.from_numpy(request.get_output_tensor(0).data.copy()),
        size,
        count,
        count,
    )


def _compiled(weights: list[tuple[Any, Any]], kind: str, problem: Problem) -> Any:
    openvino, op = imported("openvino"), imported("openvino.opset13")
    n, k = problem.weight.shape
    element, shape = getattr(openvino.Type, kind), op.constant(np.array([n, k]))
    x = op.parameter([-1, k], openvino.Type.f32, name="x")
    products = []
    for packed, scales in weights:
        values = [*packed.shape[:2], 2 * packed.shape[2]]
        codes = op.constant(openvino.Tensor(packed, shape=values, type=element))
        decoded = op.multiply(op.convert(codes, "f16"), op.constant(scales))
        weight = op.convert(op.reshape(decoded, shape, special_zero=False), "f32")
        products.append(op.matmul(x, weight, transpose_a=False, transpose_b=True))
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(openvino.Model(products, [x]), "CPU", settings)
