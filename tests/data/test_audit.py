"""The audit: its counts against what training makes of the same rows, and hostile text that must
stay text.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tracemalloc
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from rich.console import Console

from retool.checkpoint.hf.side_files import write_template
from retool.data.__main__ import main
from retool.data.audit.audit import audit
from retool.data.audit.counts import KEPT_REFUSALS, Tally, percentile
from retool.data.audit.page import bars, page
from retool.data.audit.samples import KINDS
from retool.data.audit.summary import summary
from retool.data.audit.terminal import clean, coloured, show_audit
from retool.data.loader import open_dataset
from retool.data.read.source import RowSource
from retool.data.tokenise import LengthLimit
from retool.files.html import LOOK, embed
from tests.ranks import RankContext

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- [bold red]markup[/] \x1b[31mred \x1b]0;owned\x07 \u2028 \u2029 \u202e &lt;"


def rows(n=20):
    made = []
    for i in range(n):
        messages = [
            {"role": "user", "content": f"Question {i}"},
            {"role": "assistant", "content": "word " * (i % 7 + 1) + "end."},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "More"},
                {"role": "assistant", "content": "Less", "loss_mask": int(i % 2)},
            ]
        made.append({"messages": messages})
    return made


def jsonl(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.fixture
def hostile(tmp_path, tool_row):
    """Rows whose every text is hostile, refused ones among them, in a file with a hostile name."""
    tool_row["messages"][3]["content"] = EVIL
    good = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]}
    bad = [
        {"messages": [{"role": EVIL, "content": EVIL}]},
        {"messages": [{"role": "user", "content": [{"type": EVIL}]}]},
    ]
    name = "[red]<img src=x onerror=alert(1)>.jsonl"
    return jsonl(tmp_path / name, [good, tool_row, *bad])


@pytest.fixture
def model(tmp_path, tokenizer, renderer_of):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    write_template(folder, renderer_of("hermes").template)
    return str(folder)


def terminal(found, **kwargs):
    out = io.StringIO()
    show_audit(found, Console(file=out, width=100, **kwargs))
    return out.getvalue()


def test_counts_are_what_training_gets(tmp_path, renderer_of):
    path = jsonl(tmp_path / "rows.jsonl", rows(600))
    renderer = renderer_of("chatml")
    for limit in (
        LengthLimit(),
        LengthLimit(40, "right"),
        LengthLimit(40, "left"),
        LengthLimit(40, "drop"),
    ):
        dataset, report = open_dataset(
            RowSource(path), renderer, limit, cache_dir=tmp_path / "cache", num_workers=0
        )
        tally = audit(RowSource(path), renderer, limit, num_workers=0).tally
        for name in (
            "rows",
            "samples",
            "tokens",
            "trained_tokens",
            "truncated",
            "dropped_long",
            "dropped_untrained",
        ):
            assert getattr(tally, name) == getattr(report, name), name
        assert max(tally.lengths) == report.longest
        if limit == LengthLimit():
            assert Counter(dataset.lengths.tolist()) == tally.lengths
            assert report.truncated + report.dropped_long == 0
        else:
            assert report.truncated + report.dropped_long > 50
    assert tally.turns == Counter({1: 400, 2: 200}) and tally.roles == Counter(
        user=800, assistant=800
    )


def test_refusals_are_counted_by_kind_and_listed(tmp_path, renderer_of):
    bad = [{"messages": [{"role": f"bot{i}", "content": "x"}]} for i in range(3)] + [
        {"messages": [{"role": "user", "content": "x"}]}
    ]
    found = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", [*rows(5), *bad])),
        renderer_of("chatml"),
        LengthLimit(max_length=30),
        num_workers=0,
    )
    tally = found.tally
    assert (
        tally.rows == 9
        and tally.refused == 4 + tally.refused_long
        and tally.samples == 9 - tally.refused
        and tally.refused_long > 0
    )
    assert tally.reasons["unknown role …"] == 3
    assert sum(tally.reasons.values()) == tally.refused == len(tally.refusals)
    assert any("rows.jsonl, row 6, message 0: unknown role 'bot1'" in why for why in tally.refusals)
    assert (
        f"longer than {30}",
        f"{tally.refused_long} refused (data.truncation=error)",
    ) in summary(found)


def test_notes(tmp_path, renderer_of):
    made = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "\n\nHello"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Say <|im_start|>"},
                {"role": "assistant", "content": "No"},
            ]
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
    ]
    tally = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", made)), renderer_of("chatml"), num_workers=0
    ).tally
    assert (tally.piecewise_differs, tally.control_text, tally.empty_turns) == (1, 1, 1)


def test_tool_calls_by_name_and_split_history(tmp_path, renderer_of, tool_row):
    path = jsonl(tmp_path / "rows.jsonl", [tool_row])
    tally = audit(RowSource(path), renderer_of("hermes"), num_workers=0).tally
    assert tally.calls == Counter(calculator=3) and tally.calls_per_row == Counter({3: 1})
    tally = audit(RowSource(path), renderer_of("qwen3", history="split"), num_workers=0).tally
    assert (tally.rows, tally.split, tally.samples) == (1, 1, 3)


def test_calls_of_undeclared_tools_are_told(tmp_path, renderer_of, tool_row):
    tool_row["messages"][5]["tool_calls"][0]["function"]["name"] = "abacus"
    path = jsonl(tmp_path / "rows.jsonl", [tool_row])
    found = audit(RowSource(path), renderer_of("hermes"), num_workers=0)
    assert found.tally.undeclared == Counter(abacus=1)
    assert dict(summary(found))["calls of undeclared tools"] == "1 (abacus 1)"
    _, report = open_dataset(
        RowSource(path), renderer_of("hermes"), cache_dir=tmp_path / "cache", num_workers=0
    )
    assert (
        report.undeclared_calls == 1
        and "1 calls to tools that their row doesn't declare" in report.sentence()
    )


def test_arguments_may_have_any_names_and_values(tmp_path, renderer_of, tool_row):
    tool_row["messages"][5]["tool_calls"][0]["function"]["arguments"] = {
        "name": 5,
        "arguments": [None, 1.5],
        "function": {},
    }
    found = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", [tool_row])), renderer_of("hermes"), num_workers=0
    )
    assert found.tally.refused == 0 and '"name": 5' in "".join(
        text for text, _ in found.tally.shown[0].tokens
    )


def test_a_result_that_the_template_or_a_call_said_before_is_coloured_where_it_stands(
    tmp_path, renderer_of, tool_row
):
    """`6` inside `36`, and words of the template's own."""
    messages = tool_row["messages"]
    messages[0]["content"] = "user"
    messages[1]["content"] = "name"
    messages[3]["content"] = "12"
    messages[4]["content"] = " 0 "
    messages[6]["content"] = "6"
    (shown,) = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", [tool_row])), renderer_of("hermes"), num_workers=0
    ).tally.shown
    runs = [
        (KINDS[kind], "".join(text for text, _ in run))
        for kind, run in groupby(shown.tokens, key=lambda token: token[1])
    ]
    told = [(kind, text) for kind, text in runs if kind in ("context", "tool")]
    assert told == [
        ("context", "user"),
        ("context", "name"),
        ("tool", "12"),
        ("tool", "0"),
        ("tool", "6"),
    ]
    before = "".join(text for _, text in runs[: runs.index(("tool", "6"))])
    assert before.endswith("<tool_response>\n")


def test_rl_prompts(tmp_path, renderer_of):
    made = [
        {
            "prompt": [{"role": "user", "content": "Add 1 and 1."}],
            "reward_model": {"ground_truth": "2"},
        },
        {"prompt": "Add 1 and 1."},
        {"prompt": "Add 1 and 1.", "answer": "2"},
    ]
    found = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", made)), renderer_of("chatml"), num_workers=0
    )
    prompt = renderer_of("chatml").render_prompt(made[0]["prompt"])
    assert (
        found.prompts
        and found.tally.lengths == Counter({len(prompt): 3})
        and found.tally.refused == 0
    )
    assert not any("trained" in what for what, _ in summary(found))
    assert "RL prompts" in dict(summary(found))["rows"]


def test_workers_find_the_same(tmp_path, renderer_of, monkeypatch):
    monkeypatch.setattr("retool.data.tokenise.INLINE_CHUNKS", 1)
    monkeypatch.setattr("retool.data.tokenise.Spawn", RankContext)  # a worker that need not import
    path = jsonl(tmp_path / "rows.jsonl", rows(700))
    done = []
    alone = audit(RowSource(path), renderer_of("chatml"), num_workers=0)
    together = audit(RowSource(path), renderer_of("chatml"), num_workers=1, progress=done.append)
    assert vars(alone.tally) == vars(together.tally)
    assert done == sorted(done) and done[-1] == 700


@pytest.mark.parametrize("q", [0.05, 0.5, 0.95, 1.0])
def test_percentile_is_numpys(q):
    values = np.random.default_rng(1).integers(0, 50, 333)
    assert percentile(Counter(values.tolist()), q) == np.percentile(
        values, 100 * q, method="inverted_cdf"
    )


def test_bars_hold_everything():
    values = np.random.default_rng(2).integers(3, 1000, 500).tolist()
    found = bars(Counter(values))
    assert len(found) <= 32 and sum(count for *_, count in found) == 500
    for low, high, count in found:
        assert count == sum(low <= value <= high for value in values)
    assert bars(Counter({7: 2})) == [(7, 7, 2)] and bars(Counter()) == []


def test_colours_are_the_mask(tmp_path, renderer_of, tool_row, conversation):
    tool_row["messages"][7]["loss_mask"] = 0
    renderer = renderer_of("hermes")
    (shown,) = audit(
        RowSource(jsonl(tmp_path / "rows.jsonl", [tool_row])), renderer, num_workers=0
    ).tally.shown
    (sample,) = renderer.render(conversation(tool_row))
    assert "".join(text for text, _ in shown.tokens) == renderer.text(
        tool_row["messages"], tool_row["tools"]
    )
    assert [KINDS[kind] == "trained" for _, kind in shown.tokens] == sample.mask.tolist()
    by_kind = {
        name: "".join(text for text, kind in shown.tokens if KINDS[kind] == name) for name in KINDS
    }
    assert by_kind["context"] == "Be exact.How many pages?" and by_kind["tool"] == "24é84"
    assert by_kind["masked"] == "The answer is 42.<|im_end|>"
    assert "⟦Two sums.↵\n<tool_call>" in coloured(shown, brackets=True).plain
    assert "⟦" not in coloured(shown).plain


def test_shown_samples_are_what_truncation_leaves(tmp_path, renderer_of):
    path = jsonl(tmp_path / "rows.jsonl", rows(1))
    renderer = renderer_of("chatml")
    (whole,) = audit(RowSource(path), renderer, num_workers=0).tally.shown
    (right,) = audit(RowSource(path), renderer, LengthLimit(30, "right"), num_workers=0).tally.shown
    (left,) = audit(RowSource(path), renderer, LengthLimit(30, "left"), num_workers=0).tally.shown
    assert (
        right.tokens == whole.tokens[:30]
        and left.tokens == whole.tokens[-30:]
        and right.length == left.length == 30
    )


def test_terminal_gets_text_and_nothing_else(hostile, renderer_of):
    found = audit(RowSource(hostile), renderer_of("hermes"), num_workers=0)
    plain = terminal(found)
    assert "\x1b" not in plain and "\x07" not in plain and "\u202e" not in plain
    assert "[bold red]markup[/]" in plain and "[red]<img src=x" in plain
    coloured_out = terminal(found, force_terminal=True, color_system="standard")
    assert (
        "\x1b[31mred" not in coloured_out
        and "\x1b]" not in coloured_out
        and "\x07" not in coloured_out
    )
    assert set(re.findall(r"\x1b.", coloured_out)) == {"\x1b["}  # the styles of the report itself
    assert clean("a\x1b[1mb\nc\x00\u202e") == "a [1mb\nc  "


def test_page_is_self_contained_and_data_stays_data(hostile, renderer_of):
    html = page(audit(RowSource(hostile), renderer_of("hermes"), num_workers=0))
    assert (
        "<img" not in html
        and html.count("</script>") == 2
        and "\u2028" not in html
        and "\u2029" not in html
    )
    assert not re.search(r"""(src|href|url|@import)\s*[=(]\s*["']?\s*(https?:)?//""", html)
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    texts = ["".join(sample["texts"]) for sample in data["samples"]]
    assert len(texts) == 2 and all(EVIL in text for text in texts)
    assert data["refused"] == 2 and any("</script>" in why for why in data["refusals"])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert (
        policy is not None
        and policy[1].startswith("default-src 'none';")
        and "unsafe" not in policy[1]
    )
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert source is not None
        assert (
            f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source[1].encode()).digest()).decode()}'"
            in policy[1]
        )


def test_page_has_the_reports_look_and_says_what_was_audited(tmp_path, renderer_of):
    path = jsonl(tmp_path / "rows.jsonl", rows(50))
    limit = LengthLimit(40, "drop")
    found = audit(RowSource(path), renderer_of("chatml"), limit, num_workers=0)
    html = page(found, "Qwen/Qwen2.5-0.5B-Instruct")
    for shared in ("look.css", "numbers.js", "elements.js", "shell.js"):
        assert (LOOK / shared).read_text().strip() in html, shared
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    assert data["model"] == "Qwen/Qwen2.5-0.5B-Instruct" and data["files"] == [path]
    length, share, *of_rows = data["histograms"]
    assert (length["unit"], length["of"], length["limit"]) == ("tokens", "sample", 40)
    assert sum(count for *_, count in length["bars"]) == 50
    assert share["limit"] is None and all(shown["of"] == "row" for shown in of_rows)
    assert length["says"].startswith(f"{min(found.tally.lengths)} to {max(found.tally.lengths)},")
    tiles = {what: much for what, much, _ in data["tiles"]}
    assert tiles["rows"] == "50" and tiles["samples"] == f"{found.tally.samples}"
    assert data["dropped"] == found.tally.dropped_long > 0


def test_embedded_json_cannot_close_its_element():
    text = embed({"x": EVIL})
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == {"x": EVIL}


def test_page_in_a_browser(tmp_path, hostile, renderer_of):
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if browser is None:
        pytest.skip("there is no Chromium")
    path = tmp_path / "audit.html"
    path.write_text(page(audit(RowSource(hostile), renderer_of("hermes"), num_workers=0)))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dom = done.stdout
    assert "<title>Audit: [red]&lt;img src=x onerror=alert(1)&gt;.jsonl</title>" in dom
    assert (
        "2 of 4 rows can't be used." in dom
        and "2 of 2 samples, chosen at random from 4 rows" in dom
    )
    assert dom.count('<details class="card sample"') == 2 and not re.search(r"<img", dom)
    # The first sample is open
    assert len(re.findall(r'<span class="trained" title="token', dom)) > 3
    # The policy lets the page's own script work
    assert dom.count('class="histogram"') == 4 and re.search(r'style="[^"]*height: \d', dom)
    # Histograms have counts, and the length's says where samples are too long
    assert dom.count('class="row"') >= 8 and "max length 4,096 →" in dom
    assert 'id="nav"' in dom and 'href="#samples"' in dom, "it has the report's frame"
    assert (
        "Refused to" not in done.stderr
        and "Uncaught" not in done.stderr
        and "violates" not in done.stderr
    )


def test_command_line(tmp_path, model, capsys):
    good = jsonl(tmp_path / "good.jsonl", rows(5))
    assert main(["audit", good, "--model", model, "--html", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr().out
    assert "refused" in out and "⟦" in out and (tmp_path / "a.html").exists()
    bad = jsonl(tmp_path / "bad.jsonl", [*rows(2), {"messages": []}])
    assert main(["audit", good, bad, "--model", model, "--show", "0"]) == 1
    assert "⟦" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["audit", good, "--model", model, "--template-date", "yesterday"])
    assert "yesterday is no date: write it as 2026-11-29" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(
        "def rows(path):\n    yield {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}\n"
    )
    for wrong, said in {
        str(tmp_path / "none.jsonl"): "doesn't exist",
        f"{good} --model {tmp_path}": "",
        f"{good} --messages-key text": "Name the right one with --messages-key.",
        f"{good} --single-turn": "Name the right one with --prompt-key.",
        f"{good} --tools-key data.name/x": "'data.name/x'; it has messages. Name the right one with --tools-key.",
        f"{good} --max-length 1": "--max-length=1 must be at least 2",
        f"{good} --chat-template none.jinja": "audit: --chat-template=none.jinja: there is no such file",
        f"{tmp_path / 'mine.py'}": "a function of yours (--rows).",
    }.items():
        assert main(["audit", "--model", model, *wrong.split()]) == 2
        told = capsys.readouterr().err
        assert told.startswith("audit: ") and said in told
    assert main(["audit", bad, "--model", model, "--rows", f"{tmp_path / 'mine.py'}:rows"]) == 0
    single = jsonl(tmp_path / "single.jsonl", [{"q": "a", "a": "b"}])
    assert (
        main(
            [
                "audit",
                single,
                "--model",
                model,
                "--single-turn",
                "--prompt-key",
                "q",
                "--response-key",
                "a",
            ]
        )
        == 0
    )


def test_a_tally_keeps_no_rows():
    total = Tally()
    for i in range(20):
        part = Tally(rows=100)
        for j in range(100):
            part.refuse(f"f, row {i * 100 + j}: unknown role 'x{j}'" + "y" * 10_000)
        total.add(part, 3)
    assert total.refused == total.rows == 2000 and len(total.refusals) == KEPT_REFUSALS
    assert max(map(len, total.refusals)) < 500 and len(total.reasons) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path, renderer_of):
    def peak(n):
        path = jsonl(tmp_path / f"{n}.jsonl", rows(60) * (n // 60))
        tracemalloc.start()
        found = audit(RowSource(path), renderer_of("chatml"), num_workers=0)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.tally.rows == n
        return used

    peak(600)  # what is loaded once
    assert peak(12_000) < peak(3_000) + 1_000_000
