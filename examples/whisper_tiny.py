"""Compile an encoder-decoder, Whisper tiny.en, and let it write down what it hears.

    python examples/whisper_tiny.py --scheme w4a6

The encoder and the decoder become an artifact each, which run in a new process. With the clips of
the Debian package pocketsphinx-testdata (a novel, read aloud) wrong words are counted. Without them
a made-up tone is heard, which says only how close the compiled model stays to the fp32 one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import fpcompiler
from examples import console, new_process
from fpcompiler.errors import DependencyError

with console.required():
    from examples.zoo import corpora, metrics, whisper

Clips = list[tuple[Tensor, str]]
"""Sounds [samples] at 16 kHz with the words that are spoken."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser(__doc__)
    parser.add_argument("--clips", type=Path, default=corpora.LIBRIVOX, help="folder of the clips")
    parser.add_argument("--transcribe", nargs=2, metavar="ARTIFACT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.transcribe:
        encode, decode = map(fpcompiler.load, options.transcribe)
        print(json.dumps(transcripts(encode, decode, corpora.librivox(options.clips))))
        return 0
    console.heading(f"Whisper tiny.en, an encoder-decoder, compiled to {options.scheme}")
    with console.step("load"):
        model = whisper.load()
    encoder, decoder = whisper.split(model)
    paths = [
        console.artifact(options.folder, f"whisper-{part}", options.scheme)
        for part in ("encoder", "decoder")
    ]
    sound = tone()
    inputs = (whisper.features(sound),)
    with torch.no_grad():
        decoder_inputs = whisper.decoder_example_inputs(encoder(*inputs))
    with console.step(f"compile both halves, and save them in {options.folder}/") as track:
        halves = [
            fpcompiler.compile(half, options.scheme, example_inputs=example, progress=track)
            for half, example in ((encoder, inputs), (decoder, decoder_inputs))
        ]
        for half, path in zip(halves, paths, strict=True):
            half.save(path)
    try:
        clips = corpora.librivox(options.clips)
    except DependencyError as error:
        console.note(f"No speech to hear: {error}. It hears a tone instead.", "yellow")
        hear_tone(encoder, decoder, paths, sound)
    else:
        hear_speech(encoder, decoder, paths, clips, options.clips)
    before, after = console.bytes_before_and_after(model, *paths)
    console.note(f"The model has {before} bytes, its two artifacts {after}.")
    for half, eager, example, name in zip(
        halves, (encoder, decoder), (inputs, decoder_inputs), ("encoder", "decoder"), strict=True
    ):
        console.heading(f"The layers of the {name}")
        console.layer_summary(half, half.compare(eager, [example]))
    return 0


def tone() -> Tensor:
    """Return two seconds of a tone that rises from 200 to 2,000 Hz, at 16 kHz."""
    seconds = torch.arange(32000) / 16000
    return 0.3 * torch.sin(2 * torch.pi * (200 * seconds + 450 * seconds**2))


def transcripts(encode: whisper.Encode, decode: whisper.Decode, clips: Clips) -> list[str]:
    return [whisper.transcribe(encode, decode, sound) for sound, _ in clips]


def hear_speech(
    encoder: nn.Module,
    decoder: nn.Module,
    paths: list[Path],
    clips: Clips,
    folder: Path,
) -> None:
    """Print what was spoken, what both models wrote, and how many words are wrong."""
    with console.step(f"write down {len(clips)} clips in fp32"):
        before = transcripts(encoder, decoder, clips)
    with console.step("write them down by the artifacts, in a new process"):
        files = [str(path.absolute()) for path in paths]
        command = [__file__, "--clips", str(folder.absolute()), "--transcribe", *files]
        after = json.loads(new_process.run([str(part) for part in command]))
    console.heading("Before and after")
    rows = []
    for (_, words), first, second in zip(clips, before, after, strict=True):
        rows += [("spoken", words), ("fp32", first), ("compiled", second), ("", "")]
    console.table(("", "words"), rows[:-1], left=2)
    errors = [
        [metrics.word_errors(words, text) for (_, words), text in zip(clips, texts, strict=True)]
        for texts in (before, after)
    ]
    for name, counts in zip(("fp32", "compiled"), errors, strict=True):
        wrong, total = map(sum, zip(*counts, strict=True))
        console.note(f"{name:9} {wrong} of {total} words wrong: WER {wrong / total:.3f}")


def hear_tone(encoder: nn.Module, decoder: nn.Module, paths: list[Path], sound: Tensor) -> None:
    """Print how close the compiled halves are to the model on a tone."""
    features, words = whisper.features(sound), whisper.tokenizer()
    with torch.no_grad():
        states = encoder(features)
        start = torch.tensor([words.token_to_id("<|startoftranscript|>")])
        ids = metrics.generate_greedy(lambda ids: decoder(ids, states), start, 32)[None]
        logits = decoder(ids, states)
    with console.step("hear it by the artifacts, in new processes"):
        heard = new_process.call(paths[0], {"features": features})["output"]
        inputs = {"ids": ids, "states": heard}
        compiled = new_process.call(paths[1], inputs)["output"]
    same = int((logits.argmax(-1) == compiled.argmax(-1)).sum())
    console.heading("Before and after, on a tone: no measure of how well it understands speech")
    console.table(
        ("", "fp32", "compiled"),
        [
            ("cosine of the encoder states", "1", f"{metrics.mean_cosine(states, heard):.4f}"),
            ("cosine of the logits", "1", f"{metrics.mean_cosine(logits, compiled):.4f}"),
            ("positions with the same likeliest token", f"{ids.numel()}", f"{same}"),
        ],
    )


if __name__ == "__main__":
    console.exit_with(main)
