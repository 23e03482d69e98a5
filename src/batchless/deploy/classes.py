"""Classes of other data in the order of a run's."""

from collections.abc import Sequence


def labels_of_run(found: Sequence[str], classes: Sequence[str], *, source: str) -> list[int]:
    """The label that the run has for each class found in the data; they need not have all of the run's.

    Args:
        found: classes of the data, in the order of their labels.
        classes: of the run.
        source: of the data, for errors.

    Raises:
        ValueError: a class that the run has not.
    """
    if unknown := [name for name in found if name not in classes]:
        raise ValueError(
            f"{source}: the data have classes that the run has not ({', '.join(unknown[:5])}); the run's are "
            f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )
    return [classes.index(name) for name in found]
