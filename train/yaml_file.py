"""Reading a YAML file whose values the schema's types will read: text stays text, and no key counts twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


class RepeatedKey(yaml.YAMLError):
    """A key stands twice in one mapping; the message has both lines."""


class _Loader(yaml.SafeLoader):
    """Leaves every value the text that it is: YAML by itself makes `1.10` 1.1, `007` 7, and `on` True.

    A key without a value (or with null) is as if it were not there: so are sections whose keys are all commented out.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's name
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (_MERGE, _NULL)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The mapping as it is written, before merge keys (`<<`) add what the file may override."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise RepeatedKey(f"{key.value} in line {lines[key.value]} and again in line {line}")
        node.value = [(key, value) for key, value in node.value if value.tag != _NULL]
        return node


def read_yaml(path: Path) -> Any:
    """The content of a YAML file in UTF-8 (or UTF-16 with its mark); `yaml.YAMLError` where it is none."""
    with path.open("rb") as file:  # bytes: PyYAML tells the encodings apart, and not by the machine's locale
        return yaml.load(file, _Loader)
