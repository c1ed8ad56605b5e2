"""Forty secrets, planted wherever a user may put one: none is in what a run prints or leaves, and
ordinary words stay as they are.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.config import Fault, leaves
from retool.config.redact import HIDDEN, is_secret_name, logger, redact, redact_word
from retool.metrics import Loggers, RunInfo, open_loggers, printable
from retool.metrics.transcripts import Segment, Transcript, read_transcripts, write_transcripts
from retool.rl.config import RLConfig
from retool.sft.config import SFTConfig
from tests.sft.conftest import work
from tests.sft.test_command import words

__all__ = ["work"]

# What must never be seen → the text that a user may write with it.
BY_LOOK = {
    "pa/ss1word": "s3://user:pa/ss1word@host/bucket",
    "p@ss2word": "hdfs://user:p@ss2word@namenode:8020/run",
    "pw3hidden": "https://me:pw3hidden@host/x",
    "12345/67x@": "s3://user:12345/67x@store.example.com/b",
    "tok4en4user": "https://tok4en4user@git.example.com/x",
    "T00/B00/slackhook5": "https://hooks.slack.com/services/T00/B00/slackhook5",
    "66/discordhook6": "https://discord.com/api/webhooks/66/discordhook6",
    "feishu-hook-7": "https://open.feishu.example/open-apis/bot/v2/hook/feishu-hook-7",
    "88:telegramhook8": "https://api.telegram.org/bot88:telegramhook8/send",
    "azure9key==": "AccountName=store;AccountKey=azure9key==;EndpointSuffix=core",
    "sas10signature": "https://store.example.net/c?sv=1&sig=sas10signature",
    "aws11signature": "s3://bucket/x?X-Amz-Signature=aws11signature",
    "bearer12token": "Authorization: Bearer bearer12token",
    "eyJhbGciOi13.eyJzdWIi13.c2lnbmF0dXJl": "sent eyJhbGciOi13.eyJzdWIi13.c2lnbmF0dXJl away",
    "AIzaSyA14567890abcdefghijklmnopqrstuv": "key AIzaSyA14567890abcdefghijklmnopqrstuv",
    "r8_15cdefghijklmnopqrstuvwxyz": "replicate r8_15cdefghijklmnopqrstuvwxyz",
    "hf_16cdefghijklmnopqrstuvwxyz": "use hf_16cdefghijklmnopqrstuvwxyz now",
    "sk-17cdefghijklmnopqrstuvwxyz": "use sk-17cdefghijklmnopqrstuvwxyz now",
    "ghp_18cdefghijklmnopqrstuvwxyz": "use ghp_18cdefghijklmnopqrstuvwxyz now",
    "AKIA19CDEFGHIJKLMNOP": "id AKIA19CDEFGHIJKLMNOP",
    "MIIE20privatekey": "-----BEGIN RSA PRIVATE KEY-----\nMIIE20privatekey\n-----END RSA PRIVATE KEY-----",
}
BY_NAME = {
    "plain21secret": "X-Api-Key: plain21secret",
    "plain22secret": "wandb.api_key=plain22secret",
    "plain23secret": "openai.api_keys=[plain23secret]",
    "plain24secret": "store.pwd=plain24secret",
    "plain25 secret words": "vault.passphrase=plain25 secret words",
    "plain26secret": "db.connection_string=plain26secret",
    "plain27secret": "auth.bearer=plain27secret",
    "plain28secret": "oauth.client_secret_value=plain28secret",
    "2929292929": "trainer.db_password=2929292929",
    "plain30secret": "--hub-token plain30secret",
    "plain31secret": '{"refreshToken": "plain31secret"}',
    "plain32secret": "session_cookie: plain32secret",
    "plain33secret": "notify.slack_webhook_url=plain33secret",
    "plain34secret": "s3.secretAccessKey=plain34secret",
}
BY_ENVIRONMENT = {
    "env35secret": ("WANDB_API_KEY", "env35secret"),
    "e36pw": ("DB_PWD", "e36pw"),
    "env37first": ("OPENAI_API_KEYS", "env37first,env38second"),
    "env38second": ("OPENAI_API_KEYS", "env37first,env38second"),
    "env39secret": ("GITHUB_PAT", "env39secret"),
    "env40secret": ("AZURE_STORAGE_CONNECTION_STRING", "env40secret"),
}
SECRETS = [*BY_LOOK, *BY_NAME, *BY_ENVIRONMENT]
TEXTS = [
    *BY_LOOK.values(),
    *BY_NAME.values(),
    *(f"client said {secret}, twice" for secret in BY_ENVIRONMENT),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BY_ENVIRONMENT.values():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("retool.config.redact._remembered", set())


def told(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("text", TEXTS)
def test_each_is_hidden_in_a_text(text: str) -> None:
    assert told(text) and not told(redact_word(text)) and HIDDEN in redact_word(text)


def test_each_is_hidden_in_nested_values() -> None:
    dirty = {
        "texts": TEXTS,
        "password": 123456789,
        "secrets": {"a": ["under a secret name", 987654321]},
        "sk-17cdefghijklmnopqrstuvwxyz": 1,
    }
    clean = redact(dirty)
    assert (
        not told(str(clean))
        and clean["password"] == HIDDEN
        and clean["secrets"] == {"a": [HIDDEN, HIDDEN]}
        and HIDDEN in clean
    )
    assert redact("the server refused under a secret name") == f"the server refused {HIDDEN}", (
        "a value seen under such a name is known"
    )


ORDINARY: dict[str, Any] = {
    "prompt_key": "prompt",
    "messages_key": "messages",
    "max_token_len_per_gpu": 16384,
    "data.seed": 1,
    "tokens": 5,
    "max_tokens": 512,
    "eos_token": "<|im_end|>",
    "NoCredentialsError": "Unable",
    "InvalidTokenException": "at 12345678abcdefgh",
    "pad_token_id": 151643,
    "train/global_tokens": 7.0,
    "reward_fn_key": "data_source",
    "key": "messages",
    "default_local_dir": "/home/me/run-2024/ckpt",
    "files": ["hf://datasets/a/b@main/f.parquet", "s3://bucket/a/b@2x.parquet"],
    "url": "http://localhost:8080/v1/@me",
    "token_file": "/run/secrets/token",
    "credentials_directory": "/run/credentials",
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "flag_secret": False,
    "text": "at token: the, 5 tokens; the password is wrong",
    "address": "git@github.com:me/x.git",
    "tokenizer": "fast",
}


def test_ordinary_names_and_values_stay() -> None:
    assert redact(ORDINARY) == ORDINARY
    assert redact(
        " ".join(f"{name}={value}" for name, value in ORDINARY.items() if " " not in str(value))
    ) == " ".join(f"{name}={value}" for name, value in ORDINARY.items() if " " not in str(value))


def test_the_folder_one_is_in_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shell has it as PWD, and most paths in our messages begin with it."""
    monkeypatch.setenv("PWD", "/home/somebody/project")
    monkeypatch.setenv("OLDPWD", "/home/somebody/before")
    text = "/home/somebody/project/runs/1 and /home/somebody/before/runs can't be written"
    assert redact(text) == text


@pytest.mark.parametrize("schema", [SFTConfig, RLConfig])
def test_no_key_of_ours_is_taken_for_a_secret(schema: type) -> None:
    assert [leaf.key for leaf in leaves(schema) if is_secret_name(leaf.key)] == []


def test_it_is_fast_enough_for_every_line() -> None:
    text = (
        "The answer is 42. Let me compute: x = 5 and the token y: 7 of https://example.com/a/b.\n"
        * 100
    )
    begin = time.process_time()  # its own: what else the machine does doesn't count
    redact(text)
    redact("://" * 2000 + ":" * 2000 + "@" * 10 + "a" * 20_000)
    redact("-----BEGIN PRIVATE KEY-----" * 200 + "a.b-c" * 5000)
    redact("eyJa" * 5000 + "hooks.x/" * 3000 + "?key" * 3000 + "Bearer " * 3000)
    assert time.process_time() - begin < 2


def test_logs_trackers_and_transcripts_tell_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    config = {"keys": TEXTS, "password": "plain34secret", "nested": {"api_key": 2929292929}}
    loggers = open_loggers(
        ["console", "tensorboard"], RunInfo(tmp_path, TEXTS[0], TEXTS[1], config)
    )
    loggers.log(1, {f"reward/{text}": 1.0 for text in TEXTS})
    loggers.log_table(1, "answers", [{"question": text, "answer": text} for text in TEXTS])
    loggers.close()
    Loggers([("broken", Broken())]).log(1, {"a": 1.0})
    with caplog.at_level(logging.INFO):
        for text in TEXTS:
            logger("retool.checkpoint").error("copying to %s failed", text)
    segments = [
        Segment("assistant", text, [*text], [-0.5] * len(text), mask=True) for text in TEXTS
    ]
    write_transcripts(
        tmp_path,
        "train_000001",
        [Transcript(1, text, segments, info={"said": text, "password": text}) for text in TEXTS],
    )
    assert len([record for record in read_transcripts(tmp_path) if record]) == len(TEXTS)
    out = capsys.readouterr()
    assert not told(out.out + out.err + caplog.text + printable(" ".join(TEXTS)))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not told(path.read_text(errors="replace")), path
    assert (tmp_path / "report" / "train_000001.jsonl").stat().st_size > 1000 and (
        tmp_path / "metrics.jsonl"
    ).stat().st_size > 500


class Broken:
    def log(self, step: int, metrics: Any) -> None:
        raise ConnectionError("; ".join(TEXTS))

    log_table = close = log


CRASH = """
import sys, threading
from retool.config.redact import hide_in_tracebacks
hide_in_tracebacks()
text = sys.stdin.read()
thread = threading.Thread(target=lambda: int(text))
thread.start()
thread.join()
raise RuntimeError(text)
"""


def test_tracebacks_tell_none() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH],
        input="\n".join(TEXTS),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 1
        and "Traceback" in done.stderr
        and "RuntimeError" in done.stderr
        and "ValueError" in done.stderr
    )
    assert not told(done.stderr) and HIDDEN in done.stderr


def test_a_refused_run_tells_none(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retool.sft.__main__ import main

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert (
        main(
            words(
                work,
                tmp_path / "run",
                *TEXTS,
                f"optim.lr={BY_LOOK['hf_16cdefghijklmnopqrstuvwxyz']}",
            )
        )
        == 1
    )
    said = capsys.readouterr()
    written = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert "unknown key wandb.api_key" in said.out and "unknown key wandb.api_key" in written
    assert not told(said.out + said.err + written) and not told(
        str(Fault("store.pwd=plain24secret", "plain24secret isn't known."))
    )


def test_a_run_that_trains_tells_none(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its own keys hold them: where copies go, what it is called; and its store fails with them in
    its words.
    """
    from retool.checkpoint import remote
    from retool.sft.__main__ import main

    def fail(folder: Path, url: str, *_: object) -> None:
        raise ConnectionError(f"{folder} to {url}: " + "; ".join(TEXTS))

    monkeypatch.setattr(remote, "copy", fail)
    store = f"memory://user:pa/ss1word@host/{tmp_path.name}"
    name = "run-hf_16cdefghijklmnopqrstuvwxyz-env35secret"
    keys = {
        "trainer__total_training_steps": 2,
        "trainer__default_hdfs_dir": store,
        "trainer__experiment_name": name,
    }
    assert (
        main(words(work, tmp_path / "run", 'trainer.logger=["console","tensorboard"]', **keys)) == 0
    )
    said = capfd.readouterr()
    assert "copied to memory://" in said.out and "was not copied to" in caplog.text
    assert not told(said.out + said.err + caplog.text)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or not told(path.read_bytes().decode("latin-1")), path
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"][
        "default_hdfs_dir"
    ].startswith(f"memory://{HIDDEN}@host")
