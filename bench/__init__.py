"""Performance comparisons, run from the repository root: `python -m bench weights`, `python -m bench step`."""
