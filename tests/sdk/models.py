"""Tiny random checkpoints with tokenizers, written through transformers; nothing comes from a hub."""

from pathlib import Path

import tokenizers
import torch
import transformers

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A lighthouse keeper lights the lamp at dusk and writes the log at dawn.",
    "One two three four five six seven eight nine ten.",
    "def add(a, b):\n    return a + b\n",
    "Wörter, señor, naïve café — 東京 🙂",
] * 4
EOS = "<|im_end|>"


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token=EOS, pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)


def write_model(directory: Path, family: str, **overrides) -> Path:
    """float32 weights with enough spread that logprobs differ visibly between tokens."""
    settings = dict(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.1,
    )
    settings.update(overrides)
    torch.manual_seed(7)
    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    write_tokenizer(directory, 320)
    return directory
