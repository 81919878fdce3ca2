"""The report: what the committed results say, as Markdown and as one page; it trains nothing.

`summary` writes what a run found, `collect` reads the results directories, `markdown` and `page` make the two reports
of them, `command` writes and checks both.
"""

from experiments.framework.report.collect import collect
from experiments.framework.report.command import PAGE, README, REPORT, RESULTS, check, files_of, write_report
from experiments.framework.report.markdown import FOUND, front_of, page_of_run, with_found
from experiments.framework.report.page import page_of
from experiments.framework.report.summary import read_verdicts, write_summary
