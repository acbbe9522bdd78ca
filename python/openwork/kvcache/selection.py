"""The pages that steps read, chosen anew every few of them."""

from __future__ import annotations

from torch import Tensor

from openwork import ops
from openwork.kv_pages import KVPages
from openwork.kvcache.policy import PageChoice


class Selection:
    """A policy's choice among the pages of a layer.

    Args:
        choice: what the policy asks for; None: every page.
        pages: the layer's.
    """

    def __init__(self, choice: PageChoice | None, pages: KVPages) -> None:
        self._choice, self._pages = choice, pages
        self._selected: Tensor | None = None
        self._selected_at, self._newest = -1, -1

    def of(self, rows: Tensor, seen: int) -> Tensor | None:
        """Places of the pages to read, or None for all.

        Args:
            rows: ``[b g, t, h / g, d]``: the step's queries.
            seen: tokens so far.
        """
        if self._choice is None:
            return None
        size = self._pages.page_size
        newest = (int(self._pages.lengths.max()) - 1) // size
        age = seen - self._selected_at
        if self._selected is None or age >= self._choice.refresh or newest != self._newest:
            self._selected = ops.select_pages(
                rows,
                self._pages,
                max(1, self._choice.tokens // size),
                method=self._choice.method,
                reduce=self._choice.reduce,
            )
            self._selected_at, self._newest = seen, newest
        return self._selected

    def forget(self) -> None:
        """Choose anew at the next step: the pages changed."""
        self._selected = None
