"""The comparisons that `batchless demo` runs: of normalizers, and of federated algorithms."""

from batchless.demo.config import DemoConfig as DemoConfig
from batchless.demo.run import run_demo as run_demo
