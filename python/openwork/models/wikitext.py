"""Prose from a MediaWiki dump: articles without markup, tables, lists and references.

Not a parser of wikitext, which is Turing-complete; a few patterns, applied from the innermost
bracket outwards, that leave clean paragraphs of ordinary articles.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from typing import IO, TypeAlias
from xml.etree import ElementTree

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SELF_CLOSED = re.compile(r"<(ref|references|nowiki)\b[^<>]*/>", re.IGNORECASE)
# Elements whose content is not prose.
_DROPPED = re.compile(
    r"<(ref|math|gallery|table|timeline|source|syntaxhighlight|imagemap|score|code|pre)\b[^<>]*>"
    r".*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_INNER_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_INNER_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
# Pictures, categories, other languages ("fr:...") and other projects.
_NOT_PROSE = re.compile(r":?(file|image|category|media|wikt|wiktionary|[a-z]{2,3}):", re.IGNORECASE)
_LEFTOVER = re.compile(r"\{\{|\}\}|\[\[|\]\]|\|")
_EXTERNAL_LINK = re.compile(r"\[(?:https?:)?//\S+ ?([^\[\]]*)\]")
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
# Where a template stood, as in "ASD {{fact}}, a".
_GAP = re.compile(r" +(?=[ ,.;)])|(?<=\() +")
_HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1\s*$")
Replacement: TypeAlias = str | Callable[[re.Match[str]], str]

# Sections after the prose.
_BACK_MATTER = {
    "see also", "notes", "references", "further reading", "external links", "bibliography",
    "citations", "sources", "footnotes", "notes and references",
}  # fmt: skip


def articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The articles of a dump in order, redirects left out: ``(title, wikitext)``.

    Args:
        dump: a MediaWiki XML export, uncompressed. It is parsed as it is read.
    """
    for _, element in ElementTree.iterparse(dump):
        if element.tag.rpartition("}")[2] != "page":
            continue
        if element.find("{*}redirect") is None and element.findtext("{*}ns") == "0":
            yield element.findtext("{*}title", ""), element.findtext("{*}revision/{*}text", "")
        element.clear()


def prose(wikitext: str) -> str:
    """The paragraphs of an article, each a line, and its headings as ``== TEXT ==``.

    Lists, tables, formulas, notes, lines with markup left in them, and everything from the first
    section of references on are left out, and so are headings with no paragraph left under them.

    Example:
        >>> prose("'''A''' [[cat|feline]]{{fact}} purrs.<ref>me</ref>\\n== Notes ==\\nx")
        'A feline purrs.'
    """
    text = _COMMENT.sub("", wikitext)
    text = _DROPPED.sub("", _SELF_CLOSED.sub("", text))
    text = _innermost_first(_INNER_TEMPLATE, "", text)
    text = _innermost_first(_INNER_LINK, _link_text, text)
    text = _TAG.sub("", _EXTERNAL_LINK.sub(r"\1", text))
    text = html.unescape(_QUOTES.sub("", text)).replace("\xa0", " ")
    lines: list[str] = []
    heading = None
    for line in map(str.strip, _GAP.sub("", text).splitlines()):
        if match := _HEADING.match(line):
            if match[2].lower() in _BACK_MATTER:
                break
            heading = f"== {match[2]} =="
        elif line and line[0] not in "*#:;!=" and not _LEFTOVER.search(line):
            lines += [line] if heading is None else [heading, line]
            heading = None
    return "\n".join(lines)


def _link_text(match: re.Match[str]) -> str:
    """What a link shows."""
    return "" if _NOT_PROSE.match(match[1]) else match[1].rpartition("|")[2]


def _innermost_first(pattern: re.Pattern[str], replacement: Replacement, text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text
