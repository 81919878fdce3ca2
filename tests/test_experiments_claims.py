"""What fixes a claim before a run: its hash changes with the meaning, not with the layout."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

from experiments.framework import registry
from experiments.framework.claim import Claim, Compared, Least, fingerprint, source_of

WORDS = {"measures": "m", "unit": "u"}


def helper(r):
    return r.v


def other_helper(r):
    return r.w


def effect(r):
    """A docstring."""
    return helper(r)


def claim(**changes):
    fields = {"sentence": "Claim.", "effect": lambda r: helper(r), "above": 0.5, **WORDS}
    return Claim(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"sentence": "Another."},
        {"above": 0.6},
        {"above": None, "below": 0.5},
        {"unit": "other"},
        {"ratio": True},
        {"effect": lambda r: r.v + 1},
        {"effect": lambda r: other_helper(r)},
        {"effect": Compared(lambda r: r.v)},
        {"effect": Compared(lambda r: r.v, "a", "b")},
    ],
)
def test_every_part_of_a_claim_changes_the_hash(changes):
    assert fingerprint([claim(**changes)]) != fingerprint([claim()])


def test_the_hash_is_the_same_when_asked_again_and_in_another_layout():
    one = claim(effect=lambda r: r.v.sel(a=1))
    # fmt: off
    two = claim(effect=lambda r: r.v.sel(
        a=1,  # a comment
    ))
    # fmt: on
    assert fingerprint([one]) == fingerprint([one]) == fingerprint([two])


def test_a_constant_that_an_effect_uses_is_part_of_the_hash(monkeypatch):
    before = fingerprint([claim(effect=lambda r: r.v.sel(unit=WORDS["unit"]))])
    monkeypatch.setitem(WORDS, "unit", "other")
    assert fingerprint([claim(effect=lambda r: r.v.sel(unit=WORDS["unit"]), unit="u")]) != before


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_the_hash_of_an_experiment_is_the_same_in_every_process(name):
    sources = [source for claim in registry.load(name).claims for source in source_of(claim.effect)]
    assert not any(" at 0x" in source for source in sources)


def test_functions_that_an_effect_calls_are_part_of_its_source():
    assert any("r.v" in source for source in source_of(effect))
    assert any("r.w" in source for source in source_of(Compared(lambda r: other_helper(r))))


def test_two_lambdas_on_one_line_are_told_apart():
    first, second = (lambda r: r.a), (lambda r: r.b)
    assert source_of(first) != source_of(second)


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_every_experiment_is_whole(name):
    experiment = registry.load(name)
    assert {"smoke", "cpu", "full"} <= set(experiment.settings)
    assert experiment.title.endswith(".")
    assert experiment.question.endswith("?")
    assert experiment.source
    assert experiment.claims
    assert experiment.tables
    assert experiment.grid is not None or experiment.stages is not None
    assert fingerprint(experiment.claims) == fingerprint(experiment.claims)
    for one in experiment.claims:
        assert one.sentence.endswith(".")
        assert "supported if" in one.criterion


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_every_claim_of_an_experiment_is_fixed_by_itself(name):
    claims = list(registry.load(name).claims)
    for number, one in enumerate(claims):
        changed = [*claims[:number], dataclasses.replace(one, unit=one.unit + "!"), *claims[number + 1 :]]
        assert fingerprint(changed) != fingerprint(claims)


def shares(*, lacking: bool = False) -> xr.Dataset:
    """Cells [depth, scale, seed], the least of them 0.2 and 0.3; one at depth 2 does not exist."""
    values = np.array([[[0.9, 0.8], [np.nan, np.nan]], [[0.2, 0.7], [0.5, 0.3]]])
    if lacking:
        values[0, 0, 1] = np.nan
    return xr.Dataset(
        {"share": (("depth", "scale", "seed"), values)},
        {"depth": [2, 3], "scale": ["small", "large"], "seed": [0, 1]},
    )


def test_the_least_of_all_cells_is_taken_seed_by_seed():
    least = Least(lambda r: r.share, "scale")
    np.testing.assert_array_equal(least(shares()), [0.2, 0.3])
    assert least.found(shares()) == "Least by scale: small 0.45; large 0.4."


def test_a_seed_without_a_cell_that_others_have_has_no_least():
    np.testing.assert_array_equal(Least(lambda r: r.share, "scale")(shares(lacking=True)), [0.2, np.nan])


def test_a_claim_about_the_least_says_so_and_its_effect_is_fingerprinted():
    claims = [
        Claim("Holds everywhere.", Least(lambda r: r.share, by), measures="share", unit="share", above=0.1)
        for by in ("scale", "depth")
    ]
    assert claims[0].criterion.startswith("Share, the least of all cells; ")
    assert claims[0].in_figures(shares()).startswith("Least by scale")
    assert fingerprint(claims[:1]) != fingerprint(claims[1:])
