"""The pytest fixture `llm_provider`: a local provider for one test.

Registered as an entry point, so it is imported by every pytest run: it imports nothing until a
test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .handle import Provider


@pytest.fixture
def llm_provider() -> Iterator[Provider]:
    """A local provider, with the SDKs' environment variables pointing at it.

    Yields
    ------
    Provider
        See `polars_llm.testing`.

    Examples
    --------
    >>> def test_each_prompt_is_paid_once(llm_provider):
    ...     ...
    ...     assert not llm_provider.bill().duplicates
    """
    from .handle import provider

    with provider() as running:
        yield running
