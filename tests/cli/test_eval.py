"""``fpcompiler eval`` on small models and files: results, exit codes, and errors."""

import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fpcompiler.cli.main import main
from fpcompiler.evaluation import perplexity
from fpcompiler.runtime.loading import load

tokenizers = pytest.importorskip("tokenizers")

MODELS = '''
"""Models and tasks for `fpcompiler eval ... small_eval:NAME`."""
import torch
from fpcompiler.evaluation import Item, MultipleChoice

class Language(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed, self.up = torch.nn.Embedding(vocabulary, 32), torch.nn.Linear(32, 64)
        self.lm_head = torch.nn.Linear(64, vocabulary)

    def forward(self, ids):
        return {"logits": self.lm_head(torch.relu(self.up(self.embed(ids))))}

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = torch.nn.Embedding(8, 32), torch.nn.Linear(32, 64)

    def forward(self, ids, mask):
        return self.up(self.embed(ids)) * mask[..., None]

def language():
    torch.manual_seed(0)
    return Language(8), torch.arange(16).reshape(2, 8) % 8

def short():
    return Language(4), torch.zeros(2, 8, dtype=torch.long)

def nan():
    model = Language(8)
    torch.nn.init.constant_(model.lm_head.bias, torch.nan)
    return model, torch.zeros(2, 8, dtype=torch.long)

def encoder():
    torch.manual_seed(0)
    return Encoder(), (torch.arange(16).reshape(2, 8) % 8, torch.ones(2, 8, dtype=torch.long))

def classifier():
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
    return head, torch.randn(4, 48)

def listen():
    return lambda features: features, ()

def write():
    def decode(ids, states):
        said = [*states[0].long().tolist(), 1]
        return torch.nn.functional.one_hot(torch.tensor([said[: ids.shape[1]]]), 8).float()
    return decode, ()

def quiz():
    two = torch.tensor([2]), torch.tensor([3])
    return MultipleChoice([Item(torch.tensor([0]), two, 0), Item(torch.tensor([5]), two, 1)])

def no_task():
    return 5
'''

VOCABULARY = ["<s>", "</s>", "a", "b", "c", "d", "e", "f"]


def write_tokenizer(path: Path) -> None:
    """A tokenizer of one token per letter, whose file asks for padding and for cutting."""
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, artifacts and data."""
    path = tmp_path_factory.mktemp("eval")
    (path / "small_eval.py").write_text(MODELS)
    write_tokenizer(path / "tokenizer.json")
    (path / "text.txt").write_text("a b c d e f " * 9, encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    images = {"0": torch.randn(20, 48, generator=generator)}
    safetensors.torch.save_file(images, path / "images.safetensors")
    clips = {"features": torch.tensor([[2.0, 3.0], [4.0, 4.0]])}
    safetensors.torch.save_file(clips, path / "clips.safetensors")
    before = Path.cwd()
    os.chdir(path)
    try:
        for name in ("language", "encoder", "classifier"):
            arguments = [f"small_eval:{name}", "-o", f"{name}.fpc", "--scheme", "w4a16"]
            assert main(["compile", *arguments]) == 0
    finally:
        os.chdir(before)
    yield path
    sys.modules.pop("small_eval")


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def evaluate(capsys, *arguments: str) -> list[dict]:
    """Run the command with --json; return its rows."""
    assert main(["eval", *arguments, "--json"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)["rows"]


TEXT = ("--task", "perplexity", "--text", "text.txt", "--tokenizer", "tokenizer.json")


def test_perplexity_of_an_artifact_beside_its_original(capsys) -> None:
    (row,) = evaluate(capsys, "language.fpc", "--against", "small_eval:language", *TEXT)
    ids = torch.arange(2, 8).repeat(9)
    assert row["count"] == len(ids) - 1
    assert row["value"] == pytest.approx(perplexity(load("language.fpc"), ids))
    assert row["recovery"] == pytest.approx(row["value"] / row["original"])
    assert row["loss"] == pytest.approx(row["recovery"] - 1)
    assert (row["better"], row["counted"]) == ("lower", "tokens")


def test_perplexity_of_token_ids_with_windows_and_a_start_token(capsys) -> None:
    ids = torch.arange(40) % 8
    safetensors.torch.save_file({"ids": ids}, "ids.safetensors")
    data = ("--task", "perplexity", "--tokens", "ids.safetensors", "--window", "8")
    (row,) = evaluate(capsys, "language.fpc", *data, "--start", "0", "--limit", "30")
    assert row["count"] == 30
    assert row["original"] is row["recovery"] is None
    (row,) = evaluate(capsys, "language.fpc", *data)
    assert row["value"] == pytest.approx(perplexity(load("language.fpc"), ids, window=8))
    safetensors.torch.save_file({"ids": ids[None]}, "ids.safetensors")  # as tokenizers give them
    assert evaluate(capsys, "language.fpc", *data) == [row]


def test_choices_from_json_lines(capsys) -> None:
    # The most and the least likely token after "b", by the model itself.
    order = load("language.fpc")(torch.tensor([[3]]))["logits"][0, 0, 2:].argsort() + 2
    low, high = VOCABULARY[order[0]], VOCABULARY[order[-1]]
    items = [{"context": "a b", "choices": [f" {low}", f" {high}"], "answer": 1},
             {"context": "b", "choices": [f" {low}", f" {high}"], "answer": 0}]  # fmt: skip
    Path("quiz.jsonl").write_text("\n\n".join(map(json.dumps, items)))
    data = ("--task", "choices", "--choices", "quiz.jsonl", "--tokenizer", "tokenizer.json")
    rows = evaluate(capsys, "language.fpc", *data)
    assert {row["metric"]: row["value"] for row in rows} == {
        "accuracy": 0.5, "accuracy_by_sum": 0.5,
    }  # fmt: skip
    assert evaluate(capsys, "language.fpc", *data, "--limit", "1")[0]["value"] == 1.0


def test_similarity_from_lines_with_tabs(capsys) -> None:
    lines = ["a b c\ta b c\t5", "a b c\td e\t1.5", "d e\tf\t2", "f\ta b c\t0"]
    Path("pairs.tsv").write_text("\n".join(lines) + "\n")
    data = ("--task", "similarity", "--pairs", "pairs.tsv", "--tokenizer", "tokenizer.json")
    rows = evaluate(capsys, "encoder.fpc", "--against", "small_eval:encoder", *data)
    assert [row["metric"] for row in rows] == ["pearson", "spearman"]
    assert rows[0]["count"] == 4

    from small_eval import encoder  # What the command imported from this folder.

    model, texts = encoder()[0], {"a b c": [2, 3, 4], "d e": [5, 6], "f": [7]}
    with torch.no_grad():
        vectors = {
            text: torch.nn.functional.normalize(
                model(torch.tensor([ids]), torch.ones(1, len(ids))).mean(1)
            )[0]
            for text, ids in texts.items()
        }
    pairs = [line.split("\t") for line in lines]
    cosines = torch.tensor([float(vectors[a] @ vectors[b]) for a, b, _ in pairs])
    scores = torch.tensor([float(score) for *_, score in pairs])
    expected = float(torch.corrcoef(torch.stack([cosines, scores]))[0, 1])
    assert rows[0]["original"] == pytest.approx(expected, abs=1e-5)


def test_agreement_and_features_of_the_same_inputs(capsys) -> None:
    tasks = ("--task", "agreement", "--task", "features", "--inputs", "images.safetensors")
    arguments = ("classifier.fpc", "--against", "small_eval:classifier", *tasks)
    rows = evaluate(capsys, *arguments, "--batch-size", "7")
    values = {(row["task"], row["metric"]): row for row in rows}
    assert values["agreement", "top5"]["count"] == 20
    assert all(row["original"] == pytest.approx(1) for row in rows)
    cosine = values["features", "cosine"]
    assert cosine["value"] == values["agreement", "cosine"]["value"]
    assert 0.9 < cosine["recovery"] < 1
    assert evaluate(capsys, *arguments, "--limit", "5")[0]["count"] == 5


def test_word_error_rate_of_two_programs(capsys) -> None:
    Path("said.txt").write_text("a b\nc c d\n")
    data = ("--task", "wer", "--inputs", "clips.safetensors", "--references", "said.txt")
    tokens = ("--tokenizer", "tokenizer.json", "--start", "<s>", "--end", "</s>")
    (row,) = evaluate(capsys, "small_eval:listen,small_eval:write", *data, *tokens)
    assert (row["value"], row["count"]) == (1 / 5, 5)


def test_a_task_of_ones_own(capsys) -> None:
    (row, _) = evaluate(capsys, "language.fpc", "--task", "small_eval:quiz")
    assert (row["task"], row["count"]) == ("small_eval:quiz", 2)


def test_the_table_says_what_recovery_is(capsys) -> None:
    assert main(["eval", "language.fpc", "--against", "small_eval:language", *TEXT]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert " lower " in captured.out
    assert "53 tokens" in captured.out
    assert "% worse" in captured.out or "% better" in captured.out
    assert "where lower is better, above 1 is a loss" in captured.out
    assert main(["eval", "small_eval:language", "--against", "small_eval:language", *TEXT]) == 0
    assert " equal " in capsys.readouterr().out
    assert main(["eval", "language.fpc", *TEXT]) == 0
    assert "recovery" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task"),
        (["--task", "poetry"], "there is no task 'poetry': it is perplexity, choices,"),
        (["--task", "perplexity"], "the task perplexity needs --text and --tokenizer"),
        (["--task", "perplexity", "--text", "text.txt"], "needs --tokenizer"),
        (["--task", "wer", "--inputs", "x.npz"], "needs --references and --tokenizer and --start"),
        ([*TEXT, "--batch-size", "4"], "--batch-size is of no use for the task perplexity"),
        (["--task", "small_eval:quiz", "--window", "4"], "--window is of no use"),
        ([*TEXT, "--window", "0"], "0 is not at least 1"),
    ],
)
def test_a_wrong_call_exits_with_2(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "language.fpc", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


QUIZ = ["--task", "choices", "--choices", "bad.jsonl", "--tokenizer", "tokenizer.json"]
PAIRS = ["--task", "similarity", "--pairs", "bad.tsv", "--tokenizer", "tokenizer.json"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("missing.fpc", TEXT, "missing.fpc is not a usable artifact"),
        ("small_eval:no_task", TEXT, "must return (model, example_inputs)"),
        ("language.fpc", [*TEXT[:3], "no.txt", *TEXT[4:]], "there is no file no.txt"),
        ("language.fpc", [*TEXT[:5], "no.json"], "there is no file no.json"),
        ("language.fpc", [*TEXT[:5], "text.txt"], "text.txt is no tokenizer.json"),
        ("language.fpc", [*TEXT[:3], "images.safetensors", *TEXT[4:]], "not a text in UTF-8"),
        ("language.fpc", [*TEXT, "--start", "<bos>"], "the tokenizer has no token '<bos>'"),
        ("language.fpc", [*TEXT, "--start", "a", "b"], "perplexity takes one --start token"),
        ("language.fpc", ["--task", "small_eval:none"], "small_eval has no function 'none'"),
        ("language.fpc", ["--task", "no_module:none"], "there is no module 'no_module'"),
        ("language.fpc", ["--task", "small_eval:no_task"], "small_eval:no_task() returns int"),
        ("language.fpc", QUIZ, 'bad.jsonl, line 2 is not {"context": "...", "choices"'),
        ("language.fpc", [*QUIZ, "--limit", "1"], "no answer 7; the first choice is 0.\nin bad.j"),
        ("language.fpc", PAIRS, "bad.tsv, line 1 has 2 columns, not two texts and a score"),
        ("classifier.fpc", ["--task", "agreement", "--inputs", "images.safetensors"],
         "none was given: task.against(model), or --against"),
        ("small_eval:nan", TEXT, "in window 0 of 1 the loss of 53 of 53 tokens"),
        ("small_eval:nan", TEXT, "\nin the task perplexity with the model small_eval:nan"),
        ("small_eval:short", TEXT, "\nthe token ids go up to 7: do they belong to this model?"),
        ("classifier.fpc", TEXT, "Argument 'input': expected float32, got int64"),
        ("language.fpc", [*TEXT, "--device", "warp"], "'warp' is no device"),
    ],
)  # fmt: skip
def test_errors_are_one_message_and_exit_with_1(capsys, model, arguments, message) -> None:
    item = {"context": "a", "choices": ["b", "c"], "answer": 7}
    good_then_bad = json.dumps(item) + "\n" + json.dumps({"context": "a", "choices": "bc"})
    if "--limit" not in arguments:
        good_then_bad = good_then_bad.replace("7", "1")
    Path("bad.jsonl").write_text(good_then_bad)
    Path("bad.tsv").write_text("only\tone text")
    assert main(["eval", model, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_without_the_package_tokenizers_the_command_to_run_is_named(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["eval", "language.fpc", *TEXT]) == 1
    assert "pip install 'fpcompiler[models]'" in capsys.readouterr().err


def test_progress_goes_to_stderr_when_asked_for(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FPC_PROGRESS", "1")
    assert main(["eval", "language.fpc", *TEXT, "--json"]) == 0
    captured = capsys.readouterr()
    assert "language.fpc: windows of text" in captured.err
    assert len(json.loads(captured.out)["rows"]) == 1


def test_tensors_without_rows_are_refused(capsys) -> None:
    tensors = {"0": torch.ones(3, 48), "1": torch.ones(2, 48)}
    safetensors.torch.save_file(tensors, "uneven.safetensors")
    arguments = ["--against", "small_eval:classifier", "--task", "agreement", "--inputs"]
    assert main(["eval", "classifier.fpc", *arguments, "uneven.safetensors"]) == 1
    assert "found [2, 3]" in capsys.readouterr().err
