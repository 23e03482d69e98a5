"""Comparisons of runs: tables, sentences, and one HTML page, from run folders alone."""

from .claims import claims as claims
from .page import write_page as write_page
from .table import Cell as Cell
from .table import Comparison as Comparison
from .table import comparison as comparison
