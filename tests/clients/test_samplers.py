"""emcee and dynesty: samplers that take a pool."""

from __future__ import annotations

from typing import Any

import dynesty
import emcee
import numpy as np

from tests.clients import work
from tests.modes import OURS, Maker, of_modes


@of_modes(*OURS)
def test_emcee(make: Maker) -> None:
    def chain(pool: Any) -> Any:
        random = np.random.RandomState(11)
        sampler = emcee.EnsembleSampler(12, 3, work.log_normal, pool=pool)
        start = emcee.State(random.randn(12, 3), random_state=random.get_state())
        sampler.run_mcmc(start, 15)
        return sampler.get_chain()

    assert np.array_equal(chain(None), chain(make()))


@of_modes(*OURS)
def test_dynesty(make: Maker) -> None:
    def evidence(pool: Any) -> tuple[Any, Any, int]:
        sampler = dynesty.NestedSampler(
            work.log_normal,
            work.to_cube,
            2,
            nlive=40,
            pool=pool,
            rstate=np.random.default_rng(11),
        )
        sampler.run_nested(print_progress=False, maxiter=200)
        results = sampler.results
        return results.logz, results.samples, int(sum(results.ncall))

    executor = make()
    alone, ours = evidence(work.HereAndNow(executor.size)), evidence(executor)
    assert np.array_equal(alone[0], ours[0])
    assert np.array_equal(alone[1], ours[1])
    assert alone[2] == ours[2]
