"""Tiers of keys, the caps that they set, and when a life ends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podflare.errors import BadRequest
from podflare.host import lifetimes
from podflare.host.auth import Keyring, digest
from podflare.host.config import Config
from podflare.host.lineage import Terms
from podflare.host.tiers import DEFAULT, PUBLISHED, Tier, read_keys, read_tiers
from podflare.wire.api import CreateRequest, LifetimesRequest

CAPS = ("timeout_seconds", "idle_timeout_seconds", "ram_mib", "rootfs_gb", "sandboxes")


def test_published_caps_are_the_hosted_services():
    """free, pro and scale cap as that service does; what names no tier is not capped."""
    caps = {name: tuple(getattr(tier, cap) for cap in CAPS[:4]) for name, tier in PUBLISHED.items()}
    assert caps == {
        DEFAULT: (None, None, None, None),
        "free": (1800, 300, 1024, 4),
        "pro": (28800, 1800, 4096, 16),
        "scale": (86400, 7200, 16384, 64),
    }


@given(st.builds(CreateRequest, timeout_seconds=st.none() | st.integers(1, 10**6), ram_mib=st.integers(64, 10**6)))
def test_nothing_granted_is_above_a_cap(asked):
    """Whatever is asked for, no grant passes its cap, what is below stays, and each cut is told by name."""
    tier = PUBLISHED["free"]
    granted, notes = tier.grant(asked, asked)
    assert granted.timeout_seconds is not None and granted.timeout_seconds <= 1800
    assert granted.ram_mib == min(asked.ram_mib, 1024)
    assert [note.partition("=")[0] for note in notes] == [
        name for name, most in (("timeout_seconds", 1800), ("ram_mib", 1024)) if (getattr(asked, name) or 0) > most
    ]


def test_defaults_are_capped_silently():
    """A default of the daemon above the cap is cut, too, and that is no warning: nobody asked for it."""
    resolved = CreateRequest(timeout_seconds=86400, idle_timeout_seconds=None, ram_mib=4096, rootfs_gb=4)
    granted, notes = PUBLISHED["free"].grant(CreateRequest(), resolved)
    assert (granted.timeout_seconds, granted.idle_timeout_seconds, granted.ram_mib) == (1800, 300, 1024)
    assert notes == ()


def test_keys_name_tiers():
    """KEY@TIER puts a key into a tier; the tier is no part of the key; tiers can be changed and added."""
    config = Config.from_environment(
        {
            "PODFLARE_API_KEYS": "plain, one@free, two@lab",
            "PODFLARE_TIERS": '{"free": {"sandboxes": 3, "ram_mib": null}, "lab": {"timeout_seconds": 60}}',
        }
    )
    keys = Keyring(config.key_digests)
    assert config.key_digests == (digest("plain"), digest("one"), digest("two"))
    of = {key: config.tier_of(keys.owner(f"Bearer {key}")) for key in ("plain", "one", "two")}
    assert of["plain"] == Tier(DEFAULT)
    assert of["one"] == Tier("free", 1800, 300, None, 4, sandboxes=3, snapshots=5, snapshots_gb=5)
    assert of["two"] == Tier("lab", timeout_seconds=60)


@pytest.mark.parametrize("text", ["s3cret@fre", "ok, s3cret@", "@free", "s3cret@free@x"])
def test_an_unknown_tier_is_refused_without_telling_the_key(text):
    """A misspelt tier keeps the daemon from starting, and the message holds nothing of the key."""
    with pytest.raises(BadRequest, match="PODFLARE_API_KEYS") as caught:
        read_keys(text, PUBLISHED, "PODFLARE_API_KEYS")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["x", "[]", '{"a": 1}', '{"": {}}', '{"a": {"speed": 1}}', '{"a": {"ram_mib": 0}}', '{"a": {"ram_mib": true}}',
     '{"a": {"timeout_seconds": "1"}}', "[" * 100_000],
)  # fmt: skip
def test_wrong_tiers_are_refused(text):
    """PODFLARE_TIERS is an object of known caps."""
    with pytest.raises(BadRequest, match="PODFLARE_TIERS"):
        Config.from_environment({"PODFLARE_TIERS": text})


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.dictionaries(st.sampled_from(CAPS), st.integers(1, 4096))))
def test_any_tiers_are_read_back(tiers):
    """What is configured is what holds, for any names and caps."""
    found = read_tiers(json.dumps(tiers), "PODFLARE_TIERS")
    for name, caps in tiers.items():
        assert all(getattr(found[name], cap) == value for cap, value in caps.items())


def test_extending_cannot_pass_the_cap():
    """A life can be extended to its tier's cap and no further, however often; the cut is told once."""
    terms, tier = Terms("default", 1024, 4, 600, 300, {}), PUBLISHED["free"]
    for age in (100.0, 1000.0, 1700.5):
        terms = lifetimes.changed(terms, LifetimesRequest(timeout_seconds=86400), tier, age_s=age)
        assert terms.timeout_seconds == 1800
        assert len(terms.warnings) == 1 and "tier free" in terms.warnings[0]
    terms = lifetimes.changed(terms, LifetimesRequest(timeout_seconds=5, idle_timeout_seconds=301), tier, age_s=10.2)
    assert (terms.timeout_seconds, terms.idle_timeout_seconds) == (16, 300)
    assert [note.partition("=")[0] for note in terms.warnings] == ["idle_timeout_seconds"]


def test_the_nearer_end_counts():
    """Of two lifetimes the nearer one ends a sandbox, and says so."""
    terms = Terms("default", 1024, 4, 60, 50, {})
    assert lifetimes.left(terms, age_s=15, idle_s=0).due(terms) == (
        45,
        "its lifetime of 60 s was over (timeout_seconds)",
    )
    due = lifetimes.left(terms, age_s=15, idle_s=15).due(terms)
    assert due == (35, "it was idle for 50 s (idle_timeout_seconds)")
    endless = Terms("default", 1024, 4, None, None, {})
    assert lifetimes.left(endless, age_s=1e9, idle_s=1e9).due(endless) is None


def test_a_warning_comes_a_minute_before_or_in_the_last_fifth():
    """Long lives are warned of a minute before their end, short ones not before four fifths of them."""
    assert [lifetimes.lead_s(life) for life in (5, 60, 300, 86400)] == [1, 12, 60, 60]
