"""Files that a run folder may lack: runs of an older version, of another task, or that failed early have fewer."""

import json
from pathlib import Path
from typing import Any

from batchless.runs.atomic import reason


def read_optional(file: Path) -> Any:
    """Return what a JSON file holds, None if there is no such file.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        return json.loads(file.read_bytes()) if file.is_file() else None
    except OSError as error:
        raise ValueError(f"cannot read {file}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {reason(error)}") from error
