"""Findings in parts of PEFT, LyCORIS and mlx-lm beside the linear layer: `nox -s peers`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from peers.checks import findings, meant, names, not_finite, offered

from doraxp.testing import sum_catalogue

pytestmark = pytest.mark.filterwarnings("ignore")  # from their imports and classes

EPS = float(np.finfo("float32").eps)
LYCORIS = {"norm_gradient": "exact", "eps": EPS, "dtypes": ("float32",)}


@pytest.fixture
def operators(torch):
    from peers import operators

    return operators


@pytest.fixture
def sums(torch):
    from peers import sums

    return sums


@pytest.fixture
def updates(torch):
    from peers import updates

    return updates


@pytest.fixture
def optimizers(torch):
    from peers import optimizers

    return optimizers


def distance(got, wanted):
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))


def of_case(name, dtype="float64"):
    """Return the arguments of a sum's merge."""
    (case,) = (case for case in sum_catalogue() if case.name == name)
    return {
        "weight": case.stored(dtype)["weight"],
        "adapters": case.adapters(dtype),
        "strengths": list(case.strengths),
        "scalings": [config.scaling for config in case.configs],
    }


def test_pefts_convolutions_are_right_except_with_dilation_and_groups(peft, operators, reported):
    peer = SimpleNamespace(convolution=operators.PeftConvolution())
    report = reported("peft", "convolution", peer, meant(dropout="input"))
    wrong = findings(report)
    assert {case for _, case, _ in wrong} == {"convolution, 1 dimension", "grouped convolution"}
    # Its A has no dilation, so that its sizes are not those of y.
    dilated = [one for one in report.findings if one.case == "convolution, 1 dimension"]
    assert all("must match the size" in one.problem for one in dilated)
    # The norm of a grouped convolution is that of A and B with their numbers in another order.
    grouped = {name for name, case, _ in wrong if case == "grouped convolution"}
    assert grouped == {"convolution.forward", "convolution.gradients"}


def test_pefts_convolution_pads_the_low_rank_part_with_zeros(peft, operators, noted, torch):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 3))
    base = operators.convolution(weight, None, 1, padding=1, padding_mode="reflect")
    layer = operators.PeftConvolution().adapted(base, 1.0, 2)
    layer.lora_A["default"].weight.data = torch.tensor(rng.standard_normal((2, 3, 3)))
    layer.lora_B["default"].weight.data = torch.tensor(rng.standard_normal((4, 2, 1)))
    x = torch.tensor(rng.standard_normal((2, 3, 6)))
    y = layer(x).detach().numpy()
    layer.merge()
    off = distance(y, layer(x).detach().numpy())
    noted("peft", "convolution, padding_mode", "forward is not merge", off)
    assert off > 0.1
    assert not np.any(np.abs(y - layer(x).detach().numpy())[..., 1:-1] > 1e-12)  # but at the edge


def test_pefts_embedding_is_right_but_returns_nan_for_a_zero_dimension(peft, operators, reported):
    peer = SimpleNamespace(embedding=operators.PeftEmbedding())
    report = reported("peft", "embedding", peer, meant())
    assert findings(report) == set()
    assert not_finite(report, "embedding, zero dimension") == {
        ("embedding.forward", "y"),
        ("embedding.merge", "merged"),
        *(("embedding.gradients", name) for name in ("da", "db", "dm")),
    }


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_pefts_weighted_adapter_forgets_the_magnitudes(peft, sums, reported, combination):
    peer = sums.PeftWeighted(combination)
    report = reported("peft", f"weighted, {combination}", SimpleNamespace(sums=peer), meant())
    cases = {case for _, case, _ in findings(report)}
    assert cases >= {"one adapter", "half strength", "two adapters", "three adapters"}
    assert "no strength" not in cases
    given = of_case("one adapter")
    forgotten = [{**given["adapters"][0], "magnitude": np.linalg.norm(given["weight"], axis=1)}]
    wanted = alone({**given, "adapters": forgotten})
    np.testing.assert_allclose(peer.merge(**given), wanted, rtol=1e-5)  # it computes in float32


def test_pefts_weighted_adapter_of_one_is_not_that_adapter(peft, sums, noted):
    given = trained()
    off = distance(sums.PeftWeighted("svd").merge(**given), alone(given))
    noted("peft", "weighted", "one adapter at weight 1 is not itself", off)
    assert off > 0.1


def test_pefts_strength_multiplies_s(peft, sums, reported):
    """A strength of 0 leaves m/‖W‖ on W."""
    peer = sums.OneOf(sums.PeftMerges())
    report = reported("peft", "strength of one adapter", SimpleNamespace(sums=peer), meant())
    assert "the strength multiplies s" in {one.deviations[0] for one in report.diagnoses}


def test_peft_merges_each_adapter_into_the_merge_of_those_before(peft, sums, noted):
    given = of_case("two adapters")
    merged = sums.PeftMerges().merge(**given)
    result = given["weight"]
    for v, m in layers_of(given):
        result = m[:, None] / np.linalg.norm(v, axis=1)[:, None] * (result + v - given["weight"])
    np.testing.assert_allclose(merged, result)
    noted("peft", "merge of two adapters", "is not the sum", distance(merged, added(given)))
    turned = {name: each[::-1] if name != "weight" else each for name, each in given.items()}
    other = distance(sums.PeftMerges().merge(**turned), merged)
    noted("peft", "merge of two adapters", "depends on their order", other)
    assert other > 0.1


def test_peft_adds_two_adapters_in_training_alone(peft, sums, noted, torch):
    """With dropout modules of ones two adapters add up, and without them they are composed."""
    given = of_case("two adapters")
    layer = sums.model_with(given["weight"], given["adapters"], given["scalings"])
    layer = layer.base_model.model[0]
    layer.set_adapter(["0", "1"])
    eye = torch.eye(6, dtype=torch.float64)
    evaluated = layer(eye).detach().numpy().T
    for name in ("0", "1"):
        layer.lora_dropout[name] = sums.Given(torch.ones(6, 6, dtype=torch.float64))
    layer.train()
    trained = layer(eye).detach().numpy().T
    np.testing.assert_allclose(trained, added(given))
    np.testing.assert_allclose(evaluated, sums.PeftMerges().merge(**given))
    off = distance(evaluated, trained)
    noted("peft", "two active adapters, dropout", "training is not evaluation", off)
    assert off > 0.1


def test_pefts_optimizers_are_right_but_treat_m_as_b(peft, optimizers, reported):
    peer = optimizers.PeftOptimizers()
    plus = reported("peft", "LoRA+", offered(peer, "loraplus_step"), meant())
    assert names(plus) == {
        ("loraplus_step",): (
            "the magnitude decays too",
            "the ratio raises the rate of m too",
        )
    }
    scaled = reported("peft", "Riemannian", offered(peer, "scaled_step"), meant())
    assert names(scaled) == {("scaled_step",): ("the magnitude decays too",)}


def test_lycoris_convolutions_are_right(lycoris, operators, reported):
    peer = SimpleNamespace(convolution=operators.LycorisConvolution())
    report = reported("lycoris-lora", "LoCon, convolution", peer, meant(**LYCORIS))
    assert report.findings == ()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_multiplies_x_by_the_right_weight(lycoris, updates, reported, kind):
    peer = SimpleNamespace(**{kind: updates.KINDS[kind](merged=False)})
    report = reported("lycoris-lora", f"{kind}, forward", peer, meant(**LYCORIS))
    assert report.findings == ()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("loha", "s is applied twice"),
        ("lokr", "s multiplies a right factor of low rank once more"),
    ],
)
def test_lycoris_merges_loha_and_lokr_with_s_twice(lycoris, updates, reported, kind, named):
    peer = SimpleNamespace(**{kind: updates.KINDS[kind](merged=True)})
    report = reported("lycoris-lora", f"{kind}, merge_to", peer, meant(**LYCORIS))
    assert names(report) == {(f"{kind}.merge",): (named,)}


def test_lycoris_strength_scales_the_gain_alone(lycoris, sums, reported):
    """At strength t it merges (1 + t (m/n − 1)) V: at 0 the update stays."""
    peer = sums.LycorisStrength()
    report = reported("lycoris-lora", "strength", SimpleNamespace(sums=peer), meant(**LYCORIS))
    wrong = {case for _, case, _ in findings(report)}
    assert wrong == {"half strength", "no strength", "negative strength"}
    for name in wrong:
        given = of_case(name, "float32")
        ((v, m),), (t,) = layers_of(given), given["strengths"]
        gain = m / (np.linalg.norm(v, axis=1) + EPS)
        wanted = (1 + t * (gain - 1))[:, None] * v
        np.testing.assert_allclose(peer.merge(**given), wanted, rtol=1e-5, atol=1e-6)


def test_mlx_lm_embeddings_have_a_norm_for_each_token(mlx_lm, reported, torch):
    from peers import layers

    table = layers.MlxTable()
    report = reported(
        "mlx-lm", "embedding as a linear layer", offered(table, "forward", "merge"), meant()
    )
    assert findings(report) == set()
    looked_up = SimpleNamespace(merge=table.looked_up)
    report = reported("mlx-lm", "embedding, looked up", looked_up, meant())
    assert findings(report) == set()
    assert not_finite(report, "zero row") == {("merge", "merged")}


def layers_of(given):
    """Return V and m of each adapter of a sum."""
    pairs = zip(given["adapters"], given["scalings"], strict=True)
    return [
        (given["weight"] + s * one["lora_b"] @ one["lora_a"], one["magnitude"]) for one, s in pairs
    ]


def added(given):
    """Return W + Σ t (W' − W) in NumPy."""
    total = given["weight"]
    for (v, m), t in zip(layers_of(given), given["strengths"], strict=True):
        merged = (m / np.linalg.norm(v, axis=1))[:, None] * v
        total = total + t * (merged - given["weight"])
    return total


def alone(given):
    """Return the merge of a sum of one adapter."""
    return added({**given, "strengths": [1.0]})


def trained():
    """Return one adapter whose magnitudes are up to a third away from the norms of W."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 32)) / 32**0.5
    adapter = {
        "lora_a": rng.standard_normal((4, 32)) / 32**0.5,
        "lora_b": 0.1 * rng.standard_normal((24, 4)),
        "magnitude": np.linalg.norm(weight, axis=1) * rng.uniform(2 / 3, 4 / 3, 24),
    }
    return {"weight": weight, "adapters": [adapter], "strengths": [1.0], "scalings": [2.0]}
