"""Damages artifacts in every way that was thought of, to see that no damage goes unnoticed."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpcompiler.artifact.container import Writer
from fpcompiler.errors import FpcompilerError

Mutation = Callable[[bytes, random.Random], bytes]


def members(data: bytes) -> tuple[dict[str, bytes], bytes]:
    """Return the members of a zip file and its comment."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}, archive.comment


def packed(rows: list[tuple[str, bytes]], comment: bytes) -> bytes:
    """Return a file with these members, laid out as an artifact."""
    file = io.BytesIO()
    writer = Writer(file)
    for name, data in rows:
        writer.add(name, [data])
    writer.close(comment)
    return file.getvalue()


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flip_header_bit(data: bytes, rng: random.Random) -> bytes:
    """Like flip_bit, outside of the members' data, which is a small part of the file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        starts = [info.header_offset for info in archive.infolist()] + [archive.start_dir]
    start = rng.choice(starts)
    place = min(start + rng.randrange(100), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def zero_range(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data)), rng.randrange(1, 300)
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 2, 64, 4096]))


def prepend(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([1, 64, 4096])) + data


def remove_range(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 64, 300]) :]


def swap_ranges(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1, 16, 64, 256])
    a, b = sorted(rng.sample(range(0, len(data) - size, size), 2))
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def swap_payloads(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    a, b = rng.sample(sorted(rows), 2)
    rows[a], rows[b] = rows[b], rows[a]
    return packed([*rows.items()], comment)


def swap_members(data: bytes, rng: random.Random) -> bytes:
    """The same members in another order: nothing is wrong but the place."""
    rows, comment = members(data)
    shuffled = [*rows.items()]
    rng.shuffle(shuffled)
    return packed(shuffled, comment)


def swap_tensors(data: bytes, rng: random.Random) -> bytes:
    """Exchange the places of two tensors in the header of a safetensors member."""
    rows, comment = members(data)
    weights = rows["weights.safetensors"]
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    a, b = rng.sample(sorted(header), 2)
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    rows["weights.safetensors"] = weights[:8] + text + weights[8 + size :]
    return packed([*rows.items()], comment)


def delete_member(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    del rows[rng.choice(sorted(rows))]
    return packed([*rows.items()], comment)


def duplicate_member(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    twice = [*rows.items()]
    twice.insert(rng.randrange(len(twice) + 1), rng.choice(twice))
    return packed(twice, comment)


def rename_member(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    old = rng.choice(sorted(rows))
    names = ["../" + old, "/etc/passwd", old.upper(), old + "2", "kernels/x.so", "", "a\\..\\b"]
    new = rng.choice(names)
    return packed([(new if name == old else name, row) for name, row in rows.items()], comment)


def add_member(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    name = rng.choice(["setup.py", "kernels/evil.so", "data.pkl", "../../x", "plan.json "])
    return packed([*rows.items(), (name, rng.randbytes(40))], comment)


def edit_text(data: bytes, rng: random.Random) -> bytes:
    """Change one character of a JSON member, its length and place being kept."""
    rows, comment = members(data)
    name = rng.choice(["manifest.json", "plan.json", "recipe.json"])
    place = rng.randrange(len(rows[name]))
    letter = rng.choice(b'0123456789abcdef{}[]",:')
    rows[name] = rows[name][:place] + bytes([letter]) + rows[name][place + 1 :]
    return packed([*rows.items()], comment)


def edit_manifest(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    manifest = json.loads(rows["manifest.json"])
    change: Callable[[], Any] = rng.choice(
        [
            lambda: manifest.update(version=rng.choice([0, 2, 99, "1", None])),
            lambda: manifest.update(scheme="w4a16"),
            lambda: manifest.update(fpcompiler=f"9.{rng.random()}"),
            lambda: manifest["members"].popitem(),
            lambda: manifest["members"]["plan.json"].update(size=rng.randrange(10**9)),
            lambda: manifest["members"]["plan.json"].update(sha256="0" * 64),
            lambda: manifest.update(extra=rng.random()),
        ]
    )
    change()
    rows["manifest.json"] = json.dumps(manifest).encode()
    return packed([*rows.items()], comment)


def edit_plan(data: bytes, rng: random.Random) -> bytes:
    rows, comment = members(data)
    plan = json.loads(rows["plan.json"])
    change: Callable[[], Any] = rng.choice(
        [
            lambda: plan["steps"].pop(rng.randrange(len(plan["steps"]))),
            lambda: rng.choice(plan["steps"]).update(op="aten.from_file.default"),
            lambda: plan["outputs"].reverse(),
            lambda: plan["constants"].popitem(),
            lambda: plan.update(version=rng.randrange(2, 9)),
            lambda: plan["placeholders"][0].update(dtype="float16"),
        ]
    )
    change()
    rows["plan.json"] = json.dumps(plan).encode()
    return packed([*rows.items()], comment)


def repack(data: bytes, rng: random.Random) -> bytes:
    """Pack the same members with another program: compressed, or stored without alignment."""
    rows, comment = members(data)
    file = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = rng.choice([comment, b"", comment[::-1]])
        for name, row in rows.items():
            archive.writestr(name, row)
    return file.getvalue()


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        flip_bit, flip_header_bit, zero_range, truncate, append, prepend, remove_range,
        swap_ranges, swap_payloads, swap_members, swap_tensors, delete_member, duplicate_member,
        rename_member, add_member, edit_text, edit_manifest, edit_plan, repack,
    )
}  # fmt: skip


@dataclass
class Tally:
    """What became of the mutants of one kind; ``failures`` should be empty."""

    refused: int = 0
    right: int = 0
    failures: list[str] = field(default_factory=list)


def fuzz(
    data: bytes, judge: Callable[[Path], bool], folder: Path, count: int, seed: int = 0
) -> dict[str, Tally]:
    """Make ``count`` mutants of an artifact and judge each.

    Args:
        data: The artifact.
        judge: Loads and runs a file; returns whether its output is exactly the right one.
        folder: Where the mutants are written, one at a time.
        count: How many; the kinds take turns.
        seed: Of the random choices.
    """
    rng = random.Random(seed)
    tallies = {name: Tally() for name in MUTATIONS}
    kinds = list(MUTATIONS.items())
    path = folder / "mutant.fpc"
    for index in range(count):
        name, mutation = kinds[index % len(kinds)]
        mutant = mutation(data, rng)
        while mutant == data:
            mutant = mutation(data, rng)
        path.unlink(missing_ok=True)  # A new file: the last one may still be mapped.
        path.write_bytes(mutant)
        _judge(tallies[name], judge, path, f"{name} #{index}")
    return tallies


def _judge(tally: Tally, judge: Callable[[Path], bool], path: Path, what: str) -> None:
    try:
        right = judge(path)
    except FpcompilerError:
        tally.refused += 1
    except Exception as error:
        tally.failures.append(f"{what}: {type(error).__name__}: {error}")
    else:
        if right:
            tally.right += 1
        else:
            tally.failures.append(f"{what}: loaded, and gave another output")
