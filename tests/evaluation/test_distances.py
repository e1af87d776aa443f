"""Distances of feature sets against closed forms and slow references."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from timm_collapse import CollapseError
from timm_collapse.evaluation import FeatureStatistics, classifier_score, distances, frechet_distance, kid, prdc


def gaussian(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x):
    return x.mean(0), x.T.cov()


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    m1, m2 = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 0.0])
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 0.5, 0.0])
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2)) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_equals_the_matrix_square_root():
    (m1, c1), (m2, c2) = moments(gaussian(50, 6) @ gaussian(6, 6, 1)), moments(gaussian(60, 6, 2) + 0.3)
    root = sqrtm((c1 @ c2).numpy()).real
    slow = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(slow, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(slow, rel=1e-9)


def test_frechet_of_singular_covariances():
    # 5 images of width 40: rank 4; two planes at right angles share nothing
    m, c = moments(gaussian(5, 40, scale=100))
    assert frechet_distance(m, c, m, c) == pytest.approx(0, abs=1e-9)
    zero, one, two = torch.zeros(4), torch.diag(torch.tensor([4.0, 1, 0, 0])), torch.diag(torch.tensor([0.0, 0, 9, 0]))
    assert frechet_distance(zero, one, zero, two) == pytest.approx(4 + 1 + 9)
    assert frechet_distance(zero, torch.zeros(4, 4), zero, two) == pytest.approx(9)


def test_statistics_of_a_stream_are_those_of_the_batch():
    x = gaussian(57, 5).float() + 1e4  # far from 0: sums of squares would lose the digits
    stream = FeatureStatistics("net")
    for part in x.split(10):
        stream.update(part)
    assert stream.count == 57
    torch.testing.assert_close(stream.mean, x.double().mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(stream.covariance, x.double().T.cov(), rtol=1e-9, atol=1e-9)
    halves = FeatureStatistics().merge(FeatureStatistics().update(x[:1])).merge(FeatureStatistics().update(x[1:]))
    torch.testing.assert_close(halves.covariance, stream.covariance, rtol=1e-9, atol=1e-9)
    assert FeatureStatistics().update(x[:3]).merge(FeatureStatistics()).count == 3


def test_statistics_in_a_file(tmp_path):
    first = FeatureStatistics("net").update(gaussian(20, 3))
    first.to_npz(tmp_path / "a.npz")
    again = FeatureStatistics.from_npz(tmp_path / "a.npz")
    assert (again.features, again.count) == ("net", 20) and torch.equal(again.mean, first.mean)
    torch.testing.assert_close(again.covariance, first.covariance)
    rest = gaussian(9, 3, 1)
    torch.testing.assert_close(again.update(rest).covariance, first.update(rest).covariance)

    np.savez(tmp_path / "adm.npz", mu=np.ones(3, np.float32), sigma=np.eye(3), mu_s=np.ones(2))
    other = FeatureStatistics.from_npz(tmp_path / "adm.npz")
    assert (other.features, other.count) == ("", None) and torch.equal(other.covariance, torch.eye(3).double())
    for change in (lambda: other.update(rest), lambda: first.merge(other)):
        with pytest.raises(CollapseError, match="unknown number of images"):
            change()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.ones(3)}, "holds no sigma"),
        ({"mu": np.ones(3), "sigma": np.eye(4)}, r"\(3,\) and \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
    ],
)
def test_wrong_statistics_files(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CollapseError, match=message):
        FeatureStatistics.from_npz(tmp_path / "a.npz")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.save(tmp_path / "single.npy", np.ones(3))
    for name in ("text.npz", "single.npy", "missing.npz"):
        with pytest.raises(CollapseError, match=name):
            FeatureStatistics.from_npz(tmp_path / name)


def slow_mmd2(x, y):
    """The unbiased estimate as in the paper, pair by pair."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_equals_a_double_loop():
    x, y = gaussian(12, 4), gaussian(12, 4, 1) + 0.5
    mean, std = kid(x, y, subset_size=12, subsets=2)
    assert mean == pytest.approx(slow_mmd2(x, y), rel=1e-9) and std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_and_sees_a_shift():
    x, y = gaussian(4000, 8), gaussian(4000, 8, 1)
    mean, std = kid(x, y, subset_size=50, subsets=200)
    # the biased estimate would be off by 2 (E k(x, x) - E k(x, y)) / 50, about 0.3
    assert abs(mean) < 4 * std / math.sqrt(200) and mean < 0.05
    assert kid(x, y + 0.5, subset_size=50, subsets=20)[0] > 10 * abs(mean)


def test_kid_draws_with_the_generator():
    x, y = gaussian(60, 4), gaussian(50, 4, 1)
    first, again, other = (kid(x, y, 20, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other and kid(x, y, 20, 3) == kid(x, y, 20, 3)


def slow_prdc(real, fake, k):
    def distance(a, b):
        return float((a - b).square().sum())

    def radii(points):
        rows = ([distance(p, q) for j, q in enumerate(points) if j != i] for i, p in enumerate(points))
        return [sorted(row)[k - 1] for row in rows]

    real_radii, fake_radii = radii(real), radii(fake)
    table = [[distance(f, r) for r in real] for f in fake]
    columns = [[row[i] for row in table] for i in range(len(real))]
    precision = sum(any(d <= r for d, r in zip(row, real_radii)) for row in table) / len(fake)
    recall = sum(any(d <= r for d, r in zip(column, fake_radii)) for column in columns) / len(real)
    density = sum(d < r for row in table for d, r in zip(row, real_radii)) / k / len(fake)
    coverage = sum(min(column) < r for column, r in zip(columns, real_radii)) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [2**24, 100])
def test_prdc_equals_a_double_loop(monkeypatch, k, chunk):
    monkeypatch.setattr(distances, "CHUNK_ELEMENTS", chunk)  # 100: a few rows at a time
    real, fake = gaussian(40, 3), gaussian(31, 3, 1, scale=0.7) + 0.8
    found = prdc(real, fake, k)
    assert tuple(found) == pytest.approx(slow_prdc(real, fake, k), rel=1e-12)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    # small integers: exact ties and copies, where closed and open balls differ
    real, fake = gaussian(40, 2, 2).round(), gaussian(30, 2, 3).round()
    assert tuple(prdc(real, fake, k)) == pytest.approx(slow_prdc(real, fake, k), rel=1e-12)


def test_prdc_of_known_cases():
    x = gaussian(50, 4)
    assert tuple(prdc(x, x, 5)) == pytest.approx((1, 1, 1, 1))
    assert tuple(prdc(x, x + 100, 5)) == (0, 0, 0, 0)
    # half of the real images, each once more: nothing false, half of the modes lost
    far = torch.cat([x, x + 100])
    found = prdc(far, x + 0.001, 3)
    assert (found.precision, found.recall, found.coverage) == (1, 0.5, 0.5) and found.density > 0.9


def test_copies_have_distance_0_where_products_do_not_cancel():
    x = gaussian(30, 64, scale=1e3)
    assert (distances._squared_distances(x, x.clone()).diagonal() == 0).all()
    # three copies of each: radius 0, and the other set's copies are inside by precision's closed balls alone
    found = prdc(x.repeat(3, 1), x[:7].repeat(5, 1), 2)
    assert tuple(found) == (1, 7 / 30, 0, 0)


def test_classifier_score_of_known_cases():
    classes = torch.arange(200) % 10
    sure = 1e4 * torch.nn.functional.one_hot(classes, 10).float()  # other probabilities underflow to 0
    assert classifier_score(sure, splits=1) == (pytest.approx(10), pytest.approx(0))
    assert classifier_score(torch.zeros(50, 10), splits=5) == (pytest.approx(1), pytest.approx(0))
    assert classifier_score(sure[:1].repeat(20, 1), splits=2)[0] == pytest.approx(1)
    # sorted by class, and every tenth image of one class: neither way of cutting without a shuffle would hold all
    for order in (classes.argsort(), torch.arange(200)):
        assert classifier_score(sure[order], splits=10)[0] > 5


def test_classifier_score_equals_the_formula():
    logits = gaussian(30, 7, scale=2)
    p = logits.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert classifier_score(logits, 1)[0] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: prdc(x, x, 10), "k must be 1 to 9, .* got 10"),
        (lambda x: prdc(x, x[:4], 4), "k must be 1 to 3"),
        (lambda x: prdc(x, x, 0), "k must be 1 to 9, .* got 0"),
        (lambda x: prdc(x, x[:, :2], 3), "real and fake must have the same width, got 3 and 2"),
        (lambda x: prdc(x, x * torch.nan, 3), "fake must be finite, got NaN or inf for 10 of 10 images"),
        (lambda x: kid(x, x, 11), "subset_size must be 2 to 10, .* got 11"),
        (lambda x: kid(x, x, 1), "subset_size must be 2 to 10"),
        (lambda x: kid(x, x, 5, 0), "subsets must be at least 1, got 0"),
        (lambda x: kid(x, x[:, :2], 5), "same width"),
        (lambda x: classifier_score(x, 11), "splits must be 1 to 10, .* got 11"),
        (lambda x: classifier_score(x / 0), "logits must be finite"),
        (lambda x: classifier_score(x.long()), r"logits must be a float tensor of shape \(images, width\)"),
        (lambda x: FeatureStatistics().update(x[0]), "features must be a float tensor"),
        (lambda x: FeatureStatistics().update(x[:0]), "features must not be empty"),
        (lambda x: FeatureStatistics().update(x).update(x[:, :2]), "width 3 of those before, got 2"),
        (lambda x: FeatureStatistics().update(x[:1]).covariance, "at least 2 images, got 1"),
        (lambda x: FeatureStatistics("a").merge(FeatureStatistics("b")), "same features, got 'a', 'b'"),
        (lambda x: frechet_distance(x[0], x, x[0], x), r"got \(3,\) and \(10, 3\)"),
        (lambda x: frechet_distance(*moments(x), *moments(x[:, :2])), "same width, got 3 and 2"),
        (lambda x: frechet_distance(*moments(x), *moments(x * torch.inf)), "mean2 and cov2 must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(CollapseError, match=message):
        call(gaussian(10, 3))
