"""A strict session: eight host devices, implicit rank promotion is an error, property tests repeat exactly.

On an accelerator (`JAX_PLATFORMS=cuda python -m pytest -n 4 tests/test_exactness.py ...`) its own devices are used, and
what needs more of them is skipped.
"""

import gc
import os
from importlib.metadata import version

# Read once, when JAX starts its backend: it has to stand before the first import of jax. Most of the time goes into
# compiling; without the backend's optimizations that takes 40% less, and without its newer way to write loops, which
# can be turned off in jax 0.10 only, a quarter less. What depends on them asks for them (FULL), and what the
# environment says goes last and wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
            os.environ.get("XLA_FLAGS", ""),
        ]
    )
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import numpy as np
import pytest

ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"

jax.config.update("jax_numpy_rank_promotion", "raise")
if not ON_CPU:  # which multiply float32 in fewer bits, unless told
    jax.config.update("jax_default_matmul_precision", "highest")
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


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Forget a module's compiled programs at its end: each takes mappings of memory, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip on an accelerator what asks for a mesh of more devices than there are."""
    try:
        return (yield)
    except ValueError as error:
        if not ON_CPU and "must be >= the product of mesh_shape" in str(error):
            pytest.skip(f"needs more devices: {error}")
        raise
