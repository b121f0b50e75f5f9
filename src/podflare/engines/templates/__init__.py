"""Templates other than `default`: what one is (definition), how it is made (build), where it is kept (store)."""
