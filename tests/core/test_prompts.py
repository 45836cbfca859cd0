"""Prompts are read as transformers reads them, for tokenizers with tokens around a text."""

import pytest

from jaxfm.prompts import read_chat, read_prompt
from jaxfm.tokenizer import HuggingFaceTokenizer, train_bpe

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    """A BPE that puts a token before and one after each text, and has a chat template."""
    from tokenizers.processors import TemplateProcessing

    made = train_bpe(["hello world"], 266)
    ids = [("<|bos|>", made.bos_id), ("<|eos|>", made.eos_id)]
    made.inner.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=ids
    )
    made.inner.chat_template = TEMPLATE
    return made


def test_a_prompt_begins_as_the_tokenizer_says_and_does_not_end(tokenizer):
    whole = tokenizer.inner.encode("hello")
    assert whole[0] == tokenizer.bos_id and whole[-1] == tokenizer.eos_id
    assert read_prompt(tokenizer, "hello") == whole[:-1]
    assert read_prompt(tokenizer, "<|bos|>hello") == whole[:-1]  # not twice
    assert tokenizer.encode("hello") == whole[1:-1]
    plain = train_bpe(["hello world"], 266)
    assert read_prompt(plain, "hello") == plain.encode("hello")


def test_special_tokens_are_read_where_they_are_meant(tokenizer):
    assert tokenizer.eos_id in read_prompt(tokenizer, "a<|eos|>b")
    as_text = read_prompt(tokenizer, "a<|eos|>b", special=False)
    assert tokenizer.eos_id not in as_text and tokenizer.decode(as_text) == "a<|eos|>b"


def test_a_chat_is_put_into_the_template(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ids = read_chat(tokenizer, messages)
    text = "<|bos|>system\nbe brief<|eos|>\n<|bos|>user\nhello<|eos|>\n<|bos|>assistant\n"
    assert tokenizer.inner.decode(ids) == text
    assert ids.count(tokenizer.bos_id) == 3
    with pytest.raises(ValueError, match=r"template refuses these messages: no tools"):
        read_chat(tokenizer, [{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="has no chat template"):
        read_chat(train_bpe(["hello world"], 266), messages)
