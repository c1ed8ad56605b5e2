"""Reading and writing Hugging Face folders, against the safetensors library."""

from __future__ import annotations

import json
import locale
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retool.checkpoint.flat.fill import load_flat
from retool.checkpoint.format.safetensors import WeightsWriter, plan_files
from retool.checkpoint.hf.side_files import copy_side_files, stop_at, tied, untie, with_dtype
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.model.catalogue.families import read_model_config
from retool.model.hub import UNWANTED, WANTED
from retool.parallel.fsdp.layout import Layout, local_pieces, make_layout

SHAPES = {
    "embed.weight": (11, 4),
    "block.q.weight": (4, 4),
    "block.k.weight": (2, 4),
    "block.q.bias": (4,),
    "norm.weight": (4,),
}


def small_layout(shards: int) -> Layout:
    units = [
        ("embed", [("embed.weight", (11, 4), [("embed.weight", (11, 4))], True)]),
        (
            "block",
            [
                (
                    "qk.weight",
                    (6, 4),
                    [("block.q.weight", (4, 4)), ("block.k.weight", (2, 4))],
                    True,
                ),
                ("q.bias", (4,), [("block.q.bias", (4,))], True),
            ],
        ),
        ("norm", [("norm.weight", (4,), [("norm.weight", (4,))], True)]),
    ]
    return make_layout(units, shards, (("lm_head.weight", "embed.weight"),))


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def gathered(layout: Layout, flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {
        m.name: torch.full((m.numel,), float("nan"), dtype=flats[0].dtype)
        for _, m in layout.members
    }
    for rank, flat in enumerate(flats):
        for p in local_pieces(layout, rank):
            out[p.member.name][p.start : p.stop] = flat[p.local : p.local + p.stop - p.start]
    return {m.name: out[m.name].view(m.shape) for _, m in layout.members}


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("split", [False, True])
def test_load_flat_fills_every_element(tmp_path: Path, shards: int, split: bool) -> None:
    weights = random_weights(torch.bfloat16)
    if split:
        parts = {
            "a.safetensors": ["embed.weight", "norm.weight"],
            "b.safetensors": ["block.q.weight", "block.k.weight", "block.q.bias"],
        }
        for file, names in parts.items():
            save_file({n: weights[n] for n in names}, tmp_path / file)
        weight_map = {n: f for f, names in parts.items() for n in names}
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    else:
        save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(shards)
    flats = [torch.full((layout.shard_numel,), 7.0, dtype=torch.float64) for _ in range(shards)]
    for rank, flat in enumerate(flats):
        load_flat(layout, rank, SafetensorsSource(tmp_path), flat)
    for name, value in gathered(layout, flats).items():
        assert torch.equal(value, weights[name].double()), name
    assert sum(f.abs().sum() for f in flats).item() == pytest.approx(
        sum(w.double().abs().sum() for w in weights.values()).item()
    ), "padding is not 0"


def test_an_alias_stands_in_for_its_parameter(tmp_path: Path) -> None:
    weights = random_weights()
    weights["lm_head.weight"] = weights.pop("embed.weight")
    save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(1)
    flat = torch.zeros(layout.shard_numel)
    load_flat(layout, 0, SafetensorsSource(tmp_path), flat)
    assert torch.equal(flat[:44].view(11, 4), weights["lm_head.weight"])


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["block.q.bias"]
    weights["norm.weight"] = torch.zeros(5)
    weights["block.q.extra"] = torch.zeros(5)
    weights["rotary_emb.inv_freq"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(1)
    with pytest.raises(
        ValueError,
        match=r"block\.q\.bias \[4\] is missing; norm\.weight is \[5\], the model has \[4\]; block\.q\.extra is unexpected\.",
    ):
        load_flat(layout, 0, SafetensorsSource(tmp_path), torch.zeros(layout.shard_numel))


def with_index(folder: Path, parts: dict[str, dict[str, torch.Tensor]], **places: str) -> None:
    """Files of tensors, and an index that says where each is, but for what `places` says otherwise."""
    weight_map = dict[str, str]()
    for file, tensors in parts.items():
        save_file({name: value.clone() for name, value in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    weight_map |= places
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_no_tensor_is_left_unread_without_a_word(tmp_path: Path) -> None:
    """An index that belongs to other files would choose among them, or leave some out."""
    one = torch.ones(2)
    with_index(tmp_path, {"a.safetensors": {"w": one, "x": one}, "b.safetensors": {"x": one + 1}})
    with pytest.raises(ValueError, match=r"a\.safetensors holds x, which .* doesn't place there"):
        SafetensorsSource(tmp_path)
    with_index(tmp_path, {"a.safetensors": {"x": one, "y": one, "z": one}}, y="b.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors holds y, which"):
        SafetensorsSource(tmp_path)
    with_index(tmp_path, {"a.safetensors": {"x": one}})
    assert list(SafetensorsSource(tmp_path).names()) == ["x"]
    save_file({"x": one + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"two sets of weights\. Take away"):
        SafetensorsSource(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert SafetensorsSource(tmp_path).read("x", 0, 2).tolist() == [2, 2], "an index left over"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn]
)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    """Without their scales they would be other weights."""
    weights = random_weights()
    weights["block.k.weight"] = weights["block.k.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(1)
    with pytest.raises(
        ValueError, match=r"block\.k\.weight is quantised .* before it was quantised"
    ):
        load_flat(layout, 0, SafetensorsSource(tmp_path), torch.zeros(layout.shard_numel))


def test_a_mixture_of_plain_types_is_read(tmp_path: Path) -> None:
    weights = random_weights(torch.bfloat16)
    weights["block.k.weight"] = weights["block.k.weight"].half()
    save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(1)
    flat = torch.zeros(layout.shard_numel)
    load_flat(layout, 0, SafetensorsSource(tmp_path), flat)
    found = gathered(layout, [flat])
    assert all(torch.equal(found[name], weights[name].float()) for name in found)


def test_names_within_a_wrapper_are_told(tmp_path: Path) -> None:
    weights = {f"base_model.model.{name}": value for name, value in random_weights().items()}
    save_file(weights, tmp_path / "model.safetensors")
    layout = small_layout(1)
    with pytest.raises(ValueError, match=r"base_model\.model\. stands before each"):
        load_flat(layout, 0, SafetensorsSource(tmp_path), torch.zeros(layout.shard_numel))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """transformers would apply it to the weights beside it."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for read in (SafetensorsSource, read_model_config):
        with pytest.raises(ValueError, match=r"holds an adapter of org/base .*merge_and_unload"):
            read(tmp_path)
    save_file(random_weights(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="take adapter_config"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.gguf", "consolidated.safetensors"])
def test_what_lies_in_the_place_of_weights_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds neither.*{name}"):
        SafetensorsSource(tmp_path)


def test_bad_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        SafetensorsSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds neither"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-2.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"lacks model-2\.safetensors"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../model-2.safetensors"}})
    )
    with pytest.raises(ValueError, match="lacks"):
        SafetensorsSource(tmp_path)


def test_truncated_and_lying_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_weights(), path)
    whole = path.read_bytes()
    for cut in (0, 5, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=str(path)):
            SafetensorsSource(tmp_path)
    path.write_bytes(whole.replace(b'"shape":[11,4]', b'"shape":[99,4]'))
    with pytest.raises(ValueError, match="does not fit its bytes"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [100, 10**9])
def test_the_writer_matches_the_library(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    weights = random_weights()
    writer = WeightsWriter(tmp_path, SHAPES, dtype, limit)
    for value in weights.values():
        for piece in value.view(-1).split(5):
            writer.write(piece)
    writer.close()
    loaded: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= load_file(file)
    assert list(SafetensorsSource(tmp_path).names()) == list(SHAPES)
    for name, value in weights.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], value.to(dtype)), name


def test_files_stay_below_the_limit() -> None:
    plan = plan_files({"a": (10,), "b": (10,), "c": (30,), "d": (1,)}, torch.float32, 80)
    assert plan == [
        ("model-00001-of-00003.safetensors", ["a", "b"]),
        ("model-00002-of-00003.safetensors", ["c"]),
        ("model-00003-of-00003.safetensors", ["d"]),
    ]


def test_only_the_dtype_fields_change() -> None:
    text = '{\n  "rope_theta": 1000000.0,\n  "torch_dtype": "float32",\n "x": 1e-06\n}\n'
    assert with_dtype(text, torch.bfloat16, add=True) == text.replace("float32", "bfloat16")
    assert with_dtype('{"a": 1}', torch.bfloat16, add=False) == '{"a": 1}'
    assert json.loads(with_dtype('{"a": 1}', torch.bfloat16, add=True)) == {
        "torch_dtype": "bfloat16",
        "a": 1,
    }


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "in"
    target = tmp_path / "out"
    source.mkdir()
    kept = {
        "vocab.json": b'{"a":\xc4\xa0 1}',
        "merges.txt": b"a b\n",
        "tokenizer.json": b"{}",
        "special_tokens_map.json": b"{ }",
    }
    for name, content in kept.items():
        (source / name).write_bytes(content)
    (source / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "x"}')
    config = '{"torch_dtype": "float32", "by": "千问"}'
    (source / "config.json").write_text(config, encoding="utf-8")
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "README.md",
    ):
        (source / name).write_text("x")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        copy_side_files(source, target, torch.bfloat16, chat_template="new")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert {p.name for p in target.iterdir()} == {
        *kept,
        "tokenizer_config.json",
        "config.json",
        "chat_template.jinja",
    }
    assert all((target / name).read_bytes() == content for name, content in kept.items())
    found = (target / "config.json").read_text(encoding="utf-8")
    assert found == config.replace("float32", "bfloat16")
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "chat_template": "new",
        "eos_token": "x",
    }
    assert (target / "chat_template.jinja").read_text() == "new"


@pytest.mark.parametrize("named", [{}, {"default": "old", "tool_use": "old {{ tools }}"}])
def test_a_replaced_template_is_the_only_one_in_the_export(
    tmp_path: Path, named: dict[str, str]
) -> None:
    """A reader renders tools with the template named tool_use where there is one, whatever else the
    folder holds.
    """
    source = tmp_path / "in"
    target = tmp_path / "out"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    )
    tokenizer.chat_template = named or "old"
    tokenizer.save_pretrained(source)
    (source / "chat_template.json").write_text('{"chat_template": "old"}')
    assert (source / "additional_chat_templates").is_dir() == bool(named)
    copy_side_files(source, target, torch.bfloat16, chat_template="new ü")
    assert not any("old" in path.read_text() for path in target.rglob("*") if path.is_file())
    found = AutoTokenizer.from_pretrained(target)
    assert found.chat_template == "new ü"
    copy_side_files(source, tmp_path / "kept", torch.bfloat16)
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("said", "wanted"), [(None, [7, 3]), (3, [3, 7]), ([3, 5], [3, 5, 7])], ids=str
)
def test_who_samples_from_an_export_stops_where_turns_end(
    tmp_path: Path, name: str, said: int | list[int] | None, wanted: list[int]
) -> None:
    """A base model's files name only the end of a document; what its author wrote there stays."""
    settings = {"model_type": "llama", "top_p": 0.7, "eos_token_id": said}
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    (tmp_path / name).write_text(json.dumps(settings))
    stop_at(tmp_path, (7, 3))
    assert json.loads((tmp_path / name).read_text()) == {**settings, "eos_token_id": wanted}
    before = (tmp_path / name).read_bytes()
    stop_at(tmp_path, (7,))
    assert (tmp_path / name).read_bytes() == before


def test_a_tokenizers_own_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `trust_remote_code` a tokenizer is a file of Python, and the model's folder is of no use
    without it.
    """
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    source = tmp_path / "in"
    source.mkdir()
    code = (
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    files = {
        "tokenization_own.py": code,
        "config.json": '{"model_type": "llama"}',
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "Own",
                "auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]},
            }
        ),
    }
    for name, content in files.items():
        (source / name).write_text(content)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(source / "tokenizer.json"))
    copy_side_files(source, tmp_path / "out", torch.bfloat16)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert found("a").input_ids == [0]
    assert {*filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=UNWANTED)} == set(
        files
    ), "and is fetched from the hub"


@pytest.mark.parametrize(
    "said",
    [
        {"tie_word_embeddings": True},
        {},
        {"tie_word_embeddings": None},
        {"text_config": {"tie_word_embeddings": True}},
    ],
    ids=str,
)
def test_a_config_is_untied_however_it_tied(said: dict[str, object], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gemma2", "by": "千问", **said}), encoding="utf-8")
    assert tied(tmp_path)
    untie(config)
    assert not tied(tmp_path)
    found = json.loads(config.read_text(encoding="utf-8"))
    assert found["by"] == "千问" and found.keys() == {
        "model_type",
        "by",
        "tie_word_embeddings",
        *said,
    }
