"""Prose out of wikitext."""

from __future__ import annotations

import io

import pytest

from openwork.models.wikitext import articles, prose


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("[[cat]]s and [[dog|hounds]]", "cats and hounds"),
        ("a[[File:x.png|thumb|of [[a|b]] and {{c}}]]b", "ab"),
        ("x[[fr:chat]][[Category:Cats]]", "x"),
        ("[[Alien: Resurrection]]", "Alien: Resurrection"),
        ("a {{cite|{{nested}}|x}}, b", "a, b"),
        ("a\n{| class=t\n| b\n|}\nc", "a\nc"),
        ("a<ref name=x>b</ref>c<ref name=y/>d", "acd"),
        ("a<!-- b\n c -->d", "ad"),
        ("a<math>x^2</math>b <sub>2</sub>", "ab 2"),
        ("see [http://a.b/c the page] [//d.e]", "see the page"),
        ("fish &amp; chips&nbsp;here", "fish & chips here"),
        ("* item\n# item\n: item\ntext", "text"),
        ("=== Part ===\ntext", "== Part ==\ntext"),
        ("== Empty ==\n== Full ==\ntext", "== Full ==\ntext"),
        ("a\n== References ==\nb\n== More ==\nc", "a"),
        ("ok\nbroken {{template\nbroken [[link", "ok"),
        ("", ""),
    ],
)
def test_prose(wikitext: str, expected: str) -> None:
    assert prose(wikitext) == expected


def test_articles_skip_redirects_and_other_namespaces() -> None:
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>t</text></revision></page>"
    pages = [page.format("A", 0, ""), page.format("B", 0, "<redirect/>"), page.format("C", 1, "")]
    namespace = "http://www.mediawiki.org/xml/export-0.10/"
    dump = f'<mediawiki xmlns="{namespace}">{"".join(pages)}</mediawiki>'
    assert list(articles(io.BytesIO(dump.encode()))) == [("A", "t")]
