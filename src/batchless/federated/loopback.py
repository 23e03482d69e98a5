"""A federated run over Flower on this machine alone: a SuperLink and some SuperNodes, started and ended here."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchless.federated.config import FederateConfig
from batchless.federated.experiment import FinishedFederation, say_nothing
from batchless.federated.flower_app import write_app
from batchless.federated.flower_settings import RESUME, run_config_of
from batchless.federated.preparation import Prepared, prepare
from batchless.federated.rounds import MEAN, OnRound, RoundProgress, show_nothing
from batchless.runs import read_run
from batchless.runs.folder import METRICS, SUMMARY, require_no_run
from batchless.runs.lock import FolderLock
from batchless.train import TrainingStoppedError
from batchless.train.interrupt import ShouldStop, never_stop
from batchless.train.run_ends import begun

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment in which Flower asks nothing of the internet."""

_CONNECTION = "loopback"
_START_SECONDS, _CLOSING_SECONDS = 300, 30
_POLL, _ASK = 0.5, 60.0
"""Seconds between looks at the run folder, and between questions to the SuperLink, each of which starts a process."""


def federate_on_loopback(
    config: FederateConfig,
    on_round: OnRound = show_nothing,
    *,
    should_stop: ShouldStop = never_stop,
    on_start: Callable[[str], None] = say_nothing,
) -> FinishedFederation:
    """`run_federation` over Flower: `config.flower.nodes` SuperNodes, the disk of each a folder in `out/flower`.

    Raises:
        ValueError: a wrong setting, Flower is not installed or does not start, or a failure in a round.
        TrainingStoppedError: `should_stop()` became true; `resume_on_loopback` goes on.
    """
    prepared = prepare(config, device=config.device)
    require_no_run(config.folder())
    on_start(prepared.explanation())
    return _go(prepared, on_round, should_stop, resume=False)


def resume_on_loopback(
    folder: str | Path,
    on_round: OnRound = show_nothing,
    *,
    should_stop: ShouldStop = never_stop,
    device: str | None = None,
    root: str | None = None,
) -> FinishedFederation:
    """Go on with such a run from its last round, to the same bits as if it had never been interrupted.

    Arguments as those of `batchless.federated.resume_federation`.

    Raises:
        ValueError: as `batchless.federated.resume_federation`, and as `federate_on_loopback`.
        TrainingStoppedError: as there.
    """
    config = begun(folder, FederateConfig, device=device, root=root)
    prepared = prepare(config, device=config.device)
    return _go(prepared, on_round, should_stop, resume=True)


def _go(prepared: Prepared, on_round: OnRound, should_stop: ShouldStop, *, resume: bool) -> FinishedFederation:
    config, number = prepared.config, len(prepared.workplace.clients())
    home = config.folder().absolute() / "flower"
    home.mkdir(parents=True, exist_ok=True)
    data = replace(config.data, root=_absolute(config.data.root))
    config = replace(config, out=_absolute(str(config.folder())), weights=_absolute(config.weights), data=data)
    write_app(home / "app", {RESUME: resume, **run_config_of(config)})
    count = min(config.flower.nodes, number)
    hosted = [",".join(map(str, range(node, number, count))) for node in range(count)]
    before = _stamp(config.folder())
    with ExitStack() as ending:
        processes = _started(home, hosted, ending)
        _flwr(home, "run", str(home / "app"), _CONNECTION)
        _follow(config, home, processes, before, on_round, should_stop)
        _wait_until_released(config.folder())
    summary = read_run(config.folder()).summary or {}
    if "failed" in summary:
        raise ValueError(str(summary["failed"]))
    return FinishedFederation(
        folder=prepared.config.folder(),
        summary=summary,
        conversion=prepared.conversion,
        explanation=prepared.explanation(),
        notes=prepared.notes,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


@dataclass(frozen=True, kw_only=True)
class _Daemon:
    process: subprocess.Popen[bytes]
    log: Path

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise ValueError(
                f"{self.log.stem} ended (exit status {self.process.returncode}), see {self.log}: {' | '.join(last)}"
            )


def _started(home: Path, hosted: Sequence[str], ending: ExitStack) -> list[_Daemon]:
    """The SuperLink and its SuperNodes, ready."""
    ports = _free_ports(1 + len(hosted))
    address = f"127.0.0.1:{ports[0]}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
    )
    superlink = _daemon(home, "superlink", ["flower-superlink", "--insecure", "--port", str(ports[0])], ending)
    deadline = time.monotonic() + _START_SECONDS
    while not _healthy(address):
        superlink.require_alive()
        if time.monotonic() > deadline:
            raise ValueError(f"Flower's SuperLink did not start within {_START_SECONDS} seconds, see {superlink.log}")
        time.sleep(0.1)
    daemons = [superlink]
    for node, (clients, port) in enumerate(zip(hosted, ports[1:], strict=True)):
        disk = home / "disks" / f"node{node}"
        about = f"partition-id={json.dumps(clients)} state-folder={json.dumps(str(disk))}"
        command = [
            "flower-supernode",
            "--insecure",
            "--superlink",
            address,
            "--port",
            str(port),
            "--node-config",
            about,
        ]
        daemons.append(_daemon(home, f"supernode{node}", command, ending))
    return daemons


def _daemon(home: Path, name: str, command: Sequence[str], ending: ExitStack) -> _Daemon:
    log = home / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [_program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(home),
            start_new_session=True,  # Ctrl-C is this process's to handle
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    ending.callback(_end, process)
    return _Daemon(process=process, log=log)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; Flower's own processes then end with theirs


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: Flower's own would go on for some seconds, and write the run folder."""
    below = _started_by(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for known in below:
        for pid in (*_started_by(known), known):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _started_by(pid: int) -> list[int]:
    """The processes below one, where /proc tells them."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *_started_by(child))]


def _flwr(home: Path, *words: str) -> dict[str, Any]:
    """What Flower's command answers."""
    command = [_program("flwr"), *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(home), check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        reason = answer.get("error-message") or (done.stdout + done.stderr)[-300:]
        raise ValueError(f"`flwr {words[0]}` failed: {reason}")
    return answer


def _follow(
    config: FederateConfig,
    home: Path,
    daemons: Sequence[_Daemon],
    before: int,
    on_round: OnRound,
    should_stop: ShouldStop,
) -> None:
    """Show what the run folder says until it has a summary, another one than that of a run that had failed `before`."""
    asked, shown = time.monotonic(), -1
    while _stamp(config.folder()) in (0, before):
        progress = _progress(config)
        if progress is not None and progress.round > shown:
            shown = progress.round
            on_round(progress)
        if should_stop():
            raise TrainingStoppedError(0 if progress is None else progress.images)
        for daemon in daemons[:1] if progress else daemons:  # later a node may die: its clients are left out
            daemon.require_alive()
        if time.monotonic() - asked > _ASK:
            (run,) = _flwr(home, "list", _CONNECTION)["runs"]
            if str(run["status"]).startswith("finished") and _stamp(config.folder()) in (0, before):
                raise ValueError(f"Flower's run ended ({run['status']}) without a result, see {daemons[0].log}")
            asked = time.monotonic()
        time.sleep(_POLL)
    if (progress := _progress(config)) is not None:
        on_round(progress)


def _wait_until_released(folder: Path) -> None:
    """The summary is not the last that the server writes: let it close the folder, or end it after a while."""
    deadline = time.monotonic() + _CLOSING_SECONDS
    while time.monotonic() < deadline:
        with suppress(ValueError):
            FolderLock(folder).release()
            return
        time.sleep(_POLL)


def _progress(config: FederateConfig) -> RoundProgress | None:
    """How far the run is by its log; None: no round is done."""
    file = config.folder() / METRICS
    lines = (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )
    rounds = [line for line in lines if line["kind"] == "round"]
    if not rounds:
        return None
    figures = {name: float(rounds[-1][name]) for name in ("loss", "epsilon") if name in rounds[-1]}
    figures["left_out"] = float(sum(line["left_out"] for line in rounds))
    for line in lines:
        if line["kind"] == "test" and line["domain"] == MEAN:
            figures |= {f"test_{name}": value for name, value in line.items() if name in ("accuracy", "loss")}
    last = rounds[-1]
    return RoundProgress(
        round=last["round"],
        rounds=config.rounds,
        clients=1,
        clients_in_round=1,
        images=last["images"],
        figures=figures,
        domains={},
    )


def _stamp(folder: Path) -> int:
    """When the summary was written; 0: there is none."""
    try:
        return (folder / SUMMARY).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ValueError(
            f"engine=flower needs Flower, which has no command {name} here: pip install 'batchless[flower]'"
        )
    return found


def _environment(home: Path) -> dict[str, str]:
    path = os.pathsep.join(
        [str(Path(_program("flwr")).parent), os.environ.get("PATH", "")]
    )  # daemons start others by name
    return {
        **os.environ,
        **OFFLINE,
        "FLWR_HOME": str(home),
        "PATH": path,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _free_ports(count: int) -> list[int]:
    with ExitStack() as closing:
        sockets = [closing.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
