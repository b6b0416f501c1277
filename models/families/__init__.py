"""Families of published checkpoints; a new one is one small file of name maps, listed here."""

from steppe.models.families import bert, distilbert, mpnet, roberta
from steppe.models.families.names import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (bert, roberta, distilbert, mpnet)
}


def family(name: str) -> Family:
    """The family whose ``model_type`` is ``name``.

    Raises:
      ValueError: it is not known; lists those that are.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is not known; known families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
