"""``steppe plan``: what a training step needs on devices that are not there.

Settings -> abstract values (``work``) -> bytes a device (``memory``), a mesh (``propose``), the
partitioned program (``program``, ``hlo``, ``count``) -> time on an accelerator (``roofline``) ->
a table (``table``). No array of a model's size is ever made.
"""
