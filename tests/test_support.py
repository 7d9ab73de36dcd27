"""Each cell of docs/support.md, and the page."""

from __future__ import annotations

import pytest
import support


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("feature", support.FEATURES)
@pytest.mark.parametrize("storage", support.DTYPES)
def test_a_feature_is_right_or_has_a_declared_reason(backend, feature, storage, record_property):
    result = support.result(backend, feature, storage)
    record_property("cell", (backend.name, support.version(backend), storage, feature, *result))
    declared = backend.limit(feature, storage)
    assert (result.state == "right") == (declared is None), (result, declared)
