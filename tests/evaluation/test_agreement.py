"""Agreement with an original model on logits chosen by hand."""

import pytest
import torch
from torch import nn

from fpcompiler.errors import NumericsError, OptionError, RunError
from fpcompiler.evaluation import Agreement, FeatureAgreement, mean_cosine, recoveries

LOGITS = torch.eye(8)[:4] * 8.0  # Row i has its largest logit at class i.


def original(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"features": x, "logits": LOGITS[: len(x)]}


def other(x: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = LOGITS.clone()
    logits[1, 2] = 9.0  # The original's best class is now second.
    logits[2] = torch.tensor([5.0, 5, 0, 5, 5, 5, 0, 0])  # It is not among the first five.
    return {"features": -x, "logits": logits[: len(x)]}


def test_top1_top5_and_cosine() -> None:
    result = Agreement([(torch.ones(4, 3),)]).against(original).run(other)
    assert result.metrics["top1"] == 0.5
    assert result.metrics["top5"] == 0.75
    cosines = [1.0, 8 / (8**2 + 9**2) ** 0.5, 0.0, 1.0]
    assert result.metrics["cosine"] == pytest.approx(sum(cosines) / 4)
    assert (result.count, result.counted) == (4, "rows")


def test_the_original_agrees_with_itself() -> None:
    task = Agreement([torch.ones(2, 3), torch.ones(4, 3)]).against(original)
    reference, result = task.run(original), task.run(other)
    assert list(reference.metrics.values()) == pytest.approx([1, 1, 1])
    assert reference.count == 6
    top1 = recoveries(reference, result)[0]
    assert top1.ratio == pytest.approx(3 / 6)  # Row 1 differs twice, row 2 once.


def test_rows_weigh_the_same_whatever_their_batch() -> None:
    batches = torch.ones(4, 3), torch.ones(1, 3)
    value = Agreement(batches).against(original).run(other).metrics["top1"]
    assert value == pytest.approx(3 / 5)


def test_few_classes_are_all_among_the_first_five() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    task = Agreement([torch.ones(1)]).against(lambda x: logits)
    assert task.run(lambda x: -logits).metrics == pytest.approx(
        {"top1": 0.0, "top5": 1.0, "cosine": -1.0}
    )


def test_features_by_name_and_calls_by_keyword() -> None:
    task = FeatureAgreement([{"x": torch.randn(2, 5, 3)}], output="features").against(original)
    result = task.run(other)
    assert result.metrics == pytest.approx({"cosine": -1.0})
    assert result.count == 10


def test_mean_cosine() -> None:
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [4.0, -3.0]])
    assert mean_cosine(a, b) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (Agreement([torch.ones(4, 3)]), OptionError, "none was given: task.against"),
        (Agreement([]).against(original), OptionError, "no inputs"),
        (Agreement([torch.ones(4, 3)], "probs").against(original), OptionError,
         "no tensor 'probs'. Tensors in it: features, logits"),
        (Agreement([torch.ones(4, 3)]).against(lambda x: torch.zeros(4)), OptionError,
         r"original model, batch 0: the output has shape \[4\]"),
        (Agreement([torch.ones(4, 3)]).against(lambda x: torch.zeros(4, 9)), OptionError,
         r"batch 0: the outputs have \[4, 9\] and \[4, 8\]"),
        (Agreement([torch.ones(4, 3)]).against(lambda x: LOGITS / 0), NumericsError,
         "original model, batch 0: 32 of 32 values"),
        (Agreement([torch.ones(4, 3)]).against(nn.Linear(9, 2)), RunError,
         r"Linear failed on inputs \[4, 3\]: RuntimeError"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(task, error, message) -> None:
    with pytest.raises(error, match=message):
        task.run(other)
