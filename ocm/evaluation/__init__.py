"""Scores of covariances and samples, and the tables and pictures that show them."""
