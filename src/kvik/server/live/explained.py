"""Pages that were made of prompts, for as long as they are among the newest."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable

MAX_KEPT = 8
"""Pages, of all who asked for some."""


MAX_LINKS = 64
"""That nobody has opened yet."""

LINK_S = 30.0
"""How long a link can be opened."""


class ExplainedPages:
    """The newest pages, and whose they are; links open one of them once, for a browser sends no key with a link."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pages: OrderedDict[str, tuple[str | None, str]] = OrderedDict()
        self._links: OrderedDict[str, tuple[float, str]] = OrderedDict()  # when each ends, and its page

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

    def link(self, tenant: str | None, page_id: str) -> str | None:
        """A new secret that opens a page of the tenant's; None where there is no such page."""
        page = self.get(tenant, page_id)
        if page is None:
            return None
        secret = secrets.token_urlsafe(24)
        self._links[secret] = self._clock() + LINK_S, page
        if len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)
        return secret

    def open(self, secret: str) -> str | None:
        """The page, once."""
        ends_s, page = self._links.pop(secret, (0.0, None))
        return page if self._clock() < ends_s else None
