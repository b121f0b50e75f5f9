"""The data set and the question.  Pure and deterministic: the same bytes and the same right answer everywhere."""

from __future__ import annotations

import random

ORDERS_PATH = "/root/orders.csv"
SUMMARY_PATH = "/root/summary.md"
QUESTION = f"""\
The file {ORDERS_PATH} in your sandbox holds the orders of a small shop. It was put together by hand, so expect \
mistakes in it. Drop repeated orders (same order_id) and orders without a quantity, then tell me which region earned \
the most, by how much it leads the second, and which month was the best one over all regions. Before you answer, \
write the same as a short summary to {SUMMARY_PATH}. Work in small steps; variables stay between your calls."""

_COLUMNS = "order_id,date,region,product,quantity,unit_price"
_REGIONS = ("North", "East", "South", "West")
_PRODUCTS = (("lamp", 2490), ("chair", 7900), ("table", 24900), ("shelf", 5450), ("rug", 11990))
_ORDERS = 600
_SEED = 20240229


def orders_csv() -> str:
    """The data set: 600 orders of which some have no quantity or a price in another notation, some appear twice."""
    draw = random.Random(_SEED).random  # the one generator method whose sequence Python promises to keep

    def below(count: int) -> int:
        return int(draw() * count)

    lines: list[str] = []
    for number in range(1, _ORDERS + 1):
        product, cents = _PRODUCTS[below(len(_PRODUCTS))]
        cents += 10 * below(200)
        price = f"{cents // 100},{cents % 100:02d} EUR" if below(24) == 0 else f"{cents // 100}.{cents % 100:02d}"
        quantity = "" if below(50) == 0 else str(1 + below(9))
        date = f"2024-{1 + below(12):02d}-{1 + below(28):02d}"
        region = _REGIONS[below(len(_REGIONS))]
        lines.append(f'A{number:04d},{date},{region},{product},{quantity},"{price}"')
        if below(40) == 0:
            lines.append(lines[-1])
    return "\n".join([_COLUMNS, *lines]) + "\n"
