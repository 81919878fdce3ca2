"""`python -m experiments report`: write both reports, or check that they and the results are as they should be."""

from pathlib import Path

from experiments.framework.files import write_text
from experiments.framework.report.collect import Collection, collect
from experiments.framework.report.markdown import front_of, page_of_run, with_found
from experiments.framework.report.page import page_of

RESULTS = Path(__file__).parents[2] / "results"
REPORT = "README.md"
PAGE = "report.html"
README = Path(__file__).parents[3] / "README.md"


def write_report(results: Path = RESULTS, readme: Path | None = README) -> list[str]:
    """Write both reports in `results` from the directories in it, and the list of what was found in the top README.

    Each file is written beside its place and renamed. A directory that cannot be used is left out, with a note in both.

    Returns:
      What is wrong with the results, a sentence each.
    """
    collection = collect(results)
    for path, text in files_of(collection, results, readme).items():
        write_text(path, text)
    return collection.troubles


def check(results: Path = RESULTS, readme: Path | None = README) -> list[str]:
    """What is wrong, a sentence each: stale or unusable results, and reports that are not what the results say."""
    collection = collect(results)
    troubles = collection.troubles
    for path, text in files_of(collection, results, readme).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            troubles.append(f"{path} is not what the results say: run python -m experiments report.")
    return troubles


def files_of(collection: Collection, results: Path, readme: Path | None = None) -> dict[Path, str]:
    """What a report consists of: the first page, one for each run beside its pictures, and all on one page."""
    files = {run.directory / REPORT: page_of_run(run) for run in collection.runs}
    files |= {results / REPORT: front_of(collection), results / PAGE: page_of(collection)}
    return files if readme is None else {**files, readme: with_found(readme.read_text(encoding="utf-8"), collection)}
