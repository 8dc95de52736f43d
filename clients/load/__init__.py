"""`python -m clients load`: an open-loop load generator for operators."""
