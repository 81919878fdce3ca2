import importlib
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from finished_runs import (
    ABOVE,
    CLAIM,
    EVERY,
    FAILED,
    HELD,
    PROTOCOL,
    TABLE,
    finished_run,
    verdict,
)

from experiments import topics
from experiments.__main__ import main
from experiments.errors import UserError
from experiments.framework import registry, report
from experiments.framework.claim import Claim, fingerprint
from experiments.framework.experiment import Experiment
from experiments.framework.report import words
from experiments.framework.tables import to_markdown


class Ids(HTMLParser):
    """The ids of a page, what its links lead to, and every address that it names."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]


def texts_of(directory):
    """Both reports, written; the Markdown of the first page and then of each run's."""
    report.write_report(directory, None)
    pages = [directory / report.REPORT, *sorted(directory.glob(f"*/{report.REPORT}"))]
    return "\n".join(page.read_text() for page in pages), (directory / report.PAGE).read_text()


def plain(page):
    """What a page says, without marks."""
    body = re.sub(r"<(style|script|svg).*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body)).replace("&#39;", "'").replace("&#34;", '"')


def both(directory):
    """Both reports as words."""
    markdown, page = texts_of(directory)
    return markdown, plain(page)


def test_a_table_in_markdown():
    shown = "| arm | ours | published ours |\n| --- | ---: | ---: |\n| plain | 0.1 | 0.2 |"
    assert to_markdown(TABLE) == f"**Accuracy**\n\n{shown}\n\nn = 2"


def test_both_reports_have_question_verdict_table_picture_criterion_and_origin(tmp_path, monkeypatch):
    declared(monkeypatch, citation="", answer={}, surprise="", reader_questions={})
    finished_run(tmp_path, [verdict(HELD)], protocol=PROTOCOL)
    markdown, page = texts_of(tmp_path)
    for text in (markdown, plain(page)):
        for part in (
            "Why?",
            "A paper",
            "Of 1 claim, 1 held.",
            "The effect = 1.05 points (95% interval 0.926 to 1.17, n = 3).",
            "Accuracy",
            "n = 2",
            f"Claim. {CLAIM.criterion}",
            "Fewer seeds.",
            "The claims were fixed before the run",
            "python -m experiments run benefits --preset cpu",
            "0123456789ab",
            "a machine",
            "3 minutes",
            "plain: 89,610",
            "rate by validation accuracy, the same 3 trials for every arm (0.1, 1, 10), 2 seeds each",
            "Final validation beside test accuracy",
            words.INTERVALS,
        ):
            assert part in text
    assert "![What is it?](a.png)\n\n*A picture.*" in markdown
    assert "<figcaption>A picture.</figcaption>" in page
    assert 'alt="What is it? A picture."' in page


def test_the_page_names_no_address_outside_and_every_link_leads_somewhere(tmp_path):
    finished_run(tmp_path, list(EVERY.values()))
    finished_run(tmp_path, [verdict(HELD)], experiment="placement")
    found = Ids(texts_of(tmp_path)[1])
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)


def test_what_an_experiment_says_is_text_and_no_markup(tmp_path):
    finished_run(tmp_path, [verdict(HELD, sentence="<script>alert(1)</script> a | b")])
    markdown, page = texts_of(tmp_path)
    assert "<script>alert" not in page
    assert "a \\| b" in markdown


def test_the_reports_count_outcomes_and_have_the_effect_of_every_cell(tmp_path):
    finished_run(tmp_path, [EVERY[name] for name in ("above, held", "above, failed", "above, open", "above, in part")])
    markdown, page = texts_of(tmp_path)
    assert "**Of 4 claims: 1 held, 1 held in part, 1 failed, 1 open.**" in markdown
    assert re.findall(r'class="number">(\d+)<', page) == ["1", "1", "1", "1"]
    assert "| Claim. | rate 1 | 0.05 (-0.0742 to 0.174) | not supported |" in markdown
    assert "rate 10.05-0.0742 to 0.174" in plain(page).replace(" rate 1 ", "rate 1")


def test_what_surprised_us_is_told_once_and_what_failed_or_held_in_part_is_listed(tmp_path, monkeypatch):
    declared(monkeypatch, surprise="Nobody would have thought so.")
    sentences = {"above, held": "Held.", "above, failed": "Failed.", "above, in part": "In part."}
    verdicts = [EVERY[name]._replace(claim=sentence) for name, sentence in sentences.items()]
    finished_run(tmp_path, verdicts)
    finished_run(tmp_path, [verdict(HELD)], name="benefits_again")
    markdown, page = both(tmp_path)
    for text in (markdown, page):
        assert text.count("Nobody would have thought so.") == 1
    told = page[page.index("2 claims that failed or held in part only") :]
    told = told[: told.index("Why?")]
    assert "Did not hold (claimed: above 0.5)." in told
    assert "Held on average (claimed: above 0.5), but not for certain in 1 of 2 cells: rate 1" in told
    assert "Held." not in told


def test_what_was_read_back_is_what_was_judged(tmp_path):
    for name, found in EVERY.items():
        directory = finished_run(tmp_path, [found], name=name)
        (again,) = report.read_verdicts(directory)
        assert [cell.where for cell in again.cells] == [cell.where for cell in found.cells]
        assert (again.needed, again.outcome, again.p_value is None) == (
            *(found.needed, found.outcome),
            found.p_value is None,
        )
        if math.isfinite(found.effect):
            assert again.effect == pytest.approx(found.effect, rel=1e-5)


def test_claims_that_were_not_in_a_commit_are_said_to_be_so(tmp_path):
    finished_run(tmp_path, [verdict(HELD)], fixed=False)
    markdown, page = both(tmp_path)
    assert "**Not fixed before the run**" in markdown
    assert "except those of benefits" in page


STALE = {
    "claims": ({"sha256": "0" * 64}, "claims have changed since it was made"),
    "settings": ({"settings": {"steps": 7}}, "settings of the preset cpu are others than it was made with (steps 7"),
    "more settings": ({"settings": {"gone": 1}}, "(gone 1, today None)"),
}


@pytest.mark.parametrize(("changes", "said"), STALE.values(), ids=STALE)
def test_a_stale_result_is_marked_and_fails_the_check(tmp_path, capsys, changes, said):
    finished_run(tmp_path, [verdict(HELD)], **changes)
    markdown, page = texts_of(tmp_path)
    assert said in markdown
    assert said in plain(page)
    assert '<strong class="stale">stale</strong>' in page
    assert main(["report", "--check", "--results", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_a_result_of_other_code_is_not_stale(tmp_path):
    directory = finished_run(tmp_path, [verdict(HELD)])
    texts_of(tmp_path)
    assert report.check(tmp_path, None) == []
    config = json.loads((directory / "config.json").read_text())
    config["provenance"]["commit"] = "f" * 40
    (directory / "config.json").write_text(json.dumps(config))
    assert "f" * 12 in texts_of(tmp_path)[0]
    assert report.check(tmp_path, None) == []


def test_the_check_writes_nothing_and_asks_for_a_report_that_is_behind(tmp_path, capsys):
    finished_run(tmp_path, [verdict(HELD)])
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "--check", "--results", str(tmp_path)]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert "report.html is not what the results say" in capsys.readouterr().err
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert main(["report", "--check", "--results", str(tmp_path)]) == 0


def unfinished(directory):
    held = json.loads((directory / "progress.json").read_text())
    (directory / "progress.json").write_text(json.dumps({**held, "finished": False}))


def without(file):
    return lambda directory: (directory / file).unlink()


def instead(file, content):
    return lambda directory: (directory / file).write_text(content)


def edited(file, **changes):
    def harm(directory):
        (directory / file).write_text(json.dumps({**json.loads((directory / file).read_text()), **changes}))

    return harm


HARMS = {
    "unknown": (edited("config.json", experiment="gone"), "a run of 'gone', which is no experiment"),
    "unfinished": (unfinished, "not finished"),
    "not judged": (without("summary.json"), "not finished"),
    "no config": (without("config.json"), "no run (no config.json in it)"),
    "no progress": (without("progress.json"), "progress.json is missing or damaged"),
    "no rows": (without("metrics.jsonl"), "metrics.jsonl was changed"),
    "other rows": (instead("metrics.jsonl", "{}\n"), "metrics.jsonl was changed"),
    "half a config": (instead("config.json", '{"exp'), "config.json is not readable JSON"),
    "half a summary": (instead("summary.json", '{"verd'), "summary.json is not readable JSON"),
    "an old summary": (edited("summary.json", verdicts=[{"claim": "Claim."}]), "not as a run writes it today"),
    "an old table": (edited("summary.json", tables=[{"head": []}]), "not as a run writes it today"),
    "an old config": (edited("config.json", claims={}), "not as a run writes it today"),
    "no hardware": (edited("config.json", provenance={"commit": "a", "versions": {}}), "has no 'hardware'"),
    "no picture": (without("a.png"), "a.png is missing or no PNG"),
    "other picture": (instead("a.png", "<svg>"), "a.png is missing or no PNG"),
    "picture elsewhere": (edited("summary.json", pictures=[{"file": "../../x.png", "caption": ""}]), "leads out of"),
}


@pytest.mark.parametrize(("harm", "said"), HARMS.values(), ids=HARMS)
def test_a_bad_directory_is_left_out_with_a_note_and_fails_the_check(tmp_path, capsys, harm, said):
    finished_run(tmp_path, [verdict(HELD, sentence="The good one.")])
    harm(finished_run(tmp_path, [verdict(HELD, sentence="The bad one.")], experiment="placement", name="bad"))
    for text in both(tmp_path):
        assert said in text
        assert "The good one." in text
        assert "The bad one." not in text
    assert main(["report", "--check", "--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "bad is left out" in error
    assert said in error


def test_a_report_of_bad_directories_alone_says_so(tmp_path):
    unfinished(finished_run(tmp_path, [verdict(HELD)]))
    assert all("not finished" in text for text in both(tmp_path))


def test_benchmarks_are_no_experiment(tmp_path):
    (tmp_path / "bench").mkdir()
    with pytest.raises(UserError, match="holds no finished run"):
        report.write_report(tmp_path, None)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    finished_run(tmp_path, [verdict(HELD)])
    texts_of(tmp_path)
    before = {path: path.read_text() for path in (tmp_path / report.REPORT, tmp_path / report.PAGE)}
    shutil.rmtree(tmp_path / "benefits")
    finished_run(tmp_path, [verdict(FAILED)])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        report.write_report(tmp_path, None)
    assert {path: path.read_text() for path in before} == before
    assert not list(tmp_path.rglob("*.new"))


def test_a_second_run_of_an_experiment_has_a_section_of_its_own(tmp_path):
    finished_run(tmp_path, [verdict(HELD)])
    finished_run(tmp_path, [verdict(HELD)], name="benefits_again")
    text, page = texts_of(tmp_path)
    assert text.index("### [benefits](benefits/README.md)") < text.index(
        "### [benefits_again](benefits_again/README.md)"
    )
    assert text.index("\n# benefits\n") < text.index("\n# benefits_again\n")
    assert page.index('id="benefits"') < page.index('id="benefits_again"')


def test_the_list_in_the_top_page_is_replaced_between_its_marks(tmp_path):
    finished_run(tmp_path, [verdict(HELD), verdict(FAILED)])
    readme = tmp_path / "TOP.md"
    readme.write_text("\n".join(["before", report.FOUND[0], "old", report.FOUND[1], "after"]))
    report.write_report(tmp_path, readme)
    first, *_, last = readme.read_text().split("\n")
    assert (first, last) == ("before", "after")
    assert "**Of 2 claims: 1 held, 0 held in part, 1 failed, 0 open.**" in readme.read_text()
    assert "- when it helps: [benefits](experiments/results/benefits/README.md) 1 of 2\n" in readme.read_text()
    assert "old" not in readme.read_text()


def test_the_report_is_the_same_when_built_again(tmp_path):
    finished_run(tmp_path, list(EVERY.values()))
    assert texts_of(tmp_path) == texts_of(tmp_path)


def declared(monkeypatch, **fields):
    """Let the experiments declare other things than they do: fields of `Experiment`, for all of them."""
    load = registry.load

    def more(name):
        held = load(name)
        return Experiment(**{**{field: getattr(held, field) for field in held.__dataclass_fields__}, **fields})

    monkeypatch.setattr(registry, "load", more)


def test_parts_that_no_experiment_declares_are_left_out(tmp_path, monkeypatch):
    declared(monkeypatch, citation="", answer={}, surprise="", reader_questions={})
    finished_run(tmp_path, [verdict(HELD)])
    for text in both(tmp_path):
        assert "contradict" not in text
        assert "Questions that readers ask" not in text
        assert "What surprised us" not in text


def test_both_reports_say_how_an_experiment_goes_in_the_words_of_its_file(tmp_path, monkeypatch):
    said = "What?\n\nProtocol: `x -> y` at |rate| < 2; <b> is text.\n\n- plain: none;\n- norm: all.\n\nTwo minutes."
    monkeypatch.setattr(importlib.import_module("experiments.benefits"), "__doc__", said)
    finished_run(tmp_path, [verdict(HELD)])
    markdown, page = texts_of(tmp_path)
    assert said.removeprefix("What?\n\n") in markdown
    assert "<p>Protocol: <code>x -&gt; y</code> at |rate| &lt; 2; &lt;b&gt; is text.</p>" in page
    assert "<li>norm: all.</li>" in page
    assert "<p>Two minutes.</p>" in page


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_every_experiment_says_how_it_goes(name):
    assert len(" ".join(registry.protocol(name))) > 300


def test_an_answer_a_citation_and_readers_questions_are_shown(tmp_path, monkeypatch):
    said = {"Is it needed?": "No. Not here.", "Which batch size?": "Any."}
    answer = {"cpu": "It does. Look."}
    declared(monkeypatch, answer=answer, citation="A. Author, Paper, 2015.", reader_questions=said)
    finished_run(tmp_path, [verdict(HELD)])
    finished_run(tmp_path, [verdict(HELD)], name="again")
    for text in both(tmp_path):
        assert "It does. Look." in text
        assert "A. Author, Paper, 2015." in text
        assert text.count("Is it needed?") == text.count("Not here.") == 1
        assert text.index("How to train with it") < text.index("Which batch size?") < text.index("Is it needed?")


def test_an_answer_is_that_of_the_preset_and_never_of_another(tmp_path, monkeypatch):
    declared(monkeypatch, answer={"full": "It does. Look."})
    finished_run(tmp_path, [verdict(HELD)])
    for text in both(tmp_path):
        assert "It does." not in text
        assert "Of 1 claim, 1 held." in text


def test_one_question_to_two_experiments_has_both_answers(tmp_path, monkeypatch):
    load = registry.load

    def more(name):
        held = load(name)
        fields = {field: getattr(held, field) for field in held.__dataclass_fields__}
        return Experiment(**{**fields, "reader_questions": {"Is it needed?": f"Says {name}."}})

    monkeypatch.setattr(registry, "load", more)
    for name in ("benefits", "placement"):
        finished_run(tmp_path, [verdict(HELD)], experiment=name)
    for text in both(tmp_path):
        assert text.count("Is it needed?") == 1
        assert text.index("Says benefits.") < text.index("Says placement.")


def test_a_claim_that_leans_on_another_is_told_in_full_where_it_stands_alone(tmp_path, monkeypatch):
    claims = [Claim("And it is faster.", lambda r: r.v, standalone="Batch norm is faster.", **ABOVE)]
    declared(monkeypatch, claims=claims, reader_questions={}, surprise="")
    finished_run(tmp_path, [verdict(HELD, sentence="And it is faster.")])
    front = texts_of(tmp_path) and (tmp_path / report.REPORT).read_text()
    assert "Batch norm is faster." in front
    assert "And it is faster." not in front
    one = (tmp_path / "benefits" / report.REPORT).read_text()
    assert "And it is faster." in one


WORKS = {
    "Ioffe and Szegedy 2015, section 2": "Ioffe 2015",
    "van Laarhoven 2017; Hoffer et al. 2018": "Laarhoven 2017",
    "after Zhang, Dauphin and Ma 2019, whose initialization is another": "Zhang 2019",
    "Udacity, Deep Learning Foundations: Batch Normalization - Lesson": "Udacity",
    "a control of ours; that it shrinks: De and Smith 2020": words.OURS,
    "ours": words.OURS,
}


@pytest.mark.parametrize(("source", "work"), WORKS.items())
def test_claims_are_filtered_by_the_work_in_which_they_stand(source, work):
    assert words.work_of(source) == work


def test_a_run_that_was_continued_elsewhere_names_both_machines(tmp_path):
    directory = finished_run(tmp_path, [verdict(HELD)])
    config = json.loads((directory / "config.json").read_text())
    other = {**config["provenance"], "hardware": "another machine", "commit": "fedcba9876543210"}
    (directory / "config.json").write_text(json.dumps({**config, "continued": [other, None]}))
    for text in both(tmp_path):
        assert "a machine; then another machine" in text
        assert "0123456789ab; then fedcba987654" in text
        assert "jax 0.10.2; then" not in text


def test_every_dispute_and_question_of_the_list_is_one_of_an_experiment():
    experiments = [registry.load(name) for name in registry.EXPERIMENTS]
    asked = {question for one in experiments for question in one.reader_questions}
    assert {question for questions in topics.QUESTIONS.values() for question in questions} <= asked
    disputed = {claim.dispute for one in experiments for claim in one.claims if claim.dispute}
    assert disputed == set(topics.DISPUTES)
    assert all(topics.DISPUTES.values())


def test_claims_of_one_dispute_stand_side_by_side(tmp_path, monkeypatch):
    sentences = {"It helps.": "benefits", "It hurts.": "placement"}
    claims = [Claim(s, lambda r: r.v, dispute="Does noise help?", **ABOVE) for s in sentences]
    lone = Claim("Alone.", lambda r: r.v, dispute="Is it alone?", **ABOVE)
    declared(monkeypatch, claims=[*claims, lone])
    for sentence, name in sentences.items():
        found = [verdict(HELD, sentence=sentence), *([verdict(HELD, sentence="Alone.")] if name == "benefits" else [])]
        finished_run(tmp_path, found, experiment=name)
    for text in both(tmp_path):
        told = text[text.index("Does noise help?") :]
        told = told[: told.index("Why?")]
        assert told.index("It helps.") < told.index("It hurts.")
        assert "Is it alone?" not in text


def test_a_dispute_is_no_part_of_what_fixes_a_claim():
    def effect(r):
        return r.v

    one, other = (fingerprint([Claim("C.", effect, dispute=d, **ABOVE)]) for d in ("", "Does noise help?"))
    assert one == other
