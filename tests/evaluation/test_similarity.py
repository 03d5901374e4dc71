"""Correlations against scipy, pooling, and the task on vectors chosen by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError, OptionError
from fpcompiler.evaluation import Similarity, mean_pooled, pearson, spearman
from tests.evaluation.models import Table

stats = pytest.importorskip("scipy.stats")


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_correlations_equal_those_of_scipy(pairs) -> None:
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if a.unique().numel() < 2 or b.unique().numel() < 2:
        assert pearson(a, b) == spearman(a, b) == 0.0
        return
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_mean_pooling_leaves_out_padding() -> None:
    model = Table(torch.tensor([[3.0, 0.0], [0.0, 4.0], [99.0, 99.0]]))
    vectors = mean_pooled(model, torch.tensor([[0, 0, 2], [0, 1, 2]]),
                          torch.tensor([[1, 1, 0], [1, 1, 0]]))  # fmt: skip
    assert torch.allclose(vectors, torch.tensor([[1.0, 0.0], [0.6, 0.8]]))


def test_vectors_that_are_pooled_already_are_taken_as_they_are() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    vectors = mean_pooled(lambda ids, mask: torch.tensor([[3.0, 4.0]]), ids, torch.ones(1, 3))
    assert torch.allclose(vectors, torch.tensor([[0.6, 0.8]]))


def task(scores: list[float]) -> Similarity:
    """Four texts of one token; the pairs have cosines 1, 0.6 and 0 with the table below."""
    ids = torch.arange(4)[:, None]
    batches = [(ids[:3], torch.ones(3, 1)), (ids[3:], torch.ones(1, 1))]
    return Similarity(batches, torch.tensor([[0, 3], [0, 1], [0, 2]]), torch.tensor(scores))


TABLE = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [5.0, 0.0]])


def test_similarity_of_known_vectors() -> None:
    result = task([10.0, 6.0, 0.0]).run(Table(TABLE))
    assert result.metrics == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    assert (result.count, result.counted) == (3, "pairs")
    turned = task([0.0, 1.0, 100.0]).run(Table(TABLE)).metrics
    assert turned["spearman"] == pytest.approx(-1)
    assert turned["pearson"] == pytest.approx(stats.pearsonr([1, 0.6, 0], [0, 1, 100]).statistic)


def test_another_way_to_embed_can_be_given() -> None:
    given = task([10.0, 6.0, 0.0])
    other = Similarity(
        given.batches, given.pairs, given.scores, lambda model, ids, mask: model(ids)
    )
    assert other.run(lambda ids: TABLE[ids[:, 0]]).count == 3


def test_nan_is_named() -> None:
    table = TABLE.clone()
    table[3, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"text 3 \(counted from 0\).* 1 of 4 texts"):
        task([1.0, 2.0, 3.0]).run(Table(table))


def test_unusable_data_are_refused() -> None:
    with pytest.raises(OptionError, match=r"pairs \[3, 2\] and scores \[2\]"):
        task([1.0, 2.0]).run(Table(TABLE))
    good = task([1.0, 2.0, 3.0])
    with pytest.raises(OptionError, match="not among the 3 texts"):
        Similarity(good.batches[:1], good.pairs, good.scores).run(Table(TABLE))
    with pytest.raises(OptionError, match=r"gives \[3, 2, 1\] for texts \[3, 1\]"):
        good.run(lambda ids, mask: torch.zeros(3, 2, 1))
