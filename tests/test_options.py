"""The environment: what is read, what is refused, and what is logged."""

import io
import logging
import re
from pathlib import Path

import pytest

import fpcompiler.options
from fpcompiler.errors import OptionError
from fpcompiler.options import Options, configure_logging

ROOT = Path(fpcompiler.options.__file__).parents[1]


def test_an_empty_environment_gives_the_defaults() -> None:
    options = Options.from_env({})
    assert (options.dump, options.logs, options.progress) == (None, {}, None)
    assert options.cache == Path.home() / ".cache" / "fpcompiler"
    assert (options.graphs, options.attention) == (None, True)
    assert options == Options()


def test_every_variable_is_read(tmp_path) -> None:
    env = {
        "FPC_DUMP": str(tmp_path / "dumps"),
        "FPC_LOGS": "warning, passes, runtime=info",
        "FPC_CACHE": str(tmp_path),
        "FPC_PROGRESS": "0",
        "FPC_GRAPHS": "0",
        "FPC_ATTENTION": "0",
        "CUDA_HOME": str(tmp_path),
        "HOME": "/nowhere",
    }
    options = Options.from_env(env)
    assert options.dump == tmp_path / "dumps"
    assert options.logs == {"": "warning", "passes": "debug", "runtime": "info"}
    assert options.cache == tmp_path
    assert options.progress is False
    assert options.cuda_home == tmp_path
    assert (options.graphs, options.attention) == (False, False)


def test_the_cache_follows_xdg(tmp_path) -> None:
    options = Options.from_env({"XDG_CACHE_HOME": str(tmp_path)})
    assert options.cache == tmp_path / "fpcompiler"


def test_progress_follows_the_terminal_unless_set() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    auto = Options.from_env({"FPC_PROGRESS": "auto"})
    assert (auto.shows_progress(Terminal()), auto.shows_progress(io.StringIO())) == (True, False)
    assert Options.from_env({"FPC_PROGRESS": "1"}).shows_progress(io.StringIO())
    assert not Options.from_env({"FPC_PROGRESS": "0"}).shows_progress(Terminal())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FPC_PROGRESS": "yes"}, "it is 1, 0 or auto"),
        ({"FPC_LOGS": "pass"}, "'pass' is no part; did you mean passes"),
        ({"FPC_LOGS": "passes=loud"}, "'loud' is no level"),
        ({"FPC_DUMP": __file__}, "is a file; it must be a folder"),
        ({"FPC_CACHE": __file__}, "is a file; it must be a folder"),
        ({"CUDA_HOME": __file__}, "is a file; it must be a folder"),
        ({"FPC_NATIVE_LIBRARY": "/no/such/library.so"}, "is no file; leave it out"),
        ({"FPC_ATTENTION": "yes"}, "it is 0 or 1"),
        ({"FPC_DUMP_DIR": "x"}, "did you mean FPC_DUMP"),
        ({"FPC_LOG": "x"}, "did you mean FPC_LOGS"),
    ],
)
def test_unusable_values_are_refused(env, message) -> None:
    with pytest.raises(OptionError, match=message):
        Options.from_env(env)


def test_variables_of_other_programs_are_left_alone() -> None:
    assert Options.from_env({"FPC_TARGET": "x86_64", "FPCDIR": "/usr"}) == Options()


@pytest.fixture
def stream():
    yield io.StringIO()
    configure_logging(Options())


def test_only_what_is_asked_for_is_logged(stream) -> None:
    configure_logging(Options(logs={"passes": "debug"}), stream)
    logging.getLogger("fpcompiler.passes.cse").debug("merged 3 operations")
    logging.getLogger("fpcompiler.runtime").info("not asked for")
    assert stream.getvalue() == "DEBUG fpcompiler.passes.cse: merged 3 operations\n"


def test_a_second_call_replaces_the_first(stream) -> None:
    configure_logging(Options(logs={"": "debug"}), io.StringIO())
    configure_logging(Options(logs={"": "info"}), stream)
    logging.getLogger("fpcompiler.api").info("once")
    logging.getLogger("fpcompiler.api").debug("never")
    assert stream.getvalue() == "INFO fpcompiler.api: once\n"
    configure_logging(Options(), stream)
    assert logging.getLogger("fpcompiler").handlers == []


def test_debug_means_everything() -> None:
    assert Options.from_env({"FPC_LOGS": "debug"}).debug
    assert not Options.from_env({"FPC_LOGS": "passes=debug"}).debug


def test_nothing_else_reads_the_environment() -> None:
    folders = ("fpcompiler", "passes", "codegen", "runtime")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    readers = {
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"\b(environ|getenv|expandvars)\b", path.read_text(encoding="utf-8"))
    }
    assert readers == {"fpcompiler/options.py"}
