"""karpathy/nanochat's files: its model in ours with its logits, ours in its format, and what can be wrong with them."""

import json
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import durable, interchange
from nanochat.errors import BadInput
from nanochat.gpt import GPT, GPTConfig
from nanochat.interchange import export_model, import_model, nanochat_steps, parameter_shapes
from nvfp8.precision import fp32

FIXTURE = Path(__file__).parents[1] / "fixtures" / "nanochat_tiny"  # how_it_was_made.md there says how
MODEL, META = "model_000007.pt", "meta_000007.json"


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape, bits(left[name])) == (right[name].dtype, right[name].shape, bits(right[name]))
        for name in left
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fixture's two files, to be damaged."""
    for name in (MODEL, META):
        shutil.copy(FIXTURE / name, tmp_path)
    return tmp_path


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = torch.load(directory / MODEL, weights_only=True)
    change(tensors)
    torch.save(tensors, directory / MODEL)
    return dict(tensors)


def edit_meta(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((directory / META).read_text())
    change(meta)
    (directory / META).write_text(json.dumps(meta))


# ------------------------------------------------------------------------------------------------------ the same model


def test_nanochats_model_has_its_logits_in_ours() -> None:
    config, tensors, meta = import_model(FIXTURE)
    assert (meta["step"], meta["val_bpb"], meta["user_config"]["depth"]) == (7, 1.25, 3)
    with torch.device("meta"):
        model = GPT(GPTConfig(**config), fp32())
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict(tensors)
    recorded = load_file(FIXTURE / "logits.safetensors")
    logits = model.logits(recorded["tokens"])
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 160, 250))
    assert float((logits - recorded["logits"]).abs().max() / recorded["logits"].abs().max()) < 1e-5


@pytest.mark.parametrize("n_layer", [1, 2])
def test_names_and_shapes_are_nanochats(n_layer: int) -> None:
    """By hand: a vocabulary padded to 64s, grouped heads, value embeddings and gates in every second layer, the last included."""
    config = GPTConfig(sequence_len=16, vocab_size=70, n_layer=n_layer, n_head=4, n_kv_head=2, n_embd=32)
    expected: dict[str, tuple[int, ...]] = {
        "resid_lambdas": (n_layer,), "x0_lambdas": (n_layer,), "smear_lambda": (1,), "backout_lambda": (1,),
        "smear_gate.weight": (1, 24), "transformer.wte.weight": (128, 32), "lm_head.weight": (128, 32),
    }  # fmt: skip
    for layer in range(n_layer):
        for name, shape in {
            "attn.c_q": (32, 32), "attn.c_k": (16, 32), "attn.c_v": (16, 32), "attn.c_proj": (32, 32),
            "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128),
        }.items():  # fmt: skip
            expected[f"transformer.h.{layer}.{name}.weight"] = shape
    expected[f"transformer.h.{n_layer - 1}.attn.ve_gate.weight"] = (2, 12)
    expected[f"value_embeds.{n_layer - 1}.weight"] = (128, 16)
    assert parameter_shapes(config) == expected


def test_dtypes_are_those_of_the_file() -> None:
    _, tensors, _ = import_model(FIXTURE)
    halves = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert halves == {"transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in halves} == {torch.float32}


def test_export_of_an_import_is_the_same_checkpoint(tmp_path: Path) -> None:
    config, tensors, meta = import_model(FIXTURE)
    path = export_model(tmp_path / "d3", 7, tensors, config, meta)
    assert sorted(found.name for found in path.parent.iterdir()) == [META, MODEL]
    ours = torch.load(path, weights_only=True)
    assert same(ours, torch.load(FIXTURE / MODEL, weights_only=True))
    assert (tmp_path / "d3" / META).read_text() == (FIXTURE / META).read_text()
    assert same(import_model(tmp_path / "d3", 7)[1], tensors)


def test_export_keeps_exact_values_in_nanochats_dtypes(tmp_path: Path) -> None:
    config, tensors, _ = import_model(FIXTURE)
    ours = {name: tensor.float() for name, tensor in tensors.items()}  # an fp32 run has fp32 embeddings, as in nanochat
    ours["lm_head.weight"] = ours["lm_head.weight"].bfloat16()
    ours["value_embeds.0.weight"] = tensors["value_embeds.0.weight"]
    saved = torch.load(export_model(tmp_path, 1, ours, config, {}), weights_only=True)
    halves = [name for name, tensor in saved.items() if tensor.dtype == torch.bfloat16]
    assert halves == ["value_embeds.0.weight"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(saved[name].float(), tensor.float()) for name, tensor in ours.items())


def test_export_writes_views_without_what_lies_behind_them(tmp_path: Path) -> None:
    config, tensors, _ = import_model(FIXTURE)
    usual = export_model(tmp_path / "a", 1, tensors, config, {}).stat().st_size
    stacked = torch.stack([tensors["transformer.h.0.mlp.c_fc.weight"]] * 9)
    views = {**tensors, "transformer.h.0.mlp.c_fc.weight": torch.nn.Parameter(stacked)[0]}
    path = export_model(tmp_path / "b", 1, views, config, {})
    assert path.stat().st_size == usual
    assert same(torch.load(path, weights_only=True), tensors)


# ------------------------------------------------------------------------------------------------------ older versions


def test_the_prefix_of_a_compiled_model_is_dropped(copy: Path) -> None:
    tensors = torch.load(copy / MODEL, weights_only=True)
    torch.save(OrderedDict((f"_orig_mod.{name}", tensor) for name, tensor in tensors.items()), copy / MODEL)
    assert same(import_model(copy)[1], tensors)


def test_what_old_files_lack_gets_the_value_it_had(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: (tensors.pop("resid_lambdas"), tensors.pop("x0_lambdas")))
    edit_meta(copy, lambda meta: meta["model_config"].pop("window_pattern"))
    config, tensors, _ = import_model(copy)
    assert config["window_pattern"] == "L"
    assert tensors["resid_lambdas"].tolist() == [1, 1, 1]
    assert tensors["x0_lambdas"].tolist() == [0, 0, 0]


def test_the_last_step_is_taken_unless_one_is_named(copy: Path) -> None:
    for name in (MODEL, META):
        shutil.copy(copy / name, copy / name.replace("000007", "1000000"))
        shutil.copy(copy / name, copy / name.replace("000007", "000100"))
    assert nanochat_steps(copy) == [7, 100, 1_000_000]
    assert import_model(copy)[2]["step"] == 1_000_000
    assert import_model(copy, 100)[2]["step"] == 100
    with pytest.raises(BadInput, match="has no model of step 8; it has 7, 100, 1000000"):
        import_model(copy, 8)


# ----------------------------------------------------------------------------------------------------------- bad input


def refusal(directory: Path, step: int | None = None) -> str:
    """Import, expect a refusal in one line, return it."""
    with pytest.raises(BadInput) as caught:
        import_model(directory, step)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_a_model_says_so(copy: Path) -> None:
    assert "absent is not a directory" in refusal(copy / "absent")
    assert f"{copy / MODEL} is not a directory" in refusal(copy / MODEL)
    (copy / "empty").mkdir()
    assert refusal(copy / "empty").endswith(f"(model_000100.pt or the like) in {copy / 'empty'}")
    copy.joinpath("runs").mkdir()
    for depth in (2, 4):
        shutil.copytree(FIXTURE, copy / "runs" / f"d{depth}")
    assert refusal(copy / "runs").endswith(f"in {copy / 'runs'}; did you mean d2, d4 in it?")


BAD_META: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda meta: meta.pop("model_config"), "has no model_config"),
    "config a list": (lambda meta: meta.update(model_config=[1]), "has no model_config"),
    "field missing": (lambda meta: meta["model_config"].pop("n_head"), "lacks n_head"),
    "field unknown": (lambda meta: meta["model_config"].update(bias=True), "fields this program does not know: bias"),
    "text": (lambda meta: meta["model_config"].update(n_layer="3"), "n_layer must be a positive integer, not '3'"),
    "fraction": (lambda meta: meta["model_config"].update(n_embd=64.0), "n_embd must be a positive integer, not 64.0"),
    "true": (lambda meta: meta["model_config"].update(n_layer=True), "n_layer must be a positive integer, not True"),
    "zero": (lambda meta: meta["model_config"].update(n_kv_head=0), "n_kv_head must be a positive integer, not 0"),
    "heads": (
        lambda meta: meta["model_config"].update(n_head=3),
        "multiple of the next: n_embd 64, n_head 3, n_kv_head 1",
    ),
    "kv heads": (lambda meta: meta["model_config"].update(n_kv_head=4), "n_head 2, n_kv_head 4"),
    "window": (lambda meta: meta["model_config"].update(window_pattern="SX"), "must consist of S and L, not 'SX'"),
    "no window": (lambda meta: meta["model_config"].update(window_pattern=""), "must consist of S and L, not ''"),
    "window a list": (lambda meta: meta["model_config"].update(window_pattern=["S"]), "must consist of S and L, not ['S']"),
    "odd heads": (lambda meta: meta["model_config"].update(n_embd=66, n_head=2), "head dimension 33 is odd"),
    "window null": (lambda meta: meta["model_config"].update(window_pattern=None), "must consist of S and L, not None"),
    "another depth": (
        lambda meta: meta["model_config"].update(n_layer=4),
        "lacks transformer.h.1.attn.ve_gate.weight, ",
    ),
    "another vocabulary": (
        lambda meta: meta["model_config"].update(vocab_size=257),
        "transformer.wte.weight in",
    ),
}


@pytest.mark.parametrize("kind", BAD_META)
def test_wrong_metadata_is_named(copy: Path, kind: str) -> None:
    change, fragment = BAD_META[kind]
    edit_meta(copy, change)
    assert fragment in refusal(copy)


@pytest.mark.parametrize("text", [b"", b'{"step": 7', b"\xff\xfe", b"nan?"])
def test_metadata_that_is_not_json_is_named(copy: Path, text: bytes) -> None:
    (copy / META).write_bytes(text)
    assert f"{copy / META} is not JSON: truncated or damaged" in refusal(copy)


def test_metadata_of_another_kind_or_absent_is_named(copy: Path) -> None:
    (copy / META).write_text("[1, 2]")
    assert f"{copy / META} has no model_config" in refusal(copy)
    (copy / META).unlink()
    assert f"{copy / META}, which belongs to the model, cannot be read: No such file" in refusal(copy)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop("smear_gate.weight"), "lacks smear_gate.weight"),
    "many missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.1." in name],
        "c_k.weight, transformer.h.1.attn.c_proj.weight, transformer.h.1.attn.c_q.weight, "
        "transformer.h.1.attn.c_v.weight and 2 more",
    ),
    "extra": (lambda tensors: tensors.update(cos=torch.ones(1)), "has tensors this model does not: cos"),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(250, 64)}),
        "has shape (250, 64); model_config asks for (256, 64)",
    ),
    "dtype": (
        lambda tensors: tensors.update({"backout_lambda": torch.ones(1, dtype=torch.int64)}),
        "is torch.int64, not floating point",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(copy: Path, kind: str) -> None:
    change, fragment = BAD_TENSORS[kind]
    edit_tensors(copy, change)
    message = refusal(copy)
    assert fragment in message
    assert str(copy / MODEL) in message


class Payload:
    """What a hostile pickle would call."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("pickle_was_run",)


def test_a_pickle_that_would_run_code_is_refused_unrun(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    torch.save({"lm_head.weight": Payload()}, copy / MODEL)
    assert "holds more than tensors; only a plain state_dict is read" in refusal(copy)
    assert not (copy / "pickle_was_run").exists()


@pytest.mark.parametrize(
    ("content", "fragment"), [([1, 2], "is not a state_dict"), ({"a": 1}, "is not a state_dict: names and tensors")]
)
def test_a_file_of_something_else_is_refused(copy: Path, content: object, fragment: str) -> None:
    torch.save(content, copy / MODEL)
    assert fragment in refusal(copy)


def test_files_that_torch_did_not_write_are_refused(copy: Path) -> None:
    (copy / MODEL).write_bytes(b"")
    assert "is truncated or damaged; copy it again (or is not a file of torch.save)" in refusal(copy)
    with zipfile.ZipFile(copy / MODEL, "w") as archive:
        archive.writestr("hello", "world")
    assert "is damaged or not a file of torch.save" in refusal(copy)
    (copy / MODEL).unlink()
    (copy / MODEL).mkdir()
    assert "cannot be read: Is a directory" in refusal(copy)


def test_a_file_cut_anywhere_is_refused(copy: Path) -> None:
    whole = (copy / MODEL).read_bytes()
    for length in [*range(0, len(whole), 50_021), *range(len(whole) - 200, len(whole), 9)]:
        (copy / MODEL).write_bytes(whole[:length])
        assert "truncated or damaged; copy it again" in refusal(copy), length


def test_no_flipped_bit_reaches_a_weight(copy: Path) -> None:
    """A flip either is refused or lies where it changes nothing (padding, time stamps)."""
    whole = (copy / MODEL).read_bytes()
    original = import_model(copy)[1]
    with zipfile.ZipFile(copy / MODEL) as archive:
        directory_at = archive.start_dir
    refused = flips = 0
    for at in [*range(0, directory_at, 4_001), *range(directory_at, len(whole), 13)]:
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        (copy / MODEL).write_bytes(data)
        flips += 1
        try:
            assert same(import_model(copy)[1], original), at
        except BadInput as error:
            assert re.search("damaged|more than tensors", str(error)), at
            refused += 1
    assert refused > flips // 2


# -------------------------------------------------------------------------------------------------------- bad exports


def test_a_model_that_does_not_fit_its_configuration_is_not_exported(tmp_path: Path) -> None:
    config, tensors, _ = import_model(FIXTURE)
    with pytest.raises(BadInput, match=r"the model lacks .*transformer\.h\.3"):
        export_model(tmp_path / "out", 1, tensors, {**config, "n_layer": 4}, {})
    with pytest.raises(BadInput, match="lacks n_layer"):
        export_model(tmp_path / "out", 1, tensors, {name: config[name] for name in config if name != "n_layer"}, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [MODEL, META])
def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path, name: str) -> None:
    config, tensors, meta = import_model(FIXTURE)
    (tmp_path / name).write_text("precious")
    with pytest.raises(BadInput, match="has a model of step 7 already; choose another directory"):
        export_model(tmp_path, 7, tensors, config, meta)
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("room", [0, 300, 1_000, 300_000])
def test_a_full_disk_leaves_nothing_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    config, tensors, meta = import_model(FIXTURE)
    left = room

    def opens(path: Path, mode: str) -> Any:
        file = path.open(mode)
        write = file.write

        def limited(data: bytes) -> int:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            return write(data)

        monkeypatch.setattr(file, "write", limited)
        return file

    for module in (durable, interchange):
        monkeypatch.setattr(module, "open", opens, raising=False)
    with pytest.raises(BadInput, match=r"model of step 7 not written to .*: No space left on device"):
        export_model(tmp_path, 7, tensors, config, meta)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_a_directory_is_named(tmp_path: Path) -> None:
    config, tensors, meta = import_model(FIXTURE)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"not written to .*file: File exists"):
        export_model(tmp_path / "file", 7, tensors, config, meta)
