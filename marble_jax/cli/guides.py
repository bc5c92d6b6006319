"""Guides that travel with the package: every Markdown page in `marble_jax/guides` is a topic of `marble-jax help`."""

from __future__ import annotations

from pathlib import Path

from marble_jax.cli.help import columns

_FOLDER = Path(__file__).parents[1] / "guides"


def guide_files() -> dict[str, Path]:
    """Returns the pages by the name that `marble-jax help` takes."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.md"))}


def guide_title(file: Path) -> str:
    """Returns what a page is about: its first heading."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").strip()


def guide_list() -> str:
    """Returns the names of all pages with what they are about, a line each."""
    rows = [(name, guide_title(file)) for name, file in guide_files().items()]
    return "\n".join([*columns(rows), "", "marble-jax help NAME prints one"])


def guide_text(file: Path) -> str:
    """Returns a page as it stands."""
    return file.read_text(encoding="utf-8").rstrip()
