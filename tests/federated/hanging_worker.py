"""What each process of torchrun does in `test_hanging`: a run of which one client hangs.

torchrun ... hanging_worker.py DATA OUT CLIENT
"""

import sys
from pathlib import Path

from test_hanging import hanging_federation

from batchless.federated import preparation, run_federation


def main(root: str, out: str, client: str) -> None:
    config, federation = hanging_federation(Path(root), Path(out), int(client))
    preparation.open_federation = lambda _: federation
    try:
        run_federation(config)
    except ValueError as error:
        sys.exit(f"hanging_worker: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
