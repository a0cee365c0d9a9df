"""Metrics against scikit-learn and SciPy."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as judge

from minilora.training.evaluate import classification_metrics, pearson, perplexity

pairs = st.integers(2, 5).flatmap(lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=30))


@given(pairs)
def test_classification_metrics_match_scikit_learn(rows):
    predicted, labels = np.array(rows).T
    k = max(2, predicted.max() + 1, labels.max() + 1)
    result = classification_metrics(predicted, labels, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about classes that do not occur
        assert result["accuracy"] == pytest.approx(judge.accuracy_score(labels, predicted))
        assert result["f1_macro"] == pytest.approx(judge.f1_score(labels, predicted, average="macro", zero_division=0))
        assert result["matthews"] == pytest.approx(judge.matthews_corrcoef(labels, predicted), abs=1e-12)
        assert result["f1"] == (pytest.approx(judge.f1_score(labels, predicted, zero_division=0)) if k == 2 else result["f1_macro"])


def test_known_values():
    labels, predicted = np.array([1, 1, 1, 1, 0, 0]), np.array([1, 1, 1, 0, 1, 0])  # TP 3, FP 1, FN 1, TN 1
    result = classification_metrics(predicted, labels, 2)
    assert result == {"accuracy": pytest.approx(4 / 6), "f1": 0.75, "f1_macro": pytest.approx((0.75 + 0.5) / 2), "matthews": 0.25}
    assert classification_metrics(predicted, labels, 3)["f1"] == result["f1_macro"]


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=20))
def test_correlations_match_scipy(rows):
    x, y = np.array(rows).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about constants
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9, nan_ok=True)


def test_perplexity_is_the_exponential_of_the_loss_and_never_raises():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e5) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_refused():
    with pytest.raises(ValueError, match="no predictions to measure"):
        classification_metrics(np.array([], int), np.array([], int), 2)
    with pytest.raises(ValueError, match=r"predictions have shape \(2,\), labels \(3,\)"):
        classification_metrics(np.zeros(2, int), np.zeros(3, int), 2)
