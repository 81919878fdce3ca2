"""`python -m experiments`: list, run and report experiments, and run benchmarks."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments import registry
from experiments.errors import UserError

INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C
USER_ERROR = 2

app = tyro.extras.SubcommandApp()


@app.command(name="list")
def list_experiments() -> None:
    """Show the experiments and what each claims."""
    shown = Table("experiment", "claim", title="python -m experiments run NAME", title_justify="left")
    for name, entry in registry.EXPERIMENTS.items():
        shown.add_row(name, entry.claim)
    Console().print(shown)


@app.command
def run(
    name: Annotated[str, tyro.conf.Positional],
    preset: str = "cpu",
    seeds: str | None = None,
    data: str | None = None,
    out: str | None = None,
) -> None:
    """Run an experiment, or continue it, or show it again once it is done.

    Args:
        name: the experiment, as `list` shows it.
        preset: smoke (seconds), cpu (minutes on two cores) or full (the source's own setting).
        seeds: how many random seeds, instead of the preset's.
        data: the data set instead of the preset's: mnist5k, fashion_mnist, fashion_mnist:DIRECTORY, hub:mnist,
            hub:fashion_mnist or hub:cifar10.
        out: the directory for the results; runs/NAME-PRESET if not given.
    """
    from experiments.runner import run_experiment

    module = registry.load(registry.EXPERIMENTS, name)
    settings = registry.settings_of(module, name, preset)
    if seeds is not None:
        settings["seeds"] = parse_seeds(seeds)
    if data is not None:
        if "data" not in settings:
            raise UserError(f"{name} uses no data: leave out --data {data}")
        settings["data"] = data
    run_experiment(module, name, preset, settings, Path(out or f"runs/{name}-{preset}"))


@app.command
def report() -> None:
    """Build experiments/results/REPORT.md from the committed results."""
    from experiments.report import write_report

    print(write_report())


@app.command
def bench(name: Annotated[str, tyro.conf.Positional] = "") -> None:
    """Run a benchmark, or list them.

    Args:
        name: the benchmark; without one they are listed.
    """
    if not name:
        for known, entry in registry.BENCHMARKS.items():
            print(f"{known}: {entry.claim}")
        return
    registry.load(registry.BENCHMARKS, name, "benchmark").main()


def parse_seeds(text: str) -> int:
    """A number of seeds from the command line: a whole number from 1 to 1000."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
        raise UserError(f"--seeds {text!r} is not a number of seeds: give a whole number from 1 to 1000")
    return int(text)


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    try:
        app.cli(args=arguments or ["list"], prog="python -m experiments")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        again = " ".join(["python -m experiments", *arguments])
        print(f"\nStopped. What is done is kept; continue with: {again}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
