"""Results directories as runs leave them, made without training, for the tests of the report."""

import dataclasses
import hashlib
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from experiments.framework import registry, report
from experiments.framework.claim import Claim, fingerprint
from experiments.framework.experiment import Drawn, Experiment
from experiments.framework.record import write_json
from experiments.framework.resume import Place
from experiments.framework.tables import Table
from experiments.framework.verdict import judge

TABLE = Table("Accuracy", ["arm", "ours", "published ours"], [["plain", "0.1", "0.2"]], "n = 2")
ABOVE = {"measures": "the effect", "unit": "points", "above": 0.5}
CLAIM = Claim("Claim.", lambda r: r.v, **ABOVE)
ABOUT = Experiment(title="T.", question="Why?", source="A paper", settings={}, claims=[CLAIM], differs="Fewer seeds.")
ROWS = b'{"stage": "a"}\n'
PROTOCOL = {
    "batch_size": 64,
    "programs": {"arm": ["plain", "batch norm"]},
    "runs": {"std": [0.05, 5.0]},
    "search": {"axis": "rate", "values": [0.1, 1.0, 10.0], "seeds": 2, "on": "validation_accuracy"},
    "chosen": [{"where": {"arm": "plain", "std": 0.05}, "value": 0.1}],
    "parameters": [{"where": {"arm": "plain"}, "value": 89610}],
    "validation": Table(
        "Final validation beside test accuracy", ["arm", "validation", "test"], [["plain", "0.91", "0.90"]]
    )._asdict(),
}


def results(values, axes=("seed",)):
    """Results with one array `v` over the axes; axes other than "seed" get their numbers as values."""
    values = np.asarray(values, np.float64)
    coords = {axis: np.arange(values.shape[n]) for n, axis in enumerate(axes) if axis != "seed"}
    return xr.Dataset({"v": (axes, values)}, coords)


def verdict(effects, axes=("seed",), sentence="Claim.", **claim):
    """A judged claim whose effects are given."""
    kind = {} if {"above", "below", "equal", "exact"} & set(claim) else ABOVE
    words = {"measures": "the effect", "unit": "points"}
    return judge(Claim(sentence, lambda r: r.v, **{**words, **kind, **claim}), results(effects, axes))


def finished_run(
    directory, verdicts, *, experiment="benefits", name=None, fixed=True, sha256=None, settings=None, protocol=None
):
    """A finished run of `experiment` at today's preset cpu in `directory`/`name`, with these verdicts."""
    directory = directory / (name or experiment)
    directory.mkdir()
    declared = registry.load(experiment)
    today = json.loads(json.dumps(dataclasses.asdict(declared.settings["cpu"])))
    config = {
        "experiment": experiment,
        "preset": "cpu",
        "settings": {**today, **(settings or {})},
        "provenance": {"commit": "0123456789abcdef", "hardware": "a machine", "versions": {"jax": "0.10.2"}},
        "claims": {"sha256": sha256 or fingerprint(declared.claims), "fixed_before_the_run": fixed},
        "seconds": 200,
    }
    write_json(directory / "config.json", config)
    (directory / "metrics.jsonl").write_bytes(ROWS)
    place = Place(bytes=len(ROWS), sha256=hashlib.sha256(ROWS).hexdigest(), done=("a",), finished=True)
    write_json(directory / "progress.json", place.to_json())
    figure = plt.figure(figsize=(4, 2))
    figure.savefig(directory / "a.png", dpi=50, metadata={"Software": None})
    plt.close(figure)
    report.write_summary(
        directory, ABOUT, verdicts, [TABLE], [Drawn("a.png", figure, "A picture.", "What is it?")], protocol
    )
    return directory


HELD, FAILED, OPEN = [1.0, 1.1, 1.05], [0.0, 0.1, 0.05], [0.4, 0.7, 0.5]
IN_PART_CELLS = [[3.0, 3.1, 3.05], [0.0, 0.1, 0.05]]
CELLS = ("rate", "seed")
# One of every kind and outcome, with and without cells, of one seed, of nothing measured, and at the limits of floats.
EVERY = {
    "above, held": verdict(HELD),
    "above, failed": verdict(FAILED),
    "above, open": verdict(OPEN),
    "above, in part": verdict(IN_PART_CELLS, CELLS),
    "above no effect": verdict(HELD, above=0.0),
    "below": verdict(HELD, below=2.0),
    "below, a ratio": verdict(HELD, below=2.0, ratio=True),
    "above, a ratio": verdict([2.0, 2.1, 2.2], above=1.0, ratio=True),
    "equal": verdict([0.0, 0.1, 0.05], equal=0.5),
    "equal, a ratio": verdict([1.0, 1.1, 1.05], equal=0.5, ratio=True),
    "exact": verdict([[1e-15, 2e-15], [0.0, 1e-16]], CELLS, exact=1e-12),
    "exact zero": verdict([0.0, 0.0], exact=1e-12),
    "exact, threshold zero": verdict([0.0, 0.0], exact=0.0),
    "one seed": verdict([1.0]),
    "not measured": verdict([math.nan, math.nan]),
    "all alike": verdict([1.0, 1.0, 1.0]),
    "infinite": verdict([math.inf, 1.0]),
    "huge": verdict([1e150, 2e150]),
}
