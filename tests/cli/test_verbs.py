"""The verbs after training, on a tiny run: what they print, write, continue and refuse."""

import io
import json

import pytest
import torch

import tiny
from luthier.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base and a run on it."""
    folder = tmp_path_factory.mktemp("verbs")
    tiny.folder(folder / "base")
    rows = [{"prompt": f"word {i}", "completion": f"answer {i}"} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = ["optim.steps=6", "optim.batch_tokens=200", "precision=float32", "optim.lr=2e-2", f"out={folder / 'runs'}", "name=r", "evaluate.samples=0"]
    assert main(["train", str(folder / "data.jsonl"), "--model", str(folder / "base"), "--quiet", *settings]) == 0
    return folder


def said(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_dry_run_counts_without_weights_or_data(tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000).save_pretrained(tmp_path)
    code, out, _ = said(capsys, "train", "--model", tmp_path, "--dry-run", "method.targets=[query]")
    assert code == 0
    assert "2,097,152 trained parameters" in out and "6,738,415,616" in out
    assert "65,536 against 16,777,216, 256 times fewer" in out


def test_generate_answers_prompts_and_files_and_continues_an_interrupted_one(home, tmp_path, capsys):
    code, out, _ = said(capsys, "generate", home / "runs" / "r", "--prompt", "word 1", "--max-new", 5)
    assert code == 0 and out.endswith("\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}", "id": i}) + "\n" for i in range(70)))
    ask = ("generate", home / "runs" / "r", "--input", tmp_path / "p.jsonl", "--max-new", 4, "--temperature", 1.0, "--precision", "float32", "--output")
    assert said(capsys, *ask, tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in whole] == list(range(70)) and all({"answer", "stopped", "tokens"} <= set(json.loads(x)) for x in whole)
    (tmp_path / "cut.jsonl").write_text("\n".join(whole[:30]) + "\n" + whole[30][:10])
    code, out, _ = said(capsys, *ask, tmp_path / "cut.jsonl")
    assert code == 0 and "going on after 30 of 70" in out
    assert [json.loads(x)["answer"] for x in (tmp_path / "cut.jsonl").read_text().splitlines()] == [json.loads(x)["answer"] for x in whole]
    assert "all 70 answers are there already" in said(capsys, *ask, tmp_path / "cut.jsonl")[1]


def test_generate_refuses_an_output_of_other_prompts(home, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "o.jsonl").write_text('{"prompt": "b", "answer": "x"}\n')
    code, _, err = said(capsys, "generate", home / "base", "--input", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl")
    assert code == 2 and "answers another prompt" in err


def test_chat_streams_and_knows_its_commands(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("word 3\n/base\nword 3\n/base\n/reset\n/what\n/exit\n"))
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError) if not (line := __import__("sys").stdin.readline()) else line)
    code, out, _ = said(capsys, "chat", home / "runs" / "r", "--max-new", 6)
    assert code == 0
    assert "adapter off: this is the base" in out and "adapter on" in out and "forgotten" in out and "/what: there are" in out


def test_merge_opens_in_transformers_and_export_names_the_converters_command(home, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    code, out, _ = said(capsys, "merge", home / "runs" / "r", "--output", tmp_path / "m")
    assert code == 0 and "the same everywhere" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert said(capsys, "merge", home / "runs" / "r", "--output", tmp_path / "m")[0] == 2  # never over something
    code, out, _ = said(capsys, "export", home / "runs" / "r", "--to", "gguf", "--output", tmp_path / "x.gguf")
    assert code == 3 and "convert_hf_to_gguf.py" in out and "--outfile" in out and (tmp_path / "x" / "config.json").exists()


def test_export_runs_llama_cpps_converter_where_it_is(home, tmp_path, capsys):
    (tmp_path / "llama.cpp").mkdir()
    script = "import sys, pathlib; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF' + str(len(list(pathlib.Path(sys.argv[1]).iterdir()))).encode())"
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(script)
    code, out, _ = said(capsys, "export", home / "runs" / "r", "--to", "gguf", "--output", tmp_path / "x.gguf", "--llama-cpp", tmp_path / "llama.cpp")
    assert code == 0 and (tmp_path / "x.gguf").read_bytes().startswith(b"GGUF") and "wrote" in out
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text("import sys; sys.exit('no such architecture')")
    code, _, err = said(capsys, "export", home / "runs" / "r", "--to", "gguf", "--output", tmp_path / "y.gguf", "--llama-cpp", tmp_path / "llama.cpp")
    assert code == 2 and "no such architecture" in err


def test_eval_scores_beside_the_base_and_beside_copying(home, tmp_path, capsys):
    data = home / "data.jsonl"
    ask = ("eval", home / "runs" / "r", "--data", data, "--task", "bleu", "--task", "exact_match", "--copy-from", data, "--max-new", 8)
    code, out, _ = said(capsys, *ask, "--json", "--output", tmp_path / "o.jsonl")
    assert code == 0
    columns = json.loads(out)["scores"]
    assert set(columns) == {"tuned", "base", "copy"}
    assert columns["tuned"]["loss per token"]["value"] < columns["base"]["loss per token"]["value"]
    assert columns["copy"]["exact_match"]["value"] == 1.0  # every prompt is its own nearest neighbour
    assert columns["tuned"]["bleu"]["n"] == 30
    assert {"prompt", "refs", "tuned", "base", "copy"} == set(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0]))


def test_eval_scores_answers_to_prompts_alone(home, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(6)))
    (tmp_path / "mine.py").write_text("def reward(prompt, answer, row):\n    return sum(map(ord, answer)) + len(row['prompt'])\n")
    ask = ("eval", home / "runs" / "r", "--data", tmp_path / "p.jsonl", "--max-new", 5)
    code, out, _ = said(capsys, *ask, "--prompts", "--reward", tmp_path / "mine.py", "--json", "--output", tmp_path / "o.jsonl")
    columns, lines = json.loads(out)["scores"], [json.loads(x) for x in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert code == 0 and set(columns) == {"tuned", "base"} and len(lines) == 6
    for name in columns:
        assert columns[name]["mine"]["n"] == 6 and columns[name]["mine"]["value"] == pytest.approx(1 + sum(ord(c) for x in lines for c in x[name]) / 6)
    assert columns["tuned"] != columns["base"]
    code, out, _ = said(capsys, *ask[:3], home / "data.jsonl", "--prompts", "--task", "exact_match", "--rows", 5, "--json", "--max-new", 5)
    assert code == 0 and json.loads(out)["scores"]["tuned"]["exact_match"]["n"] == 5  # prompts that have answers are scored by them
    for more, sentence in [
        (("--task", "bleu"), "luthier eval --prompts"),
        (("--prompts",), "nothing to score answers by"),
        (("--prompts", "--task", "bleu"), "needs refs"),
        (("--task", "bleu", "--reward", "mine.py"), "--reward, --temperature and --beginning are of --prompts"),
        (("--prompts", "--text", "--task", "bleu"), "--prompts answers prompts that have no answers"),
    ]:
        code, _, err = said(capsys, *ask, *more)
        assert code == 2 and sentence in err, err


def test_eval_of_raw_text_gives_bits_per_byte(home, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("Nothing much happens here.\n" * 3)
    code, out, _ = said(capsys, "eval", home / "base", "--data", tmp_path / "t.txt", "--text", "--json")
    values = json.loads(out)["scores"]["base"]
    loss, bits = values["loss per token"]["value"], values["bits per byte"]["value"]
    assert code == 0 and bits == pytest.approx(loss / 0.6931, rel=0.05)  # one byte a token here, but for the end


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_learns_and_reopens_on_the_cpu(home, tmp_path, capsys):
    code, *_ = said(
        capsys, "train", home / "data.jsonl", "--model", home / "base", "place.on=cuda", "optim.steps=6", f"out={tmp_path}", "name=r", "optim.lr=2e-2"
    )
    assert code == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["after"]["loss"]["value"] < result["before"]["loss"]["value"]
    assert said(capsys, "generate", tmp_path / "r", "--prompt", "word 1", "--precision", "float32")[0] == 0


def test_several_adapters_answer_score_and_combine(home, tmp_path, capsys):
    run, base = home / "runs" / "r", home / "base"
    ask = ("--prompt", "word 1", "--max-new", 5, "--precision", "float32")
    alone = said(capsys, "generate", run, *ask)[1]
    plain = said(capsys, "generate", base, *ask)[1]
    assert alone != plain
    both = ("--adapter", f"one={run}", "--adapter", f"two={run}")
    assert said(capsys, "generate", base, *ask, "--adapter", f"one={run}")[1] == alone  # the only one serves
    assert said(capsys, "generate", base, *ask, *both, "--use", "two")[1] == alone
    assert said(capsys, "generate", run, *ask, "--adapter", f"one={run}", "--use", "none")[1] == plain
    assert said(capsys, "generate", base, *ask, *both, "--use", "one+two")[0] == 0
    for arguments, sentence in (
        (both, "say which serves"),
        ((*both, "--use", "three"), "no delta is called 'three' here; there are one, two"),
        (("--adapter", str(run)), "say NAME=FOLDER"),
        (("--adapter", f"one={run}", "--adapter", f"one={run}"), "two are called 'one'"),
        (("--adapter", f"one={tmp_path / 'x'}"), "there is no folder"),
    ):
        code, _, err = said(capsys, "generate", base, *ask, *arguments)
        assert code == 2 and sentence in err
    code, out, _ = said(capsys, "eval", base, "--data", home / "data.jsonl", *both, "--precision", "float32", "--json")
    columns = json.loads(out)["scores"]
    assert code == 0 and set(columns) == {"one", "two", "base"} and columns["one"] == columns["two"] != columns["base"]
    code, out, _ = said(capsys, "combine", f"{run}=0.75", f"{run}=0.25", "--to", tmp_path / "c")
    assert code == 0 and "rank 16" in out  # twice 8, the same function
    assert said(capsys, "generate", tmp_path / "c", *ask)[1] == alone
    code, out, _ = said(capsys, "combine", run, run, "--how", "ties", "--rank", 2, "--to", tmp_path / "t")
    assert code == 0 and "the rank cuts off" in out
    assert said(capsys, "combine", run, run, "--to", tmp_path / "c")[0] == 2  # never over something
    assert "the weight a number" in said(capsys, "combine", f"{run}=much", "--to", tmp_path / "d")[2]
