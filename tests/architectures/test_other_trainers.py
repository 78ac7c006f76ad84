"""Trainers besides TRL's: sequence to sequence with generation, sentence embeddings, a new head on a 4-bit base."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from loraloom import LoomConfig
from tests.architectures.table import ROWS

STEPS = 3
PARTS = {"use_mixer": "orthogonal", "use_dora": True, "use_gate": True}
OPTIONS = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": []}
OPTIONS |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
IDS = torch.arange(10, 34).reshape(4, 6)

pytestmark = [
    pytest.mark.architectures,
    # The libraries warn of their own defaults, bitsandbytes of its CPU path; what is tested are the results.
    pytest.mark.filterwarnings("ignore"),
]


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".loom_" in name}


def assert_moved(model, before):
    moved = [name for name, p in adapter(model).items() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_with_generation(name, tmp_path):
    def base():
        torch.manual_seed(0)
        return ROWS[name].build()

    model = get_peft_model(base(), LoomConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", **PARTS))
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.flip(1).tolist()})
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=5, generation_num_beams=2, **OPTIONS
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = adapter(model)
    trainer.train()
    assert_moved(model, before)
    generated = trainer.predict(data).predictions
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(base(), tmp_path / "saved").eval()
    expected = again.generate(input_ids=IDS, max_length=5, num_beams=2)
    assert torch.equal(torch.as_tensor(generated)[:, : expected.shape[1]], expected)
    with torch.no_grad():
        y, z = (m.eval()(input_ids=IDS, labels=IDS).logits for m in (again, model))
    assert torch.equal(y, z)


def test_sentence_embeddings(pico_bert_dir, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = st.SentenceTransformer(str(pico_bert_dir), device="cpu")
    texts = ["the red apple is", "a small dog", "the blue bird", "one good word"]
    plain = model.encode(texts)
    model.add_adapter(LoomConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION", **PARTS))
    before = adapter(model)
    trainer = st.SentenceTransformerTrainer(
        model,
        st.SentenceTransformerTrainingArguments(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    assert_moved(model, before)
    trained = model.encode(texts)
    assert abs(trained - plain).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts)
    assert abs(again - trained).max() < 1e-6


def test_a_new_head_on_nf4(pico_llama_dir, tmp_path):
    """O9: transformers makes the head a Linear4bit that was never quantised."""

    def base():
        torch.manual_seed(0)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForSequenceClassification.from_pretrained(pico_llama_dir, num_labels=3, quantization_config=nf4)

    model = get_peft_model(base(), LoomConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", **PARTS))
    model.config.pad_token_id = 0
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
    assert head
    before = adapter(model)
    data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": [0, 1, 2, 0]})
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=data)
    trainer.train()
    assert_moved(model, before)
    assert all(not torch.equal(p, head[n]) for n, p in model.named_parameters() if n in head)
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(base(), tmp_path / "saved")
    again.config.pad_token_id = 0
    with torch.no_grad():
        y, z = (m.eval()(input_ids=IDS).logits for m in (again, model))
    torch.testing.assert_close(y, z, rtol=0, atol=1e-4)
