"""What both reports say of a run, in words."""

import re
from collections.abc import Iterable, Mapping, Sequence

from experiments import topics
from experiments.framework.experiment import THEMES
from experiments.framework.report.collect import Run
from experiments.framework.report.holm import survivors
from experiments.framework.verdict import IN_PART, INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict, cell_in_words

TITLE = "What does batch norm do, and why?"
OUTCOMES = (SUPPORTED, IN_PART, NOT_SUPPORTED, INCONCLUSIVE)
SHORT = {SUPPORTED: "held", IN_PART: "held in part", NOT_SUPPORTED: "failed", INCONCLUSIVE: "open"}
MEANING = {
    SUPPORTED: "The 95% interval lies where the claim says, and so does that of every cell.",
    IN_PART: "The mean over all cells is as claimed; some cells are not, or are not certain.",
    NOT_SUPPORTED: "The 95% interval lies wholly where the claim says it does not.",
    INCONCLUSIVE: "The 95% interval reaches across the threshold, or there is none: more seeds might decide.",
}
TERMS = {
    "claim": "A sentence from a paper, a book or a course, or a control of ours, with what would count as support.",
    "effect, threshold": "What was measured to judge the claim, and the value on one side of which the claim holds.",
    "95% interval, n": "The range in which the mean of the effect lies with 95% confidence, and from how many"
    " repetitions that is concluded: seeds, or rounds where times are measured.",
    "cell": "One combination of settings under which a claim was tested, such as ReLU at rate 1.",
    "arm": "One of the kinds of network that are compared, such as plain (without any norm) and batch norm.",
    "mnist5k": "5,000 real digits of MNIST that come with a Python package: 3,500 to train, 500 to choose rates"
    " (validation), 1,000 to test.",
    "as remembered": "A figure or sentence of a source that could not be opened when the claim was written.",
}
OURS = "ours, a formula or a common belief"
OTHERS = "Further questions"
INTERVALS = (
    "Intervals are 95% intervals of the mean over seeds (Student's t). They leave out the uncertainty of choosing rates"
    " and other settings: another search could have chosen other ones."
)


def count(number: int, thing: str) -> str:
    """A number of things: "1 claim", "3 claims"."""
    return f"{number} {thing}{'s' * (number != 1)}"


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many claims had each outcome, in the order of `OUTCOMES`."""
    found = [verdict.outcome for verdict in verdicts]
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def together_in_words(verdicts: Sequence[Verdict]) -> str:
    """How many claims survive Holm's correction over all of them."""
    survive = survivors(verdicts)
    tested = sum(one is not None for one in survive)
    held = sum(
        one is not None and verdict.outcome in (SUPPORTED, IN_PART)
        for one, verdict in zip(survive, verdicts, strict=True)
    )
    rest = len(verdicts) - tested
    words = "With many claims some hold by chance:"
    words += f" {survive.count(True)} of the {held} that held in a statistical test, at least in part, still hold by"
    words += f" Holm's correction, which asks more of each where many are tested, here {tested}."
    return words + (f" The other {rest} are exact, or have no interval." if rest else "")


def themes_of(runs: Sequence[Run]) -> list[str]:
    """The themes of the runs: those of `THEMES` in its order, then others."""
    declared = list(dict.fromkeys(run.experiment.theme for run in runs if run.experiment.theme))
    return sorted(declared, key=lambda theme: THEMES.index(theme) if theme in THEMES else len(THEMES))


def by_theme(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each theme, those without a theme last."""
    themes = [*themes_of(runs), ""]
    found = {theme: [run for run in runs if run.experiment.theme == theme] for theme in themes}
    return {theme: some for theme, some in found.items() if some}


def source_of(run: Run, verdict: Verdict) -> str:
    """Where a claim was made."""
    return verdict.source or run.summary["source"]


def citation_of(run: Run) -> str:
    """The works that an experiment tests, in full; a full stop at the end."""
    return (run.experiment.citation or run.summary["source"]).removesuffix(".") + "."


def work_of(source: str) -> str:
    """The first work that a source names, as "Ioffe 2015"; its title where it has no year; OURS where there is none."""
    if source[:1].islower() and not source.startswith(("van ", "after ")):
        return OURS
    named = re.match(r"(?:van |after )?([A-Z][\w'-]*)[^;]*?\b((?:19|20)\d\d)\b", source)
    return " ".join(named.groups()) if named else re.split("[,:]", source)[0]


def claim_of(run: Run, verdict: Verdict) -> str:
    """The sentence of a claim as it is understood alone."""
    alone = {claim.sentence: claim.standalone for claim in run.experiment.claims}
    return alone.get(verdict.claim) or verdict.claim


def answer_of(run: Run) -> str:
    """The answer in two sentences; where none is declared for the preset, how many claims held and what was found."""
    if answer := run.experiment.answer.get(run.config["preset"]):
        return answer
    found = [f"{number} {SHORT[outcome]}" for outcome, number in counts(run.verdicts).items() if number]
    return f"Of {count(len(run.verdicts), 'claim')}, {', '.join(found)}."


def fixed_in_words(run: Run) -> str:
    """Whether the claims stood in a commit before the run."""
    claims = run.config["claims"]
    if claims["fixed_before_the_run"]:
        return f"The claims were fixed before the run: SHA-256 {claims['sha256'][:16]}, in the commit below."
    return "Not fixed before the run: no commit holds the claims as they were when it started."


def all_fixed_in_words(runs: Sequence[Run]) -> str:
    """Whether the claims of all runs stood before them."""
    late = [run.name for run in runs if not run.config["claims"]["fixed_before_the_run"]]
    words = "Each claim, with the effect that counts as support, was written down before the run that judges it"
    return words + (f", except those of {', '.join(late)}." if late else ".")


def command_of(run: Run) -> str:
    """The command that makes the result again."""
    return f"python -m experiments run {run.config['experiment']} --preset {run.config['preset']}"


def origin_of(run: Run) -> dict[str, str]:
    """Where a result comes from: {what: words}, such as commit, hardware, versions and run time."""
    settings = run.config["settings"]
    sessions = [run.config["provenance"], *filter(None, run.config.get("continued", []))]
    facts = {
        "Made at commit": _in_turn(_commit(one) for one in sessions),
        "On": _in_turn(one["hardware"] for one in sessions),
        "Run time": _run_time(run.config),
        "Started": _in_turn(one.get("started", "") for one in sessions),
        "Versions": _in_turn(_versions(one) for one in sessions),
        "Seeds": f"{settings['seeds']}, from {settings.get('first_seed', 0)}",
        "Data": _data(run.config),
    }
    return {name: words for name, words in facts.items() if words}


def _in_turn(words: Iterable[str]) -> str:
    """What was so in each session of a run, each once; a run that was continued elsewhere has several."""
    return "; then ".join(dict.fromkeys(filter(None, words)))


def _commit(origin: Mapping) -> str:
    return origin["commit"][:12] + ("+changes" if origin["commit"].endswith("+changes") else "")


def _versions(origin: Mapping) -> str:
    return ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if name != "jaxbn")


def _data(config: Mapping) -> str:
    held = config.get("data")
    return f"{held['name']}, SHA-256 {held['sha256'][:16]}" if held else ""


def _run_time(config: Mapping) -> str:
    seconds = config.get("seconds")
    if seconds is None:
        return ""
    words = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"{words} since it was continued last" if config.get("continued") else words


def protocol_in_words(run: Run) -> dict[str, str]:
    """How networks were trained and rates chosen: {what: words}; empty where none were trained."""
    held = run.summary.get("protocol") or {}
    if not held:
        return {}
    settings = run.config["settings"]
    facts = {
        "Programs": _axes(held["programs"]),
        "Runs of each": _axes(held["runs"]),
        "Training": f"{settings.get('steps', 0):,} steps of {count(held['batch_size'], 'example')}",
        "Trained parameters": _places(held["parameters"]),
        "How rates were chosen": search_in_words(held["search"]),
        "Chosen": _places(held["chosen"]),
    }
    return {name: words for name, words in facts.items() if words}


def _axes(axes: Mapping[str, Sequence]) -> str:
    return "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in axes.items())


def _places(entries: Sequence[Mapping]) -> str:
    words = ((", ".join(_named(entry["where"])), f"{entry['value']:,}") for entry in entries)
    return "; ".join(f"{where}: {value}" if where else value for where, value in words)


def _named(where: Mapping) -> list[str]:
    return [value if isinstance(value, str) else f"{axis} {value:g}" for axis, value in where.items()]


def measured_in_words(run: Run, verdict: Verdict) -> str:
    """What a claim was measured on."""
    data = run.config["settings"].get("data")
    return verdict.criterion + (f" Data: {data}." if data else "")


def search_in_words(search: Mapping | None) -> str:
    """What the search tried, the same for every arm."""
    if search is None:
        return "not chosen: fixed by the protocol, the same for every arm"
    tried = ", ".join(f"{value:g}" for value in search["values"])
    return (
        f"{search['axis']} by {search['on'].replace('_', ' ')}, the same"
        f" {count(len(search['values']), 'trial')} for every arm ({tried}),"
        f" {count(search['seeds'], 'seed')} each that {'are' if search['seeds'] != 1 else 'is'} not used again"
    )


def failing_cells(verdict: Verdict) -> list[str]:
    """The cells in which a claim does not hold, or is not certain to: "rate 1 (-0.1 to 0.2)"."""
    return [
        f"{cell_in_words(cell)} ({interval_in_words(cell.low, cell.high)})"
        for cell in verdict.cells
        if cell.outcome != SUPPORTED
    ]


def interval_in_words(low: float, high: float) -> str:
    """An interval: "0.1 to 0.3"."""
    return f"{low:.3g} to {high:.3g}" if low == low and high == high else "no interval"


def threshold_in_words(verdict: Verdict) -> str:
    """What would hold: "claimed: above 0.05"."""
    limit = f"{verdict.threshold:g}"
    neutral = "1" if verdict.ratio else "0"
    rules = {"above": f"above {limit}", "below": f"below {limit}", "exact": f"at most {limit}"}
    return f"claimed: {rules.get(verdict.kind, f'within {limit} of {neutral}')}"


def surprises(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """What nobody would have expected: a run and its words, once for an experiment that has several runs."""
    first = {run.config["experiment"]: run for run in reversed(runs)}
    told = [run for run in runs if run.experiment.surprise and run is first[run.config["experiment"]]]
    return [(run, run.experiment.surprise) for run in told]


def failures(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """The claims that failed or held in part: their run and their number in it."""
    return [
        (run, number)
        for run in runs
        for number, verdict in enumerate(run.verdicts)
        if verdict.outcome in (NOT_SUPPORTED, IN_PART)
    ]


def failure_in_words(verdict: Verdict) -> str:
    """What did not hold, plainly."""
    claimed = threshold_in_words(verdict)
    if verdict.outcome == NOT_SUPPORTED:
        return f"Did not hold ({claimed})."
    failing = failing_cells(verdict)
    named = f": {'; '.join(failing[:4])}" + ("; and others" if len(failing) > 4 else "")
    number = f"{len(failing)} of {len(verdict.cells)} cells"
    return f"Held on average ({claimed}), but not for certain in {number}{named}."


def disputes(runs: Sequence[Run]) -> dict[str, list[tuple[Run, int]]]:
    """Questions on which sources contradict each other, with the claims of both sides; those of one claim are not."""
    found: dict[str, list[tuple[Run, int]]] = {}
    for run in runs:
        topics = {claim.sentence: claim.dispute for claim in run.experiment.claims}
        for number, verdict in enumerate(run.verdicts):
            if topic := topics.get(verdict.claim):
                found.setdefault(topic, []).append((run, number))
    return {topic: sides for topic, sides in found.items() if len(sides) > 1}


def conclusion_of(topic: str) -> str:
    """What the claims on both sides of a dispute say together."""
    return topics.DISPUTES.get(topic, "")


def reader_questions(runs: Sequence[Run]) -> dict[str, dict[str, list[tuple[Run, str]]]]:
    """What readers ask: {topic: {question: [(run, its answer), ...]}}, in the order of `topics.QUESTIONS`.

    An experiment answers a question once, though it may have several runs.
    """
    answers: dict[str, dict[str, tuple[Run, str]]] = {}
    for run in runs:
        for question, answer in run.experiment.reader_questions.items():
            answers.setdefault(question, {}).setdefault(run.config["experiment"], (run, answer))
    listed = {question for questions in topics.QUESTIONS.values() for question in questions}
    order = {**topics.QUESTIONS, OTHERS: [question for question in answers if question not in listed]}
    found = {topic: {q: list(answers[q].values()) for q in asked if q in answers} for topic, asked in order.items()}
    return {topic: questions for topic, questions in found.items() if questions}
