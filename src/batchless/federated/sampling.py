"""Who takes part in a round."""

from random import Random


def sampled_clients(number: int, *, fraction: float, seed: int, round: int) -> tuple[int, ...]:
    """The clients of a round, in the order of their ids: `fraction * number` of them (rounded, at least one), drawn anew.

    A function of its arguments: nothing of earlier rounds has to be known to go on.

    Args:
        number: of all clients, one or more.
        fraction: in (0, 1]; 1 is everyone.
        seed: of the run.
        round: from 1 on.

    >>> [sampled_clients(10, fraction=0.3, seed=0, round=round) for round in (1, 2)]
    [(0, 1, 3), (1, 3, 5)]
    """
    if number < 1:
        raise ValueError(f"number={number}: sampling needs at least one client")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: the share of the clients in a round is above 0 and at most 1")
    count = max(1, int(fraction * number + 0.5))
    if count == number:
        return tuple(range(number))
    return tuple(sorted(Random(f"clients/{seed}/{round}").sample(range(number), count)))
