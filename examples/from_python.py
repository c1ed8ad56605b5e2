"""SFT, then RL with a function as the reward and another as a tool, then an answer.

python examples/from_python.py MODEL CONVERSATIONS QUESTIONS   (files as docs/sft-data.md and docs/rl-data.md say)
"""

import sys

import retool


def right(completion: str, ground_truth: str) -> float:
    return float(ground_truth in completion)


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


model, conversations, questions = sys.argv[1:]
tuned = retool.sft(model, conversations, output_dir="runs/sft", batch_size=4, max_steps=2)
better = retool.rl(
    tuned.model,
    questions,
    reward=right,
    tools=[multiply],
    output_dir="runs/rl",
    batch_size=4,
    num_generations=4,
    max_completion_length=64,
    max_steps=2,
)
with retool.LLM(better.folder) as llm:
    asked = [{"role": "user", "content": "What is 17 × 23?"}]
    print(
        llm.chat(asked, retool.SamplingParams(max_tokens=32), tools=[multiply])[0].outputs[0].text
    )
