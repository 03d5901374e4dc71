"""Compile an encoder, all-MiniLM-L6-v2, and compare what it says about 50 news texts.

    python examples/minilm.py --scheme w4a6

The artifact runs in a new process. Its embeddings are compared with those of the model in fp32,
and the similarities of the texts with what people said about them (1,225 pairs).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

import fpcompiler
from examples import console, new_process

with console.required():
    from examples.zoo import corpora, metrics, minilm


def main(arguments: Sequence[str] | None = None) -> int:
    options = console.parser(__doc__).parse_args(arguments)
    path = console.artifact(options.folder, "minilm", options.scheme)
    console.heading(f"MiniLM, an encoder of 6 layers, compiled to {options.scheme}")
    with console.step("load"):
        model = minilm.load()
        texts, ratings = corpora.lee()
    with console.step("embed 50 texts in fp32"):
        ids, mask = minilm.batch(texts)
        before = metrics.sentence_vectors(lambda *call: model(*call).last_hidden_state, ids, mask)
    with console.step(f"compile, and save {path}") as track:
        example = minilm.example_inputs()
        compiled = fpcompiler.compile(model, options.scheme, example_inputs=example, progress=track)
        compiled.save(path)

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask}
        return new_process.call(path, inputs)["last_hidden_state"]

    with console.step("embed them by the artifact, in a new process"):
        after = metrics.sentence_vectors(encode, ids, mask)
    with console.step("compare the layers on four texts"):
        compared = compiled.compare(model, [minilm.example_inputs()])

    agreement = [metrics.similarity_pearson(vectors, ratings) for vectors in (before, after)]
    console.heading("Before and after")
    console.table(
        ("", "fp32", "compiled"),
        [
            ("agreement with people, Pearson", *(f"{value:.3f}" for value in agreement)),
            ("cosine to the embeddings of fp32", "1", f"{metrics.mean_cosine(before, after):.4f}"),
            ("bytes", *console.bytes_before_and_after(model, path)),
        ],
    )
    console.layer_summary(compiled, compared)
    return 0


if __name__ == "__main__":
    console.exit_with(main)
