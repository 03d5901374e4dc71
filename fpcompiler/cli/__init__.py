"""The command line: ``main`` and one module for each command.

Nothing here imports torch or another slow module before a command runs, so that ``--help`` is
immediate.
"""
