"""A strict session: eight host devices, implicit rank promotion is an error, property tests repeat exactly."""

import gc
import os

# Read once, when JAX starts its backend: it has to stand before the first import of jax. Most of the time goes into
# compiling; without the backend's optimizations that takes 40% less. What depends on them asks for them (FULL), and
# what the environment says goes last and wins.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile(
    "jaxbn", deadline=None, derandomize=True, max_examples=25, print_blob=True, database=None
)
hypothesis.settings.load_profile("jaxbn")


# Traces are millions of objects, and each collection looks at all: a tenth of the time, and more as they grow.
gc.set_threshold(200_000, 50, 100)


@pytest.fixture(autouse=True)
def draws_of_its_own(request):
    """Start a module's generator anew for each test, which then draws the same alone and among others."""
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)
