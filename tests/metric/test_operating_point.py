"""Score thresholds against exhaustive search."""

import numpy as np
import pytest

from detr_exp.metric.operating_point import THRESHOLDS, best_common_threshold, best_threshold


def f1_at(threshold: float, scores: np.ndarray, hits: np.ndarray, objects: int) -> float:
    kept = scores >= threshold
    true = int((hits & kept).sum())
    return 2 * true / (int(kept.sum()) + objects)


def random_matches(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 60))
    scores = np.sort(np.round(generator.random(n), 2))[::-1]
    hits = generator.random(n) < scores
    return scores, hits, int(hits.sum() + generator.integers(1, 10))


@pytest.mark.parametrize("seed", range(8))
def test_best_threshold_equals_exhaustive_search(seed):
    scores, hits, objects = random_matches(seed)
    point = best_threshold(scores, hits, objects)
    assert point.f1 == pytest.approx(max(f1_at(t, scores, hits, objects) for t in scores))
    assert point.f1 == pytest.approx(f1_at(point.threshold, scores, hits, objects))
    if point.f1:
        assert point.f1 == pytest.approx(2 * point.precision * point.recall / (point.precision + point.recall))


def test_common_threshold_equals_exhaustive_search():
    cases = [random_matches(seed) for seed in range(5)]
    point = best_common_threshold([case[:2] for case in cases], [case[2] for case in cases])
    means = [np.mean([f1_at(t, *case) for case in cases]) for t in THRESHOLDS]
    assert point.f1 == pytest.approx(max(means))
    assert point.threshold == THRESHOLDS[int(np.argmax(means))]


def test_classes_without_objects_have_no_say():
    scores, hits, objects = random_matches(0)
    alone = best_common_threshold([(scores, hits)], [objects])
    noise = (np.array([0.99]), np.array([False]))
    assert best_common_threshold([(scores, hits), noise], [objects, 0]) == alone
    assert best_threshold(*noise, 0).f1 == 0.0
    assert best_common_threshold([], []).f1 == 0.0
