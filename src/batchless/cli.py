"""The command `batchless`: from its words to an exit status."""

import shlex
import sys
from collections.abc import Sequence

from batchless import commands
from batchless.advise import ConvertConfig, DoctorConfig, PlanConfig
from batchless.arguments import CompareConfig, ExplainConfig, ResumeConfig, parse_arguments
from batchless.demo import DemoConfig
from batchless.deploy import EvaluateConfig, ExportConfig, PredictConfig
from batchless.federated import FederateConfig
from batchless.tasks import TrainConfig

_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status.

    0; 1 where it has found something wrong; 2 for a mistake of the user, told in one line; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except commands.StoppedError as stopped:
        print(f"batchless: {stopped}", file=sys.stderr)
        return commands.INTERRUPTED
    except KeyboardInterrupt:
        print("batchless: stopped", file=sys.stderr)
        return commands.INTERRUPTED
    except ValueError as error:
        print(f"batchless: {' '.join(str(error).split())}", file=sys.stderr)
        return _USAGE_ERROR


def _run(words: Sequence[str]) -> int:
    command = f"batchless {shlex.join(words)}"
    match parse_arguments(words):
        case TrainConfig() as config:
            return commands.train(config)
        case FederateConfig() as config:
            return commands.federate(config)
        case ExplainConfig() as config:
            return commands.explain(config)
        case ResumeConfig(verb="train") as config:
            return commands.resume(config)
        case ResumeConfig() as config:
            return commands.resume_federate(config)
        case DemoConfig() as config:
            return commands.demo(config, command)
        case CompareConfig() as config:
            return commands.compare(config, command)
        case EvaluateConfig() as config:
            return commands.evaluate(config)
        case PredictConfig() as config:
            return commands.predict(config)
        case ExportConfig() as config:
            return commands.export(config)
        case DoctorConfig() as config:
            return commands.doctor(config)
        case ConvertConfig() as config:
            return commands.convert(config)
        case PlanConfig() as config:
            return commands.plan(config)


if __name__ == "__main__":
    sys.exit(main())
