"""What holds for all tests: hypothesis' profiles. Ordinary runs repeat; HYPOTHESIS_PROFILE=thorough searches longer."""

import os

from hypothesis import HealthCheck, settings

_QUIET = [HealthCheck.too_slow]  # a slow machine is no fault of the code

# Why no deadline: tests hold no wall-clock bounds, and two slow cores are shared.
settings.register_profile("ordinary", max_examples=100, deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("thorough", max_examples=5000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))
