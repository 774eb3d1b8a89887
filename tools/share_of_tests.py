"""A pytest plugin that runs every n-th of the chosen tests, so that n processes can share them:

PYTHONPATH=tools python -m pytest -p share_of_tests --share 0/4 tests
"""

from __future__ import annotations

import pytest


def share(text: str) -> tuple[int, int]:
    which, number = (int(word) for word in text.split("/"))
    if not 0 <= which < number:
        raise ValueError
    return which, number


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=share, default=(0, 1), metavar="K/N", help="test K, K+N, K+2N, ...")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which, number = config.getoption("--share")
    others = [item for place, item in enumerate(items) if place % number != which]
    items[:] = items[which::number]
    if others:
        config.hook.pytest_deselected(items=others)
