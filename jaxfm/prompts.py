"""Prompts as a model's folder wants them: beginning of text, special tokens, chat template.

`Tokenizer.encode` reads text and nothing else, which is right for documents. Whoever writes a
prompt may mean more: the token that the model expects at the beginning, `<|im_start|>` for one
token, a question for the chat template around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxfm.tokenizer import HuggingFaceTokenizer, utf8


def read_prompt(tokenizer: HuggingFaceTokenizer, text: str, *, special: bool = True) -> list[int]:
    """Returns the ids of a prompt, after those that the tokenizer puts before every text.

    Args:
      tokenizer: of the model's folder.
      text: the prompt.
      special: whether names of special tokens in the text stand for these tokens.
    """
    utf8(text)
    encode = lambda add: tokenizer.inner.encode(
        text, add_special_tokens=add, split_special_tokens=not special
    )
    plain, whole = encode(False), encode(True)
    # What it puts behind ends a text, which is to go on.
    places = range(len(whole) - len(plain) + 1)
    start = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
    before = whole[:start]
    return plain if before == plain[:start] else before + plain


def read_chat(tokenizer: HuggingFaceTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Returns the ids of a conversation in the tokenizer's chat template, up to the answer.

    Args:
      tokenizer: of the model's folder.
      messages: dicts of "role" ("system", "user", "assistant") and "content".
    Raises:
      ValueError: the folder has no chat template, or it refuses these messages.
    """
    if not tokenizer.inner.chat_template:
        raise ValueError(
            f"{tokenizer.inner.name_or_path or 'The tokenizer'} has no chat template; give the "
            "prompt as the model was trained on it."
        )
    try:
        text = tokenizer.inner.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates are programs of their own
        raise ValueError(f"The chat template refuses these messages: {error}.") from error
    return tokenizer.inner.encode(text, add_special_tokens=False)
