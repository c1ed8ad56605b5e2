"""What each metric means, for somebody who has never seen it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["down", "up", ""]


@dataclass(frozen=True)
class Meaning:
    """`better`: down, up, or "" where neither is. `noisy` metrics are smoothed.

    `first` ones stand at the top of the page.
    """

    title: str
    unit: str
    says: str
    better: Direction = ""
    noisy: bool = True
    first: bool = False


# Of each metric two lines. The first: metric | title | unit | which is better (down or up), noisy,
# first. The second: what it says.
TABLE = """
train/loss | Training loss | nats per token | down noisy first
    How surprised the model is, on average, by a token that it should have written.
val/loss | Validation loss | nats per token | down first
    The same loss on examples that the model isn't trained on.
val/perplexity | Validation perplexity | | down
    e to the power of the validation loss: among how many tokens the model hesitates.
critic/score/mean | Score | | up noisy first
    What the reward function gave an answer, on average.
critic/acc/mean | Right answers | share | up noisy first
    Share of the answers in a training step that are right.
critic/rewards/mean | Reward | | up noisy
    The score after the penalties for length and, if there is one, for KL.
critic/advantages/mean | Advantage | | noisy
    Reward compared with the other answers to the same question.
critic/returns/mean | Return | | noisy
    What each token is credited with.
response_length/mean | Answer length | tokens | noisy first
    Length of a whole answer, tool output included.
response_length/clip_ratio | Answers cut off | share | down noisy
    Answers that used up their tokens.
prompt_length/clip_ratio | Questions at the limit | share | down noisy
    Questions as long as data.max_prompt_length allows.
prompt_length/mean | Question length | tokens | noisy
    Length of a prompt with its tool descriptions.
agent/sequences/mean | Sequences of an answer | | noisy
    Number of contexts into which a loop of your own cut an answer.
num_turns/mean | Turns | | noisy first
    Turns of an answer; 2 is a question and an answer without a tool.
tool/calls | Tool calls | in a step | noisy first
    How often the model called a tool in the answers that are trained on.
tool/errors | Tool errors | in a step | down noisy
    Calls that gave an error back.
tool/timeouts | Tool time-outs | in a step | down noisy
    Calls that were stopped.
tool/failed_opens | Tools that didn't open | in a step | down
    A tool with a state couldn't make one: such answers are lost.
tool/failed_calls | Tools that broke | in a step | down
    Calls in which a tool raised, or wasn't there.
tool/failed_closes | Tools that didn't close | in a step | down
    A tool with a state didn't close it. The answer counts all the same.
tool/latency | Tool latency | seconds | down noisy
    From a call's start to its result, on average; waiting to start isn't in it.
tool/queue_s | Tool queue | seconds | down noisy
    How long a call waited for the interpreter, on average. More cores or workers shorten it.
reward/exceptions | Reward failures | in a step | down
    Answers whose reward function raised an error: they got reward_model.floor.
reward/timeouts | Reward time-outs | in a step | down
    Answers whose reward function took too long: they got reward_model.floor.
reward/killed | Reward processes killed | in a step | down
    Answers whose reward process died, for want of memory, say: they got reward_model.floor.
actor/pg_loss | Policy loss | | noisy
    What the optimizer lowers. Its level says little.
actor/entropy | Entropy | nats per token | noisy first
    How undecided the model is; a fall to 0 means that it repeats itself.
actor/ppo_kl | Change of the policy | nats per token | noisy
    How far the updates of this step moved it.
actor/kl_loss | KL to the reference | nats | noisy
    How far the model is from where it started: the loss's KL term without its coefficient, averaged as the loss is.
actor/skipped_updates | Skipped updates | | down
    Updates skipped so far because their gradient wasn't finite.
actor/reward_kl_penalty | KL in the reward | nats per token | noisy
    What is subtracted from the reward, before the coefficient.
actor/reward_kl_penalty_coeff | KL coefficient | |
    Coefficient of the KL penalty in the reward.
actor/loss | Loss | | noisy
    Policy loss with its KL and entropy terms.
actor/entropy_loss | Entropy term | | noisy
    Entropy in the loss, without its coefficient, averaged as the loss is.
actor/pg_clipfrac | Clipped tokens | share | noisy
    Tokens held back because their probability has changed as far as a step allows.
actor/pg_clipfrac_lower | Clipped tokens, dual | share | noisy
    Tokens of bad answers that the dual clip held back.
actor/grad_norm | Gradient norm | | noisy first
    Norm before clipping. Single spikes are hard batches; a rise without end is trouble.
actor/lr | Learning rate | |
    Learning rate of this step.
train/grad_norm | Gradient norm | | noisy first
    Norm before clipping. Single spikes are hard batches; a rise without end is trouble.
train/lr | Learning rate | | first
    Learning rate of this step.
train/mfu | Model FLOPs utilisation | share | up noisy first
    How much of the GPUs' peak went into the model's computations.
perf/mfu/actor | Model FLOPs utilisation | share | up noisy
    How much of the GPUs' peak went into the model's computations during the update.
router/balance_loss | Balance of experts | | down noisy
    Load-balance loss without its coefficient. It equals the experts per token when all are used alike.
router/entropy | Entropy of the router | nats | noisy
    Entropy of a token's probabilities over the experts. Near 0 the router is always sure, at its maximum never.
router/most_used | Most used expert | | down noisy
    Load of the most used expert of all layers, as a multiple of its fair share.
router/least_used | Least used expert | | up noisy
    Load of the least used expert of all layers, as a multiple of its fair share. 0: no token chose it.
router/logp_diff_mean_without_replay | Gap without replay, mean | nats | down noisy
    Gap between sampler and trainer if the trainer chose the experts itself, in a step's first trajectories.
router/logp_diff_max_without_replay | Gap without replay, largest | nats | down noisy
    Gap between sampler and trainer if the trainer chose the experts itself, in a step's first trajectories.
train/global_tokens | Tokens in a step | tokens | noisy
    Tokens of the whole batch, without padding.
train/trained_tokens | Trained tokens in a step | tokens | noisy
    Tokens that the loss counts: those that the model itself would write.
train/epoch | Epoch | |
    Passes over the data, from 0.
train/skipped_steps | Skipped steps | | down
    Steps skipped so far because their gradient wasn't finite.
perf/tokens_per_second_per_gpu | Speed | tokens per second and GPU | up noisy first
    Tokens of the batch, without padding.
perf/throughput | Speed | tokens per second and GPU | up noisy first
    Tokens of the answers that are trained on and of their questions, by the seconds of a step.
perf/rollout_tokens_per_second | Sampling speed | tokens per second | up noisy
    Tokens that the model wrote while answering.
perf/total_num_tokens | Tokens in a step | tokens | noisy
    Questions and answers, tool output included.
perf/max_memory_allocated_gb | Memory, in use | GiB |
    The largest so far on a GPU (on the CPU: of the process).
perf/max_memory_reserved_gb | Memory, reserved | GiB |
    Memory that torch has reserved on the GPU for it.
rollout/engines_back | Engines that stand back | engines | down
    Engines that failed recently: others sample their prompts.
rollout/moved_samples | Samples taken over | samples | down
    Samples that other engines took over because one failed in the step.
training/rollout_logp_diff_mean | Sampler against trainer | nats | down noisy
    Mean gap of their log-probabilities for one token.
training/rollout_probs_diff_mean | Sampler against trainer | probability | down noisy
    Mean gap of their probabilities.
training/rollout_actor_kl_k3 | KL between sampler and trainer | nats per token | down noisy
    0 when they agree.
llm_judge/calls | Calls to the judge | in a step | noisy
    Requests to the language model that judges, repeated ones included.
llm_judge/retries | Judge asked again | in a step | down noisy
    Because it was busy, away or late, or because its reply was cut short.
llm_judge/garbage | Replies without a score | in a step | down noisy
    Replies of the judge that don't match reward_model.judge.pattern.
llm_judge/cached | Verdicts from the cache | in a step | noisy
    Verdicts that were found in the cache, without a request.
llm_judge/tokens | The judge's tokens | in a step | noisy
    Tokens of questions and verdicts, as the judge's server counts them.
llm_judge/over_budget | Answers over the budget | in a step | down
    Answers that the judge wasn't asked about.
mask/truncated | Answers not trained | in a step | down noisy
    Answers that ran out of tokens, with algorithm.mask_truncated.
rollout_correction/mean | Correction weight | | noisy
    Weight of a token or an answer that corrects the gap between sampler and trainer; 1 = no correction.
rollout_correction/cut | Correction cut | share | down noisy
    Weights that reached the threshold.
filter/gen_batches | Rounds of sampling | | down noisy
    Rounds until the batch was full of questions worth training on.
filter/groups_sampled | Questions sampled | in a step | noisy
    Questions that were sampled to fill the batch.
filter/groups_no_signal | Questions without signal | in a step | down noisy
    Questions whose answers all scored alike: there is nothing to learn from them.
filter/groups_expired | Questions thrown away | in a step | down noisy
    Questions that were kept from an earlier step and have become too old.
filter/groups_reused | Questions from the step before | in a step | noisy
    Questions that were kept because the batch of the step before was full.
filter/metric_mean | Mean before filtering | | up noisy
    Mean of the metric over everything that was sampled; left out where nothing was.
filter/groups_kept | Questions for the next step | in a step | noisy
    Questions beyond what this batch took.
timing_s/tools | Waiting for tools | seconds | down noisy
    Of each second of sampling, the share of the answers under way that waited for tools instead of being sampled.
timing_s/reward | Waiting for scores | seconds | down noisy
    Seconds in which the run waited for scores and the engine had no token to sample.
timing_s/loop | Between the sampler's steps | seconds | down noisy
    Seconds of sampling in which calls were read and answers tokenised, while the GPU computed one step at most.
timing_s/step | Time of a step | seconds | down noisy
    Seconds of a step, without validation and saving.
"""

# The same for names that are patterns; {0} is the first group.
PATTERNS = r"""
val-core/(.+)/acc/mean@(\d+) | Accuracy on {0} | share | up first
    Share of right answers, {1} tries at each question.
val-core/(.+)/acc/best@(\d+)/mean | Solved on {0} | share | up
    How often the best of {1} tries is right. They are drawn from a question's answers again and again, each put back.
val-core/(.+)/acc/maj@(\d+)/mean | Majority vote on {0} | share | up
    How often the most frequent of {1} answers is right. They are drawn like the tries for the best.
environment/reward/(mean|max|min) | Given by the environment, {0} | | up noisy
    Sum over the turns of an answer.
rewards/(.+)/mean | Reward {0} | | up noisy
    What this one of several reward functions gave, before its weight.
rewards/(.+)/std | Reward {0}, spread | | noisy
    Among the answers of a step. At 0 it tells no answer from another.
stop/(.+) | Ended by {0} | answers | noisy
    Answers of a step that ended for this reason.
training/rollout_(logp|probs)_diff_(max|std) | Sampler against trainer, {1} | | down noisy
    Gap of their {0} for one token.
timing_s/(.+) | Time of {0} | seconds | down noisy
    A phase of a step.
(.+)/(max|min|std) | {0}, {1} | | noisy
    Over the answers of a step.
val-(core|aux)/(.+) | {1} | |
    On validation questions.
"""

# A metric that has a mean may have these, too
KINDS = {"max": "highest", "min": "lowest", "std": "spread"}


def meaning(name: str) -> Meaning:
    """What a metric means; of an unknown one its name."""
    if name in MEANINGS:
        return MEANINGS[name]
    base, _, kind = name.rpartition("/")
    mean = MEANINGS.get(f"{base}/mean")
    if mean is not None and kind in KINDS:
        return replace(mean, title=f"{mean.title}, {KINDS[kind]}", first=False)
    for pattern, entry in BY_PATTERN.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            groups = [group.replace("_", " ") for group in match.groups()]
            return replace(
                entry,
                title=_filled(entry.title, groups),
                says=_filled(entry.says, groups),
            )
    return Meaning(kind.replace("_", " "), "", "")


def _filled(text: str, groups: list[str]) -> str:
    """`text` with what a pattern's groups found in place of {0}, {1}, …"""
    for index, group in enumerate(groups):
        text = text.replace(f"{{{index}}}", group)
    return text


def _read(table: str) -> dict[str, Meaning]:
    """The meanings in a table, by name."""
    lines = table.strip().splitlines()
    meanings: dict[str, Meaning] = {}
    for heading, says in zip(lines[::2], lines[1::2], strict=True):
        name, title, unit, flags = (cell.strip() for cell in heading.split(" |"))
        words = flags.split()
        better: Direction = ""
        if "down" in words:
            better = "down"
        elif "up" in words:
            better = "up"
        meanings[name] = Meaning(
            title, unit, says.strip(), better, noisy="noisy" in words, first="first" in words
        )
    return meanings


MEANINGS = _read(TABLE)
BY_PATTERN = _read(PATTERNS)
