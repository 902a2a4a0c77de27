"""Follows every link inside the built site: to pages, to files and to places on pages.

python docs/links.py build/docs              fails if one leads nowhere
python docs/links.py build/docs --external   lists the links to other sites, which are not fetched
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit


@dataclass
class Page(HTMLParser):
    """The places on a page, and where its links lead."""

    places: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(
        self, tag: str, attributes: list[tuple[str, str | None]]
    ) -> None:
        """Takes in one tag."""
        for name, value in attributes:
            if value and name == "id":
                self.places.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


@cache
def read(path: Path) -> Page:
    """The page in a file."""
    page = Page()
    page.feed(path.read_text())
    return page


def is_external(link: str) -> bool:
    """Whether it leads to another site, or out of the web."""
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def broken(site: Path) -> list[str]:
    """What is wrong with the links of a site, a line for each."""
    found = []
    for path in sorted(site.rglob("*.html")):
        for link in read(path).links:
            if is_external(link):
                continue
            name, place = urldefrag(unquote(link))
            name = name.split("?")[0]  # what follows tells versions of a file apart
            target = (path.parent / name).resolve() if name else path.resolve()
            if not target.is_file():
                found.append(f"{path.relative_to(site)}: {link} is no file of the site")
            elif (
                place and target.suffix == ".html" and place not in read(target).places
            ):
                found.append(
                    f"{path.relative_to(site)}: {link} names a place that is not on that page"
                )
    return found


def external(site: Path) -> list[str]:
    """The links to other sites, each once."""
    links = {link for path in site.rglob("*.html") for link in read(path).links}
    return sorted(
        urldefrag(link).url
        for link in links
        if urlsplit(link).scheme in ("http", "https")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path)
    parser.add_argument("--external", action="store_true")
    options = parser.parse_args()
    if options.external:
        print("\n".join(dict.fromkeys(external(options.site))))
        return
    found = broken(options.site)
    print(
        "\n".join(
            [
                *found,
                f"{len(list(options.site.rglob('*.html')))} pages, {len(found)} broken links",
            ]
        )
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
