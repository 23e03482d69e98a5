"""Comparisons of runs: tables, sentences, and one HTML page, from run folders alone."""

from batchless.report.claims import claims as claims
from batchless.report.federated_claims import federated_claims as federated_claims
from batchless.report.federated_table import FederatedComparison as FederatedComparison
from batchless.report.federated_table import federated_comparison as federated_comparison
from batchless.report.halves import Halves as Halves
from batchless.report.halves import compare_runs as compare_runs
from batchless.report.markdown import render_markdown as render_markdown
from batchless.report.page import render_page as render_page
from batchless.report.page import write_page as write_page
from batchless.report.strict import render_json as render_json
from batchless.report.table import Cell as Cell
from batchless.report.table import Comparison as Comparison
from batchless.report.table import comparison as comparison
