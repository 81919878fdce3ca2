"""Population statistics of two processes that hold a half of every batch each."""

import os
import subprocess
import sys

import numpy as np
import pytest
from loopback import free_port

PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxbn
from jaxbn._population import population_statistics
from jaxbn._recording import recordable

address, process, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
norm = recordable(jaxbn.batch_norm())
x = np.load(out + "/x.npy")
batches = [
    jax.make_array_from_process_local_data(sharded, np.split(batch, 2)[process]) for batch in np.split(x, [16, 32])
]
variables = norm.init(jax.random.key(0), batches[0])
apply = jax.jit(lambda v, b: norm.apply(v, b, train=True)[1], out_shardings=replicated)
variables["batch_stats"] = jax.device_put(variables["batch_stats"], replicated)
stats = population_statistics(apply, variables, batches)
assert stats["mean"].sharding == replicated
np.savez(f"{out}/{process}.npz", **stats)
"""


@pytest.mark.slow
def test_every_process_gets_the_statistics_of_all(tmp_path):
    x = (3 + np.random.default_rng(0).normal(size=(64, 3))).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, address, str(i), str(tmp_path)], env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name, expected in (("mean", x.mean(0, float)), ("var", x.var(0, dtype=float))):
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], expected, rtol=1e-6)
