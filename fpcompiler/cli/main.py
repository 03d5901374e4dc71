"""The entry point: reads the arguments, runs a command, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from fpcompiler import __version__
from fpcompiler.cli import (
    bench,
    convert,
    doctor,
    export,
    formats,
    import_checkpoint,
    inspect,
    methods,
    opt,
    prove,
    run,
    selftest,
    targets,
    verify,
)
from fpcompiler.cli import compile as compile_command
from fpcompiler.cli import eval as eval_command
from fpcompiler.cli.command import FAILED, Command
from fpcompiler.errors import FpcompilerError
from fpcompiler.options import Options, configure_logging

__all__ = ["main", "COMMANDS"]

COMMANDS: Final[tuple[Command, ...]] = (
    compile_command.COMMAND,
    run.COMMAND,
    inspect.COMMAND,
    verify.COMMAND,
    prove.COMMAND,
    selftest.COMMAND,
    bench.COMMAND,
    eval_command.COMMAND,
    export.COMMAND,
    import_checkpoint.COMMAND,
    convert.COMMAND,
    opt.COMMAND,
    formats.COMMAND,
    targets.COMMAND,
    methods.COMMAND,
    doctor.COMMAND,
)
"""Every command, in the order of ``--help``."""

_EPILOG: Final = """\
exit codes: 0 done, 1 failed or verification failed, 2 wrong call
environment: FPC_DUMP, FPC_LOGS, FPC_CACHE, FPC_NATIVE, FPC_NATIVE_LIBRARY, FPC_PROGRESS,
    CUDA_HOME (for nvcc)
(FPC_LOGS=debug shows tracebacks)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The arguments after the program's name; by default those of this process.
    """
    args = _parser().parse_args(argv)
    try:
        options = Options.from_env()
    except FpcompilerError as error:
        return _report(error)
    configure_logging(options)
    try:
        code: int = args.command.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has left: not an error, but Python must not flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (FpcompilerError, OSError) as error:
        if options.debug:
            raise
        return _report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _report(error: Exception) -> int:
    lines = [f"error: {error}", *getattr(error, "__notes__", [])]
    print("\n".join(lines), file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fpcompiler",
        description="Compile PyTorch models to 4- and 6-bit floating point.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fpcompiler {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example:\n{command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(command=command, parser=sub)
    return parser
