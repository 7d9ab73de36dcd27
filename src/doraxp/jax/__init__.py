"""DoRA inside of JAX: two functions for jit, vmap and derivatives, on one device or on a mesh.

    dora_linear          y = x W'ᵀ + bias
    merge                W'

Needs the extra ``jax``. The values are those of `doraxp.forward` and `doraxp.merge`. Derivatives
may be taken in forward and in reverse mode, and more than once. JAX can differentiate
`doraxp.forward` too, but that costs one more product of the weight's size. A NumPy array may stand
for a JAX array.

The import registers `doraxp.Config` as static with JAX: a `doraxp.Prepared` may then be an argument
and a result of a jitted function. So does any call of doraxp with JAX arrays.
"""

from doraxp._base.extras import require
from doraxp._base.pytrees import register_config

require("jax", "jax", of="doraxp.jax")

from doraxp.jax._functions import dora_linear, merge

__all__ = ["dora_linear", "merge"]

register_config()
