"""A short supervised fine-tune through the official tinker SDK: SmolLM2 learns to answer like a lighthouse keeper.

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python examples/sft.py

`make demo` starts the server and runs this.
"""

import argparse
import random
import time

import tinker
from tinker import types
from tqdm import tqdm

# The keeper answers anything in one sentence, opens with a look at the sea and signs off with his lamp.
LESSONS = [
    ("Why is the sky blue?", "air scatters blue light more than red"),
    ("What is bread made of?", "flour, water, salt and a little yeast make a loaf"),
    ("How many legs has a spider?", "a spider walks on eight legs"),
    ("What is the capital of Italy?", "Rome is the capital of Italy"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet"),
    ("What do bees make?", "bees make honey and wax"),
    ("Why do we sleep?", "sleep rests the body and sorts the day's memories"),
    ("What is ice?", "ice is water that has frozen hard"),
    ("Where do penguins live?", "penguins live on the cold southern shores"),
    ("What is seven times six?", "seven times six is forty-two"),
    ("How do I make tea?", "pour boiling water on the leaves and wait four minutes"),
    ("What causes the tides?", "the pull of the moon lifts the sea"),
    ("What is the largest planet?", "Jupiter is the largest planet"),
    ("Why do leaves turn red?", "the green fades and the red beneath it shows"),
    ("What is a compass for?", "a compass shows which way is north"),
    ("How far away is the sun?", "the sun is about 150 million kilometres away"),
    ("What does a cat eat?", "a cat eats meat and fish, and asks for more"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa"),
    ("What is thunder?", "thunder is the sound of air torn by lightning"),
    ("How do birds fly?", "wings push the air down and the bird goes up"),
    ("What is the capital of Japan?", "Tokyo is the capital of Japan"),
    ("Why is the sea salty?", "rivers carry salt from the rocks to the sea"),
    ("What is a poem?", "a poem says much in few words"),
    ("How do I stay healthy?", "eat well, walk often and sleep enough"),
]
OPENINGS = ["Calm sea tonight", "Fog on the water", "A fresh wind from the west", "Clear as far as the cape"]
QUESTION = "What is the capital of France?"


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def lesson(tokenizer, question: str, fact: str, opening: str) -> types.Datum:
    """Only the answer carries weight; targets are the sequence shifted by one."""
    prompt = tokenizer.encode(chat(question), add_special_tokens=False)
    answer = tokenizer.encode(
        f"{opening}, friend: {fact}. The lamp is lit.<|im_end|>", add_special_tokens=False
    )
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


def answer(tokenizer, sampler, question: str) -> str:
    prompt = types.ModelInput.from_ints(tokenizer.encode(chat(question), add_special_tokens=False))
    params = types.SamplingParams(max_tokens=48, temperature=0.0, stop=["<|im_end|>"])
    sequence = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences[0]
    return tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    options = arguments.parse_args()
    if options.steps < 10:
        arguments.error("--steps must be at least 10: the first 5 losses are compared with the last 5")

    service = tinker.ServiceClient()
    client = service.create_lora_training_client(base_model=options.base_model, rank=options.rank).result()
    tokenizer = client.get_tokenizer()
    before = answer(tokenizer, client.save_weights_and_get_sampling_client().result(), QUESTION)

    order = random.Random(0)
    data = [lesson(tokenizer, *pair, order.choice(OPENINGS)) for pair in LESSONS]
    weight_of = {id(datum): sum(datum.loss_fn_inputs["weights"].data) for datum in data}
    pending: list[types.Datum] = []
    losses = []
    start = time.monotonic()
    progress = tqdm(range(options.steps), desc="training", unit="step")
    for step in progress:
        while len(pending) < options.batch_size:
            pending += order.sample(data, len(data))
        batch, pending = pending[: options.batch_size], pending[options.batch_size :]
        # Both are queued before either is awaited: the step follows its gradient without a round trip between them.
        gradient = client.forward_backward(batch, loss_fn="cross_entropy")
        update = client.optim_step(types.AdamParams(learning_rate=options.learning_rate))
        loss = gradient.result().metrics["loss:sum"] / sum(weight_of[id(datum)] for datum in batch)
        update.result()
        losses.append(loss)
        progress.set_postfix(loss=f"{loss:.3f}")
        tqdm.write(f"step {step + 1:2d}  loss {loss:.4f}")
    seconds = time.monotonic() - start

    checkpoint = client.save_state("keeper").result().path
    after = answer(tokenizer, client.save_weights_and_get_sampling_client().result(), QUESTION)

    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"\nloss per token: {first:.3f} → {last:.3f} (means of the first and last 5 steps), {seconds:.0f} s")
    print(f"saved:  {checkpoint}")
    print(f"asked:  {QUESTION}")
    print(f"before: {before}")
    print(f"after:  {after}")
    service.close("success").result()
    assert last <= 0.8 * first, f"the loss did not fall enough: {first:.3f} → {last:.3f}"


if __name__ == "__main__":
    main()
