"""Heads against one another: likelihood and samples on three data sets and three paths."""
