"""The command line, in this process: what it prints, what it writes, and one sentence with an exit code for trouble."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPConfig, GPTJConfig, GPTJForCausalLM

from foreword import cli, files


def train_arguments(model: Path, data: Path, output: Path) -> list[object]:
    where = ["train", "--model", model, "--data", data, "--output", output]
    return [*where, "--epochs", 6, "--batch-size", 8, "--max-length", 48, "--learning-rate", 0.3]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "topics"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["foreword", *map(str, train_arguments(tiny_llama, topics, output))])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return output


def test_help_of_every_command_has_an_example(run) -> None:
    for name in ("train", "tune", "eval", "predict", "generate", "inspect", "compose", "cut", "export", "import"):
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"foreword {name}" in out.split("Example:")[1]


def test_help_imports_no_torch() -> None:
    program = "import sys; sys.argv = ['foreword', '--help']; from foreword.cli import app; app(standalone_mode=False)"
    check = f"{program}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_train_prints_figures_beside_zero_shot_and_leaves_only_the_finished_prefix(
    run, tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    code, out, err = run(*train_arguments(tiny_llama, topics, tmp_path / "p"))
    assert code == 0
    assert "zero-shot" in out and "prefix" in out and "animal" in out
    assert "trained parameters" in err
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "README.md",
        "prefix.json",
        "prefix.safetensors",
        "report.html",
    ]


def test_train_learns_and_eval_predict_and_inspect_agree(run, trained: Path, topics: Path, tmp_path: Path) -> None:
    code, out, _ = run("eval", trained, "--json")
    report = json.loads(out)
    saved = files.read_header(trained)["training"]
    assert code == 0
    assert report["metrics"] == saved["test"]
    assert report["metrics"]["accuracy"] >= 0.75 > saved["zero_shot"]["accuracy"] - 0.3
    code, out, _ = run("eval", trained, "--data", topics / "test.jsonl")
    assert code == 0 and "8 rows" in out and "tool" in out
    code, out, _ = run("predict", trained, "the cat sleeps on the warm stone", "--json")
    row = json.loads(out)
    assert code == 0
    assert row["label"] in ("animal", "tool") and abs(sum(row["scores"].values()) - 1) < 1e-5
    code, out, _ = run("predict", trained, "--input", topics / "test.jsonl", "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in (topics / "test.jsonl").read_text().splitlines()]
    right = sum(row["label"] == label for row, label in zip(rows, labels, strict=True)) / len(rows)
    assert code == 0 and right == report["metrics"]["accuracy"]
    code, out, _ = run("inspect", trained, "--json")
    description = json.loads(out)
    assert code == 0
    assert description["parameters"] == 1 * description["length"] * 32  # trained layers x P x d; one of two is frozen
    assert description["test"] == saved["test"]
    code, out, _ = run("inspect", trained)
    assert code == 0 and "share of base" in out


def test_generate_continues_a_prompt(run, trained: Path) -> None:
    code, out, _ = run("generate", trained, "the cat", "a saw cuts", "--max-new-tokens", 4, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["the cat", "a saw cuts"]
    assert run("generate", trained, "the cat", "--max-new-tokens", 4)[1].startswith("the cat")


def test_the_same_seed_gives_the_same_prefix_and_another_seed_another(
    run, tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        steps = ["--max-steps", 3, "--save-steps", 3, "--seed", seed, "--no-zero-shot"]
        assert run(*train_arguments(tiny_llama, topics, tmp_path / name), *steps)[0] == 0
        digests.append(files.read_header(tmp_path / name)["digest"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--length", 0], "the prefix length must be at least 1, not 0"),
        (["--length", 500], "a prefix of 500 tokens leaves no room in the model's 128 positions"),
        (["--instruction", " ".join(["word"] * 300)], "leaves no room in the model's 128 positions"),
        (["--instruction", ""], "the instruction has no tokens; write at least one word"),
        (["--form", "magic"], "form 'magic' is unknown; choose one of direct, projected, mlp"),
        (["--start", "magic"], "start 'magic' is unknown"),
        (["--task", "magic"], "task 'magic' is unknown"),
        (["--dtype", "magic"], "dtype 'magic' is unknown"),
        (["--head", "magic"], "head 'magic' is unknown"),
        (["--template", "no place for it"], r"the template must hold {text} once"),
        (["--label-word", "x"], "there are 2 labels and 1 label words"),
        (["--label-word", "cat", "--label-word", "cat"], "begins with the same token as 'cat'"),
        (["--max-length", 3], "leaves none of 3 for the text"),
        (["--epochs", 0], "epochs must be above 0"),
        (["--schedule", "magic"], "schedule 'magic' is unknown; choose one of constant_with_warmup, cosine, linear"),
        (["--train-rows", 0], "train_rows must be above 0"),
        (["--train-rows", 1000], "train_rows is 1000; give a number from 1 to 64"),
        (["--text-column", "nothing"], "nothing"),
    ],
)
def test_bad_settings_of_train_are_one_sentence_and_leave_nothing(
    run, tiny_llama: Path, topics: Path, tmp_path: Path, arguments: list[object], sentence: str
) -> None:
    code, out, err = run(*train_arguments(tiny_llama, topics, tmp_path / "p"), *arguments)
    said = err.strip().splitlines()[-1]
    assert code == 2 and out == ""
    assert sentence in said and "Traceback" not in err
    assert not list(tmp_path.rglob("prefix.json"))
    assert run(*train_arguments(tiny_llama, topics, tmp_path / "p"), "--max-steps", 1, "--no-zero-shot")[0] == 0


def test_a_missing_model_folder_is_named(run, topics: Path, tmp_path: Path) -> None:
    code, _, err = run(*train_arguments(tmp_path / "nowhere", topics, tmp_path / "p"))
    assert code == 2 and "is no model folder: config.json is missing" in err


def test_a_model_of_another_kind_is_refused(run, topics: Path, tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path / "clip")
    code, _, err = run(*train_arguments(tmp_path / "clip", topics, tmp_path / "p"))
    assert code == 2 and "is not a causal, masked or sequence-to-sequence language model" in err


def test_a_family_that_a_prefix_cannot_enter_is_refused(run, tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    for file in tiny_llama.glob("token*"):
        (tmp_path / "gptj" / file.name).write_bytes(file.read_bytes())
    code, _, err = run(*train_arguments(tmp_path / "gptj", topics, tmp_path / "p"))
    assert code == 2 and "GPTJForCausalLM does not route its attention" in err


def test_a_prefix_is_refused_on_another_base(run, trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foreword import InputError, PrefixModel

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.model.layers[0].self_attn.k_proj.weight.data += 1
    with pytest.raises(InputError, match=r"was trained for .* not for this base"):
        PrefixModel(base, AutoTokenizer.from_pretrained(tiny_llama)).load(trained)


@pytest.mark.parametrize("command", ["eval", "predict", "generate", "inspect"])
def test_a_damaged_prefix_is_one_sentence(run, trained: Path, tmp_path: Path, command: str) -> None:
    texts = ["x"] if command in ("predict", "generate") else []
    for name, damage, sentence in (
        ("prefix.safetensors", lambda b: b[: len(b) // 2], "is damaged"),
        ("prefix.json", lambda b: b[: len(b) // 2], "is damaged"),
        ("prefix.json", lambda b: b.replace(b'"format": 1', b'"format": 99'), "format version 99"),
    ):
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in trained.iterdir():
            content = file.read_bytes()
            (folder / file.name).write_bytes(damage(content) if file.name == name else content)
        code, _, err = run(command, folder, *texts)
        assert code == 2 and sentence in err and "Traceback" not in err
    code, _, err = run(command, tmp_path / "nowhere", *texts)
    assert code == 2 and "holds no saved prefix" in err


def test_empty_texts_and_prompts_are_refused(run, trained: Path) -> None:
    assert run("predict", trained, "fine", "  ")[0::2] == (
        2,
        "foreword: text 2 is empty; there is nothing to classify.\n",
    )
    code, _, err = run("generate", trained, " ")
    assert code == 2 and "prompt 1 is empty" in err
    code, _, err = run("predict", trained)
    assert code == 2 and "give texts, or --input" in err
    code, _, err = run("generate", trained, "word " * 300)
    assert code == 2 and "has room for" in err


def test_eval_refuses_labels_that_the_prefix_does_not_know(run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x", "label": "animal"}\n{"text": "y", "label": "planet"}\n')
    code, _, err = run("eval", trained, "--data", tmp_path / "d.jsonl")
    assert code == 2 and "labels that the prefix was not trained for: planet" in err
    code, _, err = run("eval", trained, "--split", "nothing")
    assert code == 2 and "split 'nothing' is unknown" in err


def test_long_texts_are_cut_and_counted_and_the_template_is_not(
    run, tiny_llama: Path, topics: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(tiny_llama, topics, tmp_path / "p")
    code, _, err = run(*arguments, "--max-length", 12, "--max-steps", 1)
    assert code == 0 and "Texts cut to fit 12 tokens: 64 train, 8 validation, 8 test rows." in err
    code, _, err = run("predict", tmp_path / "p", "word " * 50, "word")
    assert code == 0 and "1 of 2 texts were cut to fit 12 tokens." in err


def test_a_full_disk_while_saving_is_one_sentence_and_the_run_can_be_resumed(
    run, tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [*train_arguments(tiny_llama, topics, tmp_path / "p"), "--max-steps", 4, "--no-zero-shot"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        code, _, err = run(*arguments)
    assert code == 1 and "could not be saved" in err and "No space left on device" in err
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    assert run(*arguments, "--resume")[0] == 0
    assert (tmp_path / "p" / "prefix.json").is_file()


def test_an_output_in_use_is_not_overwritten(run, tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("mine")
    code, _, err = run(*train_arguments(tiny_llama, topics, tmp_path / "p"))
    assert code == 2 and "exists and is not empty" in err
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["thesis.txt"]
    code, _, err = run(*train_arguments(tiny_llama, topics, tmp_path / "q"), "--resume")
    assert code == 2 and "there is no unfinished run" in err


def test_inspect_writes_a_page_and_compares_two(run, trained: Path, topics: Path, tmp_path: Path) -> None:
    code, out, err = run("inspect", trained, "--html", tmp_path / "page.html", "--rows", 4, "--json")
    assert code == 0 and "page.html written" in err
    assert set(json.loads(out)) == {"about", "sites", "shares", "moved", "words", "loss", "worth"}
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    code, out, _ = run("inspect", trained, trained)
    assert code == 0 and out.count("instruction") >= 2
    code, _, err = run("inspect", trained, "--data", topics)
    assert code == 2 and "--html" in err
    code, _, err = run("inspect", trained, trained, trained)
    assert code == 2 and "one or two" in err
