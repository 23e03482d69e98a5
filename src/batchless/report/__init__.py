"""Comparisons of runs: tables, sentences, and one HTML page, from run folders alone."""

from batchless.report.claims import claims as claims
from batchless.report.page import write_page as write_page
from batchless.report.table import Cell as Cell
from batchless.report.table import Comparison as Comparison
from batchless.report.table import comparison as comparison
