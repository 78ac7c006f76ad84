"""Verification compares with PEFT in a process of its own, and tells a wrong merge from a right one."""

import json
import shutil
import subprocess

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from loraloom import LoomConfig
from loraloom.errors import InputError, RunFailedError
from loraloom.merge import verify
from loraloom.merge.merge import merge_checkpoint, verified
from loraloom.merge.verify import SENTENCES, check_verifiable, check_verification, verify_merge
from tests.adapter.support import trained
from tests.refusals import coded


@pytest.fixture
def in_this_process(monkeypatch):
    """Compares here: a process imports torch and transformers anew for each comparison. Two tests keep theirs."""

    def run(command, **_):
        result = verify._compare(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(result), stderr="")

    monkeypatch.setattr(verify.subprocess, "run", run)


def merged(base, model, config, folder, **options):
    trained(model, config, folder / "adapter")
    return merge_checkpoint([folder / "adapter"], base, folder / "out", **options)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("make", [peft.LoraConfig, LoomConfig])
def test_a_right_merge_and_a_wrong_one(pico_llama_dir, tmp_path, make):
    config = make(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    result = merged(pico_llama_dir, AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path)
    check = verify_merge(tmp_path / "out", pico_llama_dir, [tmp_path / "adapter"], 3)
    assert check["prompts"] == 3
    assert check["positions"] > 9
    assert check["input"] == "text"
    assert check["max_logit_difference"] < 1e-5 < 1e-2 < check["adapter_effect"]
    assert check["top1_agreement"] == 1
    check_verification(check)
    result = verified(result, check)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["verification"] == check == result.verification

    shutil.copy(pico_llama_dir / "model.safetensors", tmp_path / "out")  # the base, as if nothing were merged
    check = verify_merge(tmp_path / "out", pico_llama_dir, [tmp_path / "adapter"], 3)
    assert check["max_logit_difference"] == pytest.approx(check["adapter_effect"], rel=1e-4)
    with pytest.raises(RunFailedError) as error:
        check_verification(check)
    assert error.value.code == "not-verified"


def test_a_classifier_without_a_tokenizer(pico_bert_dir, tmp_path):
    base = shutil.copytree(pico_bert_dir, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    model = BertForSequenceClassification.from_pretrained(base, num_labels=5)
    merged(base, model, LoomConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), tmp_path)
    check = verify_merge(tmp_path / "out", base, [tmp_path / "adapter"], 4)
    assert (check["input"], check["positions"]) == ("random tokens", 4)
    assert check["max_logit_difference"] < 1e-5


@pytest.mark.usefixtures("in_this_process")
def test_several_adapters_with_weights_on_more_prompts_than_sentences(pico_llama_dir, tmp_path):
    paths, weights = [tmp_path / "a", tmp_path / "b"], [0.5, -2.0]
    for path in paths:
        trained(
            AutoModelForCausalLM.from_pretrained(pico_llama_dir),
            LoomConfig.moslora(r=2, target_modules=["q_proj"]),
            path,
        )
    merge_checkpoint(paths, pico_llama_dir, tmp_path / "out", weights=weights)
    check_verifiable(paths, weights, pico_llama_dir)
    check = verify_merge(tmp_path / "out", pico_llama_dir, paths, len(SENTENCES) + 2, weights)
    assert check["prompts"] == len(SENTENCES) + 2
    assert check["max_logit_difference"] < 1e-5
    assert verify_merge(tmp_path / "out", pico_llama_dir, paths, 2)["max_logit_difference"] > 1e-3


def test_what_peft_has_no_model_for(pico_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained
    trained(model(pico_llama_dir), LoomConfig.dora(r=2, target_modules=["q_proj"]), tmp_path / "dora")
    trained(model(pico_llama_dir), peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    saved = LoomConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained(model(pico_llama_dir), saved, tmp_path / "saved")
    check_verifiable([tmp_path / "saved"], None, pico_llama_dir)
    with pytest.raises(InputError, check=coded("cannot-verify")):
        check_verifiable([tmp_path / "dora", tmp_path / "lora"], None, pico_llama_dir)
    for names, weights in ((["dora"], [0.5]), (["saved"], [2]), (["saved", "dora"], None)):
        with pytest.raises(InputError, check=coded("cannot-verify", names[0] if weights else "saved")):
            check_verifiable([tmp_path / name for name in names], weights, pico_llama_dir)
    with pytest.raises(InputError, check=coded("no-architecture")):
        check_verifiable([tmp_path / "lora"], None, tmp_path)


def test_a_model_that_cannot_be_run(pico_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    merged(pico_llama_dir, model, LoomConfig(r=2, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "out" / "model.safetensors"
    save_file({k: torch.full_like(v, torch.nan) for k, v in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(RunFailedError, check=coded("not-verified", "NaN")):
        verify_merge(tmp_path / "out", pico_llama_dir, [tmp_path / "adapter"], 1)


@pytest.mark.parametrize(
    ("difference", "effect", "top1", "passes"),
    [
        (2.8, 3.2, 0.17, False),  # a wrong merge
        (0.3, 3.2, 0.94, False),
        (0.33, 3.2, 1.0, False),
        (0.3, 3.2, 0.96, True),
        (1e-5, 0.0, 1.0, True),  # an adapter without an effect
        (0.01, 0.0, 1.0, False),
    ],
)
def test_what_is_let_through(difference, effect, top1, passes):
    check = {"max_logit_difference": difference, "adapter_effect": effect, "top1_agreement": top1, "largest_logit": 9.0}
    if passes:
        check_verification(check)
        return
    with pytest.raises(RunFailedError):
        check_verification(check)
    if effect:
        check_verification(check, logits=1.0, top1=0.0)
