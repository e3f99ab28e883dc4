"""Sentences in many languages, from the translations that Debian packages ship.

Each sentence knows its document; every translation of a document falls on the same side of the split, so that nothing
held out was seen in another language. Sentences that a translation left in English are dropped.
"""

# ruff: noqa: RUF001 - sentences end in many alphabets

import gettext
import hashlib
import html
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from debian import members

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hu": "Hungarian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
    "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip
SCRIPTS = {
    "ar": "[\u0600-\u06ff]", "el": "[\u0370-\u03ff]", "he": "[\u0590-\u05ff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]", "ru": "[\u0400-\u04ff]", "uk": "[\u0400-\u04ff]", "zh": "[\u4e00-\u9fff]",
}  # fmt: skip
LATIN = "[A-Za-z\u00c0-\u024f]"
DENSE = {"ja", "zh", "ko"}
FORTUNES = {
    "fortunes-de": "de", "fortunes-es": "es", "fortunes-it": "it", "fortunes-pl": "pl", "fortunes-cs": "cs",
    "fortunes-ru": "ru", "fortunes-zh": "zh", "fortunes-br": "pt", "fortunes": "en", "fortunes-min": "en",
}  # fmt: skip
TAG, SPACE = re.compile(r"<[^<>]*>"), re.compile(r"\s+")
BLOCK = re.compile(r"<(?:p|dd|li|title|h[1-4])\b[^>]*>(.*?)</(?:p|dd|li|title|h[1-4])>", re.DOTALL)
STOP = re.compile(r"(?<=[.!?\u2026])\s+|(?<=[。！？])\s*")


@dataclass(frozen=True)
class Sentence:
    """A sentence, its language and the document that it stands in."""

    text: str
    language: str
    document: str


def _language(code: str) -> str:
    return re.split(r"[_@-]", code)[0].lower()


def _paragraphs(markup: str) -> list[str]:
    """The text of paragraphs, list items and headings of HTML or Mallard."""
    return [html.unescape(TAG.sub("", found)) for found in BLOCK.findall(markup)]


def _catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """The English and the translation of each message of a .mo file."""
    try:
        catalogue = gettext.GNUTranslations(io.BytesIO(data))._catalog  # type: ignore[attr-defined] # noqa: SLF001
    except (OSError, ValueError):  # a catalogue without a plural rule
        return
    for key, text in catalogue.items():
        english = (key[0] if isinstance(key, tuple) else key).split("^")[-1]
        if english and text and english != text:
            yield english, text


def _catalogues() -> Iterator[Sentence]:
    games = r"\./usr/share/games/wesnoth/1\.16/locale/(?P<code>[^/@]+)/LC_MESSAGES/(?P<name>.*)\.mo"
    players = r"\./usr/share/locale/(?P<code>[^/@]+)/LC_MESSAGES/(?P<name>vlc)\.mo"
    for package, pattern in (("wesnoth-1.16-data", games), ("vlc-l10n", players)):
        for found, data in members(package, pattern):
            code = _language(found["code"])
            for number, (english, text) in enumerate(_catalogue(data)):
                document = found["name"] if package != "vlc-l10n" else f"vlc-{number // 200}"
                yield Sentence(text, code, document)
                if code == "de":  # a catalogue holds the English too; take it once
                    yield Sentence(english, "en", document)


def _pages() -> Iterator[Sentence]:
    sources = {
        "gnome-user-docs": r"\./usr/share/help/(?P<code>[^/@]+)/[^/]+/(?P<name>[^/]+)\.page",
        "debian-handbook": r"\./usr/share/doc/debian-handbook/html/(?P<code>[^/]+)/(?P<name>[^/]+)\.html",
        "installation-guide-amd64": r"\./usr/share/doc/installation-guide-amd64/(?P<code>[^/]+)/(?P<name>[^/]+)\.html",
    }
    for package, pattern in sources.items():
        for found, data in members(package, pattern):
            code = "en" if found["code"] == "C" else _language(found["code"])
            for text in _paragraphs(data.decode("utf-8", "replace")):
                yield Sentence(text, code, f"{package}/{found['name']}")


def _fortunes() -> Iterator[Sentence]:
    for package, code in FORTUNES.items():
        for found, data in members(package, r"\./usr/share/games/fortunes/(?P<name>(?:.*/)?[^.]+)"):
            for number, text in enumerate(re.split(r"\n%+\n", data.decode("utf-8", "replace"))):
                yield Sentence(text, code, f"fortune-{found['name']}-{number // 100}")


def _clean(text: str) -> str:
    """Text without markup, escape codes, variables, options, addresses and keyboard marks."""
    text = TAG.sub(" ", html.unescape(text)).replace("_", "").replace("&", "")
    text = re.sub(r"\x1b\[[0-9;]*m|\$\(?\w+\)?|%\w|https?://\S+|\S*[/\\=@|{}]\S*|(?<!\w)--?\w[\w-]*", " ", text)
    return SPACE.sub(" ", text).strip(" -*•~\"'")


def _in_script(text: str, language: str) -> bool:
    """Whether most letters are of the language's script."""
    letters = re.findall(r"[^\W\d_]", text)
    own = re.findall(SCRIPTS.get(language, LATIN), text)
    kana = language != "ja" or re.search("[\u3040-\u30ff]", text) is not None
    russian = language != "ru" or not re.search("[іїєґІЇЄҐ]", text)
    return (
        len(own) > 0.75 * max(len(letters), 1) and len(letters) > 0.6 * len(text.replace(" ", "")) and kana and russian
    )


def _sentences(raw: Sentence) -> Iterator[Sentence]:
    low, high = (6, 100) if raw.language in DENSE else (16, 200)
    for paragraph in re.split(r"\n\s*\n", raw.text):
        for part in STOP.split(_clean(paragraph)):
            if low <= len(part) <= high and "\ufffd" not in part and _in_script(part, raw.language):
                yield Sentence(part, raw.language, raw.document)


def held_out(document: str) -> bool:
    """Whether the document is one of the sixth that training never sees."""
    return hashlib.sha256(document.encode()).digest()[0] % 6 == 0


def load(seed: int, most: int) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences to train on and held-out sentences, at most `most` a language, without repeats."""
    everything = [
        sentence
        for source in (_catalogues(), _pages(), _fortunes())
        for raw in source
        if raw.language in LANGUAGES
        for sentence in _sentences(raw)
    ]
    english = {sentence.text.lower() for sentence in everything if sentence.language == "en"}
    random.Random(seed).shuffle(everything)
    seen: set[str] = set()
    kept: dict[tuple[bool, str], list[Sentence]] = defaultdict(list)
    for sentence in everything:
        text = sentence.text.lower()
        if text in seen or (sentence.language != "en" and text in english):
            continue
        seen.add(text)
        rows = kept[held_out(sentence.document), sentence.language]
        if len(rows) < most:
            rows.append(sentence)
    parts = [[s for (held, _), rows in kept.items() if held is side for s in rows] for side in (False, True)]
    return parts[0], parts[1]
