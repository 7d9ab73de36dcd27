"""Each cell of docs/reference/support.md, and the page."""

from __future__ import annotations

import pytest
import support
import support_page
from backends import LANES


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # cubed imports numpy.core
@pytest.mark.parametrize("feature", support.FEATURES)
@pytest.mark.parametrize("storage", support.DTYPES)
def test_a_feature_is_right_or_has_a_declared_reason(backend, feature, storage, record_property):
    state = support.state(backend, feature, storage)
    record_property("cell", (backend.name, support.version(backend), storage, feature, state))
    reason = backend.limit(feature, storage)
    assert (state == "right") == (reason is None), (state, reason)


def test_the_page_shows_the_cells_of_each_library():
    """`nox -s support` writes the files of the libraries and the page."""
    fragments = support_page.read()
    assert len(fragments) >= 8
    for lane, fragment in fragments.items():
        assert set(fragment) == {"version", "python", "cells"}
        assert list(fragment["cells"]) == sorted(support.DTYPES)
        for dtype, row in fragment["cells"].items():
            assert list(row) == sorted(support.FEATURES)
            for feature, state in row.items():
                assert state in support_page.SHORT
                assert (state == "right") == (LANES[lane][0].limit(feature, dtype) is None)
    assert support_page.PAGE.read_text("utf-8") == support_page.page(fragments)
