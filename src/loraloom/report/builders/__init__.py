"""From the results of the verbs to reports. One file per kind of result."""

from loraloom.report.builders.adapter import export_report, inspection_report, merge_report
from loraloom.report.builders.comparison import comparison_report
from loraloom.report.builders.composition import composition_sections
from loraloom.report.builders.modules import by_layer
from loraloom.report.builders.run import report_of_run, run_report
from loraloom.report.builders.spectrum import intruder_report, trade_off_section

__all__ = [
    "by_layer",
    "comparison_report",
    "composition_sections",
    "export_report",
    "inspection_report",
    "intruder_report",
    "merge_report",
    "report_of_run",
    "run_report",
    "trade_off_section",
]
