"""Each cell of docs/support.md, and the page."""

from __future__ import annotations

import pytest
import support
import support_page
from backends import LANES


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("feature", support.FEATURES)
@pytest.mark.parametrize("storage", support.DTYPES)
def test_a_feature_is_right_or_has_a_declared_reason(backend, feature, storage, record_property):
    result = support.result(backend, feature, storage)
    record_property("cell", (backend.name, support.version(backend), storage, feature, *result))
    declared = backend.limit(feature, storage)
    assert (result.state == "right") == (declared is None), (result, declared)


def test_the_page_shows_the_cells_of_each_library():
    """`nox -s support` writes both."""
    fragments = support_page.read()
    for lane, fragment in fragments.items():
        assert set(fragment) == {"version", "python", "cells"}
        assert list(fragment["cells"]) == sorted(support.DTYPES)
        for dtype, row in fragment["cells"].items():
            assert list(row) == sorted(support.FEATURES)
            for feature, (state, *text) in row.items():
                reason = LANES[lane][0].limit(feature, dtype)
                assert text == ([] if reason is None else [reason])
                assert (state == "right") == (reason is None)
    assert support_page.PAGE.read_text("utf-8") == support_page.page(fragments)
    assert len(fragments) >= 8
