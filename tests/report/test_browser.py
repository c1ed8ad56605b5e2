"""The page in a real headless Chromium: it draws, filters and compares, on a phone and in the dark,
and runs nothing but itself.
"""

from __future__ import annotations

import http.server
import json
import math
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.files.html import write_page
from retool.metrics.transcripts import Segment, Transcript, read_transcripts, write_transcripts
from retool.report.page import make_page
from retool.report.runs import read_run
from tests.report.browser import Browser
from tests.report.conftest import rl_run, sft_run, write_metrics

EVIL = "</script><img src=x onerror=\"document.title='owned';window.owned=1\"><!-- ]]> &lt;b&gt; \u2028 \u2029 \u202e \x1b[31m \x00 \ud800 '\"`${1}"
WIDTHS = [(1280, False), (1280, True), (390, False), (390, True)]
INK = "getComputedStyle(document.body).backgroundColor"
DRAWN = """return [...document.querySelectorAll(arguments[0] + ' canvas')].map(c => {
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
    for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })"""


def page_of(path: Path, *folders: Path, **options: Any) -> Path:
    write_page(
        make_page([read_run(folder, folder.name) for folder in folders], **options), path, "--out"
    )
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sft")
    return page_of(
        root / "page.html", sft_run(root / "one"), sft_run(root / "two", lr=3e-5, seed=1)
    )


@pytest.fixture(scope="module")
def dapo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rl")
    return page_of(root / "page.html", rl_run(root / "dapo"))


def opened(browser: Browser, page: Path, width: int = 1280, dark: bool = False) -> None:
    browser.open(page, width, dark=dark)
    browser.wait("document.documentElement.dataset.ready")


def text(browser: Browser, selector: str) -> str:
    return browser.run("return document.querySelector(arguments[0]).innerText", selector)


@pytest.mark.parametrize(("width", "dark"), WIDTHS)
def test_both_pages_fit_and_draw_at_each_width_and_theme(
    browser: Browser, compared: Path, dapo: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    """With RETOOL_PICTURES set to a folder, each section is left there as a picture to look at."""
    pictures = Path(os.environ.get("RETOOL_PICTURES") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    for page in (compared, dapo):
        opened(browser, page, width, dark)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        light = browser.run(f"return {INK}.match(/\\d+/g).map(Number)[0]")
        assert light < 60 if dark else light > 200
        for section in browser.run(
            "return [...document.querySelectorAll('section')].map(s => s.id)"
        ):
            browser.run("document.getElementById(arguments[0]).scrollIntoView()", section)
            browser.wait(
                f"[...document.querySelectorAll('#{section} .plot')].every(p => !p.clientWidth || p.getBoundingClientRect().top > 1200 || p.firstChild)"
            )
            shot = (
                pictures / f"{page.parent.name}-{section}-{width}-{'dark' if dark else 'light'}.png"
            )
            browser.picture(shot)
            assert shot.stat().st_size > 8_000
        drawn = browser.run(DRAWN, "#curves .charts")
        assert len(drawn) >= 5 and min(drawn) > 500 and min(browser.run(DRAWN, "#time")) > 3000
        over = browser.run(
            "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, .plot')).map(e => e.className)"
        )
        assert over == [] and browser.log() == []


def test_curves_follow_smoothing_axis_scale_and_runs(browser: Browser, compared: Path) -> None:
    opened(browser, compared)
    browser.wait("document.querySelector('[data-metric=\"train/loss\"] canvas')")
    plot = "document.querySelector('[data-metric=\"train/loss\"] .plot').uplot"
    change = "const e = document.querySelector(arguments[0]); if (arguments[1] === null) e.click(); else { e.value = arguments[1]; e.dispatchEvent(new Event('input')); }"
    raw, smooth = browser.run(f"return [{plot}.data[1], {plot}.data[2]]")
    total = mass = 0.0
    weight = 0.6 ** (100 / 250)  # of 250 steps: the same part of the chart as of 100 at 0.6
    for value, shown in zip(raw, smooth, strict=True):  # the average written out again
        total = weight * total + (1 - weight) * value
        mass = weight * mass + 1 - weight
        assert shown == pytest.approx(total / mass)
    assert browser.run(f"return {plot}.data.length") == 5  # steps; two runs, measured and smoothed
    browser.run(change, "#smooth", "0")
    assert (
        browser.run(f"return {plot}.data.length") == 3
        and browser.run(f"return {plot}.data[1]") == raw
    )
    browser.run(change, "#log", None)
    assert browser.run(f"return {plot}.scales.y.distr") == 3
    browser.run(
        "[...document.querySelectorAll('.group button')].find(b => b.textContent === 'tokens').click()"
    )
    assert browser.run(f"return {plot}.data[0].slice(0, 3)") == [262_144, 524_288, 786_432]
    browser.run(
        "[...document.querySelectorAll('.group button')].find(b => b.textContent === 'hours').click()"
    )
    hours = browser.run(f"return {plot}.data[0].at(-1)")
    assert 0.2 < hours < 0.4
    browser.run(change, "[data-run='1']", None)
    assert browser.run(f"return {plot}.data.length") == 2
    assert "at the end" in text(browser, '[data-metric="train/loss"] .reads')
    browser.run(f"{plot}.setCursor({{left: 50, top: 50}})")
    assert "at hours of training" in text(browser, '[data-metric="train/loss"] .reads')
    browser.run("document.querySelector('#all').open = true")
    browser.wait("document.querySelectorAll('#all .chart').length > 15")
    browser.run(change, "#all input", "timing_s/opt")
    assert browser.run(
        "return [...document.querySelectorAll('#all .chart')].filter(c => c.clientWidth).map(c => c.dataset.metric)"
    ) == ["timing_s/optimizer"]


def test_tables_compare_runs(browser: Browser, compared: Path) -> None:
    opened(browser, compared)
    best = browser.run(
        "return [...document.querySelectorAll('#validation td.best')].map(c => c.parentNode.firstChild.textContent + ':' + c.textContent)"
    )
    assert len(best) >= 4 and best[0].startswith("200:0.6")
    heads = browser.run(
        "return [...document.querySelectorAll('#validation thead tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    assert heads == [
        ["", "Validation loss", "Validation perplexity"],
        ["step", "one", "two", "one", "two"],
    ], "runs stand side by side"
    rows = "return [...document.querySelectorAll('#configuration tbody tr')].filter(r => r.clientHeight).map(r => r.innerText.replace(/\\t/g, ' | '))"
    assert browser.run(rows) == [
        "optim.lr | 1e-05 | 3e-05 | 1e-05",
        "trainer.experiment_name | one | two | test",
    ]
    browser.run("document.querySelector('#only').click()")
    assert len(browser.run(rows)) > 50
    browser.run(
        "const e = document.querySelector('#configuration [type=search]'); e.value = 'SAVE_F'; e.dispatchEvent(new Event('input'))"
    )
    assert browser.run(rows) == ["trainer.save_freq | -1 | -1 | -1"]
    seconds = sum(
        sft["timing_s/forward_backward"]
        for sft in map(
            json.loads, (compared.parent / "one" / "metrics.jsonl").read_text().splitlines()
        )
        if "timing_s/step" in sft
    )
    row = browser.run(
        "return [...document.querySelectorAll('#time tbody tr')].find(r => r.innerText.startsWith('forward')).innerText"
    )
    assert f"{seconds / 60:.1f}" in row
    assert "in all, min" in text(browser, "#time thead")


def test_a_run_has_its_colour_in_every_chart(browser: Browser, compared: Path) -> None:
    opened(browser, compared)
    inks = set()
    for name in ("train/loss", "val/loss", "perf/max_memory_allocated_gb"):
        card = f'[data-metric="{name}"]'
        browser.run("document.querySelector(arguments[0]).scrollIntoView()", card)
        browser.wait(f"document.querySelector('{card} canvas')")
        marks = browser.run(
            "return [...document.querySelectorAll(arguments[0] + ' .reads .dot')].map(d => [d.nextSibling.textContent.split(',')[0].trim(), getComputedStyle(d).getPropertyValue('--dot')])",
            card,
        )
        strokes = browser.run(
            f"return document.querySelector('{card} .plot').uplot.series.slice(1).filter(s => s.width === 2).map(s => s.stroke())"
        )
        assert len(set(strokes)) == 2 and len(strokes) == len(marks)
        inks |= {(run, ink) for run, ink in marks} | set(zip("12" * 9, strokes, strict=False))
        assert {run for run, _ in marks} == {"one", "two"}
    assert len({ink for run, ink in inks if run == "one"}) == 1


def test_runs_are_timed_on_the_same_axes(browser: Browser, tmp_path: Path) -> None:
    quick = sft_run(tmp_path / "quick", steps=30)
    slow = sft_run(tmp_path / "slow", steps=60, seed=1)
    opened(browser, page_of(tmp_path / "page.html", quick, slow))
    browser.run("document.querySelector('#time').scrollIntoView()")
    browser.wait("document.querySelectorAll('#time canvas').length === 2")
    scales = browser.run(
        "return [...document.querySelectorAll('#time .plot')].map(p => ['x', 'y'].flatMap(s => [p.uplot.scales[s].min, p.uplot.scales[s].max]))"
    )
    assert scales[0] == scales[1] and scales[0][:2] == [1, 61], scales
    dots = browser.run(
        "return [...document.querySelectorAll('#time .reads')].map(r => [...r.querySelectorAll('i')].map(i => i.firstChild.className + i.textContent.split(' ')[0]))"
    )
    assert set(dots[0]) < set(dots[1]), "a phase has its colour in every run"


def test_what_stands_in_rows_is_level(browser: Browser, dapo: Path) -> None:
    opened(browser, dapo)
    browser.wait("document.querySelectorAll('#curves canvas').length >= 3")
    level = "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect()).map(r => [Math.round(r.top), Math.round(r.bottom)])"
    values = browser.run(level, ".tile b")
    assert len(values) >= 7 and len({top for top, _ in values}) == 1
    plots = browser.run(level, "#curves > .charts > .chart:nth-child(-n+3) canvas")
    assert len(plots) == 3 and len({bottom for _, bottom in plots}) == 1


def test_the_top_says_what_was_trained_on_what(browser: Browser, dapo: Path) -> None:
    opened(browser, dapo)
    top = text(browser, "main").split("Curves")[0]
    for said in ("sft/global_step_62/huggingface", "questions.parquet", "aime_2024.parquet"):
        assert said in top
    rows = browser.run(
        "return [...document.querySelectorAll('#configuration tbody tr')].filter(r => r.clientHeight).map(r => r.cells[0].innerText)"
    )
    assert {"actor_rollout_ref.model.path", "data.train_files"} <= set(rows)


def test_a_phone_sees_that_there_is_more(browser: Browser, dapo: Path) -> None:
    opened(browser, dapo, 390)
    more = "return ['more-left', 'more-right'].map(c => document.querySelector('#nav').classList.contains(c))"
    assert browser.run(more) == [False, True]
    assert browser.run("return document.querySelector('.folded').open") is False
    browser.run("document.querySelector('#configuration').scrollIntoView()")
    browser.wait("document.querySelector('#nav').classList.contains('more-left')")
    current = "return document.querySelector('#nav [aria-current]').innerText"
    assert browser.run(current) == "Configuration"
    opened(browser, dapo)
    assert browser.run("return document.querySelector('.folded').open") is True
    assert browser.run(more) == [False, False]


def test_on_paper_charts_fit_and_controls_stay_away(browser: Browser, compared: Path) -> None:
    opened(browser, compared)
    browser.wait("document.querySelectorAll('#curves canvas').length >= 3")
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    try:
        hidden = "return [...document.querySelectorAll('#nav, #theme, .bar, .u-over')].filter(e => e.clientHeight).length"
        assert browser.run(hidden) == 0
        narrow = "document.querySelectorAll('.chart').forEach(c => { c.style.width = '200px'; });"
        fits = "return [...document.querySelectorAll('canvas')].every(c => c.clientWidth <= c.closest('.plot').clientWidth)"
        assert browser.run(narrow + fits), (
            "columns of the paper, which was not there when it was drawn"
        )
    finally:
        browser.devtools("Emulation.setEmulatedMedia", media="")


def test_theme_button(browser: Browser, compared: Path) -> None:
    opened(browser, compared)
    before = browser.run(f"return {INK}")
    browser.run("document.querySelector('#theme').click()")
    dark = browser.run(f"return {INK}")
    browser.run("document.querySelector('#theme').click()")
    assert browser.run(f"return {INK}") == before != dark


def shown(browser: Browser) -> list[str]:
    return browser.run(
        "return [...document.querySelectorAll('#list [data-index] .first')].map(e => e.innerText)"
    )


def put(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input'))",
            name.replace("_", "-"),
            value,
        )


def test_transcripts_are_filtered(browser: Browser, dapo: Path) -> None:
    records: list[dict[str, Any]] = [
        r for r in read_transcripts(dapo.parent / "dapo") if r is not None
    ]
    opened(browser, dapo)
    assert text(browser, "#count") == f"{len(records)} of {len(records)}"
    for filters, keep in (
        ({"stop": "length"}, lambda r: r["stop"] == "length"),
        ({"reward_from": "0.5"}, lambda r: r["reward"] >= 0.5),
        ({"reward_to": "-0.6"}, lambda r: r["reward"] <= -0.6),
        ({"step_from": "7", "step_to": "9"}, lambda r: 7 <= r["step"] <= 9),
        ({"split": "val"}, lambda r: r["split"] == "val"),
        (
            {"source": "aime_2024", "stop": "no_call"},
            lambda r: r["data_source"] == "aime_2024" and r["stop"] == "no_call",
        ),
        ({"words": "BOXED{24}"}, lambda r: "boxed{24}" in r["segments"][-1]["text"]),
    ):
        put(browser, **filters)
        expected = [r for r in records if keep(r)]
        assert text(browser, "#count") == f"{len(expected)} of {len(records)}" and 0 < len(
            expected
        ) < len(records), filters
        assert len(shown(browser)) == min(len(expected), 100)
        put(browser, **dict.fromkeys(filters, ""))
    put(browser, order="low")
    assert "−0.6" in shown(browser)[0]
    put(browser, order="old", words="nothing has this")
    assert "Nothing matches" in text(browser, "#list") and "No transcript" in text(
        browser, "#detail"
    )


def test_a_transcript_token_by_token(browser: Browser, dapo: Path) -> None:
    opened(browser, dapo)
    put(browser, order="old")
    record = next(r for r in read_transcripts(dapo.parent / "dapo") if r is not None)
    detail = text(browser, "#detail")
    assert "calls code_interpreter" in detail and "s, t = symbols('s t')" in detail, (
        "code is laid out, not a line of JSON"
    )
    assert f"ended by {record['stop']}" in detail and "[(2.5, 0.4)]" in detail
    spans = "[...document.querySelectorAll('#detail .tokens span')]"
    tokens = [token for segment in record["segments"] for token in segment["tokens"]]
    logp = [
        value
        for segment in record["segments"]
        for value in segment.get("logp", [None] * len(segment["tokens"]))
    ]
    for mode in ("mask", "logp", "advantage"):
        browser.run("document.querySelector(`[data-mode=${arguments[0]}]`).click()", mode)
        assert browser.run(f"return {spans}.map(s => s.textContent)") == tokens
        kinds = browser.run(f"return {spans}.map(s => s.className)")
        if mode == "logp":
            levels = [
                sum(-value > limit for limit in (0.1, 0.7, 1.6, 3, 5))
                if value is not None
                else None
                for value in logp
            ]
            assert [kind.replace(" nl", "") for kind in kinds] == [
                "m0" if n is None else f"lp{n}" if n else "" for n in levels
            ]
        elif mode == "mask":
            assert [kind.startswith("m1") for kind in kinds] == [
                value is not None for value in logp
            ]
        else:
            sign = "ap" if record["segments"][0]["advantage"] > 0 else "an"
            assert all(
                kind.startswith(sign if value is not None else "m0")
                for kind, value in zip(kinds, logp, strict=True)
            )
    browser.run(f"{spans}[3].click()")
    said = text(browser, "#inspect")
    assert (
        json.dumps(tokens[3]) in said
        and "written by the model" in said
        and f"({math.exp(logp[3]):.1%})".replace("%", " %") in said
        and "advantage" in said
    )
    step = "document.querySelector('#detail .tokens').dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))"
    browser.run(step, "ArrowRight")
    assert json.dumps(tokens[4]) in text(browser, "#inspect"), "the keyboard goes along, too"
    browser.run("document.querySelector('#next').click()")
    assert (
        browser.run("return document.querySelector('#list [aria-current=true]').dataset.index")
        == "1"
    )
    assert browser.log() == []


def test_hostile_runs_stay_text(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "</title><img src=x onerror=alert(1)>".replace("/", "∕")
    write_metrics(
        folder,
        [
            {
                "step": s,
                EVIL: 1.0 * s,
                f"val-core/{EVIL}/acc/mean@4": 0.5,
                "train/loss": 1.0,
                f"timing_s/{EVIL}": 1,
                "timing_s/step": 2,
            }
            for s in (1, 2)
        ],
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"trainer": {EVIL: EVIL.replace("\ud800", "")}}), errors="replace"
    )
    call = (
        "<tool_call>"
        + json.dumps({"name": EVIL, "arguments": {EVIL: EVIL}})
        + "</tool_call><tool_call>{broken"
        + EVIL
        + "</tool_call>"
    )
    segments = [
        Segment("assistant", EVIL + call, [EVIL, call], [-1.0, -2.0], 1.0, True),
        Segment(EVIL, EVIL),
    ]
    write_transcripts(
        folder,
        "train_000001",
        [Transcript(1, EVIL, segments, 1.0, EVIL, 2, EVIL, EVIL, EVIL, {EVIL: EVIL})],
    )
    page = page_of(tmp_path / "page.html", folder)
    opened(browser, page)
    browser.run("document.querySelector('#all').open = true")
    browser.run("document.querySelector('#only').click()")
    for mode in ("mask", "logp", "advantage", "read"):
        browser.run("document.querySelector(`[data-mode=${arguments[0]}]`).click()", mode)
        browser.run("document.querySelector('#detail .tokens span')?.click()")
    time.sleep(0.3)
    assert browser.run(
        "return [window.owned, document.querySelectorAll('img, iframe, object, embed').length, performance.getEntriesByType('resource').length]"
    ) == [None, 0, 0]
    assert "owned" not in browser.run("return document.title") and browser.log() == []
    detail = text(browser, "#detail")
    assert (
        detail.count("<img src=x onerror=") >= 6
        and "␛[31m" in detail
        and "⟨U+202E⟩" in detail
        and "⟨U+2028⟩" in detail
    )
    assert not set("\x1b\x00\u202e\u2028") & set(
        browser.run(
            "return document.body.textContent.replace(document.getElementById('data').textContent, '')"
        )
    )


def test_the_policy_holds_against_a_script_in_the_page(browser: Browser, tmp_path: Path) -> None:
    """What would get past the escaping still reaches no network and runs no code of its own."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        page = page_of(tmp_path / "page.html", sft_run(tmp_path / "run", steps=3))
        spoilt = page.read_text().replace(
            "<main",
            f"<img src='{address}/img' onerror='window.owned=1'><script>window.owned=2</script>"
            f"<link rel=stylesheet href='{address}/css'><script src='{address}/js'></script><main",
            1,
        )
        page.write_text(spoilt)
        opened(browser, page)
        browser.run(
            f"fetch('{address}/fetch').catch(() => 0); new Image().src = '{address}/image'; navigator.sendBeacon('{address}/beacon')"
        )
        time.sleep(0.5)
        server.shutdown()
    assert asked == [] and browser.run("return window.owned ?? null") is None
    assert sum("Content Security Policy" in line for line in browser.log()) >= 6


def test_a_long_run_opens_quickly(browser: Browser, tmp_path: Path) -> None:
    rng = random.Random(0)
    write_metrics(
        tmp_path / "long",
        [
            {
                "step": s,
                **{f"group/metric_{k}": rng.random() for k in range(20)},
                "train/loss": 1 / s,
                "val/loss": 2 + abs(s - 700),
            }
            for s in range(1, 2001)
        ],
    )
    tokens = ["word "] * 16_000
    long = Transcript(
        1, "q", [Segment("assistant", "".join(tokens), tokens, [-0.5] * 16_000, 1.0, True)], 1.0
    )
    write_transcripts(tmp_path / "long", "train_000001", [long] * 6)
    page = page_of(tmp_path / "page.html", tmp_path / "long")
    begun = time.monotonic()
    opened(browser, page, 390)
    assert time.monotonic() - begun < 20
    rows = browser.run(
        "return [...document.querySelectorAll('#validation tbody tr')].map(r => r.cells[0].innerText)"
    )
    assert rows == ["700", *(f"{step:,}" for step in range(1901, 2001))], "the best and the last"
    begun = time.monotonic()
    browser.run("document.querySelector('[data-mode=logp]').click()")
    assert (
        browser.run("return document.querySelectorAll('#detail .tokens span').length") == 16_000
        and time.monotonic() - begun < 15
    )


def test_a_run_that_has_just_begun(browser: Browser, tmp_path: Path) -> None:
    write_metrics(tmp_path / "new", [])
    write_metrics(
        tmp_path / "one",
        [
            {
                "step": 1,
                "train/loss": 2.0,
                "timing_s/step": 1.0,
                "timing_s/data": 0.1,
                "val/loss": 2.5,
                "critic/acc/mean": 0,
            }
        ],
    )
    opened(browser, page_of(tmp_path / "new.html", tmp_path / "new"))
    assert "no metrics yet" in text(browser, "main")
    opened(browser, page_of(tmp_path / "one.html", tmp_path / "one", tmp_path / "new"))
    browser.run("document.querySelector('#time').scrollIntoView()")
    browser.wait("document.querySelectorAll('canvas').length >= 3")
    scale = "return (({min, max}) => [min, max])(document.querySelector(`[data-metric='${arguments[0]}'] .plot`).uplot.scales.y)"
    write_metrics(tmp_path / "late", [{"step": 500, "train/loss": 2.0}])
    opened(browser, page_of(tmp_path / "late.html", tmp_path / "late"))
    browser.wait("document.querySelector('canvas')")
    assert browser.run(
        "return (({min, max}) => [min, max])(document.querySelector('.plot').uplot.scales.x)"
    ) == [499, 501], "around a single point stand its neighbours"
    opened(browser, tmp_path / "one.html")
    browser.run("document.querySelector('#time').scrollIntoView()")
    browser.wait("document.querySelectorAll('canvas').length >= 3")
    assert browser.run(scale, "train/loss") == [1.8, 2.2] and browser.run(
        scale, "critic/acc/mean"
    ) == [0, 0.1]
    assert browser.log() == []
