"""Running one experiment from its settings to its pictures."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.errors import UserError
from experiments.framework import registry, results
from experiments.framework.claim import fingerprint
from experiments.framework.display import Track, progress, terminal
from experiments.framework.experiment import Experiment, Grid, Settings, Trained
from experiments.framework.grid import train_grid
from experiments.framework.pictures import save
from experiments.framework.protocol import protocol_of
from experiments.framework.provenance import provenance
from experiments.framework.record import CONFIG, Record, open_record, write_json
from experiments.framework.report import write_summary
from experiments.framework.search import choose, runs_of, with_chosen
from experiments.framework.show import show_tables, show_verdicts
from experiments.framework.tables import Table
from experiments.framework.verdict import MOST_SEEDS, judge, seeds_for
from experiments.training import data
from experiments.training.loop import Schedule

PILOT_SEED = 20_000  # seeds of a pilot; its results are thrown away


def run_experiment(experiment: Experiment, name: str, preset: str, settings: Settings, directory: Path) -> None:
    """Run the experiment in `directory` or continue it there, then judge, draw and print it.

    A finished run is not trained again: its rows are judged, drawn and printed anew.
    """
    config = config_of(experiment, name, preset, settings)
    record = open_record(directory, config)
    console = terminal()
    seeds = f"{settings.seeds} seed{'s' if settings.seeds != 1 else ''}"
    console.print(f"{name}, preset {preset}, {seeds}, in {directory}\nSource: {experiment.source}", highlight=False)
    if not record.finished:
        began = time.monotonic()
        with progress(console) as track:
            measure(experiment, settings, record, track)
        # Before the run counts as finished; a run that was killed knows only the time since it was continued.
        write_json(directory / CONFIG, {**record.config, "seconds": round(time.monotonic() - began)})
        record.close()
    rows = record.rows()
    found = results.results_of(experiment, rows)
    verdicts = [judge(claim, found) for claim in experiment.claims]
    tables = [table(settings, found) for table in experiment.tables]
    pictures = [picture(settings, found) for picture in experiment.pictures]
    for picture in pictures:
        save(picture, directory)
    protocol = protocol_of(experiment, settings, rows, found)
    write_summary(directory, experiment, verdicts, tables, pictures, protocol)
    show_tables(console, tables)
    show_verdicts(console, verdicts)
    console.print(f"\nPictures: {', '.join(str(directory / picture.file) for picture in pictures)}", highlight=False)


def run_all(preset: str, seeds: int | None, directory: Path) -> int:
    """Run every experiment in a directory of its own, those that are done apart; 1 if one of them failed, else 0."""
    console, failed = terminal(), []
    for number, name in enumerate(registry.EXPERIMENTS):
        where = directory / f"{name}-{preset}"
        console.rule(f"{number + 1} of {len(registry.EXPERIMENTS)}: {name}")
        if (where / "summary.json").exists():
            console.print(f"done already: python -m experiments run {name} --out {where} shows it again")
            continue
        try:
            experiment = registry.load(name)
            run_experiment(experiment, name, preset, registry.settings_of(experiment, name, preset, seeds), where)
        except UserError as error:
            failed.append(f"{name}: {error}")
        except Exception as error:  # one experiment that breaks must not cost the others
            console.print_exception()
            failed.append(f"{name}: {type(error).__name__}: {error}")
    for line in failed:
        console.print(f"[bold red]failed[/] {line}", highlight=False)
    return 1 if failed else 0


def config_of(experiment: Experiment, name: str, preset: str, settings: Settings) -> dict:
    """What config.json says of a run before it starts."""
    origin = provenance()
    fixed = origin["commit"] != "unknown" and not origin["commit"].endswith("+changes")
    config = {
        "experiment": name,
        "preset": preset,
        "settings": dataclasses.asdict(settings),
        "claims": {"sha256": fingerprint(experiment.claims), "fixed_before_the_run": fixed},
        "provenance": origin,
    }
    if settings.data is not None:
        config["data"] = {"name": settings.data, "sha256": data.load(settings.data).fingerprint}
    return config


@jax.default_matmul_precision("float32")  # which accelerators give up for speed, unless told
def measure(experiment: Experiment, settings: Settings, record: Record, track: Track) -> None:
    """Train the grid and run the stages; what the record has is not done again."""
    if experiment.grid is not None:
        _train(experiment.grid, settings, record, track)
    stages = list(experiment.stages(settings)) if experiment.stages else []
    for number, stage in enumerate(stages):
        track("stages" if len(stages) > 1 else stage.name, number, len(stages))
        if not record.is_done(stage.name):
            found = stage.measure()
            record.finish(stage.name, [{"stage": stage.name, "dataset": found.to_dict()}])
    if stages:
        track("stages" if len(stages) > 1 else stages[-1].name, len(stages), len(stages))


def _train(grid: Grid, settings: Settings, record: Record, track: Track) -> None:
    dataset = data.load(settings.data)
    schedule = Schedule(settings.steps, settings.interval, grid.batch_size)
    on_all = grid.search is not None and grid.search.then_on_all
    of_result = data.validation_for_training(dataset) if on_all else dataset

    def train(
        stage: str, program: Mapping, runs: list[dict], conclude=None, dataset: data.Dataset = dataset
    ) -> Sequence[Mapping]:
        task = grid.task(settings, **program)
        if not record.is_done(stage):
            further = (
                {} if conclude is None else {"conclude": _concluding(program, task, settings, stage, runs, conclude)}
            )
            train_grid(record, stage, task, schedule, runs, dataset, track, **further)
        return [row for row in record.rows() if row.get("stage") == stage]

    chosen = None if grid.search is None else choose(grid, settings.steps, train)
    for program in results.programs_of(grid):
        seeds = min(settings.seeds, grid.most_seeds(settings, **program)) if grid.most_seeds else settings.seeds
        runs = runs_of(grid.runs, seeds, settings.first_seed)
        runs = runs if chosen is None else with_chosen(runs, chosen, program, grid.search.given)
        train(results.program_name(program), program, runs, grid.conclude, of_result)


def _concluding(program, task, settings, stage, every_run, conclude):
    """The experiment's `conclude` as rows of the stage: runs that stand beside each other, but for those without any.

    Of a run that is nan throughout nothing is kept; it is read back as nan.
    """

    def rows(runs: list[dict], variables: dict, arrays: dict) -> list[dict]:
        found = conclude(Trained(program, task, runs, variables, arrays, settings))
        first = every_run.index(runs[0])
        return [
            {"stage": stage, "first": first + start, "concluded": {name: (list(further), values[start:stop])}}
            for name, (further, values) in jax.device_get(found).items()
            for start, stop in measured_stretches(np.asarray(values))
        ]

    return rows


def measured_stretches(values: np.ndarray) -> list[tuple[int, int]]:
    """Where the first axis has anything but nan, as (start, stop) of indices beside each other; all if nowhere."""
    known = [not np.isnan(one).all() for one in values]
    edges = np.flatnonzero(np.diff([False, *known, False])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True)) or [(0, len(values))]


def plan(experiment: Experiment, name: str, preset: str, settings: Settings, directory: Path) -> Table:
    """Run a pilot on seeds that are used for nothing else, and say how many seeds each claim needs.

    Only the standard deviation of the effects is looked at.
    """
    if settings.seeds < 2:
        raise UserError("a pilot needs two seeds at least, for a standard deviation")
    settings = dataclasses.replace(settings, first_seed=PILOT_SEED)
    record = open_record(directory, config_of(experiment, name, f"{preset}, pilot", settings))
    console = terminal()
    if not record.finished:
        with progress(console) as track:
            measure(experiment, settings, record, track)
        record.close()
    found = results.results_of(experiment, record.rows())
    rows = []
    for claim in experiment.claims:
        if claim.kind == "exact" or claim.over != "seed":
            continue
        effect = claim.effect(found)
        cells = [axis for axis in effect.dims if axis != "seed"]
        known = effect.stack(cell=cells).dropna("cell") if cells else effect
        values = (np.log(known) if claim.ratio else known).mean("cell") if cells else known
        values = np.exp(values) if claim.ratio and cells else values
        needed = seeds_for(claim, values.values)
        shown = str(needed) if needed <= MOST_SEEDS else f"{needed}: more than {MOST_SEEDS}"
        rows.append([claim.sentence, f"{float(np.std(values.values, ddof=1)):.2g}", shown])
    columns = ["claim", "standard deviation", "seeds"]
    table = Table(f"Seeds that {name} needs, by a pilot of {settings.seeds} seeds", columns, rows)
    show_tables(console, [table])
    return table
