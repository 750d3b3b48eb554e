"""`accelerate launch` for make: python -m data.tools.launch --num_processes 8 SCRIPT ARGUMENTS

The processes say themselves why they ended. torch's launcher adds a traceback of its own to that,
with exit status 1; here the exit status is that of the first process that failed, or after a signal
128 and its number."""

import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    try:
        main()
    except SignalException as e:
        sys.exit(128 + e.sigval)
    except ChildFailedError as e:
        _, failure = e.get_first_failure()
        # the exit code of a process that a signal ended is its negative number
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
