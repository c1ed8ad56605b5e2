"""What each metric means, for somebody who has never seen it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Meaning:
    """`better`: down, up, or "" where neither is. `noisy` metrics are smoothed.

    `first` ones stand at the top of the page.
    """

    title: str
    unit: str
    says: str
    better: Literal["down", "up", ""] = ""
    noisy: bool = True
    first: bool = False


# metric | title | unit | what it says | down or up (which is better), noisy, first
TABLE = """
train/loss | Training loss | nats per token | How surprised the model is by a token it should have written. | down noisy first
val/loss | Validation loss | nats per token | The same on examples that aren't trained on. | down first
val/perplexity | Validation perplexity |  | e to the validation loss: among how many tokens it hesitates. | down
critic/score/mean | Score |  | What the reward function gave an answer, on average. | up noisy first
critic/acc/mean | Right answers | share | Of the answers that were trained on. | up noisy first
critic/rewards/mean | Reward |  | Score with the penalty for length, and for KL where there is one. | up noisy
critic/advantages/mean | Advantage |  | Reward compared with the other answers to the same question. | noisy
critic/returns/mean | Return |  | What each token is credited with. | noisy
response_length/mean | Answer length | tokens | Of a whole answer, tool output included. | noisy first
response_length/clip_ratio | Answers cut off | share | Answers that used up their tokens. | down noisy
prompt_length/clip_ratio | Questions cut off | share | Questions that used up their tokens. | down noisy
prompt_length/mean | Question length | tokens | Of a prompt with its tool descriptions. | noisy
num_turns/mean | Turns |  | Of an answer; 2 is a question and an answer without a tool. | noisy first
tool/calls | Tool calls | in a step | How often the model called a tool, all answers together. | noisy first
tool/errors | Tool errors | in a step | Calls that gave an error back. | down noisy
tool/timeouts | Tool time-outs | in a step | Calls that were stopped. | down noisy
tool/latency | Tool latency | seconds | From a call's start to its result, on average; waiting to start isn't in it. | down noisy
tool/queue_s | Tool queue | seconds | What a call waited before it could start, on average. More workers shorten it. | down noisy
reward/exceptions | Reward failures | in a step | Answers whose reward function raised an error: they got the lowest score. | down
reward/timeouts | Reward time-outs | in a step | Answers whose reward function took too long: they got the lowest score. | down
reward/killed | Reward processes killed | in a step | Answers whose reward function took too much memory: they got the lowest score. | down
actor/pg_loss | Policy loss |  | What the optimizer lowers. Its level says little. | noisy
actor/entropy | Entropy | nats per token | How undecided the model is; a fall to 0 means that it repeats itself. | noisy first
actor/ppo_kl | Change of the policy | nats per token | How far the updates of this step moved it. | noisy
actor/kl_loss | KL to the reference | nats per token | How far the model is from where it started. | noisy
actor/skipped_updates | Skipped updates |  | So far, for a gradient that wasn't finite. | down
actor/reward_kl_penalty | KL in the reward | nats per token | What is taken off the reward, before its coefficient. | noisy
actor/reward_kl_penalty_coeff | KL coefficient |  | Of the penalty in the reward. |
actor/loss | Loss |  | Policy loss with its KL and entropy terms. | noisy
actor/entropy_loss | Entropy term |  | What the loss gains from entropy. | noisy
actor/pg_clipfrac | Clipped tokens | share | Tokens whose probability changed more than is allowed in a step. | noisy
actor/pg_clipfrac_lower | Clipped tokens, dual | share | Tokens of bad answers that the dual clip held back. | noisy
actor/grad_norm | Gradient norm |  | Before clipping. Spikes are hard batches; a rise without end is trouble. | noisy first
actor/lr | Learning rate |  | Of the step. |
train/grad_norm | Gradient norm |  | Before clipping. Spikes are hard batches; a rise without end is trouble. | noisy first
train/lr | Learning rate |  | Of the step. | first
train/mfu | Model FLOPs utilisation | share | Of what the GPUs could compute, how much went into the model. | up noisy first
perf/mfu/actor | Model FLOPs utilisation | share | Of the update: how much of the GPUs' peak went into the model. | up noisy
train/global_tokens | Tokens in a step | tokens | Of the whole batch, padding left out. | noisy
train/trained_tokens | Trained tokens in a step | tokens | Those that the loss counts: what the model itself would write. | noisy
train/epoch | Epoch |  | Passes over the data, from 0. |
train/skipped_steps | Skipped steps |  | So far, for a gradient that wasn't finite. | down
perf/tokens_per_second_per_gpu | Speed | tokens per second and GPU | Tokens trained, padding left out. | up noisy first
perf/throughput | Speed | tokens per second and GPU | Tokens of a whole step. | up noisy first
perf/rollout_tokens_per_second | Sampling speed | tokens per second | Tokens that the model wrote while answering. | up noisy
perf/total_num_tokens | Tokens in a step | tokens | Questions and answers, tool output included. | noisy
perf/max_memory_allocated_gb | Memory, in use | GiB | The largest so far on a GPU (on the CPU: of the process). |
perf/max_memory_reserved_gb | Memory, reserved | GiB | What torch has taken from the device for it. |
training/rollout_logp_diff_mean | Sampler against trainer | nats | Mean gap of their log-probabilities for one token. | down noisy
training/rollout_probs_diff_mean | Sampler against trainer | probability | Mean gap of their probabilities. | down noisy
training/rollout_actor_kl_k3 | KL between sampler and trainer | nats per token | 0 when they agree. | down noisy
rollout_correction/mean | Correction weight |  | Of a token or an answer, for the gap between sampler and trainer; 1 is none. | noisy
rollout_correction/cut | Correction cut | share | Weights that reached the threshold. | down noisy
filter/gen_batches | Rounds of sampling |  | Until the batch was full of questions worth training on. | down noisy
filter/groups_sampled | Questions sampled | in a step | To fill the batch. | noisy
filter/groups_no_signal | Questions without signal | in a step | All answers scored alike: nothing to learn from. | down noisy
filter/groups_expired | Questions thrown away | in a step | Kept from before, and too old by now. | down noisy
filter/groups_reused | Questions from the step before | in a step | Kept because its batch was full. | noisy
filter/metric_mean | Mean before filtering |  | Of the metric, over everything that was sampled. | up noisy
filter/groups_kept | Questions for the next step | in a step | More than this batch took. | noisy
timing_s/tools | Waiting for tools | seconds | With no token to make meanwhile. | down noisy
timing_s/reward | Waiting for scores | seconds | With no token to make meanwhile. | down noisy
timing_s/step | Time of a step | seconds | Without validation and saving. | down noisy
"""
# the same for patterns; {0} is the first group
PATTERNS = r"""
val-core/(.+)/acc/mean@(\d+) | Accuracy on {0} | share | Share of right answers, {1} tries at each question. | up first
val-core/(.+)/acc/best@(\d+)/mean | Solved on {0} | share | Questions with a right answer among {1} tries. | up
val-core/(.+)/acc/maj@(\d+)/mean | Majority vote on {0} | share | Questions where most of {1} answers are right. | up
stop/(.+) | Ended by {0} | answers | Answers of a step that ended for this reason. | noisy
training/rollout_(logp|probs)_diff_(max|std) | Sampler against trainer, {1} |  | Gap of their {0} for one token. | down noisy
timing_s/(.+) | Time of {0} | seconds | A phase of a step. | down noisy
(.+)/(max|min|std) | {0}, {1} |  | Over the answers of a step. | noisy
val-(core|aux)/(.+) | {1} |  | On validation questions. |
"""


def _rows(table: str) -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for line in table.strip().splitlines():
        name, title, unit, says, flags = (cell.strip() for cell in line.split(" |"))
        words = flags.split()
        better: Literal["down", "up", ""] = (
            "down" if "down" in words else "up" if "up" in words else ""
        )
        found[name] = Meaning(title, unit, says, better, "noisy" in words, "first" in words)
    return found


def meaning(name: str) -> Meaning:
    """What a metric means; of an unknown one its name."""
    if name in MEANINGS:
        return MEANINGS[name]
    base, _, kind = name.rpartition("/")
    if kind in KINDS and f"{base}/mean" in MEANINGS:
        said = MEANINGS[f"{base}/mean"]
        return replace(said, title=f"{said.title}, {KINDS[kind]}", first=False)
    for pattern, said in BY_PATTERN.items():
        if (found := re.fullmatch(pattern, name)) is not None:
            title = said.title
            says = said.says
            for index, group in enumerate(found.groups()):
                title, says = (
                    text.replace(f"{{{index}}}", group.replace("_", " ")) for text in (title, says)
                )
            return Meaning(title, said.unit, says, said.better, said.noisy, said.first)
    return Meaning(name.rpartition("/")[2].replace("_", " "), "", "")


KINDS = {"max": "highest", "min": "lowest", "std": "spread"}
MEANINGS = _rows(TABLE)
BY_PATTERN = _rows(PATTERNS)
