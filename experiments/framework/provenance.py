"""Where a result comes from: commit, versions and hardware, for config.json."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

NOT_INSTALLED = "not installed"
PACKAGES = ("jaxbn", "jax", "jaxlib", "flax", "optax", "numpy")


def provenance() -> dict:
    """Commit, versions, hardware and the time, as JSON-able values."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "hardware": hardware(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit that is checked out, "+changes" if tracked files differ from it, "unknown" outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    directory = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def installed_version(package: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def hardware() -> str:
    """The accelerator, or the processor and its number of cores, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"  # that this process may use


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
