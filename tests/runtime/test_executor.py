import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import ArtifactError, NumericsError, RunError
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.runtime.executor import Executor
from fpcompiler.tree import LEAF, NONE
from tests.plans import Mlp, aten, mlp_artifact, value


def plan_of(*steps: Step, out: str = "y", **fields) -> Plan:
    """Return a plan from ``x`` [s0, 3] to one value, or with other fields."""
    defaults = {
        "signature": Signature((Parameter("x", LEAF),), LEAF),
        "placeholders": (Placeholder("x", "float32", ("s0", 3)),),
        "outputs": (out,),
        "symbols": {"s0": Symbol(1, 8)},
    }
    return Plan(steps=tuple(steps), **{**defaults, **fields})


X = torch.arange(6.0).reshape(2, 3)


def run(*steps: Step, **fields) -> Tensor:
    return Executor(plan_of(*steps, **fields), {}).run(X)


def test_the_arguments_of_operators_are_decoded():
    steps = [
        aten("full_like.default", value("x"), {"f": "-inf"}, out="a", dtype={"dtype": "float64"},
             layout={"layout": "strided"}, device={"device": "cuda"}, pin_memory=False,
             memory_format={"memory_format": "preserve_format"}),
        aten("cat.default", [value("a"), value("x")], -1, out="y"),
    ]  # fmt: skip
    expected = torch.cat([torch.full_like(X, -torch.inf, dtype=torch.float64), X], -1)
    assert torch.equal(run(*steps), expected)


def test_sizes_are_computed_with_python_arithmetic():
    steps = [
        aten("sym_size.int", value("x"), 0, out="n"),
        Step("py.mul", (value("n"), 3), ("m",)),
        Step("py.floordiv", (value("m"), 2), ("h",)),
        Step("py.sym_max", (value("h"), 1), ("g",)),
        aten("reshape.default", value("x"), [2, value("g")], out="y"),
    ]
    assert torch.equal(run(*steps), X.reshape(2, 3))


def test_a_list_result_is_one_value_or_several():
    one = [
        aten("split.Tensor", value("x"), 1, out="parts"),
        Step("py.getitem", (value("parts"), 1), ("y",)),
    ]
    several = [Step("aten.split.Tensor", (value("x"), 1), ("first", "y"))]
    assert torch.equal(run(*one), X[1:])
    assert torch.equal(run(*several), X[1:])
    with pytest.raises(RunError, match=r"step 0 \(aten.split.Tensor\) failed"):
        run(Step("aten.split.Tensor", (value("x"), 1), ("a", "b", "y")))


def test_values_are_freed_after_their_last_use():
    steps = [aten("add.Tensor", value("x"), 1, out="v0", layer="l")]
    for i in range(9):
        steps.append(aten("add.Tensor", value(f"v{i}"), 1, out=f"v{i + 1}", layer="l"))
    results: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def observe(step: Step, tensor: Tensor) -> None:
        results.append(weakref.ref(tensor))
        alive.append(sum(result() is not None for result in results))

    result = Executor(plan_of(*steps, out="v9"), {}).observed(observe, X)
    assert torch.equal(result, X + 10)
    assert alive == [1] + [2] * 9  # The result of a step and what it was computed from.


def test_results_do_not_share_memory_with_constants_or_state():
    weights = {"w": torch.ones(2, 3), "s": torch.zeros(3)}
    fields = {
        "signature": Signature((Parameter("x", LEAF),), {"t": "tuple", "c": [LEAF, LEAF, LEAF]}),
        "outputs": ("w", "row", "s"),
        "constants": {"w": "w"},
        "state": {"s": "s"},
    }
    steps = [
        aten("t.default", value("w"), out="t"),
        aten("select.int", value("t"), 1, 0, out="row"),
    ]
    executor = Executor(plan_of(*steps, **fields), weights)
    for result in executor.run(X):
        result.fill_(7)
    assert weights["w"].eq(1).all()
    assert executor.run(X)[2].eq(0).all()


def test_state_lives_from_call_to_call_until_reset():
    tensors = {"a": torch.zeros(3), "b": torch.ones(3)}
    swap = {
        "outputs": ("sum",),
        "state": {"a": "a", "b": "b"},
        "stores": (("b", "a"), ("sum", "b")),
    }
    steps = [aten("add.Tensor", value("a"), value("b"), out="sum")]
    executor = Executor(plan_of(*steps, **swap), tensors)
    fibonacci = [int(executor.run(X)[0]) for _ in range(6)]
    assert fibonacci == [1, 2, 3, 5, 8, 13]
    other = executor.fresh()
    assert int(other.run(X)[0]) == 1
    assert int(executor.run(X)[0]) == 21
    executor.reset()
    assert int(executor.run(X)[0]) == 1
    assert tensors["a"].eq(0).all()


def test_a_failed_run_leaves_the_state_as_it_was():
    fields = {"state": {"s": "s"}, "stores": (("more", "s"),), "outputs": ("more",)}
    steps = [
        aten("add.Tensor", value("s"), 1, out="more"),
        aten("reshape.default", value("x"), [2, 3], out="r"),
    ]
    executor = Executor(plan_of(*steps, **fields), {"s": torch.zeros(1)})
    with pytest.raises(RunError):
        executor.run(torch.ones(1, 3))
    assert int(executor.run(X)) == 1


def test_a_failing_step_is_named_with_its_layer():
    step = aten("reshape.default", value("x"), [5, 5], out="y", layer="blocks.3")
    message = r"layer 'blocks.3': step 0 \(aten.reshape.default\) failed: shape '\[5, 5\]' is inv"
    with pytest.raises(RunError, match=message) as caught:
        run(step)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_values_that_cannot_be_quantized_name_the_layer():
    step = Step("fpc.quantize", (value("x"), "f4E2M1FN@row:f32", "up"), ("y", "s"), {}, "up")
    executor = Executor(plan_of(step), {})
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN/Inf"):
        executor.run(X * torch.inf)


def test_gradients_are_not_recorded():
    step = aten("mul.Tensor", value("x"), 2, out="y")
    assert not Executor(plan_of(step), {}).run(X.clone().requires_grad_()).requires_grad


def test_a_number_may_be_a_result():
    fields = {
        "signature": Signature((Parameter("x", LEAF),), {"t": "list", "c": [LEAF, LEAF]}),
        "outputs": ("n", 3),
    }
    assert run(aten("sym_size.int", value("x"), 0, out="n"), **fields) == [2, 3]


# What a plan may use


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("aten.from_file.default", "is not a plain computation"),
        ("aten.add_.Tensor", "writes to its arguments"),
        ("aten.add.out", "writes to its arguments"),
        ("aten.set_.source_Tensor", "writes to its arguments"),
        ("aten._print.default", "is not a plain computation"),
        ("aten._cuda_getCurrentBlasHandle.default", "which torch does not have"),
        ("aten._assert_async.msg", "is not a plain computation"),
        ("aten.nothing.default", "which torch does not have"),
        ("aten.add.nothing", "which torch does not have"),
        ("aten.__init__.default", "which torch does not have"),
        ("aten.add.__call__", "which torch does not have"),
        ("fpc.secret", "which this fpcompiler does not have"),
        ("py.__import__", "which this fpcompiler does not have"),
        ("py.eval", "which this fpcompiler does not have"),
    ],
)
def test_operators_that_are_not_pure_functions_are_refused(op, message):
    with pytest.raises(ArtifactError, match=message):
        Executor(plan_of(Step(op, (value("x"),), ("y",))), {})


@pytest.mark.parametrize(
    "argument", [{"dtype": "object"}, {"layout": "sparse_coo"}, {"memory_format": "x"}, {"f": "1"}]
)
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(ArtifactError, match="which is unknown"):
        Executor(plan_of(aten("add.Tensor", value("x"), argument, out="y")), {})


def test_an_unknown_kernel_and_a_missing_tensor_are_refused():
    artifact = mlp_artifact()
    steps = tuple(replace(step, kernel="sm_900") for step in artifact.plan.steps)
    message = "wants the kernel 'sm_900' for up; this fpcompiler has reference"
    with pytest.raises(ArtifactError, match=message):
        Executor(replace(artifact.plan, steps=steps), artifact.tensors)
    with pytest.raises(ArtifactError, match=r"names the tensor 'up.w0', which"):
        Executor(artifact.plan, {})


# torch.compile


def test_torch_compile_traces_a_run_without_a_break():
    torch.manual_seed(0)
    artifact = mlp_artifact(Mlp(32, 32))
    eager = Executor(artifact.plan, artifact.tensors)
    traced = Executor(artifact.plan, artifact.tensors)
    function = torch.compile(traced.run, backend="eager", fullgraph=True)
    for rows in (4, 9):
        x = torch.randn(rows, 32)
        ours, theirs = function(x, use_cache=False), eager.run(x)
        assert torch.equal(ours["logits"], theirs["logits"])
        assert torch.equal(ours["hidden"][0], theirs["hidden"][0])
    assert traced._state["calls"].item() == 2


# Inputs

MASKED = replace(
    mlp_artifact().plan,
    signature=Signature(
        (Parameter("x", LEAF), Parameter("mask", NONE), Parameter("past"), Parameter("n", NONE)),
        mlp_artifact().plan.signature.outputs,
        {"use_cache": False, "mode": "a"},
    ),
)
Z = torch.ones(2, 64)


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(MASKED, mlp_artifact().tensors)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((Z,), {}),
        ((), {"x": Z}),
        ((Z, None), {"use_cache": False, "mode": "a"}),
        ((Z,), {"mask": None, "n": None}),
    ],
)
def test_arguments_may_come_by_position_and_by_name(executor, args, kwargs):
    assert executor.run(*args, **kwargs)["logits"].shape == (2, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"'x' is missing"),
        ((None,), {}, r"argument 'x': expected a tensor, got None"),
        ((Z, Z), {}, r"argument 'mask': expected None, .* got a tensor of shape \[2, 64\]"),
        ((Z, None, Z), {}, r"'past' was not given when the model was captured.*Leave it out"),
        ((Z, None, Z, Z, Z), {}, r"takes 4 positional arguments \(x, mask, past, n\), got 5"),
        ((Z,), {"x": Z}, r"'x' was given twice"),
        ((Z,), {"maks": None}, r"no argument 'maks'. Did you mean 'mask'\?"),
        ((Z,), {"use_cache": True}, r"'use_cache' is fixed to False .* got True. Leave it out"),
        ((Z,), {"use_cache": 0}, r"'use_cache' is fixed to False in this program, got 0"),
        ((Z,), {"mode": "b"}, r"'mode' is fixed to 'a' in this program, got a str"),
        (
            (Z.half(),),
            {},
            r"'x': expected float32, got float16. Convert it with .to\(torch.float32",
        ),
        ((Z.to("meta"),), {}, r"'x' is on meta, the model runs on cpu. Move it with .to\('cpu'\)"),
        (
            (Z[0],),
            {},
            r"expected the shape \[s0, 64\] with s0 from 1 to 64, got \[64\]: it has 1 d",
        ),
        ((Z[:, :9],), {}, r"got \[2, 9\]: dimension 1 must be 64"),
        ((Z[:0],), {}, r"got \[0, 64\]: dimension 0 must be from 1 to 64"),
        ((torch.ones(65, 64),), {}, r"got \[65, 64\]: dimension 0 must be from 1 to 64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(executor, args, kwargs, message):
    with pytest.raises(RunError, match=message):
        executor.run(*args, **kwargs)


def test_sizes_of_the_same_symbol_must_agree():
    spec = {"t": "dict", "k": ["a", "b"], "c": [LEAF, LEAF]}
    plan = Plan(
        Signature((Parameter("past", spec),), LEAF),
        (Placeholder("a", "float32", ("s0", "2*s0")), Placeholder("b", "int64", ("s0",))),
        (),
        ("a",),
        {"s0": Symbol(0, None)},
    )
    executor = Executor(plan, {})
    a, b = torch.ones(2, 4), torch.ones(2, dtype=torch.int64)
    assert executor.run({"b": b, "a": a}) is a
    message = (
        r"'past.b': expected the shape \[s0\] with s0 at least 0, got \[3\]: dimension 0 must "
    )
    with pytest.raises(RunError, match=message + "be the same as s0 = 2 of argument 'past.a'"):
        executor.run({"a": a, "b": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(RunError, match=r"takes 2 tensors \(past.a, past.b\), got 1"):
        executor.run_leaves([a])
