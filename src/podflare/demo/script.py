"""What the scripted model says next, made from the tool results so far.  Pure.

Each turn reads the numbers it needs out of the result before it; what it cannot read, it says and stops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from podflare.demo.task import ORDERS_PATH, SUMMARY_PATH


@dataclass(frozen=True)
class Call:
    """The result of one tool call, as the agent reported it."""

    text: str
    failed: bool


@dataclass(frozen=True)
class Turn:
    """The model's words and the program that it wants to have run; no program ends the conversation."""

    says: str
    code: str = ""


class _Unreadable(Exception):
    """A result does not hold what the turn needs."""


def next_turn(results: Sequence[Call]) -> Turn:
    """The turn that follows `results`."""
    turns = (_look, _sum_up, _clean, _aggregate, _write, _answer)
    try:
        return turns[min(len(results), len(turns) - 1)](results)
    except _Unreadable as error:
        return Turn(f"I cannot answer the question: {error}")


def _look(results: Sequence[Call]) -> Turn:
    return Turn(
        "I start with a look at the file.",
        f"""\
import csv

with open({ORDERS_PATH!r}, newline="") as file:
    rows = list(csv.DictReader(file))
print("rows:", len(rows))
print("columns:", ", ".join(rows[0]))
print("first:", rows[0])
""",
    )


def _sum_up(results: Sequence[Call]) -> Turn:
    rows = _find(r"^rows: (\d+)$", results[0], "the number of rows")[0]
    return Turn(
        f"{rows} rows. Revenue is quantity times price, so I need the prices as numbers.",
        """\
for row in rows:
    row["price"] = float(row["unit_price"])
print("prices:", len(rows))
""",
    )


def _clean(results: Sequence[Call]) -> Turn:
    if not results[1].failed:
        raise _Unreadable("every price was a number at once, and this file is known to have others")
    culprit = _find(r"could not convert string to float: '([^'\n]*)'", results[1], "which price is no number")[0]
    shape = re.fullmatch(r"\d+([.,])\d+\s*([A-Za-z]+)", culprit)
    if shape is None:
        raise _Unreadable(f"I do not know how to read {culprit!r} as a price")
    mark, unit = shape.groups()
    return Turn(
        f"My program stumbled over the price {culprit!r}: some are written with {mark!r} and {unit}. The rows are "
        "still loaded, so I go on from there, read such prices too, and drop what I was told to drop.",
        f"""\
def price(text):
    return float(text.replace({unit!r}, "").replace({mark!r}, ".").strip())

orders, seen, repeated, empty = [], set(), 0, 0
for row in rows:
    if row["order_id"] in seen:
        repeated += 1
    elif not row["quantity"].strip():
        empty += 1
    else:
        orders.append({{**row, "revenue": round(int(row["quantity"]) * price(row["unit_price"]), 2)}})
    seen.add(row["order_id"])
print(f"kept: {{len(orders)}}, repeated: {{repeated}}, without quantity: {{empty}}")
""",
    )


def _aggregate(results: Sequence[Call]) -> Turn:
    kept, repeated, empty = _find(r"^kept: (\d+), repeated: (\d+), without quantity: (\d+)$", results[2], "the counts")
    return Turn(
        f"{kept} orders are left; {repeated} were repeated and {empty} had no quantity. Now the sums.",
        """\
import json
from collections import defaultdict

by_region, by_month = defaultdict(float), defaultdict(float)
for order in orders:
    by_region[order["region"]] += order["revenue"]
    by_month[order["date"][:7]] += order["revenue"]
sums = {"regions": by_region, "months": by_month}
print(json.dumps({name: {k: round(v, 2) for k, v in values.items()} for name, values in sums.items()}, sort_keys=True))
""",
    )


def _write(results: Sequence[Call]) -> Turn:
    summary = _summary(results[3])
    top, second, _ = _ranking(results[3])
    return Turn(
        "I write the summary down, and let the sandbox check it against the sums it still holds.",
        f"""\
ranked = sorted(by_region, key=by_region.get, reverse=True)
assert ranked[:2] == {[top, second]!r}, f"the sums say {{ranked}}"
with open({SUMMARY_PATH!r}, "w") as file:
    file.write({summary + chr(10)!r})
print("written:", {SUMMARY_PATH!r})
""",
    )


def _answer(results: Sequence[Call]) -> Turn:
    _find(rf"^written: {re.escape(SUMMARY_PATH)}$", results[4], "that the summary was written")
    return Turn(_summary(results[3]))


def _summary(sums: Call) -> str:
    top, second, (first_sum, second_sum, month, month_sum) = _ranking(sums)
    return (
        f"{top} earned the most: {first_sum:,.2f} EUR, {first_sum - second_sum:,.2f} EUR ahead of {second}. "
        f"The best month over all regions was {month} with {month_sum:,.2f} EUR."
    )


def _ranking(sums: Call) -> tuple[str, str, tuple[float, float, str, float]]:
    line = _find(r"^(\{.*\})$", sums, "the sums")[0]
    try:
        found = json.loads(line)
        regions = sorted(found["regions"].items(), key=lambda item: -item[1])
        months = sorted(found["months"].items(), key=lambda item: -item[1])
        (top, first_sum), (second, second_sum) = regions[:2]
        month, month_sum = months[0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _Unreadable(f"the sums are not what I asked for: {line[:200]}") from error
    return top, second, (first_sum, second_sum, month, month_sum)


def _find(pattern: str, result: Call, what: str) -> tuple[str, ...]:
    """The groups of the first match of `pattern` in the result.  Raises: _Unreadable, which says what was missing."""
    match = re.search(pattern, result.text, re.MULTILINE)
    if match is None:
        shown = " ".join(result.text.split())[-300:] or "nothing"
        raise _Unreadable(f"the sandbox did not tell {what}. Its last answer was: {shown}")
    return match.groups()
