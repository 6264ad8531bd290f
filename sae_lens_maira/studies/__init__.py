"""Study records, tables of them, the Open-I reader, and rule labels of report text."""

from sae_lens_maira.studies.findings import (
    FindingReader,
    known_findings,
    readable_studies,
    rule_reader,
    truth_table,
)
from sae_lens_maira.studies.labels import RuleLabel, RuleStatus, is_unknown, rule_labels
from sae_lens_maira.studies.readers import import_iuxray
from sae_lens_maira.studies.report_metrics import ReportErrors, report_errors
from sae_lens_maira.studies.sequence import StudySequence
from sae_lens_maira.studies.statements import Statement, StatementReader
from sae_lens_maira.studies.study import Box, Finding, GroundedStatement, Licence, Study, StudyImage
from sae_lens_maira.studies.table import StudyTable, read_table, table_of_studies

__all__ = [
    "Box",
    "Finding",
    "FindingReader",
    "GroundedStatement",
    "Licence",
    "ReportErrors",
    "RuleLabel",
    "RuleStatus",
    "Statement",
    "StatementReader",
    "Study",
    "StudyImage",
    "StudySequence",
    "StudyTable",
    "import_iuxray",
    "is_unknown",
    "known_findings",
    "read_table",
    "readable_studies",
    "report_errors",
    "rule_labels",
    "rule_reader",
    "table_of_studies",
    "truth_table",
]
