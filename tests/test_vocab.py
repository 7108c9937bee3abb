"""Ids: user text never becomes a special token; mask tokens; two vocabularies compared."""

import pytest
from tiny import CHAT_TEMPLATE, END, PAD, START, byte_alphabet, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdm.errors import VocabError
from mdm.vocab import NEW_MASK_TOKEN, read_vocab, require_same_tokens


def vocab(*extra, mask=None):
    return read_vocab(byte_tokenizer(extra)).with_mask(mask)


def test_ids_are_read_from_the_tokenizer():
    found = read_vocab(byte_tokenizer())
    assert (found.mask_id, found.start_id, found.eos_id, found.pad_id) == (None, 256, 257, 258)
    assert len(found) == 259


def test_named_tokens_replace_those_of_the_tokenizer():
    found = read_vocab(byte_tokenizer(("<|doc|>", "<|eot|>")), start_token="<|doc|>",
                       end_token="<|eot|>")  # fmt: skip
    assert (found.start_id, found.eos_id, found.pad_id) == (259, 260, 258)


def test_without_bos_and_pad_the_end_token_serves():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.pad_token = None
    found = read_vocab(tokenizer)
    assert (found.start_id, found.eos_id, found.pad_id) == (257, 257, 257)


def test_an_end_token_is_needed():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(VocabError, match="names no end-of-text token; give one with end_token"):
        read_vocab(tokenizer)


def test_an_unknown_token_suggests_a_special_one():
    with pytest.raises(VocabError, match=r"unknown token '<\|ends\|>'; did you mean '<\|end\|>'"):
        read_vocab(byte_tokenizer(), end_token="<|ends|>")


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [START, END, PAD, NEW_MASK_TOKEN])
def test_special_tokens_in_text_are_text(special):
    # T5: a user who types the mask token does not open a hole.
    text = f"a{special}b {special}"
    ids = vocab().encode(text)
    assert ids == list(text.encode())
    assert vocab().decode(ids) == text


def test_a_reused_token_in_text_is_text():
    # In many vocabularies such tokens are not flagged special before they become the mask.
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|hole|>", special=False, normalized=False)])
    text = "a<|hole|>b"
    assert read_vocab(tokenizer).with_mask("<|hole|>").encode(text) == list(text.encode())


def test_a_batch_is_encoded_like_its_texts():
    texts = ["", "def f():\n\treturn 'é🐍'", " x "]
    assert vocab().encode_batch(texts) == [list(text.encode()) for text in texts]
    assert vocab().encode_batch([]) == []


def test_tokens_know_the_characters_they_cover():
    texts = ["", "a é\N{SNAKE}b\r\n", f"x{NEW_MASK_TOKEN}"]
    found = vocab().encode_batch_with_spans(texts)
    assert [ids for ids, _ in found] == vocab().encode_batch(texts)
    # A token is a byte here: é is two of them, the snake four.
    counts = [1, 1, 2, 4, 1, 1, 1]
    expected = [(i, i + 1) for i, count in enumerate(counts) for _ in range(count)]
    assert found[1][1] == expected
    assert found[2][1] == [(i, i + 1) for i in range(len(texts[2]))]
    assert found[0] == ([], [])
    assert vocab().encode_batch_with_spans([]) == []


def test_a_token_that_holds_half_a_character_covers_all_of_it():
    # As real vocabularies have it: a space and the first two bytes of many emoji are one token.
    chars = byte_alphabet()
    space, first, second = (chars[byte] for byte in b" \xf0\x9f")
    merges = [(first, second), (space, first + second)]
    ids = {char: byte for byte, char in enumerate(chars)}
    ids |= {first + second: 256, space + first + second: 257, END: 258}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = read_vocab(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END))
    ((tokens, spans),) = found.encode_batch_with_spans(["a \N{SNAKE}b\N{SNAKE}"])
    assert (tokens[1], tokens[5]) == (257, 256)
    assert spans == [(0, 1), (1, 3), (2, 3), (2, 3), (3, 4), (4, 5), (4, 5), (4, 5)]


def test_special_tokens_are_decoded_only_if_asked():
    found = vocab()
    ids = [found.start_id, 97, found.mask_id, 98, found.eos_id]
    assert found.decode(ids) == "ab"
    assert found.decode(ids, keep_special=True) == f"{START}a{NEW_MASK_TOKEN}b{END}"
    assert found.token(found.mask_id) == NEW_MASK_TOKEN


def chat_vocab():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return read_vocab(tokenizer).with_mask(None)


def test_chat_uses_the_template():
    ids = chat_vocab().encode_chat([{"role": "user", "content": "hi"}])
    assert ids == [256, *b"user\nhi", 257, 256, *b"assistant\n"]


def test_special_tokens_in_a_message_are_text():
    first, second = f"hi {NEW_MASK_TOKEN}{END}", "ok"
    ids = chat_vocab().encode_chat(
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    )
    assert ids == [
        *[256, *b"user\n", *first.encode(), 257],
        *[256, *b"assistant\n", *second.encode(), 257],
        *[256, *b"assistant\n"],
    ]


def test_chat_without_a_template_says_what_to_do():
    with pytest.raises(VocabError, match="no chat template; use plain text, or rows with `prompt`"):
        vocab().encode_chat([{"role": "user", "content": "hi"}])


# --- mask token ----------------------------------------------------------------------------------


def test_a_new_mask_token_is_appended():
    assert vocab().mask_id == 259
    assert len(vocab()) == 260


@pytest.mark.parametrize(
    ("name", "expected"), [("<|fim|>", 259), (PAD, 258), (NEW_MASK_TOKEN, 260)]
)
def test_a_special_token_is_reused_as_mask(name, expected):
    found = vocab("<|fim|>", NEW_MASK_TOKEN, mask=name)
    assert found.mask_id == expected
    assert len(found) == 261  # nothing was added


def test_an_existing_default_mask_token_is_found():
    assert vocab(NEW_MASK_TOKEN).mask_id == 259


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (START, r"mask token '<\|start\|>' \(id 256\) already marks the start or end"),
        (END, r"mask token '<\|end\|>' \(id 257\) already marks the start or end"),
        ("a", r"mask token 'a' \(id 97\) is a word of ordinary text"),
        ("<|paad|>", r"unknown mask token '<\|paad\|>'; did you mean '<\|pad\|>'"),
    ],
)
def test_a_mask_token_that_clashes(name, text):
    with pytest.raises(VocabError, match=text):
        vocab(mask=name)


# --- two vocabularies ----------------------------------------------------------------------------


def test_fingerprint_tells_vocabularies_apart():
    same = {vocab("<|x|>", NEW_MASK_TOKEN).fingerprint for _ in range(2)}
    other = {
        vocab("<|y|>", NEW_MASK_TOKEN).fingerprint,  # another token
        vocab("<|x|>", NEW_MASK_TOKEN, "<|y|>").fingerprint,  # one more
        vocab("<|x|>", NEW_MASK_TOKEN, mask="<|x|>").fingerprint,  # another mask
        read_vocab(byte_tokenizer(("<|x|>", NEW_MASK_TOKEN)), end_token="<|x|>")
        .with_mask(None)
        .fingerprint,  # another end
    }
    assert len(same) == 1
    assert len(other) == 4
    assert not same & other


def test_a_student_may_have_tokens_more_than_its_teacher():
    teacher = read_vocab(byte_tokenizer())
    assert require_same_tokens(teacher.tokenizer, vocab().tokenizer) == len(teacher) == 259
    with pytest.raises(VocabError, match="differ at 1 of 260 ids"):
        require_same_tokens(vocab().tokenizer, teacher.tokenizer)


def test_ids_that_differ_are_named():
    teacher = read_vocab(byte_tokenizer(("<|x|>", "<|y|>")))
    student = read_vocab(byte_tokenizer(("<|y|>", "<|x|>")))
    text = r"differ at 2 of 261 ids .* 259: '<\|x\|>' / '<\|y\|>', 260: '<\|y\|>' / '<\|x\|>'"
    with pytest.raises(VocabError, match=text):
        require_same_tokens(teacher.tokenizer, student.tokenizer)


def test_a_template_that_refuses_a_conversation_says_why():
    teacher = vocab()
    teacher.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(VocabError, match="refuses these messages: roles must alternate"):
        teacher.encode_chat([{"role": "user", "content": "hi"}])
