"""torchtune's export for PEFT: the rows of m of q and k are not in the order of those of B.

torchtune keeps the two numbers of a rotation side by side, and transformers keeps them half a head
apart. The export puts lora_B in transformers' order, and leaves the magnitude as it is.
"""

from __future__ import annotations

from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._json import JsonObject

_HEADS = {
    "q_proj": ("num_attention_heads",),
    "k_proj": ("num_key_value_heads", "num_attention_heads"),
}


def in_order(
    path: str, layer: StoredLayer, adapters: AdapterSet, config: JsonObject
) -> StoredLayer:
    """Return the layer, with the heads by which the rows of its m are put in order.

    `config` is the content of the base's config.json.
    """
    names = _HEADS.get(path.rpartition(".")[2])
    if not adapters.is_interleaved or names is None:
        return layer
    text = config.get("text_config")
    entries = config | (text if isinstance(text, dict) else {})
    heads = next((entries[name] for name in names if entries.get(name)), None)
    rows = layer.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{path}: torchtune's export has the rows of the magnitude in an order that depends on "
            f"the heads, so BASE must have a config.json whose {names[0]} divides {rows} rows into "
            f"pairs, got {heads!r}"
        )
    return layer._replace(heads=heads)
