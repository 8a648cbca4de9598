"""What the launcher does before the server runs: model names, the embedded model, the table of token bytes."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers

import models
from hosted_tinker import cli, embedded_model, hub, installation, tokenizer_helper
from hosted_tinker.errors import LauncherError

TEXTS = ["Hello wörld — naïve 🙂", "  two  spaces\n\tand a tab", "東京 1234567890", "def f(x):\n    return x\n"]


def read_table(path: Path):
    data = path.read_bytes()
    assert data[:4] == b"HTTT"
    version, count = struct.unpack_from("<II", data, 4)
    assert version == 1
    table, offset = [], 12
    for _ in range(count):
        special, length = struct.unpack_from("<BI", data, offset)
        offset += 5
        table.append((bool(special), data[offset : offset + length]))
        offset += length
    assert offset == len(data)
    return table


def test_byte_level_table(tmp_path):
    models.write_tokenizer(tmp_path, 400)
    out = tmp_path / "table"
    assert tokenizer_helper.main(["export", str(tmp_path), str(out)]) == 0
    table = read_table(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(table) == len(tokenizer)
    for text in TEXTS:
        assert b"".join(table[token][1] for token in tokenizer.encode(text)) == text.encode()
    assert table[2] == (True, b"<|im_end|>") and not table[50][0]
    assert {bytes([byte]) for byte in range(256)} <= {text for _, text in table}


def test_sentencepiece_table_with_byte_fallback(tmp_path):
    """Llama 2's form: ▁ for a space, <0xXX> for bytes that no piece covers."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "cat", "▁cat", "s"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    letters = {letter for piece in pieces[259:] for letter in piece}
    for letter in sorted(letters - set(vocabulary)):
        vocabulary[letter] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer_helper.export(tmp_path, tmp_path / "table")
    table = read_table(tmp_path / "table")
    assert table[vocabulary["▁the"]] == (False, b" the")
    assert table[vocabulary["<0xE2>"]] == (False, b"\xe2")
    assert table[vocabulary["</s>"]] == (True, b"</s>")
    for text in ("the cats", "é🙂"):
        assert b"".join(table[token][1] for token in tokenizer.encode(text, add_special_tokens=False).ids) == b" " + text.encode()


def test_added_tokens_are_written_as_they_read(tmp_path):
    """A byte-level tokenizer's added token with a space or an umlaut is not in the byte alphabet."""
    models.write_tokenizer(tmp_path, 300)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "schön ist es"])
    table = tokenizer_helper.token_bytes(tokenizer)
    assert table[tokenizer.token_to_id("schön ist es")] == (False, "schön ist es".encode())
    assert table[tokenizer.token_to_id("<think>")] == (False, b"<think>")


def test_helper_names_what_is_wrong(tmp_path, capsys):
    assert tokenizer_helper.main(["export", str(tmp_path / "missing"), str(tmp_path / "out")]) == 1
    assert "missing" in capsys.readouterr().err
    assert tokenizer_helper.main(["frobnicate"]) == 2
    assert not (tmp_path / "out").exists()


def test_local_directories_resolve(tmp_path):
    for wanted in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(LauncherError):
            hub.resolve(wanted)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LauncherError, match="safetensors"):
        hub.resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_one_name_is_one_directory(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert cli.resolve_models([one + "/"], [("alias", one)]) == [(one, Path(one)), ("alias", Path(one))]
    with pytest.raises(LauncherError, match="two directories"):
        cli.resolve_models([], [("alias", one), ("alias", two)])


def test_tokenizer_command_survives_spaces(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTED_TINKER_TORCH_LIB", str(tmp_path))
    (tmp_path / "libtorch_cpu.so").touch()
    python = tmp_path / "two words" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    environment = cli.server_environment()
    models.write_tokenizer(tmp_path, 300)
    command = json.loads(environment["HOSTED_TINKER_TOKENIZER_COMMAND"])
    subprocess.run([*command, "export", str(tmp_path), str(tmp_path / "table")], env=environment, check=True)
    assert len(read_table(tmp_path / "table")) == 300


@pytest.mark.parametrize("command", ["python3 -m helper", "[]", '["python3", 1]', '{"a": 1}'])
def test_server_refuses_another_form_of_tokenizer_command(tmp_path, command):
    server = installation.bin_dir() / installation.SERVER
    done = subprocess.run(
        [server, "serve", "--base-model", f"m={tmp_path}", "--data-dir", tmp_path / "data", "--tokenizer-command", command],
        capture_output=True, text=True, timeout=60,
    )
    assert done.returncode != 0 and "JSON array of strings" in done.stderr and command in done.stderr


@pytest.mark.parametrize("backend", ["native", "pytorch"])
def test_a_wrong_backend_config_ends_the_start_at_once(make_server, backend):
    """No second attempt: it would fail alike."""
    with pytest.raises(RuntimeError, match="the server ended with 1") as ended:
        make_server("refused", None, "--backend", backend, "--backend-config", '{"frobnicate": 1}')
    log = str(ended.value)
    assert "cannot be served: the base model could not be loaded: backend config: unknown key frobnicate" in log
    assert "micro_batch_tokens" in log and "times" not in log


@pytest.fixture(scope="session")
def smollm():
    return embedded_model.ensure()


def test_embedded_model_is_a_hugging_face_directory(smollm):
    assert sorted(os.listdir(smollm)) == sorted(embedded_model.FILES)
    config = json.loads((smollm / "config.json").read_text())
    assert config["num_attention_heads"] == 9 and config["num_key_value_heads"] == 3 and config["tie_word_embeddings"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    table = tokenizer_helper.token_bytes(tokenizer_helper.load_tokenizer(smollm))
    for text in TEXTS:
        assert b"".join(table[token][1] for token in tokenizer.encode(text)) == text.encode()


def test_embedded_model_knows_the_capital_of_france(smollm):
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("The capital of France is Paris")
