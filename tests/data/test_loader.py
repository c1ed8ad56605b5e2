"""The cache and the steps: the same samples in the same step whatever the layout, resumable
anywhere, every fault said at once.
"""

import gc
import json
import threading
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

from retool.batch import Sample
from retool.data import loader, tokenise
from retool.data.loader import (
    StepOrder,
    divided_share,
    epoch_order,
    iterate_steps,
    iterate_validation,
    open_dataset,
    steps_per_epoch,
)
from retool.data.packing import Budget, Packing
from retool.data.read.row_format import RowFormat
from retool.data.read.source import RowSource
from retool.data.tokenise import LengthLimit
from tests.real_data import real


def answer(words, **extra):
    return {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": words, **extra},
        ]
    }


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclass
class Memory:
    """Samples in memory, with distinct tokens so that each can be told in a pack."""

    samples: list[Sample]

    def __post_init__(self):
        self.lengths = np.array([len(sample) for sample in self.samples], np.int32)
        self.trained = np.array([sample.trained for sample in self.samples], np.int32)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture(scope="module")
def memory():
    rng = np.random.default_rng(0)
    return Memory(
        [
            Sample(np.full(n, i, np.int32), rng.random(n) < 0.4)
            for i, n in enumerate(rng.integers(3, 90, 53).tolist())
        ]
    )


def documents(pack):
    """The sample (its token) of every document of a pack that isn't padding."""
    starts = pack.cu_seqlens[:-1].tolist()
    found = []
    for start, length in zip(starts, pack.seqlens, strict=True):
        if pack.real[start]:
            found.append((int(pack.tokens[start]), length))
    return found


FOURS = Packing(Budget(micro_batch_size=4))


class TestSteps:
    def test_order_is_a_function_of_seed_and_epoch(self):
        # Must never change: resumed runs rely on it
        assert epoch_order(8, 1, 0).tolist() == [
            2,
            4,
            7,
            5,
            0,
            6,
            3,
            1,
        ]
        for seed, epoch in product((0, 1, 7), (0, 1, 2)):
            order = epoch_order(1000, seed, epoch)
            assert sorted(order.tolist()) == list(range(1000))
            assert order.tolist() == epoch_order(1000, seed, epoch).tolist()
        firsts = {
            tuple(epoch_order(1000, seed, epoch)[:5].tolist())
            for seed, epoch in product(range(4), range(4))
        }
        assert len(firsts) == 16
        assert epoch_order(5, 1, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]

    def test_order_looks_uniform(self):
        places = np.array([np.argsort(epoch_order(10, seed, 0)) for seed in range(2000)])
        assert abs(places.mean(0) - 4.5).max() < 0.3

    @pytest.mark.parametrize(("dp", "sp"), [(1, 1), (1, 2), (2, 1), (3, 1), (4, 2), (5, 3)])
    @pytest.mark.parametrize("budget", [Budget(micro_batch_size=2), Budget(100)])
    def test_same_samples_in_the_same_step_whatever_the_layout(self, memory, dp, sp, budget):
        size = 16
        order = StepOrder(size, seed=3)
        whole_batch = Packing(Budget(micro_batch_size=size))
        reference = list(iterate_steps(memory, order, whole_batch, stop_step=7))
        ranks = [
            list(iterate_steps(memory, order, Packing(budget, r, dp, sp), stop_step=7))
            for r in range(dp)
        ]
        for step, batches in enumerate(zip(*ranks, strict=True)):
            (whole,) = reference[step].micro_batches
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            packs = [pack for batch in batches for pack in batch.micro_batches]
            assert sorted(d for pack in packs for d in documents(pack)) == sorted(documents(whole))
            for batch in batches:
                assert (batch.step, batch.epoch) == (step, step // 3)
                assert (
                    batch.real_tokens
                    == whole.real_tokens
                    == sum(pack.real_tokens for pack in packs)
                )
                assert (
                    batch.trained_tokens
                    == whole.trained_tokens
                    == sum(pack.trained_tokens for pack in packs)
                )
            assert sum(float(pack.weights.sum()) for pack in packs) == whole.trained_tokens
            assert all(len(pack.tokens) % sp == 0 for pack in packs)
            parts = [pack.slice(rank, sp) for pack in packs for rank in range(sp)]
            for part in [*packs, *parts] if sp == 1 else [part for part in parts if part.alone]:
                lengths = [n for _, n in documents(part)]
                assert lengths == sorted(lengths), "attention has the short ones side by side"

    @pytest.mark.parametrize("keep_whole", [True, False])
    def test_documents_of_one_length_stay_whole_only_where_they_may(self, keep_whole):
        equal = Memory([Sample(np.full(8, i, np.int32), np.ones(8, bool)) for i in range(4)])
        packing = Packing(Budget(micro_batch_size=4), sp=2, keep_whole=keep_whole)
        (batch,) = iterate_steps(equal, StepOrder(4, seed=0), packing, stop_step=1)
        (whole,) = batch.micro_batches
        assert [whole.slice(rank, 2).alone for rank in range(2)] == [keep_whole] * 2

    @pytest.mark.parametrize(("dp", "sp"), [(2, 2), (1, 3), (2, 1)])
    def test_the_share_of_divided_micro_batches_is_that_of_the_packs(self, memory, dp, sp):
        order = StepOrder(16, seed=0)
        budget = Budget(100, few_tokens=40)
        divided = []
        for rank in range(dp):
            packing = Packing(budget, rank, dp, sp)
            for batch in iterate_steps(memory, order, packing, stop_step=3):
                divided += [not pack.slice(0, sp).alone for pack in batch.micro_batches]
        share = divided_share(memory, order, Packing(budget, 0, dp, sp), 3)
        assert share == np.mean(divided)
        assert 0 < share < 1 or sp == 1

    def test_epochs_cover_everything_but_the_incomplete_batch(self, memory):
        assert steps_per_epoch(53, 16) == 3
        batches = iterate_steps(memory, StepOrder(16, seed=1), FOURS, stop_step=6)
        seen = [i for batch in batches for i in batch.samples]
        for epoch in (seen[:48], seen[48:]):
            assert len(set(epoch)) == 48
        assert seen[:48] != seen[48:]

    @pytest.mark.parametrize("start", [0, 1, 3, 5])
    def test_resumed_is_the_tail(self, memory, start):
        order = StepOrder(16, seed=5)
        packing = Packing(Budget(200), dp_rank=1, dp=2)
        whole = list(iterate_steps(memory, order, packing, stop_step=7))
        tail = list(iterate_steps(memory, order, packing, stop_step=7, start_step=start))
        assert [batch.step for batch in tail] == list(range(start, 7))
        for a, b in zip(whole[start:], tail, strict=True):
            assert (a.samples, a.real_tokens, a.trained_tokens) == (
                b.samples,
                b.real_tokens,
                b.trained_tokens,
            )
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert (
                    x.tokens.equal(y.tokens)
                    and x.weights.equal(y.weights)
                    and x.cu_seqlens.equal(y.cu_seqlens)
                )

    def test_padded_rows(self, memory):
        order = StepOrder(8, seed=1)
        padded = replace(FOURS, pad_to=90, pad_id=99)
        (batch,) = iterate_steps(memory, order, padded, stop_step=1)
        assert all(pack.seqlens == (90,) * 4 for pack in batch.micro_batches)
        assert batch.real_tokens == sum(int(memory.lengths[i]) for i in batch.samples)
        two_rows = Packing(Budget(180), pad_to=90)
        (by_tokens,) = iterate_steps(memory, order, two_rows, stop_step=1)
        assert len(by_tokens.micro_batches) == 4  # the padding counts against the budget

    def test_an_epoch_needs_one_full_batch(self, memory):
        with pytest.raises(
            ValueError,
            match=r"train_batch_size=64 is more than the 53 training samples.*at most 53",
        ):
            next(iterate_steps(memory, StepOrder(64, seed=1), FOURS, stop_step=1))
        with pytest.raises(ValueError, match="at least 1"):
            steps_per_epoch(5, 0)

    def test_prepared_ahead_in_a_thread_whose_errors_arrive(self, memory):
        made = threading.Event()

        class Slow(Memory):
            def __getitem__(self, index):
                if threading.current_thread() is not threading.main_thread():
                    made.set()
                if index == 7:
                    raise OSError("the disk is gone")
                return super().__getitem__(index)

        before = threading.active_count()
        order = StepOrder(16, seed=1)
        steps = iterate_steps(Slow(memory.samples), order, FOURS, stop_step=3)
        with pytest.raises(OSError, match="the disk is gone"):
            list(steps)
        assert made.is_set()
        steps = iterate_steps(memory, order, FOURS, stop_step=300)
        next(steps)
        steps.close()
        assert threading.active_count() == before

    @pytest.mark.parametrize("left", ["steps", "validation"])
    def test_one_that_is_forgotten_waits_for_no_thread(self, memory, monkeypatch, left):
        """Garbage is collected while any lock is held: a thread that collected it in the middle of
        its start waited for itself, and the run with it.
        """
        if left == "steps":
            batches = iterate_steps(memory, StepOrder(16, seed=1), FOURS, stop_step=300)
        else:
            batches = iterate_validation(memory, FOURS)
        next(batches)
        (thread,) = (t for t in threading.enumerate() if t.name.startswith("retool-data"))
        waited_for = []
        join = threading.Thread.join
        monkeypatch.setattr(
            threading.Thread, "join", lambda thread, *_: waited_for.append(thread.name)
        )
        del batches
        gc.collect()
        assert not waited_for
        join(thread, timeout=10)
        assert not thread.is_alive()

    @pytest.mark.parametrize(("dp", "sp"), [(1, 1), (2, 2), (3, 1), (60, 1)])
    def test_validation_covers_every_row_once(self, memory, monkeypatch, dp, sp):
        monkeypatch.setattr(loader, "SAMPLES_A_VALIDATION_PLAN", 20)
        ranks = [
            list(iterate_validation(memory, Packing(Budget(150), r, dp, sp))) for r in range(dp)
        ]
        assert len({len(packs) for packs in ranks}) == 1
        packs = [pack for rank in ranks for pack in rank]
        assert sorted(d for pack in packs for d in documents(pack)) == [
            (i, int(n)) for i, n in enumerate(memory.lengths)
        ]
        assert sum(float(pack.weights.sum()) for pack in packs) == memory.trained.sum()


class TestTruncation:
    sample = Sample(np.arange(10, dtype=np.int32), np.arange(10) >= 6)

    def test_masks_stay_aligned(self):
        right = LengthLimit(7, "right").cut(self.sample)
        left = LengthLimit(7, "left").cut(self.sample)
        assert right.tokens.tolist() == list(range(7)) and right.mask.tolist() == [False] * 6 + [
            True
        ]
        assert (
            left.tokens.tolist() == list(range(3, 10))
            and left.mask.tolist() == [False] * 3 + [True] * 4
        )
        assert LengthLimit(7, "drop").cut(self.sample) is None
        assert LengthLimit(10, "error").cut(self.sample) is self.sample

    def test_error_says_how_long_and_the_way_out(self):
        with pytest.raises(ValueError, match=r"10 tokens, more than data\.max_length=9.*drop"):
            LengthLimit(9, "error").cut(self.sample)


class TestCache:
    def open(self, tmp_path, renderer, rows, limit=None, **kwargs):
        source = RowSource(jsonl(tmp_path / "rows.jsonl", rows))
        return open_dataset(source, renderer, limit, cache_dir=tmp_path / "cache", **kwargs)

    def test_samples_are_the_renders(self, tmp_path, renderer_of, tool_row, conversation):
        rows = [tool_row, answer("Hello!"), answer("Never", loss_mask=0)]
        dataset, report = self.open(tmp_path, renderer_of("hermes"), rows)
        assert (report.rows, report.samples, report.dropped_untrained, len(dataset)) == (3, 2, 1, 2)
        for i, row in enumerate(rows[:2]):
            (expected,) = renderer_of("hermes").render(conversation(row))
            assert (
                dataset[i].tokens.tolist() == expected.tokens.tolist()
                and dataset[i].mask.tolist() == expected.mask.tolist()
            )
            assert (dataset.lengths[i], dataset.trained[i], dataset.origin(i)) == (
                len(expected),
                expected.trained,
                (0, i),
            )
        assert (
            report.tokens == dataset.lengths.sum()
            and report.trained_tokens == dataset.trained.sum()
        )
        assert "1 dropped without a trained token" in report.sentence()
        with pytest.raises(IndexError):
            dataset[2]

    def test_truncation_is_decided_and_counted_up_front(self, tmp_path, renderer_of):
        rows = [answer("one two three four five six seven"), answer("A")]
        renderer = renderer_of("chatml")
        whole, _ = self.open(tmp_path, renderer, rows)
        long, short = whole.lengths.tolist()
        right, report = self.open(tmp_path, renderer, rows, LengthLimit(long - 4, "right"))
        assert (
            right.lengths.tolist() == [long - 4, short]
            and report.truncated == 1
            and report.longest == long
        )
        assert (
            right[0].tokens.tolist() == whole[0].tokens[:-4].tolist()
            and right[0].mask.tolist() == whole[0].mask[:-4].tolist()
        )
        dropped, report = self.open(tmp_path, renderer, rows, LengthLimit(long - 1, "drop"))
        assert dropped.lengths.tolist() == [short] and report.dropped_long == 1
        nothing, report = self.open(tmp_path, renderer, rows, LengthLimit(short - 2, "right"))
        assert report.samples == len(nothing) == 2 - report.dropped_untrained
        with pytest.raises(
            ValueError,
            match=rf"1 of 2 rows can't be used:\n.*rows\.jsonl, row 0: it has {long} tokens.*data\.truncation=drop",
        ):
            self.open(tmp_path, renderer, rows, LengthLimit(long - 1))

    @pytest.mark.parametrize(
        ("weight", "limit", "max_rows", "way_out"),
        [
            (1, LengthLimit(2, "right"), -1, r"Raise data\.max_length: what is trained was cut"),
            (1, LengthLimit(2, "drop"), -1, r"Raise data\.max_length, or cut them"),
            (0, LengthLimit(), -1, r"Have a turn of each row trained: loss_mask or weight 1"),
            (1, LengthLimit(), 0, r"data\.train_max_samples and data\.val_max_samples are -1"),
        ],
    )
    def test_where_no_sample_is_left_the_way_out_is_said(
        self, tmp_path, renderer_of, weight, limit, max_rows, way_out
    ):
        rows = [answer("one two three four", loss_mask=weight)] * 2
        source = RowSource(jsonl(tmp_path / "rows.jsonl", rows), max_rows=max_rows)
        with pytest.raises(ValueError, match=rf"no sample is left of /.*rows\.jsonl: .* {way_out}"):
            open_dataset(source, renderer_of("chatml"), limit, cache_dir=tmp_path / "cache")

    def test_every_refused_row_is_named_at_once(self, tmp_path, renderer_of):
        rows = [
            answer("A"),
            {"messages": [{"role": "bot", "content": "x"}]},
            {"messages": 3},
            *[{"messages": []}] * 30,
        ]
        with pytest.raises(ValueError) as caught:
            self.open(tmp_path, renderer_of("chatml"), rows)
        text = str(caught.value)
        assert text.startswith("32 of 33 rows can't be used:\n")
        assert (
            "row 1, message 0: unknown role 'bot'" in text
            and "row 2: 'messages' isn't a list" in text
        )
        assert (
            "row 3: 'messages' isn't a list of messages (empty). … and 29 more rows like it."
            in text
        )
        assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]

    def test_reused_until_anything_changes(self, tmp_path, renderer_of, monkeypatch):
        calls = []
        monkeypatch.setattr("retool.data.cache._build", _counting(calls))
        rows = [answer("A"), answer("B")]
        path = jsonl(tmp_path / "rows.jsonl", rows)
        chatml = renderer_of("chatml")
        choices = [
            (RowSource(path), chatml, LengthLimit()),
            (RowSource(path), chatml, LengthLimit(99)),
            (RowSource(path), chatml, LengthLimit(truncation="left")),
            (RowSource(path), renderer_of("chatml", history="last"), LengthLimit()),
            (RowSource(path, max_rows=1), chatml, LengthLimit()),
        ]
        for expected, choice in enumerate(choices, 1):
            for _ in range(2):
                open_dataset(*choice, cache_dir=tmp_path / "cache")
            assert len(calls) == expected
        open_dataset(RowSource(path), renderer_of("hermes"), cache_dir=tmp_path / "cache")
        assert len(calls) == 6
        jsonl(tmp_path / "rows.jsonl", [*rows, answer("C")])
        dataset, _ = open_dataset(
            RowSource(path), renderer_of("chatml"), cache_dir=tmp_path / "cache"
        )
        assert len(calls) == 7 and len(dataset) == 3

    def test_the_content_is_known_by_its_tokens_masks_and_order(self, tmp_path, renderer_of):
        """Whatever the files are called: same samples in the same order, same content; anything
        else is another.
        """
        one = answer("one")
        two = answer("two")
        masked = {
            "messages": [
                *one["messages"],
                {"role": "user", "content": "Hi"},
                {**two["messages"][1], "loss_mask": 0},
            ]
        }
        unmasked = {
            "messages": [*one["messages"], {"role": "user", "content": "Hi"}, two["messages"][1]]
        }
        made = {
            "a": [one],
            "b": [two],
            "copy_of_a": [one],
            "ab": [one, two],
            "masked": [masked],
            "unmasked": [unmasked],
        }
        files = {name: jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in made.items()}

        def content(*names):
            _, report = open_dataset(
                RowSource([files[name] for name in names]),
                renderer_of("chatml"),
                cache_dir=tmp_path / "cache",
                num_workers=0,
            )
            return report.content

        assert content("a") == content("copy_of_a") and content("a", "b") == content(
            "ab"
        ) == content("copy_of_a", "b")
        assert (
            len(
                {
                    content("a"),
                    content("b"),
                    content("a", "b"),
                    content("b", "a"),
                    content("masked"),
                    content("unmasked"),
                }
            )
            == 6
        )

    def test_the_highest_token_id_is_known_and_found(self, tmp_path, renderer_of):
        file = jsonl(tmp_path / "a.jsonl", [answer("one"), answer("two"), answer("three")])
        dataset, report = open_dataset(
            RowSource(file), renderer_of("chatml"), cache_dir=tmp_path / "cache", num_workers=0
        )
        highest = max(int(dataset[i].tokens.max()) for i in range(3))
        sample, found = dataset.find_id(highest)
        assert report.highest_id == highest == found and highest in dataset[sample].tokens
        assert dataset.find_id(highest + 1) is None

    def test_a_torn_cache_is_made_anew(self, tmp_path, renderer_of):
        first, _ = self.open(tmp_path, renderer_of("chatml"), [answer("A")])
        tokens = first[0].tokens.tolist()
        (first.folder / "tokens.bin").write_bytes(b"\0" * 4)
        again, _ = open_dataset(
            RowSource(str(tmp_path / "rows.jsonl")),
            renderer_of("chatml"),
            cache_dir=tmp_path / "cache",
        )
        assert again[0].tokens.tolist() == tokens

    def test_ranks_together_build_once(self, tmp_path, renderer_of, monkeypatch):
        calls = []
        monkeypatch.setattr("retool.data.cache._build", _counting(calls))
        path = jsonl(tmp_path / "rows.jsonl", [answer(str(i)) for i in range(50)])
        found = []
        renderer = renderer_of("chatml")
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    open_dataset(RowSource(path), renderer, cache_dir=tmp_path / "cache")
                )
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1 and [len(dataset) for dataset, _ in found] == [50] * 4

    def test_a_run_that_waits_for_another_ones_cache_says_so(
        self, tmp_path, renderer_of, monkeypatch, caplog
    ):
        monkeypatch.setattr("retool.data.cache.SECONDS_TO_WAIT_UNSAID", 0.05)
        source = RowSource(jsonl(tmp_path / "rows.jsonl", [answer("A")]))
        renderer = renderer_of("chatml")
        first_is_at_work = threading.Event()
        go_on = threading.Event()

        def slowly(rows):
            first_is_at_work.set()
            assert go_on.wait(30)

        made = []

        def first_run():
            made.append(
                open_dataset(source, renderer, cache_dir=tmp_path / "cache", progress=slowly)
            )

        thread = threading.Thread(target=first_run)
        thread.start()
        assert first_is_at_work.wait(30)
        # The first goes on as soon as the second has said that it waits.
        monkeypatch.setattr(
            "retool.data.cache.log.warning",
            lambda text, folder: (made.append(text % folder), go_on.set()),
        )
        second, report = open_dataset(source, renderer, cache_dir=tmp_path / "cache")
        thread.join()
        said, (first, first_report) = made
        assert "another process is making the token cache" in said
        assert first.folder == second.folder and report == first_report

    def test_worker_processes_make_the_same(self, tmp_path, renderer_of, monkeypatch):
        rows = [answer("word " * (i % 17)) for i in range(900)]
        alone, report = self.open(tmp_path, renderer_of("chatml"), rows, num_workers=0)
        monkeypatch.setattr(tokenise, "INLINE_CHUNKS", 1)
        done = []
        together, other = open_dataset(
            RowSource(str(tmp_path / "rows.jsonl")),
            renderer_of("chatml"),
            cache_dir=tmp_path / "other",
            num_workers=2,
            progress=done.append,
        )
        assert other == report and done[-1] == 900 and done == sorted(done)
        assert together.lengths.tolist() == alone.lengths.tolist()
        assert all(
            together[i].tokens.tolist() == alone[i].tokens.tolist() for i in range(0, 900, 37)
        )

    def test_splits_are_counted(self, tmp_path, renderer_of, chat_row):
        dataset, report = self.open(tmp_path, renderer_of("qwen3", history="split"), [chat_row])
        assert (len(dataset), report.rows, report.split) == (2, 1, 1)
        assert dataset.origin(0) == dataset.origin(1) == (0, 0)

    def test_users_rows(self, tmp_path, renderer_of):
        (tmp_path / "mine.py").write_text(
            "def rows(path):\n    for line in open(path):\n        q, a = line.strip().split('|')\n"
            "        yield {'messages': [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': a}]}\n"
        )
        (tmp_path / "data.txt").write_text("Hi|Hello\nBye|Ciao\n")
        dataset, _ = open_dataset(
            RowSource(
                str(tmp_path / "data.txt"),
                function_file=str(tmp_path / "mine.py"),
                function_name="rows",
            ),
            renderer_of("chatml"),
            cache_dir=tmp_path / "c",
        )
        assert len(dataset) == 2

    def test_bad_choices(self, tmp_path, renderer_of):
        with pytest.raises(ValueError, match=r"data\.truncation=middle"):
            LengthLimit(truncation="middle")
        with pytest.raises(ValueError, match="max_length=1"):
            LengthLimit(1)
        with pytest.raises(ValueError, match=r"data\.multiturn\.history=keep"):
            renderer_of("chatml", history="keep")
        source = RowSource(
            jsonl(tmp_path / "rows.jsonl", [answer("A")]), RowFormat(multiturn=False)
        )
        with pytest.raises(ValueError, match="no column 'prompt'"):
            open_dataset(source, renderer_of("chatml"), cache_dir=tmp_path / "cache")


def _counting(calls):
    from retool.data.cache import _build

    def build(*args):
        calls.append(args[0])
        return _build(*args)

    return build


@pytest.mark.slow
def test_all_of_gsm8k(qwen_tokenizer, tmp_path):
    from retool.data.render.renderer import Renderer

    dataset, report = open_dataset(
        RowSource(str(real("gsm8k-tool-sft/train.parquet"))),
        Renderer(qwen_tokenizer),
        LengthLimit(max_length=16384),
        cache_dir=tmp_path,
    )
    assert (report.rows, report.samples, len(dataset)) == (7378, 7378, 7378)
    # As the data's own description says
    assert np.median(dataset.lengths) == pytest.approx(466, rel=0.02)
    assert np.percentile(dataset.lengths, 95) == pytest.approx(703, rel=0.02)
    assert steps_per_epoch(len(dataset), 16) == 461
