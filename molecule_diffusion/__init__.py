"""The rooms behind `helpers.py`, one file a subject; each imports only from those above it. `helpers` has the map."""
