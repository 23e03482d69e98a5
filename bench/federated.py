"""Rounds of federated averaging against what they are made of: forward, backward and step on the same batches, nothing else.

The pure loops have their batches ready in memory and one network; they neither load nor average. The first round of each is
warm-up. Beside the times: the peak memory of rounds of 100 and of 1,000 clients, each in a process of its own.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from batchless.data import ChannelStatistics
from batchless.data.dataset import Subset
from batchless.data.memory import TensorImages
from batchless.federated.algorithms import FedAvg
from batchless.federated.client import CLIENT_OPTIMIZER, ClientSettings
from batchless.federated.engine import Engine, LocalEngine, Workplace, run_round
from batchless.federated.partition import Client, Federation
from batchless.federated.server import ServerState, initial_state
from batchless.federated.workers import WorkerEngine
from batchless.models import build_model
from batchless.runs.memory import peak_memory_bytes
from batchless.tasks import Classify
from batchless.train.interrupt import never_stop
from bench.flower_rounds import FlowerSimulation, is_installed
from bench.pure_loops import RATE, PureProcess, pure_loop, run_together
from bench.step import require_finite
from bench.timing import Clock, Comparison, Contestant, Target, Times, combined, interleave, judge

REPEATS = 6
BATCH = 32
MEMORY_CLIENTS = (100, 1000)
MEMORY_AT_MOST = 1.05
GAIN_AT_LEAST = 0.95


@dataclass(frozen=True, kw_only=True)
class Case:
    """A federation to be timed.

    Attributes:
        title: one line.
        network: makes the network.
        image_size: of the images.
        clients: how many.
        images: of each client.
        at_most: what a round may take, in pure loops of as many processes.
        rounds: for each repeat that is asked for: where they are short, more of them decide.
    """

    title: str
    network: Callable[[], nn.Module]
    image_size: int
    clients: int
    images: int
    at_most: float
    rounds: int = 1


def small_network() -> nn.Module:
    """24,458 parameters: three convolutions of stride 2 with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


CASES = (
    Case(
        title="the digits CNN with 14 M parameters",
        network=lambda: build_model("digits_cnn", num_classes=10),
        image_size=28,
        clients=10,
        images=743,  # as FedBN and FedWon have it
        at_most=1.05,
    ),
    Case(
        title="a network of 25 k parameters",
        network=small_network,
        image_size=32,
        clients=50,
        images=160,
        at_most=1.15,
        rounds=10,
    ),
)


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """Each case in one process and in two, what there is to say of memory, and Flower's simulation where it is installed."""
    for number, case in enumerate(CASES):
        count = (repeats or REPEATS) * case.rounds
        model, workplace, state = federation(case, seed=seed)
        with ExitStack() as ending:
            found = contestants(case, model, workplace, state, ending)
            times = interleave(found, repeats=count, seed=seed, clock=clock, on_round=on_round)
            require_finite({"the pure loop's network": model, "the engine's network": workplace.model})
        last = number == len(CASES) - 1
        yield Comparison(
            title=f"one round of {case.clients} clients, {case.images} images each in batches of {BATCH}: {case.title}",
            base="pure loop",
            times=times,
            targets=(
                Target(of="one process", base="pure loop", at_most=case.at_most),
                Target(of="two workers", base="two pure loops", at_most=case.at_most),
            ),
            notes=(gain_note(times, seed=seed), *(memory_notes() if last else ()), *(flower_notes() if last else ())),
        )
        if is_installed():
            yield beside_flower(case, repeats=count, seed=seed, clock=clock, on_round=on_round)


def contestants(
    case: Case, model: nn.Module, workplace: Workplace, state: ServerState, ending: ExitStack
) -> dict[str, Contestant]:
    """What is timed; processes end with `ending`."""
    batches = batches_of(workplace)
    workers = ending.enter_context(WorkerEngine(workplace, state, count=2, threads=torch.get_num_threads()))
    halves = [ending.enter_context(PureProcess(model, batches[half::2])) for half in range(2)]
    return {
        "pure loop": pure_loop(model, batches),
        "one process": rounds(LocalEngine(workplace=workplace), workplace, state),
        "two pure loops": lambda: run_together(halves),
        "two workers": rounds(workers, workplace, state),
    }


def federation(case: Case, *, seed: int) -> tuple[nn.Module, Workplace, ServerState]:
    """A network for the pure loop, and what a round of federated averaging needs, with weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    count, size = case.clients * case.images, case.image_size
    images = TensorImages(
        images=torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8),
        labels=tuple(torch.randint(10, (count,), generator=generator).tolist()),
        classes=tuple("0123456789"),
        origins=(("noise", count),),
    )
    clients = tuple(
        Client(
            id=i,
            domain="noise",
            train=Subset(dataset=images, indices=tuple(range(i * case.images, (i + 1) * case.images))),
        )
        for i in range(case.clients)
    )
    torch.manual_seed(seed)
    networks = [case.network(), case.network()]
    algorithm = FedAvg()
    workplace = Workplace(
        model=networks[1],
        federation=Federation(
            clients=clients, tests={"noise": images}, domains=("noise",), classes=images.classes, record={}
        ),
        algorithm=algorithm,
        task=Classify(),
        settings=client_settings(size, seed=seed),
    )
    return networks[0].train(), workplace, initial_state(networks[1], algorithm, 10**6)


def client_settings(size: int, *, seed: int) -> ClientSettings:
    """Plain SGD on batches of 32, no augmentation; a rate so small that all rounds do the same arithmetic."""
    return ClientSettings(
        images_per_forward=BATCH,
        images_per_step=BATCH,
        image_size=size,
        optimizer=replace(CLIENT_OPTIMIZER, learning_rate=RATE),
        statistics=ChannelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        seed=seed,
    )


def batches_of(workplace: Workplace) -> list[list[tuple[Tensor, Tensor]]]:
    """By client, batches of its images as the network sees them."""
    settings = workplace.settings
    found = []
    for client in workplace.clients():
        data = settings.data(client.train, seed=settings.seed)
        order = data.order(0)
        found.append(list(data.train(0, [order[at : at + BATCH] for at in range(0, len(order), BATCH)])))
    return found


def rounds(engine: Engine, workplace: Workplace, state: ServerState) -> Contestant:
    """A round of everybody; each goes on from the one before."""
    everybody = tuple(range(len(workplace.clients())))
    now = [state]

    def run() -> None:
        now[0], _ = run_round(
            engine,
            workplace,
            now[0],
            everybody,
            {},
            min_clients=len(everybody),
            should_stop=never_stop,
            on_client=lambda done, of: None,
        )

    return run


def gain_note(times: Times, *, seed: int = 0) -> str:
    """How much faster two workers are than one process, of how much faster two pure loops are than one on this machine.

    `(one process / two workers) / (pure loop / two pure loops)` of minima and paired, judged by its inverse, which is to
    be at most, as a time.
    """
    inverse = combined(
        times,
        ("one process", "two workers", "pure loop", "two pure loops"),
        lambda one, two, pure, two_pure: (two / one) / (two_pure / pure),
        seed=seed,
    )
    verdict = judge(Target(of="two workers", base="two pure loops", at_most=1 / GAIN_AT_LEAST), inverse)
    return (
        f"what two workers gain over one process, of what two pure loops gain over one: {1 / inverse.minima:.3f} of minima, "
        f"{1 / inverse.paired:.3f} ({1 / inverse.high:.3f}..{1 / inverse.low:.3f}) paired, "
        f"target >= {GAIN_AT_LEAST}: {verdict}"
    )


def memory_notes() -> tuple[str, ...]:
    """Peak memory of a process after a round of each number of clients, and whether they agree within 5 %."""
    peaks = [peak_in_process(clients) for clients in MEMORY_CLIENTS]
    found = max(peaks) / min(peaks)
    words = ", ".join(
        f"{clients:,} clients {peak / 2**20:.0f} MiB" for clients, peak in zip(MEMORY_CLIENTS, peaks, strict=True)
    )
    verdict = "met" if found <= MEMORY_AT_MOST else "missed"
    return (f"peak memory of a process: {words}; {found:.3f} of each other, target <= {MEMORY_AT_MOST}: {verdict}",)


def peak_in_process(clients: int) -> int:
    """Bytes, as a process that does one round of so many clients tells them."""
    command = [sys.executable, "-m", "bench.federated", str(clients)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak_after_rounds(clients: int) -> int:
    """Bytes at most in this process, after two rounds of that many clients of one step each, who share 32 images."""
    torch.set_num_threads(1)
    case = Case(title="", network=small_network, image_size=32, clients=1, images=BATCH, at_most=0)
    _, workplace, state = federation(case, seed=0)
    (client,) = workplace.clients()
    everybody = tuple(Client(id=i, domain="noise", train=client.train) for i in range(clients))
    many = replace(workplace.federation, clients=everybody)
    workplace = replace(workplace, federation=many)
    run = rounds(LocalEngine(workplace=workplace), workplace, state)
    run()
    run()
    return peak_memory_bytes("cpu")


def beside_flower(
    case: Case, *, repeats: int, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Comparison:
    """Our two workers and the two actors of Flower's own simulation."""
    model, workplace, state = federation(case, seed=seed)
    batches = batches_of(workplace)
    with ExitStack() as ending:
        halves = [ending.enter_context(PureProcess(model, batches[half::2])) for half in range(2)]
        workers = ending.enter_context(WorkerEngine(workplace, state, count=2, threads=torch.get_num_threads()))
        found: dict[str, Contestant] = {
            "two pure loops": lambda: run_together(halves),
            "two workers": rounds(workers, workplace, state),
            "Flower's simulation": ending.enter_context(FlowerSimulation(model, batches)),
        }
        times = interleave(found, repeats=repeats, seed=seed, clock=clock, on_round=on_round)
    return Comparison(
        title=f"one round of {case.clients} clients in two processes, and in Flower's simulation: {case.title}",
        base="two pure loops",
        times=times,
    )


def flower_notes() -> tuple[str, ...]:
    """What is said in place of a ratio to Flower's simulation."""
    return () if is_installed() else ("Flower's own simulation: not compared, flwr[simulation] is not installed",)


if __name__ == "__main__":
    print(peak_after_rounds(int(sys.argv[1])))
