"""Texts to ask with: sentences of a small world, and what the world's keyboards can do to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

CORPUS = (
    "the pump in hall seven runs warm and the valve beside it is closed",
    "Anna Lindqvist of Northwind Motors flew from Oslo to New York on Monday",
    "please call the engineer before the pressure rises above three bars",
    "a small box at the edge answers in milliseconds, without any cloud",
    "what a wonderful, quiet and reliable machine! we never had a better one",
    "this is the worst update ever... nothing works & support won't answer",
    "le café près de la gare est fermé; où est le médecin de Genève?",
    "Grüße aus Köln: die Straßenbahn fährt heute nicht über den Fluß",
    "привет мир, как дела сегодня в Москве",
    "東京は今日も雨です。北京欢迎你",
    "שלום עולם מרחבא بالعالم",
    "0 1 2 3 4 5 6 7 8 9 10 2026-11-22 19:07 +47 12 34 56 78 (100%)",
    "translate English to German: summarize: question: answer: context:",
)
ODD = (
    "",
    " ",
    "a",
    "pump",
    ".",
    "\u0301",
    "e\u0301\u0323 \u0301\u0301\u0301 x\u0335",
    "שלום \u202eabc\u202c مرحبا 123",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇳🇴🇳",
    "\u200b\u200c\u200d\ufeff",
    "a\tb\nc\r\nd\x0be\x00f\x1b[2J\x7f\x85",
    "  two  spaces   at\u00a0the\u3000ends  ",
    "I\u0307stanbul İSTANBUL ıI ẞ ß ſ ŉ ǰ ΐ",
    "ﬁle ﬃ ① Ⅳ ℌ 𝔘𝔫𝔦 ｆｕｌｌ ｶﾅ",
    "한국어 조합 ᄒ\u1161ᆫ",
    "ไม่มีช่องว่างระหว่างคำ",
    "[CLS] [SEP] [MASK] <s> </s> <pad> <unk> <mask>",
    "don't can't we'll I'm 'tis O'Neil's \"quoted\" (a) [b] {c} <d>",
    "https://example.org/a?b=c&d=é#f user@example.org #tag @name $5.00 1,000.5",
    "x" * 120,
    "Donaudampfschifffahrtsgesellschaftskapitän" * 4,
)
"""What goes wrong most often, one by one; each fits a model of 64 tokens, or is too long for it."""

PLANES = (0x0000, 0x1000, 0x2000, 0x4E00, 0xA000, 0xE000, 0xF900, 0x10000, 0x1F300, 0x20000, 0x30000, 0xE0000, 0xF0000,
          0x10F000)  # fmt: skip
"""Where letters are drawn from: every plane of Unicode that has any, private ones too."""


def texts(chance: random.Random, count: int, most_words: int = 12) -> Iterator[str]:
    """Give the odd texts, then `count` generated ones."""
    yield from ODD
    for _ in range(count):
        yield text(chance, most_words)


def text(chance: random.Random, most_words: int = 12) -> str:
    """Return a sentence, most often an ordinary one."""
    makers: list[Callable[[random.Random], str]] = [_known, _known, _known, _known, _cased, _letters, _marked]
    separators = [" ", " ", " ", " ", " ", "  ", ", ", "\n", "", "-"]
    made = ""
    for _ in range(chance.randint(1, most_words)):
        made += chance.choice(makers)(chance) + chance.choice(separators)
    return made if chance.random() < 0.2 else made.strip()


def sentence(chance: random.Random, words: int) -> str:
    """Return plain words of the corpus."""
    return " ".join(_known(chance) for _ in range(words))


def _known(chance: random.Random) -> str:
    return chance.choice(chance.choice(CORPUS).split())


def _cased(chance: random.Random) -> str:
    return chance.choice([str.upper, str.title, str.swapcase])(_known(chance))


def _letters(chance: random.Random) -> str:
    start = chance.choice(PLANES)
    drawn = (chr(start + chance.randrange(0x800)) for _ in range(chance.randint(1, 6)))
    return "".join(letter for letter in drawn if not 0xD800 <= ord(letter) < 0xE000)


def _marked(chance: random.Random) -> str:
    return "".join(letter + chr(chance.randint(0x300, 0x36F)) * chance.randint(0, 2) for letter in _known(chance))


def fitting(length: Callable[[str], int], tokens: int, chance: random.Random) -> tuple[str, str]:
    """Return a text of exactly `tokens` tokens as `length` counts them, or just fewer, and one that is just longer."""
    words: list[str] = []
    while length(" ".join(words)) <= tokens:
        words.append(_known(chance))
    longer = " ".join(words)
    fits = " ".join(words[:-1])
    while length(f"{fits} a") <= tokens:
        fits += " a"
    return fits, longer
