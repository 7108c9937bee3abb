"""A model with another tokenizer: its rows, and that it is a student like any other."""

import json

import pytest
import tiny
import torch
from test_mapped import STUDENT_WORDS, vocab_of
from tiny_run import ar_folder, corpus_folder, recipe
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mdm.checkpoint import load_denoiser, save_denoiser
from mdm.convert import StudentSettings, convert
from mdm.errors import VocabError
from mdm.new_tokens import give_tokens, spelt
from mdm.train.run import new_run
from mdm.train.trainer import train
from mdm.vocab import read_vocab


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "tokenizer"
    tokenizer = vocab_of(STUDENT_WORDS).tokenizer
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_rows_are_means_of_what_spells_the_token(family):
    old, new = read_vocab(tiny.byte_tokenizer()), vocab_of((*STUDENT_WORDS, "日"))
    model = tiny.tiny_model(family, len(old) + 3)  # a head with unused rows
    before = {
        "in": model.get_input_embeddings().weight.detach().clone(),
        "out": model.get_output_embeddings().weight.detach().clone(),
    }
    tied = torch.equal(before["in"], before["out"])
    give_tokens(model, old, new)
    after = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    assert len(after["in"]) == len(after["out"]) == len(new) - 1  # convert adds the mask
    assert (after["in"] is after["out"]) == tied
    table = {new.token(i): i for i in range(len(new))}
    for side in ("in", "out"):
        for name, expected in (
            ("return", before[side][list(b"return")].mean(0)),
            ("Ġreturn", before[side][list(b" return")].mean(0)),
            ("Ã©", before[side][list("é".encode())].mean(0)),
            ("Ã", before[side][0xC3]),
            ("æĹ", before[side][[0xE6, 0x97]].mean(0)),  # two of the three bytes of 日
            (tiny.START, before[side][old.start_id]),
            (tiny.END, before[side][old.eos_id]),
        ):
            torch.testing.assert_close(after[side][table[name]].detach(), expected)
    with torch.no_grad():
        assert model(torch.tensor([[new.start_id, 5]])).logits.shape[-1] == len(new) - 1


def test_a_token_that_nothing_spells_starts_as_the_mean_of_all():
    old, new = read_vocab(tiny.byte_tokenizer()), vocab_of((), (tiny.START, tiny.END, "<|odd|>"))
    model = tiny.tiny_model("llama", len(old) + 3)
    mean_D = model.get_input_embeddings().weight.detach()[: len(old)].mean(0)
    odd = new.tokenizer.convert_tokens_to_ids("<|odd|>")
    new = type(new)(new.tokenizer, new.mask_id, new.start_id, new.eos_id, new.eos_id)
    assert spelt(old, new)[odd] == []
    give_tokens(model, old, new)
    torch.testing.assert_close(model.get_input_embeddings().weight[odd].detach(), mean_D)


@pytest.mark.parametrize("random", [False, True])
def test_a_student_with_a_new_tokenizer(tmp_path, tokenizer_folder, random):
    ar = ar_folder(tmp_path / "ar")
    student = convert(StudentSettings(init=ar, tokenizer=tokenizer_folder, random=random))
    assert len(student.vocab) == len(vocab_of(STUDENT_WORDS))
    assert student.vocab.encode("return") == [student.vocab.tokenizer.get_vocab()["return"]]
    save_denoiser(student, tmp_path / "student")
    again = load_denoiser(tmp_path / "student")
    x_BL = torch.tensor([[student.vocab.start_id, student.mask_id, 260]])
    wanted_BL = torch.tensor([[False, True, False]])
    torch.testing.assert_close(again(x_BL, wanted_BL), student(x_BL, wanted_BL))
    assert again.model.config.vocab_size == len(student.vocab)
    assert student.lineage[0]["tokenizer"] == tokenizer_folder


def test_random_weights_need_no_tokenizer_of_the_source(tmp_path, tokenizer_folder):
    """And are random: no means of random rows."""
    tiny.tiny_config("llama", 300).save_pretrained(tmp_path / "config")
    chosen = StudentSettings(init=str(tmp_path / "config"), tokenizer=tokenizer_folder, random=True)
    student = convert(chosen)
    rows_VD = student.model.get_input_embeddings().weight
    assert len(rows_VD) == len(student.vocab)
    norms_V = rows_VD[:-1].detach().norm(dim=1)
    assert float(norms_V.min()) > 0.4 * float(norms_V.max())


def test_special_ids_follow_the_tokenizer(tmp_path, tokenizer_folder):
    student = convert(StudentSettings(init=ar_folder(tmp_path / "ar"), tokenizer=tokenizer_folder))
    for config in (student.model.config, student.model.generation_config):
        ids = (config.bos_token_id, config.eos_token_id)
        assert ids == (student.vocab.start_id, student.vocab.eos_id)


def test_ids_with_gaps_are_refused():
    vocab = vocab_of(())
    backend = json.loads(vocab.tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["zz"] = 400
    gap = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token=tiny.START,
        eos_token=tiny.END,
    )
    with pytest.raises(VocabError, match=r"ids up to 400: ids must have no gaps"):
        give_tokens(tiny.tiny_model("llama", 300), vocab, read_vocab(gap))


def test_training_with_it(tmp_path, tokenizer_folder):
    ar, corpus = ar_folder(tmp_path / "ar"), corpus_folder(tmp_path / "corpus")
    chosen = recipe(ar, corpus, student={"tokenizer": tokenizer_folder}, target={"kind": "mapped"})
    outcome = train(chosen, new_run(chosen, tmp_path / "runs"))
    assert outcome.after.values_R4.isfinite().all()
    left = recipe(ar, corpus, student={"tokenizer": tokenizer_folder})
    with pytest.raises(VocabError, match=r"tokenizers differ .*target.kind=mapped or embedding"):
        train(left, new_run(left, tmp_path / "left"))


def test_an_old_tokenizer_with_more_tokens_than_the_model_has_rows():
    """Some checkpoints name tokens that their weights do not have: no row to start from."""
    old, new = read_vocab(tiny.byte_tokenizer()), vocab_of(())
    model = tiny.tiny_model("llama", 257)
    before_VD = model.get_input_embeddings().weight.detach().clone()
    give_tokens(model, old, new)
    after_WD = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(after_WD[: len(before_VD)], before_VD)
    torch.testing.assert_close(after_WD[new.eos_id], before_VD.mean(0))
