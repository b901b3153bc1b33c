"""An exported checkpoint loads in Hugging Face's own loaders, tied weights and all. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model, save_torch_model
from safetensors import safe_open
from safetensors.torch import load_file
from same import same
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer
from obsinfra.backup.export import export, import_file

SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **SIZES))


def llama() -> PreTrainedModel:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, **SIZES))


def bert() -> PreTrainedModel:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**shape, vocab_size=50))


@pytest.fixture(params=[gpt2, llama, bert], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    return request.param  # type: ignore[no-any-return]


def trained(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """A model with tied weights after two steps: no two of its tensors are equal by chance."""
    torch.manual_seed(3)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tokens = torch.randint(3, 50, (2, 8))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model, optimizer


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(sorted(model.state_dict().items()))


def test_from_pretrained_and_load_torch_model_give_the_parameters_back(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model, optimizer = trained(make)
    backup = create_backup_system(tmp_path / "store")
    backup.create_checkpoint(model, optimizer, step=2)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    export(backup, "latest", folder / "model.safetensors")

    found, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), f"nothing is missing, unknown or of another shape: {told}"
    assert same(parameters(model), parameters(found))
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight

    other = make()
    assert not load_torch_model(other, folder).unexpected_keys
    assert same(parameters(model), parameters(other))


def test_the_file_is_the_one_that_hugging_face_writes(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """The same tensors under the same names, and the same names left out and noted."""
    model, optimizer = trained(make)
    backup = create_backup_system(tmp_path / "store")
    backup.create_checkpoint(model, optimizer, step=2)
    export(backup, "latest", tmp_path / "ours.safetensors")
    save_torch_model(model, tmp_path)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "model.safetensors"
    assert same(dict(sorted(load_file(theirs).items())), dict(sorted(load_file(ours).items())))
    notes = []
    for path in (ours, theirs):
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            notes.append(file.metadata())
    assert notes[0].pop("obsinfra_checkpoint") and notes[0].pop("step") == "2"
    assert notes[0] == notes[1] and len(notes[0]) > 1, "at least one name was left out"


def test_a_snapshot_of_tied_weights_is_exported_as_a_save_is(tmp_path: Path) -> None:
    model, optimizer = trained(gpt2)
    checkpointer = create_checkpointer(tmp_path / "store")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert checkpointer.snapshot(state, step=2, epoch=0)
    checkpointer.commit("regular", "test").wait(60)
    checkpointer.close()
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    export(create_backup_system(tmp_path / "store"), "latest", folder / "model.safetensors")
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    assert same(parameters(model), parameters(GPT2LMHeadModel.from_pretrained(folder)))


def test_what_hugging_face_saved_is_imported_whole(tmp_path: Path) -> None:
    model, _ = trained(gpt2)
    save_torch_model(model, tmp_path)
    backup = create_backup_system(tmp_path / "store")
    state = backup.load(import_file(backup, tmp_path / "model.safetensors").path).state["model"]
    other = gpt2()
    other.load_state_dict(state)
    assert same(parameters(model), parameters(other))
