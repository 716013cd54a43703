"""What commands share: a fault of the user's input is one line and an exit code, never a traceback."""

import sys
from collections.abc import Callable


def run_command(name: str, work: Callable[[], int]) -> int:
    """Runs a command's work and turns faults of its input into one line on standard error.

    Faults of the input are `ValueError`, `OSError` (files) and `ImportError` (an extra that is not installed). Any
    other error is one of the program and keeps its traceback.

    Args:
        name: what the line begins with.
        work: does everything behind the reading of arguments and returns the exit code.

    Returns:
        The exit code of `work`, or 2 where the input was wrong.
    """
    try:
        return work()
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
