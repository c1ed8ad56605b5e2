"""Reward functions that behave in every way a user's can."""

import asyncio
import os
import socket
import subprocess
import sys
import time


class NotForPickle(Exception):
    def __init__(self, one, two):
        super().__init__(one)
        self.two = two


class Text(str):
    pass


def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "hang":
        time.sleep(60)
    if solution_str == "spin":
        while True:
            pass
    if solution_str == "raise":
        raise KeyError("oops")
    if solution_str == "die":
        os._exit(9)
    if solution_str == "exit":
        sys.exit(3)
    if solution_str == "interrupt":
        raise KeyboardInterrupt
    if solution_str == "cancel":
        raise asyncio.CancelledError
    if solution_str == "own error":
        raise NotForPickle("of my own", 2)
    if solution_str == "fork":
        os.fork()
        return os.getpid() * 1.0
    if solution_str == "start":
        subprocess.run(["sleep", "777"])
    if solution_str == "print":
        print("\n".join(["\0" * 100] * 10_000))
        return 0.125
    if solution_str == "own types":
        return {"score": 1.0, "pred": Text("seven"), "acc": "yes", "long": "y" * 20_000}
    if solution_str == "eat":
        return float(len(bytearray(3 << 30)))
    if solution_str == "connect":
        try:
            socket.socket(socket.AF_INET).close()
        except PermissionError:
            return {"score": 1.0, "why": "refused"}
        return {"score": 0.0, "why": "a socket"}
    if solution_str == "environment":
        with open("/proc/self/environ", "rb") as start:
            seen = os.environ.get("WANDB_API_KEY", "") + start.read().decode()
        return {"score": float("geheim" in seen), "there": seen}
    values = {
        "nan": float("nan"),
        "inf": float("inf"),
        "text": "seven",
        "none": None,
        "bool": True,
        "noscore": {"acc": 1},
        "acc nan": {"score": 1.0, "acc": float("nan")},
        "acc inf": {"score": 1.0, "acc": float("-inf")},
    }
    if solution_str in values:
        return values[solution_str]
    return {
        "score": 0.5,
        "acc": solution_str == ground_truth,
        "turns": extra_info["num_turns"],
        "stop": extra_info["stop_reason"],
        "list": [1],
    }


async def asynchronous(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.001)
    return 0.25


class Judge:
    pass


def digits(data_source, solution_str, ground_truth, extra_info):
    """The share of digits in what the model wrote: something that a random model can learn in
    seconds.
    """
    share = sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)
    return {"score": share, "acc": float(share > 0.5)}


def never(data_source, solution_str, ground_truth, extra_info):
    return 0.0


def too_many(solution_str: str, prompt: str) -> float:
    return float(len(solution_str + prompt))


def raises(data_source, solution_str, ground_truth, extra_info):
    raise LookupError("no judge today")


def raises_on_real(data_source, solution_str, ground_truth, extra_info):
    """The answer that the reward is tried on is fine."""
    if "\\boxed" not in solution_str:
        raises(data_source, solution_str, ground_truth, extra_info)
    return 0.0


def raises_on_some(data_source, solution_str, ground_truth, extra_info):
    """On every seventh question or so, whatever was answered; on none that was made up."""
    if int(ground_truth) % 7 == 6 and "\\boxed" not in solution_str:
        raise LookupError("not this one")
    return digits(data_source, solution_str, ground_truth, extra_info)


async def by_the_source(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    return {"shop": 1.0}[data_source]


def slow(data_source, solution_str, ground_truth, extra_info):
    time.sleep(0.3)
    return 0.0


async def over_http(data_source, solution_str, ground_truth, extra_info):
    """A judge behind an address, which its row tells."""
    import httpx

    if _client.get("client") is None:
        _client["client"] = httpx.AsyncClient(trust_env=False)
    said = await _client["client"].post(extra_info["address"], json={"answer": solution_str})
    return {
        "score": said.json()["score"],
        "key": os.environ.get("JUDGE_API_KEY", ""),
        "other": os.environ.get("WANDB_API_KEY", ""),
    }


_client = {}


async def every_way(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "exit":
        sys.exit(3)
    if solution_str == "cancel":
        raise asyncio.CancelledError
    if solution_str == "nan":
        return float("nan")
    await asyncio.sleep(60.0 if solution_str == "hang" else 0.05)
    return 1.0


async def seeing(response, tool_calls, turn_rewards, row):
    return {
        "score": len(tool_calls) + sum(turn_rewards),
        "last": response[-1]["content"],
        "level": row["level"],
    }
