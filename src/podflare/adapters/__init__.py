"""Import paths under which adapters were promised elsewhere; the adapters are in podflare.integrations."""
