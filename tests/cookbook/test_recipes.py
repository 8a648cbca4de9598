"""The cookbook's recipes, unmodified, to their end on the real SmolLM2: numbers, not exit codes.

sl_loop and sl_basic: the first step's NLL equals Hugging Face's within 1e-4, and training lowers it; an interrupted
sl_loop goes on from its checkpoint with the numbers it would have had.
rl_loop: the logprobs that came with the samples equal those of the first training pass (KL ≤ 1e-4). It starts from
a checkpoint that answers right about half of the time: without differing rewards it would train nothing.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinker
import torch
from tinker import types
from tinker_cookbook import renderers
from tinker_cookbook.renderers.base import ParseTermination
from tinker_cookbook.supervised.data import conversation_to_datum
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_hub import MODEL_NAME, make_offline_hub

HERE = Path(__file__).parent
STOP = "\n\nUser:"  # of the recipes' renderer


@pytest.fixture(scope="module")
def hub(tmp_path_factory, smollm2):
    return make_offline_hub(tmp_path_factory.mktemp("hub"), smollm2)


@pytest.fixture(scope="module")
def server(start_server, smollm2):
    return start_server({MODEL_NAME: smollm2})


def run_recipe(server, hub, directory, module, *arguments):
    """Runs the recipe in the offline hub; returns (recorded calls, lines of its metrics.jsonl)."""
    directory.mkdir(exist_ok=True)
    record, log = directory / "record.json", directory / "log"
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test", "TINKER_TELEMETRY": "0",
                   "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf"),
                   "WANDB_MODE": "disabled"}
    completed = subprocess.run(
        [sys.executable, HERE / "record_run.py", record, f"tinker_cookbook.recipes.{module}", f"log_path={log}", *arguments],
        cwd=hub, env=environment, capture_output=True, text=True, timeout=500)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-6000:]
    return json.loads(record.read_text()), lines_of(log / "metrics.jsonl")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def values_of(metrics, name):
    return [line[name] for line in metrics if name in line]


@pytest.fixture(scope="module")
def reference(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def reference_nll(model, datums):
    """Weighted mean NLL of the base model: a fresh adapter changes nothing."""
    total, weights = 0.0, 0.0
    for datum in datums:
        with torch.no_grad():
            logprobs = model(torch.tensor([datum["tokens"]])).logits[0].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(datum["inputs"]["target_tokens"])[:, None])[:, 0]
        weight = torch.tensor(datum["inputs"]["weights"])
        total -= float((chosen.double() * weight).sum())
        weights += float(weight.sum())
    return total / weights


def test_sl_loop_and_its_resumption(server, hub, tmp_path, reference):
    arguments = ["sl_loop", "batch_size=4", "max_steps=4", "learning_rate=2e-3", "save_every=2", "max_length=256"]
    calls, metrics = run_recipe(server, hub, tmp_path / "whole", *arguments)
    nll = values_of(metrics, "train_mean_nll")
    assert len(nll) == len(calls) == 4
    assert nll[0] == pytest.approx(reference_nll(reference, calls[0]["datums"]), abs=1e-4)
    assert nll[-1] < nll[0]
    checkpoints = lines_of(tmp_path / "whole/log/checkpoints.jsonl")
    assert [entry["name"] for entry in checkpoints] == ["000002", "final"]

    service = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    run_id = checkpoints[0]["state_path"].removeprefix("tinker://").split("/")[0]
    listed = service.create_rest_client().list_checkpoints(run_id).result().checkpoints
    service.close("success").result()
    saved = {entry[key] for entry in checkpoints for key in ("state_path", "sampler_path") if key in entry}
    assert len(saved) == 3 and {checkpoint.tinker_path for checkpoint in listed} == saved

    # As if it had been stopped after step 2's checkpoint: the state and the optimizer's come back.
    resumed_log = tmp_path / "resumed/log"
    resumed_log.mkdir(parents=True)
    (resumed_log / "checkpoints.jsonl").write_text(json.dumps(checkpoints[0]) + "\n")
    _, resumed = run_recipe(server, hub, tmp_path / "resumed", *arguments)
    assert values_of(resumed, "train_mean_nll") == pytest.approx(nll[2:], abs=1e-5)


def test_sl_basic(server, hub, tmp_path, reference):
    # The recipe gives its data set as a value, which has no parts to override: the same one is named by its class.
    data = "dataset_builder"
    calls, metrics = run_recipe(
        server, hub, tmp_path, "sl_basic", f"{data}=tinker_cookbook.recipes.chat_sl.chat_datasets:NoRobotsBuilder",
        f"{data}.common_config.model_name_for_tokenizer={MODEL_NAME}", f"{data}.common_config.renderer_name=role_colon",
        f"{data}.common_config.train_on_what=ALL_ASSISTANT_MESSAGES", f"{data}.common_config.batch_size=4",
        f"{data}.common_config.max_length=256", "max_steps=3", "eval_every=2", "learning_rate=2e-3")
    nll = values_of(metrics, "train_mean_nll")
    assert nll[0] == pytest.approx(reference_nll(reference, calls[0]["datums"]), abs=1e-4)
    assert nll[-1] < nll[0]
    evaluations = values_of(metrics, "test/nll")
    assert evaluations and all(math.isfinite(value) for value in evaluations)
    assert evaluations[-1] < evaluations[0]


@pytest.fixture(scope="module")
def conversations(hub):
    """rl_loop's prompts for the problems, each answered once with 3, which is right, and once with 4."""
    suffix = " Provide a numerical answer without units, written inside \\boxed{}."
    example = [
        {"role": "user", "content": "How many r's are in strawberry?" + suffix},
        {"role": "assistant", "content": "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w "
                                         "6) b 7) e 8) r 9) r 10) y. We have r's at positions 3, 8, and 9. \\boxed{3}"}]
    problems = lines_of(hub / "openai/gsm8k/train.jsonl")[-2:]
    return [[*example, {"role": "user", "content": problem["question"] + suffix},
             {"role": "assistant", "content": f"\\boxed{{{answer}}}"}] for problem in problems for answer in (3, 4)]


@pytest.fixture(scope="module")
def renderer(smollm2):
    return renderers.get_renderer("role_colon", AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture(scope="module")
def half_right(server, conversations, renderer):
    """(state path, sampler path) of an adapter that answers every problem with 3 or 4, evenly."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    client = service.create_lora_training_client(base_model=MODEL_NAME, rank=32, seed=1).result()
    data = [conversation_to_datum(conversation, renderer, 512, renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE)
            for conversation in conversations]
    for _ in range(10):
        gradient = client.forward_backward(data, loss_fn="cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8))
        loss = gradient.result().metrics["loss:sum"] / len(data)
    # Each answer takes about 8 tokens, of which one is a coin's toss: ln 2 / 8.
    assert loss < 0.3
    paths = client.save_state("half_right").result().path, client.save_weights_for_sampler("half_right").result().path
    service.close("success").result()
    return paths


def test_string_stop_on_the_real_tokenizer(server, half_right, conversations, renderer):
    """The tokens that spell the stop are returned, with the logprobs that the model gives them."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
    sampler = service.create_sampling_client(model_path=half_right[1])
    prompt = renderer.build_generation_prompt(conversations[0][:-1])
    result = sampler.sample(prompt, 8, types.SamplingParams(max_tokens=40, stop=renderer.get_stop_sequences())).result()
    ended = [sequence for sequence in result.sequences if sequence.stop_reason == "stop"]
    assert len(ended) >= 4
    spelled = [sequence for sequence in ended if renderer.tokenizer.decode(sequence.tokens).endswith(STOP)]
    assert len(spelled) >= 2, [renderer.tokenizer.decode(sequence.tokens) for sequence in result.sequences]
    for sequence in spelled:
        assert STOP not in renderer.tokenizer.decode(sequence.tokens[:-1])
        assert renderer.parse_response(sequence.tokens)[1] is ParseTermination.STOP_SEQUENCE
        assert len(sequence.logprobs) == len(sequence.tokens)
        whole = types.ModelInput.from_ints(prompt.to_ints() + sequence.tokens)
        scored = sampler.compute_logprobs(whole).result()[prompt.length:]
        assert sequence.logprobs == pytest.approx(scored, abs=1e-4)
    service.close("success").result()


@pytest.mark.parametrize("loss_fn", ["stable_reinforce", "importance_sampling", "cispo", "gspo"])
def test_rl_loop(server, hub, tmp_path, half_right, loss_fn):
    log = tmp_path / "log"
    log.mkdir()
    (log / "checkpoints.jsonl").write_text(json.dumps({"name": "half_right", "batch": 0, "state_path": half_right[0]}) + "\n")
    calls, metrics = run_recipe(server, hub, tmp_path, "rl_loop", "batch_size=4", "group_size=8", "max_tokens=24",
                                "max_steps=2", f"loss_fn={loss_fn}", "learning_rate=1e-4")
    assert values_of(metrics, "progress/batch") == [0, 1]
    assert calls, "no group had differing rewards: nothing was trained"
    assert {call["loss_fn"] for call in calls} == {loss_fn}
    assert 0 < values_of(metrics, "reward/total")[0] < 1
    differences = [sampled - trained for datum in calls[0]["datums"]
                   for sampled, trained in zip(datum["inputs"]["logprobs"], datum["logprobs"]) if sampled != 0.0]
    assert len(differences) > 50
    assert abs(sum(differences) / len(differences)) <= 1e-4  # KL(sample, train), k1 estimator
    assert max(map(abs, differences)) <= 1e-3
    assert lines_of(log / "checkpoints.jsonl")[-1]["name"] == "final"
