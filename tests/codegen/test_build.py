"""The cache of compiled kernels, with a program in place of nvcc."""

import dataclasses
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fpcompiler.codegen import build, slots
from fpcompiler.codegen.build import KernelCache
from fpcompiler.errors import OptionError, TargetError
from fpcompiler.options import Options
from tests.codegen.fake_nvcc import compilations, fake_nvcc, fake_toolkit, most_at_once, source
from tests.forks import exit_code


@pytest.fixture
def cache(tmp_path) -> KernelCache:
    return KernelCache(tmp_path / "cache", fake_nvcc(tmp_path / "cuda"))


def test_a_kernel_comes_with_all_that_explains_it(cache) -> None:
    kernel = cache.build(source())
    assert not kernel.cached
    assert kernel.path.read_text(encoding="utf-8") == "int main;"
    assert kernel.source.read_text(encoding="utf-8") == "int main;"
    assert kernel.object.is_file()
    assert "Used 136 registers" in kernel.log.read_text(encoding="utf-8")
    stored = json.loads((kernel.folder / "metadata.json").read_text(encoding="utf-8"))
    assert stored == kernel.metadata
    assert stored["sha256"] == hashlib.sha256(b"int main;").hexdigest()
    assert stored["description"] == {"n": 1}
    assert stored["resources"] == [
        {"function": "main_kernel", "arch": "sm_100a", "stack": 8, "stores": 4, "loads": 12,
         "registers": 136}
    ]  # fmt: skip
    assert set(stored["cost"]) == {"seconds", "peak_mb"}
    left = {path.name for path in cache.folder.iterdir()}
    assert left == {"kernels", "building", "locks", "slots"}
    assert not list((cache.folder / "building").iterdir())


def test_the_second_time_nothing_runs(cache, tmp_path) -> None:
    first = cache.build(source())
    started = time.perf_counter()
    second = cache.build(source())
    assert time.perf_counter() - started < 0.5
    assert second.cached
    assert (second.path, second.metadata) == (first.path, first.metadata)
    assert compilations(tmp_path / "cuda") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"text": "int other;"},
        {"arch": "sm_120a"},
        {"headers": "nvidia-cutlass 4.3.0.0"},
    ],
)
def test_what_goes_in_makes_the_key(cache, change) -> None:
    first = cache.build(source())
    second = cache.build(dataclasses.replace(source(), **change))
    assert second.path != first.path


def test_names_and_folders_do_not_make_the_key(cache, tmp_path) -> None:
    cache.build(source())
    same = dataclasses.replace(source(), name="other", include=(tmp_path,), description={})
    assert cache.find(same) is not None


def test_another_compiler_makes_another_kernel(cache, tmp_path) -> None:
    cache.build(source())
    newer = KernelCache(cache.folder, fake_nvcc(tmp_path / "newer", "13.1"))
    assert newer.find(source()) is None
    assert not newer.build(source()).cached
    assert cache.find(source()) is not None


def test_a_failure_leaves_no_kernel_and_shows_the_error(cache, tmp_path) -> None:
    broken = source("int broken;")
    with pytest.raises(TargetError) as raised:
        cache.build(broken)
    text = str(raised.value)
    assert 'kernel.cu(3): error: identifier "broken" is undefined' in text
    assert "some warning" not in text
    assert cache.find(broken) is None
    assert not (cache.folder / "kernels").exists()
    (failed,) = (cache.folder / "failed").iterdir()
    assert f"The whole log is {failed / 'build.log'}, the source {failed / 'kernel.cu'}" in text
    assert (failed / "kernel.cu").read_text(encoding="utf-8") == "int broken;"
    # The next try is not told of this one, and takes its place.
    with pytest.raises(TargetError, match="does not compile for sm_100a"):
        cache.build(broken)
    assert compilations(tmp_path / "cuda") == 2
    assert len(list((cache.folder / "failed").iterdir())) == 1


@pytest.mark.parametrize("name", ["kernel.so", "metadata.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_kernel_is_built_again(cache, tmp_path, name, damage) -> None:
    file = cache.build(source()).folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "other":
        file.write_bytes(b"[1]")
    else:
        file.unlink()
    assert cache.find(source()) is None
    assert not cache.build(source()).cached
    assert compilations(tmp_path / "cuda") == 2
    assert cache.find(source()) is not None


def test_threads_that_want_one_kernel_compile_it_once(tmp_path) -> None:
    cache = KernelCache(tmp_path / "cache", fake_nvcc(tmp_path / "cuda", delay=0.3))
    with ThreadPoolExecutor(6) as pool:
        kernels = list(pool.map(lambda _: cache.build(source()), range(6)))
    assert compilations(tmp_path / "cuda") == 1
    assert sorted(kernel.cached for kernel in kernels) == [False] + [True] * 5
    assert len({kernel.path for kernel in kernels}) == 1


def test_processes_that_want_one_kernel_compile_it_once(tmp_path) -> None:
    cache = KernelCache(tmp_path / "cache", fake_nvcc(tmp_path / "cuda", delay=0.3))
    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(lambda _: exit_code(lambda: cache.build(source())), range(3)))
    assert codes == [0, 0, 0]
    assert compilations(tmp_path / "cuda") == 1


def test_a_process_killed_while_building_leaves_no_lock_and_no_kernel(tmp_path) -> None:
    slow = KernelCache(tmp_path / "cache", fake_nvcc(tmp_path / "cuda", delay=0.2))

    def die() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(slow.build, source())
            while not (tmp_path / "cuda" / "bin" / "at-once").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), 9)

    assert exit_code(die) == -9
    assert slow.find(source()) is None
    assert not slow.build(source()).cached
    assert not list((slow.folder / "building").iterdir())


@pytest.mark.parametrize("fit", [1, 2])
def test_as_many_run_at_once_as_memory_holds(tmp_path, monkeypatch, fit) -> None:
    memory = fit * slots.NVCC_BYTES
    for module in (build, slots):
        monkeypatch.setattr(module, "available_memory", lambda: (memory, memory))
    monkeypatch.setattr(build.os, "cpu_count", lambda: 8)
    cache = KernelCache(tmp_path / "cache", fake_nvcc(tmp_path / "cuda", delay=0.2))
    sources = [source(f"int number_{index};") for index in range(4)]
    kernels = cache.build_all(sources)
    assert [kernel.source.read_text() for kernel in kernels] == [each.text for each in sources]
    again = {wanted.text: kernel.path for wanted, kernel in cache.stream(sources)}
    assert again == {each.text: k.path for each, k in zip(sources, kernels, strict=True)}
    assert most_at_once(tmp_path / "cuda") == fit


def test_one_failure_of_many_is_raised_and_the_rest_not_started(
    cache, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(build.os, "cpu_count", lambda: 1)
    sources = [source("int broken;"), *(source(f"int n{index};") for index in range(5))]
    with pytest.raises(TargetError, match="broken"):
        cache.build_all(sources)
    assert compilations(tmp_path / "cuda") <= 2  # the next may have started in the meantime


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = KernelCache(tmp_path / "file" / "cache", fake_nvcc(tmp_path / "cuda"))
    with pytest.raises(OptionError, match=r"kept in .*cache: Not a directory.*FPC_CACHE"):
        cache.build(source())


def test_the_cache_of_the_options(tmp_path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    cache = KernelCache.from_options(Options(cache=tmp_path / "cache", cuda_home=home))
    assert cache.folder == tmp_path / "cache"
    assert cache.nvcc.path == home / "bin" / "nvcc"
