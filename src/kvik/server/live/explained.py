"""Pages that were made of prompts, for as long as they are among the newest."""

from __future__ import annotations

import secrets
from collections import OrderedDict

MAX_KEPT = 8
"""Pages, of all who asked for some."""


class ExplainedPages:
    """The newest pages, and whose they are."""

    def __init__(self) -> None:
        self._pages: OrderedDict[str, tuple[str | None, str]] = OrderedDict()

    def keep(self, tenant: str | None, page: str) -> str:
        """The id of a new one; the oldest may go for it."""
        page_id = secrets.token_urlsafe(16)
        self._pages[page_id] = tenant, page
        if len(self._pages) > MAX_KEPT:
            self._pages.popitem(last=False)
        return page_id

    def get(self, tenant: str | None, page_id: str) -> str | None:
        """A page that is the tenant's."""
        owner, page = self._pages.get(page_id, (None, None))
        return page if owner == tenant else None
