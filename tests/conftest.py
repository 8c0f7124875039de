"""Prepares every test session: threads, caches, the launcher's tests and the watchdog."""

from harness.environment import prepare, rank_by_environment

prepare()  # before NumPy and Numba are imported by any test

import hypothesis  # noqa: E402

pytest_plugins = ["harness.plugin"]

_slow = hypothesis.HealthCheck.too_slow  # says something about the machine, and what else it is doing
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=(_slow,))
hypothesis.settings.register_profile("random", deadline=None, suppress_health_check=(_slow,))  # --hypothesis-profile
hypothesis.settings.register_profile(
    "parallel",  # every rank must draw the same examples, whatever the clock says
    deadline=None,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=(_slow, hypothesis.HealthCheck.function_scoped_fixture),
)
hypothesis.settings.load_profile("tests" if rank_by_environment() is None else "parallel")
