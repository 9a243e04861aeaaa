"""The fused update of leaves, one module per backend. Not public.

* ``base``: the contract, what a backend is given, gives back and has to offer.
* ``dispatch``: the table of backends, and which of them updates a leaf.
* ``xla``, ``triton``, ``mosaic_tpu``: the backends. What begins with ``triton_`` or
  ``mosaic_`` belongs to one of them.
* ``partitioning``, ``offload``: leaves that are sharded, or kept in host memory.
* ``primitive``: updates that are carried out later, for gradient release.
"""
