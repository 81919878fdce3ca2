"""The results directories: which hold a finished run, which of those are stale, and which cannot be used."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.framework import registry
from experiments.framework.claim import fingerprint
from experiments.framework.experiment import Experiment
from experiments.framework.files import inside, read_json
from experiments.framework.record import CONFIG, PROGRESS, ROWS
from experiments.framework.report.summary import SUMMARY, WORDS, verdicts_in
from experiments.framework.resume import Place
from experiments.framework.tables import Table
from experiments.framework.verdict import Verdict

BENCHMARKS = "bench"  # the directory of the benchmarks, which are no experiment


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: of its directory.
      directory: where it lies.
      experiment: as it is declared today.
      config: what config.json holds.
      summary: what summary.json holds.
      verdicts: one for each claim, as judged.
      stale: why the result no longer belongs to the experiment, a sentence each; empty if it does.
    """

    name: str
    directory: Path
    experiment: Experiment
    config: dict
    summary: dict
    verdicts: Sequence[Verdict]
    stale: Sequence[str]

    @property
    def tables(self) -> list[Table]:
        """The tables of the run."""
        return [Table(**entry) for entry in self.summary["tables"]]


@dataclass(frozen=True)
class LeftOut:
    """A directory that no report can use, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """All results directories: finished runs in the order of the registry, and those that are left out."""

    runs: Sequence[Run]
    left_out: Sequence[LeftOut]

    @property
    def troubles(self) -> list[str]:
        """What is wrong, a sentence each."""
        left_out = [f"{one.name} is left out: {one.reason}" for one in self.left_out]
        return left_out + [
            f"{run.name} is stale: {reason[:1].lower()}{reason[1:]}" for run in self.runs for reason in run.stale
        ]


def collect(results: Path) -> Collection:
    """Read every directory in `results`; UserError if there is none."""
    directories = sorted(path for path in results.glob("[!.]*") if path.is_dir() and path.name != BENCHMARKS)
    if not directories:
        raise UserError(
            f"{results} holds no finished run: python -m experiments run NAME --out {results}/NAME makes one"
        )
    found = [_read(directory) for directory in directories]
    runs = [one for one in found if isinstance(one, Run)]
    runs.sort(key=lambda run: (registry.EXPERIMENTS.index(run.config["experiment"]), run.name))
    return Collection(runs, [one for one in found if isinstance(one, LeftOut)])


def _read(directory: Path) -> Run | LeftOut:
    try:
        return read_run(directory)
    except UserError as error:
        words = str(error).replace(f"{directory}/", "").replace(str(directory), "it")
        return LeftOut(directory.name, words)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        words = f"config.json or summary.json is not as a run writes it today ({why}): run the experiment again"
        return LeftOut(directory.name, words)


def read_run(directory: Path) -> Run:
    """The finished run in a directory; UserError where it is unfinished, damaged or of no known experiment."""
    if not (directory / CONFIG).exists():
        raise UserError("it holds no run (no config.json in it): move it away")
    config = read_json(directory / CONFIG)
    name = config.get("experiment")
    if name not in registry.EXPERIMENTS:
        raise UserError(f"it holds a run of {name!r}, which is no experiment: move it away")
    _check_finished(directory)
    summary = read_json(directory / SUMMARY)
    for picture in summary["pictures"]:
        _check_picture(directory, picture["file"])
    experiment = registry.load(name)
    run = Run(directory.name, directory, experiment, config, summary, verdicts_in(summary), stale(config, experiment))
    _check_entries(run)
    return run


def _check_finished(directory: Path) -> None:
    place = Place.from_json(directory / PROGRESS)
    if place is None:
        raise UserError(f"{PROGRESS} is missing or damaged: put a copy of it in its place, or run it again")
    if not place.finished or not (directory / SUMMARY).exists():
        raise UserError("the run is not finished: give its command again")
    content = (directory / ROWS).read_bytes() if (directory / ROWS).exists() else b""
    if len(content) != place.bytes or place.sha256 not in ("", hashlib.sha256(content).hexdigest()):
        raise UserError(f"{ROWS} was changed after the run had finished: put a copy of it in its place")


def _check_picture(directory: Path, file: str) -> None:
    path = inside(directory, directory / file)
    if not path.is_file() or not path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{file} is missing or no PNG: give the run's command again, which draws it anew")


def _check_entries(run: Run) -> None:
    """Refuse a run without what the reports need; UserError."""
    needed = {
        "config.json": (run.config, ("preset", "settings", "claims", "provenance")),
        "config.json's settings": (run.config["settings"], ("seeds",)),
        "config.json's claims": (run.config["claims"], ("sha256", "fixed_before_the_run")),
        "config.json's provenance": (run.config["provenance"], ("commit", "hardware", "versions")),
        SUMMARY: (run.summary, (*WORDS, "tables", "pictures")),
    }
    lacking = [
        f"{file} has no {name!r}" for file, (held, names) in needed.items() for name in names if name not in held
    ]
    if lacking:
        raise UserError(f"{'; '.join(lacking)}: run the experiment again")
    _ = run.tables  # TypeError where a table is none


def stale(config: dict, experiment: Experiment) -> list[str]:
    """Why a result no longer belongs to its experiment; code that changed since does not count."""
    today, then = fingerprint(experiment.claims), config["claims"]["sha256"]
    found = [f"Its claims have changed since it was made (SHA-256 {then[:12]}, today {today[:12]})."] * (today != then)
    preset = config["preset"]
    if preset not in experiment.settings:
        return [*found, f"There is no preset {preset!r} any more."]
    now = json.loads(json.dumps(dataclasses.asdict(experiment.settings[preset])))
    held = config["settings"]
    differ = [
        f"{name} {held.get(name)!r}, today {now.get(name)!r}"
        for name in dict.fromkeys([*now, *held])
        if held.get(name) != now.get(name)
    ]
    return found + [f"The settings of the preset {preset} are others than it was made with ({'; '.join(differ)})."] * (
        bool(differ)
    )
