"""Makes achilles known to libraries that let others run their work."""

from __future__ import annotations


def register_joblib() -> None:
    """Make "achilles" a backend of joblib, and so of scikit-learn and all others that use joblib.

        achilles.register_joblib()
        with joblib.parallel_config(backend="achilles"):
            search.fit(X, y)

    `achilles.joblib_backend.AchillesBackend` says what else can be given there. Tasks of that
    backend may name it without registering it.

    Raises:
        ImportError: joblib is not installed.
    """
    try:
        import joblib
    except ImportError:
        raise ImportError(
            "joblib is not installed; install it with: pip install 'achilles[joblib]'"
        ) from None
    from achilles.joblib_backend import NAME, AchillesBackend

    joblib.register_parallel_backend(NAME, AchillesBackend)
