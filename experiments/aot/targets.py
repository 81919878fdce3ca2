"""Accelerators to compile for without owning one: TPUs by libtpu, NVIDIA's by JAX's CUDA plugin and a description.

A topology is named as libtpu does, "v5e:16x16", or by a GPU and how many, "h100:8" (eight a host).
"""

import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments.errors import UserError

GPUS_PER_HOST = 8


class Gpu(NamedTuple):
    """What XLA asks of an NVIDIA Hopper chip (SXM module), as the manufacturer publishes it.

    Attributes:
      name: as its driver reports it.
      memory: bytes.
      bandwidth: of its memory, bytes a second.
    """

    name: str
    memory: int
    bandwidth: int


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, 3350 * 10**9),
    "h200": Gpu("NVIDIA H200", 141 * 10**9, 4800 * 10**9),
}

# A GpuTargetConfigProto. Compute capability 9.0: 132 multiprocessors of 128 lanes, 228 KiB of shared memory each.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def mesh_of(topology: str) -> Mesh:
    """A mesh, its axis "data", of the chips of a topology; UserError for a missing package or an unknown topology."""
    kind, _, count = topology.partition(":")
    devices = _gpus(topology, GPUS[kind], count) if kind in GPUS else _tpus(topology)
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def _tpus(topology: str) -> list:
    # libtpu would ask the metadata server of a cloud machine which TPU this is, and guard the chip that it has not got.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs the package libtpu (no TPU): pip install libtpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jaxlib has no kind of its own for this
        known = ", ".join(f"{gpu}:8" for gpu in GPUS)
        raise UserError(
            f"--aot {topology!r} is no topology that libtpu knows, such as v5e:16x16, and no GPUs: {known} ({error})"
        ) from None


def _gpus(topology: str, gpu: Gpu, count: str) -> list:
    if not (count.isdigit() and (0 < int(count) <= GPUS_PER_HOST or int(count) % GPUS_PER_HOST == 0 < int(count))):
        raise UserError(f"--aot {topology!r}: give 1 to {GPUS_PER_HOST} GPUs, or a multiple of {GPUS_PER_HOST}")
    if not has_cuda_plugin():
        raise UserError(
            "compiling for GPUs needs JAX's CUDA plugin (no GPU; several GB, best in an environment of its own):"
            f" pip install 'jax[cuda12]=={jax.__version__}'"
        )
    # Without a GPU the plugin must not look for one, nor time what it compiles. It reads this where JAX starts.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.devices("cpu")
    hosts, each = (1, int(count)) if int(count) <= GPUS_PER_HOST else (int(count) // GPUS_PER_HOST, GPUS_PER_HOST)
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            target_config=_HOPPER.format(**gpu._asdict()),
            topology=f"1x{hosts}x{each}",
        ).devices
    except Exception as error:  # jaxlib has no kind of its own for this
        raise UserError(f"--aot {topology!r}: JAX's CUDA plugin does not take this description ({error})") from None


def has_cuda_plugin() -> bool:
    """Whether JAX's plugin for NVIDIA GPUs is installed, of either CUDA version."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
