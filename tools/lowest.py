"""Prints the lowest version of each dependency that pyproject.toml allows, as constraints for pip.

python tools/lowest.py test > lowest.txt && pip install -c lowest.txt ".[test]"

Bounds are therefore versions that exist, and nothing but `>=` and `<`.
"""

import re
import sys
import tomllib
from pathlib import Path


def lowest(project: dict, extras: list[str]) -> list[str]:
    """`name==version` of each requirement of a `[project]` table and of these extras.

    Raises
    ------
    ValueError
        For a requirement without a lower bound.
    """
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = []
    for line in wanted:
        if own := re.fullmatch(rf"{project['name']}\[([\w,]+)\]", line):
            found += lowest(project, own[1].split(","))
            continue
        match = re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=|==)([\d.]+)", line)
        if match is None:
            raise ValueError(f"a requirement must have a lower bound, got {line!r}: write name>=version")
        found.append(f"{match[1]}=={match[2]}")
    return sorted(set(found))


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(lowest(tomllib.loads(text)["project"], sys.argv[1:])))  # noqa: T201
