"""How tokenizers spell bytes: the printable characters of byte-level BPE, and the way back."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


def byte_characters() -> list[str]:
    """Returns the printable character that byte-level BPE (GPT-2) writes for each of 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def token_reader(backend: Any, tokens: Mapping[str, int]) -> Callable[[str], bytes]:
    """Returns how a tokenizer's decoder turns the written form of one of its tokens into bytes."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        spelled = lambda token: all(character in byte_of for character in token)
        return lambda token: (
            bytes(byte_of[character] for character in token) if spelled(token) else token.encode()
        )
    if "ByteFallback" in kinds:

        def sentencepiece(token: str) -> bytes:
            if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
                return bytes.fromhex(byte[1])
            return token.replace("\u2581", " ").encode()

        return sentencepiece
    # Of all others, what a token adds after some other token.
    first = min(tokens.values(), default=0)
    before = backend.decode([first])
    after = backend.decode_batch([[first, number] for number in tokens.values()])
    added = {token: text.removeprefix(before) for token, text in zip(tokens, after, strict=True)}
    return lambda token: added[token].encode()
