"""Optional additions to the networks' room; the core names them by strings in its tables and imports none.

What lives here: networks made of others, such as a 2-D one that goes through a volume slice by slice.
May import: what `model/` may.
To add a network: a class that takes `channels` and `classes`, and its line in `NETWORKS` of `model/networks.py`.
"""
