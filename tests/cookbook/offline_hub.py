"""A working directory in which cookbook recipes find their tokenizer and data sets without a model hub.

Folders are named like hub ids: AutoTokenizer and datasets.load_dataset take a local directory before they ask the hub.
"""

import json
import random
import shutil
from pathlib import Path

MODEL_NAME = "Qwen/Qwen3.5-9B-Base"  # the recipes' default; the server answers it with SmolLM2's weights
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"]

NAMES = ["Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gita", "Hugo"]
THINGS = ["apples", "pencils", "marbles", "books", "shells", "stamps"]
TOPICS = ["rain", "bread", "tides", "bees", "clocks", "bridges", "salt", "kites"]


def _write_splits(directory, splits, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(f"  - {{split: {split}, path: {split}.jsonl}}")
    (directory / "README.md").write_text("\n".join([*lines, "---", ""]))


def _chat(rng):
    topic = rng.choice(TOPICS)
    return {"messages": [
        {"role": "user", "content": f"Tell me one fact about {topic}, {rng.choice(NAMES)} asked."},
        {"role": "assistant", "content": f"One fact about {topic}: there is more to it than one sees at {rng.randint(1, 12)} o'clock."},
    ]}


def _problem(rng):
    # Every answer is 3, like the recipe's own example: a small model hits it now and then, so rewards differ.
    name, thing, given = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, 9)
    return {"question": f"{name} had {given + 3} {thing} and gave away {given}. How many {thing} are left?",
            "answer": f"{given + 3} - {given} = 3.\n#### 3"}


def make_offline_hub(directory, tokenizer_dir):
    directory = Path(directory)
    model = directory / MODEL_NAME
    model.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_dir) / name).exists():
            shutil.copy(Path(tokenizer_dir) / name, model / name)
    rng = random.Random(0)
    _write_splits(directory / "HuggingFaceH4/no_robots",
                  {"train": [_chat(rng) for _ in range(64)], "test": [_chat(rng) for _ in range(8)]})
    _write_splits(directory / "openai/gsm8k",
                  {"train": [_problem(rng) for _ in range(32)], "test": [_problem(rng) for _ in range(8)]}, config="main")
    return directory
