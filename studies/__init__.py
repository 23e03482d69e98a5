"""Long measurements behind docs/results.md: `python -m studies.cifar10`."""
