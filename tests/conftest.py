"""How many examples hypothesis tries: `fast`, or `long` by $FISHERLAB_TESTS=long."""

import os

from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,  # the machines are shared
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile(
    "fast", max_examples=20, derandomize=True, database=None, **COMMON
)
settings.register_profile("long", max_examples=500, **COMMON)
settings.load_profile(os.environ.get("FISHERLAB_TESTS", "fast"))
