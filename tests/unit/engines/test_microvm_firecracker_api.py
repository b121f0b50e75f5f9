"""Promise: every order to Firecracker is one that its published API knows, from the oldest supported version on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podflare.engines.microvm import firecracker_orders as orders
from podflare.engines.microvm.firecracker_orders import Order
from podflare.engines.microvm.vmm import DiskRate, Shape

BUCKET = {"size!": int, "refill_time!": int, "one_time_burst": int}
LIMITER = {"bandwidth": BUCKET, "ops": BUCKET}
API: Mapping[str, Mapping[str, Any]] = {
    "PUT /machine-config": {"vcpu_count!": range(1, 33), "mem_size_mib!": int, "track_dirty_pages": bool, "smt": bool},
    "PUT /boot-source": {"kernel_image_path!": str, "initrd_path": str, "boot_args": str},
    "PUT /drives/*": {
        "drive_id!": str,
        "is_root_device!": bool,
        "is_read_only": bool,
        "path_on_host": str,
        "cache_type": ("Unsafe", "Writeback"),
        "io_engine": ("Sync", "Async"),
        "rate_limiter": LIMITER,
    },
    "PATCH /drives/*": {"drive_id!": str, "path_on_host": str, "rate_limiter": LIMITER},
    "PUT /network-interfaces/*": {
        "iface_id!": str,
        "host_dev_name!": str,
        "guest_mac": str,
        "rx_rate_limiter": LIMITER,
        "tx_rate_limiter": LIMITER,
    },
    "PUT /vsock": {"guest_cid!": range(3, 2**32), "uds_path!": str, "vsock_id": str},
    "PUT /entropy": {"rate_limiter": LIMITER},
    "PUT /actions": {"action_type!": ("FlushMetrics", "InstanceStart", "SendCtrlAltDel")},
    "PATCH /vm": {"state!": ("Paused", "Resumed")},
    "PUT /snapshot/create": {"mem_file_path!": str, "snapshot_path!": str, "snapshot_type": ("Full", "Diff")},
    "PUT /snapshot/load": {
        "snapshot_path!": str,
        "mem_backend": {"backend_type!": ("File", "Uffd"), "backend_path!": str},
        "enable_diff_snapshots": bool,
        "resume_vm": bool,
    },
}
"""Of each request that is used, the properties that every supported version knows, their types or values; !: required.
Written from the document that is published with Firecracker's sources (firecracker.yaml)."""


def faults(body: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What the API would not take."""
    types = {name.rstrip("!"): wanted for name, wanted in known.items()}
    found = [f"{name[:-1]} is missing" for name in known if name.endswith("!") and name[:-1] not in body]
    for name, value in body.items():
        wanted = types.get(name)
        if wanted is None:
            found.append(f"{name} is unknown")
        elif isinstance(wanted, Mapping):
            found += faults(value, wanted) if isinstance(value, Mapping) else [f"{name} is no object"]
        elif isinstance(wanted, type):
            found += [] if type(value) is wanted else [f"{name} is {value!r}"]
        elif value not in wanted:
            found.append(f"{name} is {value!r}")
    return found


def of_path(order: Order) -> str:
    first, *rest = order.path.lstrip("/").split("/")
    named = first in ("drives", "network-interfaces")
    return f"{order.method} /{'/'.join([first, '*'] if named else [first, *rest])}"


def test_all_orders_are_in_the_api() -> None:
    """Each order has the properties that are required, and none that are unknown or of another type."""
    rates = (DiskRate(), DiskRate(5 << 20), DiskRate(5 << 20, 100), DiskRate(operations_per_s=1))
    given = [*orders.boot_orders(Shape(1 << 30, 64), "quiet"), *map(orders.rate_order, rates)]
    given += orders.boot_orders(Shape(1 << 30, 1, network=True), "quiet")
    given += [orders.load_order(), orders.save_order()]
    given += [orders.state_order("Paused"), orders.state_order("Resumed")]
    for order in given:
        assert faults(order.body, API[of_path(order)]) == [], order
    assert {of_path(order) for order in given} == set(API)


def test_the_table_refuses() -> None:
    """The look at an order finds what is missing, unknown, or of another type, also further inside."""
    wrong = {"vcpu_count": 33, "mem_size_mib": True, "colour": "red"}
    assert len(faults(wrong, API["PUT /machine-config"])) == 3
    assert faults({}, API["PUT /vsock"]) == ["guest_cid is missing", "uds_path is missing"]
    inside = {"drive_id": "a", "rate_limiter": {"ops": {"size": "5"}}}
    assert faults(inside, API["PATCH /drives/*"]) == ["refill_time is missing", "size is '5'"]
