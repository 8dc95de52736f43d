"""Draft modules behind one protocol."""
