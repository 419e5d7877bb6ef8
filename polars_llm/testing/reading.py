"""How the built-in model reads: the telling sentence of a text, its key words, its tone."""

from __future__ import annotations

import re

_SENTENCE = re.compile(r"(?<=[.!?…。！？])\s+|\n+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_INSTRUCTION = re.compile(r"^[^.!?\n]{0,200}:\s+(?=\S)")
_LONGEST = 20_000
_MOST_SENTENCES = 40
_KEY_WORDS = 6

_COMMON = frozenset(
    re.findall(
        r"\w+",
        """the a an and or but if of to in on at by for from with without as is are was were be been
    it its this that these those i you he she we they me him her us them my your his our their
    not no so do does did have has had can could will would should may might must what which who
    how when where why all any some more most very just than then there here about into over out
    up down please summarise summarize classify extract translate describe answer question text
    following one sentence der die das und oder ist ein eine""",
    )
)
_GOOD = frozenset(
    re.findall(
        r"\w+",
        """good great excellent love loved loves perfect happy fast best amazing wonderful nice fine
    recommend recommended brilliant superb delighted comfortable easy works thanks""",
    )
)
_BAD = frozenset(
    re.findall(
        r"\w+",
        """bad poor terrible hate hated awful slow worst broken broke refund disappointed
    disappointing useless late never crash crashed crashes died missing wrong fails failed error
    expensive rude return returned defective scratched""",
    )
)


def words(text: str) -> list[str]:
    return _WORD.findall(text[:_LONGEST].lower())


def summary(prompt: str) -> str:
    """The sentence that says most of a text; its key words where it is but one sentence."""
    text = _INSTRUCTION.sub("", prompt[:_LONGEST].strip()).strip()
    sentences = [s for s in map(str.strip, _SENTENCE.split(text)) if s]
    if not sentences:
        return "There is nothing to say about an empty text."
    if len(sentences) == 1 and len(text) == len(prompt.strip()):
        return _key_words(sentences[0])
    return max(sentences[:_MOST_SENTENCES], key=_weight)


def _weight(sentence: str) -> float:
    """Much that isn't common, in few words; a question says little."""
    told = set(sentence.lower().split()) - _COMMON
    weight = len("".join(told)) / (len(sentence) + 40)
    return weight / 2 if sentence.endswith(("?", ":")) else weight


def _key_words(sentence: str) -> str:
    unique = dict.fromkeys(word for word in words(sentence) if word not in _COMMON)
    longest = set(sorted(unique, key=len, reverse=True)[:_KEY_WORDS])
    kept = [word for word in unique if word in longest]
    if not kept:
        return f"In short: {sentence.strip(' .!?') or 'nothing'}."
    return f"In short: {', '.join(kept)}."


def tone(text: str) -> int:
    """Above zero for praise, below for complaint."""
    found = words(text)
    return sum(word in _GOOD for word in found) - sum(word in _BAD for word in found)
