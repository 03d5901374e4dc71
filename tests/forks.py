"""Work in a copy of this process, which may crash or be killed."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable

import torch


def exit_code(work: Callable[[], object]) -> int:
    """Do the work in a copy of this process; return 0, 1 if it raised, or minus a signal.

    The copy has one thread, and what waits for the others would wait forever.
    """
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from 3.12 on
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:  # Nothing of pytest must run in the copy.
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
