"""Models that the user runs with vLLM: in this process, or on the nodes of a Ray cluster.

    local.py     in this process               ray.py        on a cluster, through Ray Data
    engines.py   its engines, a thread each    cluster.py    joining it, whether there is room, its errors
    binding.py   what is called of vLLM        on_nodes.py   what runs over there

Beneath both: `backend.py` (keys, what is refused), `order.py` (order and packs), `sampling.py` (what an
engine is asked) and `weights.py` (a path as a digest).
"""
