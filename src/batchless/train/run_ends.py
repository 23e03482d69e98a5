"""Both ends of a run in its folder: what is gone on with, who opens the folder, and an error that becomes its summary."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import Field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from batchless.runs import RunFolder, read_run
from batchless.train.interrupt import TrainingStoppedError
from batchless.train.processes import Processes


class RunConfig(Protocol):
    """A frozen dataclass with all settings of a run."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def device(self) -> str:
        """Where the run computes."""

    @property
    def data(self) -> Any:
        """The settings of the data, a dataclass with `root`."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], *, source: str | Path) -> Self:
        """The inverse of what the run folder's `config.yaml` holds."""


C = TypeVar("C", bound=RunConfig)


def begun(folder: str | Path, kind: type[C], *, device: str | None = None, root: str | None = None) -> C:
    """The configuration of the run in `folder`, to go on with there.

    Args:
        folder: of a run that was interrupted or has failed.
        kind: of the configuration.
        device: another device than before; None: the same.
        root: where the data lies now; None: where it lay.

    Raises:
        ValueError: no run, one that has ended, or one of another kind.
    """
    folder = Path(folder)
    run = read_run(folder)
    if run.summary is not None and "failed" not in run.summary:
        raise ValueError(f"the run in {folder} has ended: there is nothing to go on with")
    config = kind.from_plain(run.config, source=folder / "config.yaml")
    config = replace(config, out=str(folder), device=device or config.device)
    return config if root is None else replace(config, data=replace(config.data, root=root))


def on_first(processes: Processes, make: Callable[[], RunFolder]) -> RunFolder | None:
    """The run folder on the first process, None on the others; its error on all."""
    run: RunFolder | None = None
    error: ValueError | None = None
    if processes.first:
        try:
            run = make()
        except ValueError as raised:
            error = raised
    processes.agree(error)
    return run


def as_it_is(error: Exception) -> Exception:
    """The error itself."""
    return error


@contextmanager
def failure_told(run: RunFolder | None, explain: Callable[[Exception], Exception] = as_it_is) -> Iterator[None]:
    """An error in the block, explained, becomes the run's summary, where this process has the folder.

    A run that was asked to stop has not failed.
    """
    try:
        yield
    except TrainingStoppedError:
        raise
    except Exception as error:
        explained = explain(error)
        reason = str(explained) if isinstance(explained, ValueError) else f"{type(error).__name__}: {error}"
        if run is not None:
            with suppress(ValueError):  # the disk may be full, which is what the error says
                run.finish({"failed": " ".join(reason.split())})
        if explained is error:
            raise
        raise explained from error
