"""BibTeX of the methods in use: every normalizer is known, and every entry can be read."""

import re

import pytest
from normalizers import CASES

import jaxbn
from jaxbn import variants


def keys(text):
    return re.findall(r"^@\w+\{(\w+),$", text, re.M)


@pytest.mark.parametrize("name", CASES)
def test_every_normalizer_is_known(name):
    text = jaxbn.citation(CASES[name].build(None))
    assert text.count("{") == text.count("}")
    assert bool(text) == (name != "identity")
    for entry in filter(None, text.split("\n\n")):
        assert {"author", "title", "year"} <= set(re.findall(r"^  (\w+) = ", entry, re.M))


METHODS = {
    "around another": (lambda: jaxbn.frozen(jaxbn.noisy(jaxbn.batch_norm())), ["ioffe2015batch", "santurkar2018does"]),
    "ghost batches": (lambda: jaxbn.batch_norm(group_size=4), ["ioffe2015batch", "hoffer2017train"]),
    "CrossQ": (
        lambda: jaxbn.batch_renorm(r_max=3.0, d_max=5.0, warmup_steps=100_000),
        ["ioffe2015batch", "ioffe2017batch", "bhatt2024crossq"],
    ),
    "vectors": (
        lambda: jaxbn.conditional_batch_norm(condition_size=3),
        ["ioffe2015batch", "devries2017modulating"],
    ),
    "Newton": (
        lambda: jaxbn.whitening_norm(inverse_root=variants.newton_inverse_square_root),
        ["huang2018decorrelated", "huang2019iterative"],
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_behind_arguments_are_cited(name):
    make, expected = METHODS[name]
    assert keys(jaxbn.citation(make())) == expected


def test_each_work_comes_once():
    assert keys(jaxbn.citation(jaxbn.batch_norm(), jaxbn.group_norm(2), jaxbn.batch_norm(decay=0.9))) == [
        "ioffe2015batch",
        "wu2018group",
    ]


@jaxbn.normalizer_factory
def own():
    return jaxbn.identity()


def test_a_factory_of_your_own_says_what_to_cite():
    with pytest.raises(TypeError, match=r"own\(\) comes from a factory of which nothing is known.*bibtex"):
        jaxbn.citation(own())
    own.bibtex = "@misc{own,\n  year = {2026},\n}"
    try:
        assert keys(jaxbn.citation(jaxbn.frozen(own()))) == ["own"]
    finally:
        del own.bibtex


def test_a_normalizer_put_together_by_hand_is_refused():
    with pytest.raises(TypeError, match="not made by a factory"):
        jaxbn.citation(jaxbn.Normalizer(*jaxbn.batch_norm()))
