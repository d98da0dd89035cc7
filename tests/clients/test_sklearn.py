"""scikit-learn, which runs on joblib's backend."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC

import achilles
from achilles.joblib_backend import close_idle
from benchmarks.cluster import Cluster
from tests.modes import OURS, Maker, of_modes

Context = contextlib.AbstractContextManager[Any]


@pytest.fixture
def backend(make: Maker) -> Iterator[Callable[[], Context]]:
    """The backend where the mode wants it."""
    achilles.register_joblib()
    options = {} if make.cluster is None else {"address": make.cluster.address}
    yield lambda: joblib.parallel_config(backend="achilles", n_jobs=2, **options)
    close_idle()
    joblib.parallel.BACKENDS.pop("achilles")


@of_modes(*OURS)
def test_grid_search(make: Maker, backend: Callable[[], Context]) -> None:
    x, y = load_iris(return_X_y=True)

    def search() -> Any:
        return GridSearchCV(SVC(), {"C": [0.1, 1, 10], "gamma": [0.1, 1]}, cv=3).fit(x, y)

    alone = search()
    with backend():
        ours = search()
    assert ours.best_params_ == alone.best_params_
    for name in ("mean_test_score", "std_test_score", "rank_test_score"):
        assert np.array_equal(ours.cv_results_[name], alone.cv_results_[name])
    assert np.array_equal(ours.predict(x), alone.predict(x))


@of_modes(*OURS)
def test_cross_val_score(make: Maker, backend: Callable[[], Context]) -> None:
    x, y = load_iris(return_X_y=True)
    model = RandomForestClassifier(n_estimators=10, random_state=3)
    alone = cross_val_score(model, x, y, cv=5)
    with backend():
        ours = cross_val_score(model, x, y, cv=5)
    assert np.array_equal(alone, ours)


@of_modes(*OURS)
def test_permutation_importance(make: Maker, backend: Callable[[], Context]) -> None:
    x, y = load_iris(return_X_y=True)
    model = SVC().fit(x, y)
    alone = permutation_importance(model, x, y, n_repeats=3, random_state=5)
    with backend():
        ours = permutation_importance(model, x, y, n_repeats=3, random_state=5)
    assert np.array_equal(alone.importances, ours.importances)


def test_a_lost_worker_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    achilles.register_joblib()
    x, y = load_iris(return_X_y=True)
    model = RandomForestClassifier(n_estimators=15, random_state=3)
    alone = cross_val_score(model, x, y, cv=20)
    with Cluster(workers=2, slots=1) as cluster:
        monkeypatch.setenv("ACHILLES_HOME", cluster.home)
        killer = threading.Timer(0.0, cluster.workers[0].kill)
        with joblib.parallel_config(backend="achilles", address=cluster.address):
            cross_val_score(model, x, y, cv=2)  # the runners are warm
            killer.start()
            ours = cross_val_score(model, x, y, cv=20)
        killer.join()
        close_idle()
    joblib.parallel.BACKENDS.pop("achilles")
    assert np.array_equal(alone, ours)


@of_modes(*OURS)
def test_all_slots_are_used_unless_a_number_is_given(
    make: Maker, backend: Callable[[], Context]
) -> None:
    if make.cluster is None:
        expected, options = joblib.cpu_count(), {}
    else:
        expected, options = make.cluster.status()["slots"], {"address": make.cluster.address}
    with joblib.parallel_config(backend="achilles", **options):
        assert joblib.effective_n_jobs(None) == joblib.effective_n_jobs(-1) == expected
        assert joblib.effective_n_jobs(3) == 3
