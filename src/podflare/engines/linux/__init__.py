"""Host kernel powers that both engines use."""
