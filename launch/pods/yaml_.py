"""YAML as people write it: keys in the order of the code, scripts of several lines as blocks."""

from __future__ import annotations

from typing import Any


def dump(value: Any) -> str:
    """A YAML document. Text that YAML would read as a number or a truth value is quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

    def text(dumper: Any, content: str) -> Any:
        style = "|" if "\n" in content else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", content, style=style)

    Dumper.add_representer(str, text)
    # Aliases (&id001) would be right too, but no reader likes them.
    Dumper.ignore_aliases = lambda self, data: True
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, width=2**20, allow_unicode=True))
