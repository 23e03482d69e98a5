"""Comparisons of runs: tables, sentences, and one HTML page, from run folders alone."""

from batchless.report.claims import claims as claims
from batchless.report.markdown import render_markdown as render_markdown
from batchless.report.page import render_page as render_page
from batchless.report.page import write_page as write_page
from batchless.report.strict import render_json as render_json
from batchless.report.table import Cell as Cell
from batchless.report.table import Comparison as Comparison
from batchless.report.table import comparison as comparison
